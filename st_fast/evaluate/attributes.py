"""Scores samples drawn for captions of the emoji: does a picture show the skin tone, gender and role asked for?

A small classifier, a network for each, reads them. It is trained on the real training pictures of people and on what
the VAE makes of them, so it has seen neither the held-out combinations nor a sample; its accuracy on the real held-out
pictures stands beside every score. It is kept in `attribute_classifier/` of the data folder. Prompts of anything else
are scored by retrieval: is the picture that the prompt names among the real ones nearest to the sample? A sheet shows
samples beside the real picture nearest to each, so that one sees what is drawn and what is copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from st_fast.core.errors import Say, UserError, counted
from st_fast.core.files import BadFile, read_bytes, read_json, write_folder, write_json_atomic
from st_fast.core.machine import naming_lack_of_memory
from st_fast.data.ahead import mean_and_std
from st_fast.data.shards import open_data
from st_fast.data.text import read_captions
from st_fast.evaluate.classifier import as_batch, read_images
from st_fast.model.vae import decode, load_vae
from st_fast.sample.captioned import captioned_grid

FILE, FOLDER, HELD_OUT = "attributes.json", "attribute_classifier", "held_out"
FORMAT = "st_fast.attribute_classifier/1"
NAMES = ("tone", "gender", "role")
NONE, GENDERS = "none", ("woman", "man")
"""What is no person has role "none". The gender is read of women and men: a person drawn without may look like either.
"""
SEED, EPOCHS, BATCH, SIDE = 20261129, 60, 64, 32
IGNORED = -100
"""Of cross-entropy: a label that is not learnt from."""
NEAREST, THUMBNAIL = 5, 16
"""Real pictures that count as found; side of the pictures that are compared."""
SHOWN, COLUMNS = 40, 8
"""Samples of a sheet, and of its row."""


@dataclass(frozen=True)
class Pictures:
    """The real pictures of a data folder with captions: "train", then held out, numbered through.

    images uint8 (n, 3, S, S); attributes (tone, gender, role) and captions of each; `trained` says how many are of the
    training split, `digest` changes with pictures and attributes.
    """

    images: Tensor
    attributes: tuple[tuple[str, str, str], ...]
    captions: tuple[tuple[str, ...], ...]
    trained: int
    digest: str

    def is_person(self, number: int) -> bool:
        """Whether tone, gender and role of this picture are read."""
        return self.attributes[number][1] in GENDERS

    def of_prompts(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """(n,) the number of the picture that each prompt is a caption of; UserError for a prompt that is of none."""
        numbers = {caption: number for number, captions in enumerate(self.captions) for caption in captions}
        if unknown := [prompt for prompt in prompts if prompt not in numbers]:
            others = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
            raise UserError(
                f"prompt {unknown[0]!a}{others}: not a caption of the real pictures, nothing to compare with"
            )
        return np.array([numbers[prompt] for prompt in prompts], np.int64)


def read_pictures(data: Path) -> Pictures:
    """The pictures of `data`; `BadFile` where attributes.json or the captions are not of its pictures."""
    raw, real = read_json(data / FILE), read_images(data)
    captions = [*read_captions(data)[0], *read_captions(data / HELD_OUT)[0]]
    try:
        attributes = tuple((str(a), str(b), str(c)) for split in ("train", HELD_OUT) for a, b, c in raw[split])
    except (KeyError, TypeError, ValueError):
        raise BadFile(f"{data / FILE}: lists of (tone, gender, role) as 'train' and {HELD_OUT!r} are needed") from None
    images = torch.cat((real.train, real.test))
    counts = len(attributes), len(captions), len(images)
    if len(set(counts)) > 1:
        raise BadFile(f"{data / FILE}: attributes, captions and pictures are {counts}; one each a picture is needed")
    digest = sha256(repr((real.digest, attributes)).encode()).hexdigest()
    return Pictures(images, attributes, tuple(map(tuple, captions)), len(real.train), digest)


def check_pictures(data: Path) -> Pictures:
    """`read_pictures`; of other data than emoji, UserError that says what scores samples of any captions."""
    if not (data / FILE).is_file():
        raise UserError(
            f"{data / FILE}: missing, so these are no emoji, whose attributes can be read; FID scores samples of any "
            "captions: --inception FILE and --reference FILE"
        )
    return read_pictures(data)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class AttributeNet(nn.Module):
    """A network an attribute: five convolutions from 2 × 2 pixels on, and one linear layer that keeps positions.

    Nothing is shared: what tells a role must not tell the tone that it was mostly seen with.
    """

    def __init__(self, classes: Sequence[int]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            nn.Sequential(
                nn.PixelUnshuffle(2),
                _convolution(12, 24), _convolution(24, 24), _convolution(24, 48, stride=2), _convolution(48, 48),
                _convolution(48, 48, stride=2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(48 * (SIDE // 8) ** 2, count),
            )
            for count in classes
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Pixels in [−1, 1] (B, 3, SIDE, SIDE) → logits of tone, gender and role, (B, classes) each."""
        return tuple(cast(Tensor, network(x)) for network in self.networks)


class AttributeClassifier:
    """A trained network, the values that it knows, its accuracy on the real held-out pictures and its SHA-256."""

    def __init__(self, model: AttributeNet, values: dict[str, tuple[str, ...]], digest: str) -> None:
        self.model, self.values, self.digest = model.eval().requires_grad_(False), values, digest
        self.accuracy: dict[str, float] = {}

    @torch.no_grad()
    def read(self, images: Tensor | NDArray[np.uint8]) -> list[tuple[str, str, str]]:
        """(tone, gender, role) of each uint8 picture (n, 3, H, W), whatever its size."""
        pixels = torch.split(as_batch(images), 512)
        logits = [torch.cat(parts) for parts in zip(*(self.model(_pixels(part)) for part in pixels), strict=True)]
        tones, genders, roles = (
            [self.values[name][i] for i in one.argmax(1).tolist()] for name, one in zip(NAMES, logits, strict=True)
        )
        return list(zip(tones, genders, roles, strict=True))

    def score(self, images: Tensor | NDArray[np.uint8], wanted: Sequence[tuple[str, str, str]]) -> dict[str, float]:
        """The share of pictures whose tone, gender, role and "all" three are those wanted; {} without pictures."""
        if not wanted:
            return {}
        right = np.array([np.equal(*pair) for pair in zip(np.array(self.read(images)), np.array(wanted), strict=True)])
        return dict(zip((*NAMES, "all"), (*right.mean(0).tolist(), float(right.all(1).mean())), strict=True))


def _pixels(images: Tensor, side: int = SIDE) -> Tensor:
    """uint8 (B, 3, H, W) → float in [−1, 1], side × side, channels last."""
    pixels = images.cpu().float() / 127.5 - 1
    if pixels.shape[-2:] != (side, side):
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return pixels.contiguous(memory_format=torch.channels_last)


def load_attribute_classifier(data: Path, say: Say) -> AttributeClassifier:
    """The classifier kept in `data`, or a new one, trained in about a minute and kept there.

    A kept one whose hash is wrong, or that was trained on other pictures, is replaced; `say` is told why.
    """
    pictures, folder = read_pictures(data), data / FOLDER
    if folder.exists():
        try:
            return _load(folder, pictures)
        except UserError as error:
            say(f"{error}; training it again")
    with naming_lack_of_memory("training the attributes' classifier"):
        model, values = train(data, pictures, say)
    raw = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    found = AttributeClassifier(model, values, sha256(raw).hexdigest())
    held = [i for i in range(pictures.trained, len(pictures.images)) if pictures.is_person(i)]
    found.accuracy = found.score(pictures.images[held], [pictures.attributes[i] for i in held])
    shown = ", ".join(f"{name} {share:.1%}" for name, share in found.accuracy.items())
    say(f"attributes' classifier: on {counted(len(held), 'real held-out picture')} {shown}")
    manifest = {
        "format": FORMAT, "pictures": pictures.digest, "model_sha256": found.digest, "accuracy": found.accuracy,
        "held_out_pictures": len(held), "values": values, "seed": SEED, "epochs": EPOCHS,
    }  # fmt: skip
    try:
        with write_folder(folder, replace=True) as writing:
            (writing / "model.safetensors").write_bytes(raw)
            write_json_atomic(writing / "manifest.json", manifest)
    except OSError as error:
        say(f"attributes' classifier: can't be kept in {folder}: {error.strerror}; it will be trained again next time")
    return found


def train(data: Path, pictures: Pictures, say: Say) -> tuple[AttributeNet, dict[str, tuple[str, ...]]]:
    """Trains on the training pictures of people, real and decoded from their latents; same pictures, same weights."""
    rows = [i for i in range(pictures.trained) if pictures.attributes[i][2] != NONE]
    if not any(pictures.is_person(i) for i in rows):
        raise UserError(f"{data / FILE}: no women or men among the training pictures, nothing to learn from")
    shown = [pictures.attributes[i] for i in rows]
    values = {name: tuple(sorted({one[i] for one in shown})) for i, name in enumerate(NAMES)}
    values["gender"] = GENDERS
    wanted = torch.tensor([[_index(values[name], one[i]) for i, name in enumerate(NAMES)] for one in shown])
    pixels = torch.stack((_pixels(pictures.images[rows]), _pixels(_decoded(data, rows))))
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AttributeNet([len(values[name]) for name in NAMES])
        optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
        total = EPOCHS * -(-len(rows) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=total)
        for epoch in range(EPOCHS):
            for index in torch.randperm(len(rows), generator=generator).split(BATCH):
                decoded = torch.randint(2, (len(index),), generator=generator)
                logits = model(_augmented(pixels[decoded, index], generator))
                loss = torch.stack([
                    F.cross_entropy(one, wanted[index, i], ignore_index=IGNORED, label_smoothing=0.05)
                    for i, one in enumerate(logits)
                ]).sum()  # fmt: skip
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            if (epoch + 1) % 20 == 0:
                say(f"attributes' classifier: epoch {epoch + 1}/{EPOCHS}, loss {loss.item():.3f}")
    return model.eval(), values


def _index(values: Sequence[str], value: str) -> int:
    """The number of a value; IGNORED for a gender that is not read."""
    return values.index(value) if value in values else IGNORED


def _decoded(data: Path, rows: Sequence[int]) -> Tensor:
    """What the VAE makes of some records' latents: uint8 pictures (n, 3, S, S)."""
    records = open_data(data, verify=False)
    moments = records.gather(np.array(rows))[0]
    manifest = records.manifest
    records.close()
    mean, std = mean_and_std(moments, manifest)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(SEED))
    vae = load_vae(manifest.vae.source(data))
    latents = (mean + std * noise) * manifest.scale
    return torch.cat([decode(vae, part, manifest.normalisation, manifest.vae.black) for part in latents.split(256)])


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture (B, 3, S, S) scaled by ≤ 6 % and shifted by ≤ 2 pixels of 32, with a little noise in its colours."""
    count = len(pixels)
    scale, x, y, strength = torch.rand(4, count, generator=generator).unbind()
    zeros, size = torch.zeros(count), 1 + 0.06 * (2 * scale - 1)
    rows = [torch.stack([size, zeros, 0.125 * (2 * x - 1)], 1), torch.stack([zeros, size, 0.125 * (2 * y - 1)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    colours = 0.02 * torch.randn(count, 3, 1, 1, generator=generator)
    return moved + colours + 0.1 * strength.view(-1, 1, 1, 1) * torch.randn(pixels.shape, generator=generator)


def _load(folder: Path, pictures: Pictures) -> AttributeClassifier:
    """The one in `folder`; UserError where a part is missing, damaged, of another format or for other pictures."""
    try:
        manifest, raw = read_json(folder / "manifest.json"), read_bytes(folder / "model.safetensors")
        if manifest["format"] != FORMAT or manifest["pictures"] != pictures.digest:
            raise UserError(f"{folder}: classifier of another version, or of other pictures than those beside it")
        if sha256(raw).hexdigest() != manifest["model_sha256"]:
            raise UserError(f"{folder}/model.safetensors: its SHA-256 isn't the manifest's")
        values = {name: tuple(manifest["values"][name]) for name in NAMES}
        model = AttributeNet([len(values[name]) for name in NAMES])
        model.load_state_dict(load(raw))
        found = AttributeClassifier(model, values, manifest["model_sha256"])
        found.accuracy = {name: float(manifest["accuracy"][name]) for name in manifest["accuracy"]}
        return found
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged classifier ({type(error).__name__})") from None


def nearest(real: Tensor, images: Tensor, count: int = NEAREST) -> NDArray[np.int64]:
    """(n, count) numbers of the real pictures nearest to each image, uint8 (…, 3, H, W), by error at 16 × 16."""
    candidates, samples = (_pixels(as_batch(one), THUMBNAIL).flatten(1).double() for one in (real, images))
    return torch.cdist(samples, candidates).topk(min(count, len(candidates)), largest=False).indices.numpy()


def nearest_sheet(pictures: Pictures, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """SHOWN of the uint8 images (n, 3, S, S), evenly spaced, each with the nearest real picture on its right.

    Under both the prompt, and the real picture's caption where it is another one's. uint8 (H, W, 4).
    """
    chosen = np.linspace(0, len(images) - 1, min(SHOWN, len(images))).astype(np.int64)
    found = nearest(pictures.images, images[chosen], 1)[:, 0].tolist()
    real = torch.stack([pictures.images[number] for number in found])
    sides = F.interpolate(real.float(), tuple(images.shape[-2:]), mode="nearest").byte()
    gap = torch.full_like(sides[..., :2], 255)
    asked = [prompts[i] for i in chosen.tolist()]
    texts = [
        prompt if prompt in pictures.captions[number] else f"{prompt} → {pictures.captions[number][0]}"
        for prompt, number in zip(asked, found, strict=True)
    ]
    return captioned_grid(torch.cat((images[chosen], gap, sides), dim=-1), texts, COLUMNS)


def prompt_scores(
    classifier: AttributeClassifier, pictures: Pictures, images: Tensor, prompts: Sequence[str]
) -> dict[str, object]:
    """Scores of uint8 images (n, 3, H, W) drawn for captions of the real pictures.

    For prompts of people `held_out` and `seen` have the shares with the right tone, gender, role and all three, and
    their number; `retrieved` the share of the other prompts whose picture is among the NEAREST real ones. None without
    such a prompt. `real` is the classifier's accuracy on the real held-out pictures. UserError for other prompts.
    """
    wanted = pictures.of_prompts(prompts)
    if len(wanted) != len(images):
        raise UserError(
            f"{counted(len(images), 'image')} for {counted(len(prompts), 'prompt')}; one an image is needed"
        )
    held = wanted >= pictures.trained
    person = np.array([pictures.is_person(number) for number in wanted.tolist()], bool)
    thing = np.array([pictures.attributes[number][2] == NONE for number in wanted.tolist()], bool)

    def of_people(chosen: NDArray[np.bool_]) -> dict[str, float] | None:
        asked = [pictures.attributes[number] for number in wanted[chosen].tolist()]
        return {**classifier.score(images[chosen], asked), "num": len(asked)} if asked else None

    found = nearest(pictures.images, images[thing]) == wanted[thing, None] if thing.any() else None
    return {
        "held_out": of_people(person & held),
        "seen": of_people(person & ~held),
        "retrieved": None if found is None else float(found.any(1).mean()),
        "retrieved_num": int(thing.sum()),
        "real": classifier.accuracy,
        "classifier_digest": classifier.digest,
    }


def metrics(scores: dict[str, Any]) -> dict[str, object]:
    """`prompt_scores` by the keys that a log and a report have for them."""
    found: dict[str, object] = {}
    for of in ("held_out", "seen"):
        shares = scores[of] or {}
        found |= {of if name == "all" else f"{of}_{name}": share for name, share in shares.items()}
    if scores["retrieved"] is not None:
        found |= {"retrieved": scores["retrieved"], "retrieved_num": scores["retrieved_num"]}
    return found | {"real_held_out": scores["real"].get("all"), "attributes_digest": scores["classifier_digest"]}
