"""The real latents of a probe: training records, and held-out images where the data folder has them.

All random draws have their own seed, the same for every model, so that models are compared on the same pixels and
noise.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from st_fast.core import random
from st_fast.core.errors import UserError
from st_fast.core.random import Purpose
from st_fast.data.ahead import mean_and_std
from st_fast.data.buckets import one_shape
from st_fast.data.manifest import Manifest
from st_fast.data.shards import open_data
from st_fast.evaluate.classifier import read_images
from st_fast.model import flow
from st_fast.model.vae import encode_moments, load_vae
from st_fast.sample.model import decoder

SEED = 20260711
"""No run's own seed, so that no noise equals that of a training step."""
MOST_PICTURES = 10


@dataclass(frozen=True)
class Latents:
    """Scaled clean latents (n, C, S, S) float32 and labels (n,) int64; `first` numbers their draws."""

    x: Tensor
    labels: Tensor
    first: int

    def at(self, t: Tensor, path: str, draw: int = 0) -> tuple[Tensor, Tensor]:
        """x_t and the velocity target, both (n, C, S, S), at t (n,); the same noise whatever t is, another a draw."""
        noise = random.normal(SEED + draw, Purpose.NOISE, self.ordinals, self.x.shape[1:])
        return flow.interpolate(self.x, noise, t, path)

    def times(self, low: float, high: float) -> Tensor:
        """(n,) times, uniform between low and high."""
        return low + (high - low) * random.uniform(SEED, Purpose.TIME, self.ordinals)[:, 0]

    def random_labels(self, classes: int) -> Tensor:
        """(n,) int64 labels that have nothing to do with the images."""
        drawn = random.uniform(SEED, Purpose.SAMPLE_LABELS, self.ordinals)[:, 0]
        return (drawn * classes).long().clamp_(max=classes - 1)

    @property
    def ordinals(self) -> Tensor:
        """(n,) int64: the counters of their draws."""
        return torch.arange(self.first, self.first + len(self.x))


@dataclass(frozen=True)
class Split:
    """Latents that linear probes learn from (`train`), and those for testing them and the models (`held_out`).

    `unseen`: the held-out latents are of images that no training had; else they are other records of the training set,
    unseen by the linear probe alone.
    """

    train: Latents
    held_out: Latents
    unseen: bool
    digest: str
    classes: int
    """Of the data; a model may know more."""
    pictures: Tensor
    """A held-out image of each class, of MOST_PICTURES at most, uint8 (n, 1 or 3, H, W); black without the VAE."""
    pictured: tuple[str, ...]
    """Their classes' names; numbers where the data has no names."""


def load_split(folder: Path, count: int) -> Split:
    """`count` records of a data folder to learn from and up to half as many held-out ones.

    Held-out are the test images beside the shards (`images.safetensors`), encoded with the folder's own VAE; where
    there are none, other records of the set. The classes of both take turns. UserError where the set is too small.
    """
    records = one_shape(open_data(folder, verify=False), "a probe")
    manifest, size = records.manifest, len(records)
    unseen = (folder / "images.safetensors").is_file()
    count = min(count, size if unseen else size * 2 // 3)
    if count < 2 * manifest.num_classes:
        raise UserError(f"{folder}: {size} records of {manifest.num_classes} classes; too few for a linear probe")
    order = random.epoch_order(SEED, 0, size)
    learn, rest = np.sort(order[:count]), np.sort(order[count : count + count // 2])
    moments, labels = records.gather(learn)
    turns = in_turn(labels)  # tokens are kept of the first ones, and sets are often sorted by class
    moments, labels = moments[turns], labels[turns]
    if unseen:
        real = read_images(folder)
        chosen = torch.from_numpy(np.sort(random.epoch_order(SEED, 1, len(real.test))[: max(1, count // 2)]))
        chosen = chosen[in_turn(real.test_labels[chosen])]
        vae = load_vae(manifest.vae.source(folder))
        how = (manifest.posterior, manifest.normalisation, manifest.vae.black)
        other = encode_moments(vae, real.test[chosen], *how)
        other_labels = real.test_labels[chosen]
    else:
        other, other_labels = records.gather(rest)
        turns = in_turn(other_labels)
        other, other_labels = other[turns], other_labels[turns]
    records.close()
    if other.shape[1:] != moments.shape[1:]:
        raise UserError(
            f"{folder}: its test images become moments {tuple(other.shape[1:])}, its records are {manifest.shape}"
        )
    train = Latents(_drawn(moments, manifest, 0), labels, 0)
    held_out = Latents(_drawn(other, manifest, count), other_labels, count)
    shown = min(MOST_PICTURES, len(held_out.labels.unique()))  # classes take turns, so the first are one of each
    pictured = tuple(manifest.name_of(label) for label in held_out.labels[:shown].tolist())
    pictures = _pictures(folder, manifest, held_out.x[:shown])
    return Split(train, held_out, unseen, manifest.digest, manifest.num_classes, pictures, pictured)


def in_turn(labels: Tensor) -> Tensor:
    """Places of labels (n,) in an order in which the classes take turns: the first of each, then the second of each."""
    known = labels.numpy()
    by_class = np.argsort(known, kind="stable")
    turn = np.empty_like(by_class)
    turn[by_class] = np.arange(len(known)) - np.searchsorted(known[by_class], known[by_class])
    return torch.from_numpy(np.lexsort((known, turn)))


def _pictures(folder: Path, manifest: Manifest, x: Tensor) -> Tensor:
    """The decoded latents, for the figures only: without a VAE the probe says so and goes on."""
    try:
        return decoder(folder, manifest, torch.device("cpu"))(x)
    except UserError as error:
        print(f"probe: the images themselves can't be shown: {error}")
        return torch.zeros(len(x), 1, 1, 1, dtype=torch.uint8)


def _drawn(moments: Tensor, manifest: Manifest, first: int) -> Tensor:
    """x = scale·(μ + σ·ξ), records (n, *shape) → (n, C, S, S) float32, on the host."""
    mean, std = mean_and_std(moments, manifest)
    ordinals = torch.arange(first, first + len(moments))
    return manifest.scale * (mean + std * random.normal(SEED, Purpose.POSTERIOR, ordinals, mean.shape[1:]))
