"""Metrics of a model's samples, by a judge and against the real images that the judge learnt from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from st_fast.errors import UserError
from st_fast.judge import Judge, as_batch, load_or_train, read_images
from st_fast.metrics import GaussianStats, frechet, precision_recall


@dataclass(frozen=True)
class Reference:
    """The real training images in the judge's features, and how the real held-out images score against them.

    The floors are what a perfect generator would get: nothing drawn can be expected below `floor_frechet`.
    """

    features: NDArray[np.float32]
    stats: GaussianStats
    floor_frechet: float
    floor_precision: float
    floor_recall: float
    floor_num: int


def make_reference(judge: Judge, train: Tensor, test: Tensor) -> Reference:
    """Reference from real uint8 images (n, 1|3, H, W); UserError with fewer held-out images than features."""
    features, held_out = judge.features(train), judge.features(test)
    stats = GaussianStats.of(features)
    precision, recall = precision_recall(features, held_out)
    floor = frechet(stats, GaussianStats.of(held_out))
    return Reference(features, stats, floor, precision, recall, len(held_out))


def load_judge(data_folder: Path, say: Callable[[str], None]) -> tuple[Judge, Reference]:
    """The judge of a data folder (trained on first use) and the reference it compares with."""
    judge, real = load_or_train(data_folder, say), read_images(data_folder)
    return judge, make_reference(judge, real.train, real.test)


def judge_samples(
    judge: Judge, images: Tensor | NDArray[np.uint8], labels: Tensor | NDArray[np.int64], reference: Reference
) -> dict[str, object]:
    """Scores conditional samples: uint8 images (n, 1|3, H, W) drawn for integer labels (n,).

    Returns `accuracy` (share recognised as their label), `accuracy_per_class` (None where no sample has that label),
    `frechet`, `precision` and `recall` in the judge's features with their floors (real held-out images against the
    same reference), and the judge's own accuracy and digest. The Fréchet distance is not FID: the features are not
    Inception's. UserError where labels don't fit the images, or samples are too few for a covariance.
    """
    batch, asked = as_batch(images), np.asarray(labels)
    if asked.shape != (len(batch),) or not np.issubdtype(asked.dtype, np.integer):
        raise UserError(f"labels: {asked.dtype} of shape {asked.shape} for {len(batch)} images; one integer an image")
    if len(asked) and not (asked.min() >= 0 and asked.max() < judge.num_classes):
        raise UserError(f"labels: {asked.min()}..{asked.max()}; the judge knows 0..{judge.num_classes - 1}")
    features = judge.features(batch)
    distance = frechet(GaussianStats.of(features), reference.stats)
    precision, recall = precision_recall(reference.features, features)
    recognised = judge.predict(batch) == asked
    per_class = [recognised[asked == label] for label in range(judge.num_classes)]
    return {
        "accuracy": float(recognised.mean()),
        "accuracy_per_class": [float(share.mean()) if len(share) else None for share in per_class],
        "frechet": distance,
        "floor_frechet": reference.floor_frechet,
        "precision": precision,
        "floor_precision": reference.floor_precision,
        "recall": recall,
        "floor_recall": reference.floor_recall,
        "judge_accuracy": judge.accuracy,
        "judge_digest": judge.digest,
        "num": len(batch),
        "floor_num": reference.floor_num,
    }
