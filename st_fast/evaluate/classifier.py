"""A small classifier, trained on a data set's real images, that scores samples where no Inception weights can be had.

Its accuracy on held-out real images stands beside every score, which can be no better than the classifier. Reads
`images.safetensors` of a data folder: "train" and "test" uint8 (n, H, W) or (n, 1|3, H, W), "train_labels" and
"test_labels" integers (n,). Its weights are kept in `classifier/` there, with a manifest of hashes and its accuracy.
"""

import itertools
import os
import shlex
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from st_fast.core.errors import Say, UserError
from st_fast.core.files import read_bytes, read_header, read_json, write_folder, write_json_atomic
from st_fast.core.machine import naming_lack_of_memory
from st_fast.data.buckets import has_buckets
from st_fast.evaluate.metrics import GaussianStats, frechet, precision_recall

FORMAT = "st_fast.judge/1"
SEED, EPOCHS, BATCH, FEATURES = 20260107, 16, 64, 64


@dataclass(frozen=True)
class RealImages:
    """The real images that the classifier is trained and tested on; uint8 (n, C, H, W), labels int64 (n,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    digest: str

    @property
    def num_classes(self) -> int:
        """Classes 0..max of the training labels."""
        return int(self.train_labels.max()) + 1


def how_to_write_images(data_folder: Path) -> str:
    """The command that a message on missing `images.safetensors` names; that of several shapes there are none."""
    if has_buckets(data_folder):
        return "its latents are of several shapes, for which there are none"
    return f"st-fast real-images SOURCE {shlex.quote(str(data_folder))} writes it from the real images"


def read_images(data_folder: Path) -> RealImages:
    """Reads and checks `images.safetensors`; UserError names the file, tensor and shape where something is wrong."""
    path = data_folder / "images.safetensors"
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; {how_to_write_images(data_folder)}")
    raw = read_bytes(path)
    try:
        tensors = load(raw)
    except SafetensorError as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    for name in ("train", "train_labels", "test", "test_labels"):
        if name not in tensors:
            raise UserError(f"{path}: no tensor {name!r}; it holds {', '.join(sorted(tensors)) or 'none'}")

    def checked(split: str) -> tuple[Tensor, Tensor]:
        images, labels = as_batch(tensors[split], f"{path}: {split!r}"), tensors[f"{split}_labels"].long()
        if labels.shape != (len(images),) or len(images) == 0 or int(labels.min()) < 0:
            given = f"'{split}_labels' has shape {tuple(labels.shape)} for {len(images)} images"
            raise UserError(f"{path}: {given}; one label ≥ 0 an image, and at least one, is needed")
        return images, labels

    return RealImages(*checked("train"), *checked("test"), sha256(raw).hexdigest())


def as_batch(images: Tensor | NDArray[np.uint8], name: str = "images") -> Tensor:
    """uint8 images (n, H, W) or (n, 1|3, H, W) as a tensor (n, C, H, W); UserError for any other dtype or shape."""
    batch = torch.as_tensor(images)
    if batch.ndim == 3:
        batch = batch[:, None]
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] not in (1, 3):
        raise UserError(f"{name}: {batch.dtype} of shape {tuple(batch.shape)}; uint8 (n, 1 or 3, H, W) is needed")
    return batch


class ConvNet(nn.Module):
    """Three convolutions of stride 2, global average pooling (the features), one linear layer."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        widths = (channels, 16, 32, FEATURES)
        blocks = (
            nn.Sequential(nn.Conv2d(a, b, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Pixels in [−1, 1] (B, C, H, W) → features (B, FEATURES), the input of the last layer."""
        return cast(Tensor, self.blocks(x)).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels in [−1, 1] (B, C, H, W) → logits (B, classes)."""
        return cast(Tensor, self.head(self.features(x)))


class Classifier:
    """A trained network with its accuracy on held-out real images and its SHA-256."""

    def __init__(self, model: ConvNet, size: tuple[int, int], accuracy: float, digest: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size, self.accuracy, self.digest = size, accuracy, digest
        self.num_classes = model.head.out_features
        self.channels = next(model.parameters()).shape[1]

    @torch.no_grad()
    def features(self, images: Tensor | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (n, FEATURES) of uint8 images (n, 1|3, H, W), whatever their size; UserError without any."""
        batch = as_batch(images)
        if not len(batch):
            raise UserError("images: none given; there is nothing to score")
        parts = [self.model.features(self._pixels(part)) for part in torch.split(batch, 512)]
        return torch.cat(parts).numpy()

    def predict(self, images: Tensor | NDArray[np.uint8]) -> NDArray[np.int64]:
        """The most probable class (n,) of each uint8 image (n, 1|3, H, W)."""
        return cast(Tensor, self.model.head(torch.from_numpy(self.features(images)))).argmax(dim=1).numpy()

    def _pixels(self, images: Tensor) -> Tensor:
        """uint8 (B, 1|3, H, W) → float in [−1, 1] with the classifier's channels and size."""
        pixels = images.cpu().float() / 127.5 - 1
        if pixels.shape[1] != self.channels:
            pixels = pixels.mean(dim=1, keepdim=True).expand(-1, self.channels, -1, -1)
        if pixels.shape[-2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True, align_corners=False)
        return pixels


@dataclass(frozen=True)
class Reference:
    """The real training images in the classifier's features.

    `floors` are the scores of real held-out images against them, which samples of a perfect generator would have.
    """

    features: NDArray[np.float32]
    stats: GaussianStats
    floors: dict[str, float]


def distances(reference: NDArray[np.float32], stats: GaussianStats, features: NDArray[np.float32]) -> dict[str, float]:
    """Every metric that compares features (n, F) with a reference's (m, F) and their statistics, by its key."""
    precision, recall = precision_recall(reference, features)
    return {"frechet": frechet(GaussianStats.of(features), stats), "precision": precision, "recall": recall}


def make_reference(classifier: Classifier, train: Tensor, test: Tensor) -> Reference:
    """Reference from real uint8 images (n, 1|3, H, W); UserError with fewer held-out images than features."""
    features = classifier.features(train)
    stats = GaussianStats.of(features)
    found = distances(features, stats, classifier.features(test)) | {"num": len(test)}
    return Reference(features, stats, {f"floor_{key}": value for key, value in found.items()})


def classifier_metrics(
    classifier: Classifier, images: Tensor | NDArray[np.uint8], labels: Tensor | NDArray[np.int64], reference: Reference
) -> dict[str, object]:
    """Scores conditional samples: uint8 images (n, 1|3, H, W) drawn for integer labels (n,).

    Returns `accuracy` (share classified as their label), `accuracy_per_class` (None where no sample has that label),
    `distances` with their floors, and the classifier's own accuracy and digest. The Fréchet distance is not FID: the
    features are not Inception's. UserError where labels don't fit the images, or samples are too few for a covariance.
    """
    batch, asked = as_batch(images), np.asarray(labels)
    if asked.shape != (len(batch),) or not np.issubdtype(asked.dtype, np.integer):
        raise UserError(f"labels: {asked.dtype} of shape {asked.shape} for {len(batch)} images; one integer an image")
    if len(asked) and not (asked.min() >= 0 and asked.max() < classifier.num_classes):
        raise UserError(f"labels: {asked.min()}..{asked.max()}; the classifier knows 0..{classifier.num_classes - 1}")
    found = distances(reference.features, reference.stats, classifier.features(batch))
    correct = classifier.predict(batch) == asked
    per_class = [correct[asked == label] for label in range(classifier.num_classes)]
    return {
        "num": len(batch), "accuracy": float(correct.mean()),
        "accuracy_per_class": [float(share.mean()) if len(share) else None for share in per_class],
        "classifier_accuracy": classifier.accuracy, "classifier_digest": classifier.digest,
        **found, **reference.floors,
    }  # fmt: skip


def check_count(count: int, given: str) -> None:
    """UserError, naming what was `given`, where a covariance of `count` images' features would be singular."""
    if count <= FEATURES:
        raise UserError(f"{given}: the classifier's {FEATURES} features need at least {FEATURES + 1} images")


def check_real_images(data_folder: Path) -> None:
    """UserError where a split of `images.safetensors` is too small for a covariance; reads the header only."""
    path = data_folder / "images.safetensors"
    held = read_header(path) if path.is_file() else {}
    for split in ("train", "test"):
        if split in held and len(shape := held[split].shape) > 0:  # what else is wrong, reading says
            try:
                check_count(shape[0], f"{path}: {shape[0]} images in {split!r}")
            except UserError as error:
                raise UserError(f"{error}; with more images, {how_to_write_images(data_folder)}") from None


def load_classifier(data_folder: Path, say: Say) -> tuple[Classifier, Reference]:
    """The classifier of a data folder (trained on first use) and the reference it compares with.

    UserError, before it is trained, where the images are too few to compare with.
    """
    check_real_images(data_folder)
    classifier, real = load_or_train(data_folder, say), read_images(data_folder)
    return classifier, make_reference(classifier, real.train, real.test)


def load_or_train(data_folder: Path, say: Say) -> Classifier:
    """The classifier kept in `data_folder`, or a new one, trained in well under a minute and kept there.

    A kept one whose hash is wrong, or that was trained on other images, is replaced; `say` is told why.
    """
    real, folder = read_images(data_folder), data_folder / "classifier"
    for kept in (folder, data_folder / "judge"):  # the second is an older name
        if kept.exists():
            try:
                return _load(kept, real)
            except UserError as error:
                say(f"{error}; training it again")
    with naming_lack_of_memory("training the classifier"):
        trained = train(real, say)
    return _keep(folder, trained, real, say)


def train(real: RealImages, say: Say) -> ConvNet:
    """Trains a classifier on `real.train`; the same images and thread count give the same weights."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = ConvNet(real.train.shape[1], real.num_classes)
    steps_per_epoch = -(-len(real.train) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.01, total_steps=EPOCHS * steps_per_epoch)
    pixels = real.train.float() / 127.5 - 1
    for epoch in range(EPOCHS):
        for index in torch.split(torch.randperm(len(pixels), generator=generator), BATCH):
            logits = model(_augmented(pixels[index], generator))
            loss = F.cross_entropy(logits, real.train_labels[index], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        if (epoch + 1) % 8 == 0:
            say(f"classifier: epoch {epoch + 1}/{EPOCHS}, loss {loss.item():.3f}")
    return model.eval()


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) turned by ≤ 8°, scaled by ≤ 8 % and shifted by ≤ 6 % of its size."""
    turn, scale, x, y = (torch.rand(4, len(pixels), generator=generator) * 2 - 1).unbind()
    cos, sin = (turn * 0.14).cos() * (1 + 0.08 * scale), (turn * 0.14).sin() * (1 + 0.08 * scale)
    rows = [torch.stack([cos, -sin, 0.12 * x], dim=1), torch.stack([sin, cos, 0.12 * y], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _keep(folder: Path, model: ConvNet, real: RealImages, say: Say) -> Classifier:
    """Tests the new classifier and writes it aside, then renames; says so where the folder can't be written."""
    raw = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    classifier = Classifier(model, (real.train.shape[-2], real.train.shape[-1]), 0.0, sha256(raw).hexdigest())
    classifier.accuracy = float((classifier.predict(real.test) == real.test_labels.numpy()).mean())
    say(f"classifier: accuracy {classifier.accuracy:.1%} on {len(real.test)} held-out real images")
    manifest = {
        "format": FORMAT, "images_sha256": real.digest, "model_sha256": classifier.digest,
        "accuracy": classifier.accuracy, "test_images": len(real.test), "num_classes": classifier.num_classes,
        "channels": classifier.channels, "size": list(classifier.size), "features": FEATURES, "seed": SEED,
        "epochs": EPOCHS,
    }  # fmt: skip
    try:
        with write_folder(folder, replace=True) as writing:
            (writing / "model.safetensors").write_bytes(raw)
            write_json_atomic(writing / "manifest.json", manifest)
    except OSError as error:
        say(f"classifier: can't be kept in {folder}: {error.strerror}; it will be trained again next time")
    return classifier


def _load(folder: Path, real: RealImages) -> Classifier:
    """The one in `folder`; UserError where a part is missing, damaged, of another format or for other images."""
    try:
        manifest = read_json(folder / "manifest.json")
        raw = read_bytes(folder / "model.safetensors")
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder}: classifier of format {manifest['format']!r}; this program reads {FORMAT!r}")
        if manifest["images_sha256"] != real.digest:
            raise UserError(f"{folder}: classifier of other images than those beside it")
        if sha256(raw).hexdigest() != manifest["model_sha256"]:
            raise UserError(f"{folder}/model.safetensors: its SHA-256 isn't the manifest's")
        model = ConvNet(int(manifest["channels"]), int(manifest["num_classes"]))
        model.load_state_dict(load(raw))
        height, width = manifest["size"]
        return Classifier(model, (int(height), int(width)), float(manifest["accuracy"]), manifest["model_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged classifier ({type(error).__name__})") from None
