"""Metrics of a model's samples: FID and its like where Inception's weights can be had, else by a small classifier.

    python -m st_fast.evaluate runs/digits
    python -m st_fast.evaluate runs/sit_xl -n 50000 --preset self-transcendence --inception weights.pth \\
        --reference VIRTUAL_imagenet256_labeled.npz
    python -m st_fast.evaluate runs/sit_xl --samples some.npz --inception weights.pth --reference images/

Draws the set of samples that the flags describe, or what is missing of it (as `python -m st_fast.sample --npz` would,
on as many ranks as torchrun starts), prints every number with its protocol and writes metrics.json beside the samples.
The classifier is trained on the data's real images; a distance in its features is never called FID.
"""

from __future__ import annotations

from st_fast.core.command import need_run_first

if __name__ == "__main__":
    need_run_first()  # the imports below take seconds, or a minute where csrc is compiled

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from st_fast.core.command import run_command
from st_fast.core.errors import UserError
from st_fast.core.files import write_json_atomic
from st_fast.evaluate import inception, scores
from st_fast.evaluate.classifier import Classifier, as_batch, load_or_train, read_images
from st_fast.evaluate.metrics import GaussianStats, frechet, precision_recall
from st_fast.sample.files import ImageFile, open_npz
from st_fast.sample.job import Wanted, draw_set
from st_fast.sample.parts import SETTINGS, read_settings
from st_fast.sample.request import drawing, parser_of, set_folder, wanted_of


@dataclass(frozen=True)
class Reference:
    """The real training images in the classifier's features, and how the real held-out images score against them.

    The floors are what a perfect generator would get: nothing drawn can be expected below `floor_frechet`.
    """

    features: NDArray[np.float32]
    stats: GaussianStats
    floor_frechet: float
    floor_precision: float
    floor_recall: float
    floor_num: int


def make_reference(classifier: Classifier, train: Tensor, test: Tensor) -> Reference:
    """Reference from real uint8 images (n, 1|3, H, W); UserError with fewer held-out images than features."""
    features, held_out = classifier.features(train), classifier.features(test)
    stats = GaussianStats.of(features)
    precision, recall = precision_recall(features, held_out)
    floor = frechet(stats, GaussianStats.of(held_out))
    return Reference(features, stats, floor, precision, recall, len(held_out))


def load_classifier(data_folder: Path, say: Callable[[str], None]) -> tuple[Classifier, Reference]:
    """The classifier of a data folder (trained on first use) and the reference it compares with."""
    classifier, real = load_or_train(data_folder, say), read_images(data_folder)
    return classifier, make_reference(classifier, real.train, real.test)


def classifier_metrics(
    classifier: Classifier, images: Tensor | NDArray[np.uint8], labels: Tensor | NDArray[np.int64], reference: Reference
) -> dict[str, object]:
    """Scores conditional samples: uint8 images (n, 1|3, H, W) drawn for integer labels (n,).

    Returns `accuracy` (share classified as their label), `accuracy_per_class` (None where no sample has that label),
    `frechet`, `precision` and `recall` in the classifier's features with their floors (real held-out images against
    the same reference), and the classifier's own accuracy and digest. The distance is not FID: the features are not
    Inception's. UserError where labels don't fit the images, or samples are too few for a covariance.
    """
    batch, asked = as_batch(images), np.asarray(labels)
    if asked.shape != (len(batch),) or not np.issubdtype(asked.dtype, np.integer):
        raise UserError(f"labels: {asked.dtype} of shape {asked.shape} for {len(batch)} images; one integer an image")
    if len(asked) and not (asked.min() >= 0 and asked.max() < classifier.num_classes):
        raise UserError(f"labels: {asked.min()}..{asked.max()}; the classifier knows 0..{classifier.num_classes - 1}")
    features = classifier.features(batch)
    distance = frechet(GaussianStats.of(features), reference.stats)
    precision, recall = precision_recall(reference.features, features)
    correct = classifier.predict(batch) == asked
    per_class = [correct[asked == label] for label in range(classifier.num_classes)]
    return {
        "accuracy": float(correct.mean()),
        "accuracy_per_class": [float(share.mean()) if len(share) else None for share in per_class],
        "frechet": distance,
        "floor_frechet": reference.floor_frechet,
        "precision": precision,
        "floor_precision": reference.floor_precision,
        "recall": recall,
        "floor_recall": reference.floor_recall,
        "classifier_accuracy": classifier.accuracy,
        "classifier_digest": classifier.digest,
        "num": len(batch),
        "floor_num": reference.floor_num,
    }


@dataclass(frozen=True)
class Request:
    """What `python -m st_fast.evaluate` was asked for."""

    wanted: Wanted
    samples: Path | None
    weights: Path | None
    """Inception's, or None for the classifier."""
    reference: Path
    any_labels: bool

    @property
    def npz(self) -> Path:
        """The samples' file, drawn already or not."""
        return self.samples or set_folder(self.wanted) / "samples.npz"


def _feature_name(text: str) -> str:
    return "classifier" if text == "judge" else text  # an older name


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of("evaluate", __doc__)
    parser.add_argument("--samples", type=Path, help="score this .npz (arr_0, arr_1) instead of drawing")
    parser.add_argument("--features", type=_feature_name, choices=("auto", "inception", "classifier"), default="auto")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights (default: what torch-fidelity left)")
    parser.add_argument(
        "--reference", type=Path, help="ADM's .npz, pictures or a data folder (default: the run's data)"
    )
    parser.add_argument("--any-labels", action="store_true", help="compare although a class has no sample")
    return parser


def parse(arguments: Sequence[str]) -> Request:
    """The command line over the run's own recipe; UserError in one line for what is missing, and what to pass."""
    given = parser().parse_args(arguments)
    wanted = wanted_of(given, lambda recipe: recipe.evaluate.num, needs_model=given.samples is None)
    data = Path(wanted.recipe.data.path)
    weights = None if given.features == "classifier" else inception.find_weights(given.inception)
    reference = given.reference or (data if (data / "images.safetensors").is_file() else None)
    if given.features == "inception" and weights is None:
        raise UserError(f"--features inception: no weights: pass --inception FILE ({inception.FILES[0]})")
    if weights is not None and reference is None:
        raise UserError(f"--reference: none given, and {data} has no images.safetensors; pass ADM's .npz or pictures")
    if weights is None and not (data / "images.safetensors").is_file():
        raise UserError(
            f"no Inception weights, and no images.safetensors in {data} for a classifier: pass --inception FILE "
            f"({inception.FILES[0]}) and --reference FILE"
        )
    return Request(wanted, given.samples, weights, reference or data, given.any_labels)


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's text."""
    request = parse(arguments)
    if request.weights is not None and request.samples is None:
        scores.enough(request.wanted.settings.num)
    if request.samples is not None:
        score_file(request, torch.device("cuda" if torch.cuda.is_available() else "cpu"), print)
        return
    with drawing(request.wanted) as (ranks, stop, artist, say):
        draw_set(artist, set_folder(request.wanted), False, ranks, stop, say)
        del artist
        if ranks.first:
            score_file(request, ranks.device, say)
        ranks.barrier()


def score_file(request: Request, device: torch.device, say: Callable[[str], None]) -> dict[str, object]:
    """Scores the samples' file, prints every number with its protocol, and writes the record beside the samples."""
    samples = open_npz(request.npz)
    if not request.any_labels:
        scores.check_classes(samples.labels, request.wanted.recipe.model.num_classes)
    by = _by_classifier if request.weights is None else _by_inception
    numbers, protocol = by(request, samples, device, say)
    for name, value in numbers.items():
        if isinstance(value, float):
            say(f"{name} {value:.5g} | {brief(protocol)}")
    folder = samples.path.parent
    drawn = read_settings(folder) if (folder / SETTINGS).is_file() and request.samples is None else {}
    record: dict[str, object] = {
        "kind": "metrics", "stage": drawn.get("stage"), "step": drawn.get("step"), "metrics": numbers,
        "protocol": protocol, "samples": drawn or samples.path.name,
    }  # fmt: skip
    target = folder / ("metrics.json" if request.samples is None else f"{samples.path.stem}.metrics.json")
    write_json_atomic(target, record)
    say(str(target))
    return record


def _by_inception(
    request: Request, samples: ImageFile, device: torch.device, say: Callable[[str], None]
) -> tuple[Mapping[str, object], dict[str, object]]:
    assert request.weights is not None
    scores.enough(samples.count)
    network = inception.load_inception(request.weights, device)
    reference = scores.read_reference(request.reference, network, samples.shape)
    return scores.score(samples, network, reference), scores.protocol(samples, network, reference)


def _by_classifier(
    request: Request, samples: ImageFile, device: torch.device, say: Callable[[str], None]
) -> tuple[Mapping[str, object], dict[str, object]]:
    if samples.labels is None:
        raise UserError(f"{samples.path}: no labels (arr_1); the classifier compares with the labels asked for")
    classifier, reference = load_classifier(Path(request.wanted.recipe.data.path), say)
    images = np.concatenate(list(samples.blocks())).transpose(0, 3, 1, 2)
    numbers = classifier_metrics(classifier, images, samples.labels, reference)
    numbers |= {f"classifier_{name}": numbers.pop(name) for name in ("frechet", "precision", "recall")}
    return numbers, {
        "num": samples.count,
        "reference": f"{len(reference.features)} training images",
        "resize": "bilinear, antialiased" if samples.shape[:2] != classifier.size else "none",
        "features": "a classifier trained on the data; not FID",
        "weights_sha256": classifier.digest,
    }


def brief(protocol: Mapping[str, object]) -> str:
    """The protocol in a part of a line."""
    keys = ("reference", "resize", "features")
    hashed = str(protocol["weights_sha256"])[:12]
    return f"N = {protocol['num']}, " + ", ".join(f"{key} {protocol[key]}" for key in keys) + f", weights {hashed}"


if __name__ == "__main__":
    run_command(main)
