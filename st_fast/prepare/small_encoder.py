"""A small image encoder trained on the images at hand, so that REPA runs where no published encoder can be had.

It is a DINOv2 of under a million parameters that learns to name an image's class from the mean of its patch tokens.
Unlike a published DINOv2 it has seen labels. Its training is not counted as cost, as a published encoder's never is.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from st_fast.core.errors import UserError
from st_fast.core.files import write_folder, write_json_atomic
from st_fast.core.machine import rank_count
from st_fast.core.progress import bar
from st_fast.core.writing import save_pretrained
from st_fast.data.ahead import RecordSet
from st_fast.data.features import SMALL_ENCODER
from st_fast.evaluate.classifier import read_images
from st_fast.model.encoders import input_side, preprocess, quiet_transformers
from st_fast.prepare.features import RecordImages
from st_fast.prepare.vaes import TRAINING_BYTES, compute

TRAINED_FILE = "trained_with.json"
"""In a small encoder's folder: how many images it was trained on, and how many held-out ones it names."""
SEED = 0
REPORT = 20
"""Steps between two readings of the loss that the progress bar shows."""
AT_ONCE = 256
"""Images that are read or classified at the same time."""


@dataclass(frozen=True)
class SmallEncoder:
    """Architecture and training of a small encoder; `patch` is in pixels of what it sees (`input_side`)."""

    patch: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    epochs: int = 5
    batch_size: int = 128
    peak_lr: float = 2e-3
    weight_decay: float = 0.05
    one_cycle: bool = True
    """The learning rate rises over the first tenth (a step at least) and falls to zero; else it stays at `peak_lr`."""
    flip: bool = False
    """Whether half of the images are mirrored whenever they are seen."""


class Trained(NamedTuple):
    """A DINOv2 of transformers, and the linear layer that names classes from the mean of its patch tokens."""

    encoder: Any
    head: nn.Linear


def train_encoder(images: Tensor, labels: Tensor, config: SmallEncoder, device: torch.device | str = "cpu") -> Trained:
    """Trains one on uint8 images (n, 1 or 3, S, S) and their classes (n,) int64.

    The same images and thread count give the same weights on a CPU. The global random state stays as it was.
    """
    transformers = quiet_transformers(SMALL_ENCODER)
    side = input_side(images.shape[-1], config.patch)
    sizes = transformers.Dinov2Config(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads, mlp_ratio=4,
        image_size=side, patch_size=config.patch, layerscale_value=1.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = transformers.Dinov2Model(sizes)
        torch.manual_seed(SEED)
        head = nn.Linear(config.width, int(labels.max()) + 1)
    trained = Trained(encoder.to(device).train(), head.to(device))
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *head.parameters()], lr=config.peak_lr, weight_decay=config.weight_decay
    )
    steps = config.epochs * -(-len(images) // config.batch_size)
    schedule = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, config.peak_lr, total_steps=steps, pct_start=max(0.1, 2 / steps))
        if config.one_cycle
        else None
    )
    generator = torch.Generator().manual_seed(SEED)
    with bar(None, "training a small encoder", steps, "step") as progress:
        for _ in range(config.epochs):
            for rows in torch.randperm(len(images), generator=generator).split(config.batch_size):
                pixels = preprocess(images[rows].to(device), side)
                if config.flip:
                    mirrored = (torch.rand(len(rows), generator=generator) < 0.5).to(device)
                    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
                loss = F.cross_entropy(_logits(trained, pixels), labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if schedule is not None:
                    schedule.step()
                if progress.n % REPORT == 0:
                    progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                progress.update()
    encoder.eval()
    return trained


def _logits(trained: Trained, pixels: Tensor) -> Tensor:
    """Pixels (n, 3, side, side), normalised → (n, classes)."""
    tokens: Tensor = trained.encoder(pixel_values=pixels).last_hidden_state[:, 1:]
    logits: Tensor = trained.head(tokens.mean(1))
    return logits


@torch.no_grad()
def accuracy(trained: Trained, images: Tensor, labels: Tensor) -> float:
    """The share of uint8 images (n, 1 or 3, S, S) whose class (n,) is named."""
    side, device = trained.encoder.config.image_size, trained.head.weight.device
    parts = zip(images.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    right = [_logits(trained, preprocess(part.to(device), side)).argmax(1).cpu() == named for part, named in parts]
    return float(torch.cat(right).float().mean())


def the_small_encoder(args: argparse.Namespace, out: Path, records: RecordSet, images: RecordImages) -> Path:
    """The folder of OUT's small encoder, trained first where there is none.

    It learns from the images that the latents were made from, without those that `images.safetensors` holds out, on
    which it is tested. Its patches are as many as the tokens of a model with patch 2, or 1 where a side is odd.
    """
    folder = out / SMALL_ENCODER
    if folder.is_dir():
        return folder
    if rank_count() > 1:
        raise UserError("--features small: it has to be trained first, by one process: run this without torchrun once")
    if records.manifest.num_classes < 2:
        raise UserError(f"--features small: {out} has one class; the encoder learns to tell classes apart")
    real = read_images(out)
    pixels, labels = training_images(images, records, real.test)
    tokens = records.manifest.shape[-1]
    config = SmallEncoder(patch=pixels.shape[-1] // (tokens if tokens % 2 else tokens // 2), flip=records.manifest.flip)
    trained = train_encoder(pixels, labels, config, compute(args)[0])
    share = accuracy(trained, real.test, real.test_labels)
    tqdm.write(
        f"{folder}: trained on {len(pixels):,} images; names {share:.1%} of {len(real.test):,} held-out ones "
        f"({trained.head.out_features} classes)"
    )
    with write_folder(folder) as writing:
        save_pretrained(trained.encoder, writing)
        told = {"images": len(pixels), "held_out": len(real.test), "accuracy": share}
        write_json_atomic(writing / TRAINED_FILE, told)
    return folder


def training_images(images: RecordImages, records: RecordSet, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Evenly spaced records' images, uint8 (n, C, S, S), TRAINING_BYTES at most, and their classes (n,).

    Mirrored ones are left out, and so is every image that is among `held_out` (m, C, S, S).
    """
    shape = images.manifest.shape
    if held_out.shape[1:] != shape:
        raise UserError(
            f"--features small: images.safetensors holds images of {'×'.join(map(str, held_out.shape[1:]))}, the "
            f"latents' are of {'×'.join(map(str, shape))}; remove it and write it anew with st-fast real-images"
        )
    views = 2 if records.manifest.flip else 1
    step = views * -(-len(records) // views * int(np.prod(shape)) // TRAINING_BYTES)
    numbers = np.arange(0, len(records), step)
    pixels = np.empty((len(numbers), *shape), np.uint8)
    with bar(None, "reading images", len(numbers), "image") as progress:
        for start in range(0, len(numbers), AT_ONCE):
            part = numbers[start : start + AT_ONCE]
            images.read_into(part, pixels[start : start + len(part)])
            progress.update(len(part))
    unseen = {image.tobytes() for image in held_out.numpy()}
    kept = np.array([image.tobytes() not in unseen for image in pixels])
    if not kept.any():
        raise UserError("--features small: images.safetensors holds out every image that the latents were made from")
    labels = torch.from_numpy(np.asarray(records.labels)[numbers[kept]]).long()
    return torch.from_numpy(pixels[kept]), labels
