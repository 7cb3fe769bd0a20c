"""Metrics of a model's samples: FID and its like where Inception's weights are at hand, else by a small classifier.

    python -m st_fast.evaluate runs/digits
    python -m st_fast.evaluate runs/sit_xl -n 50000 --preset self-transcendence --inception weights.pth \\
        --reference VIRTUAL_imagenet256_labeled.npz
    python -m st_fast.evaluate runs/sit_xl --samples some.npz --inception weights.pth --reference images/

Draws the set of samples that the flags describe, or what is missing of it (as `python -m st_fast.sample --npz` would,
on as many ranks as torchrun starts), prints every number with its protocol and writes metrics.json beside the samples.
The classifier is trained on the data's real images; a distance in its features is never called FID.
"""

from st_fast.core.command import need_run_first

if __name__ == "__main__":
    need_run_first()  # the imports below take seconds, or a minute where csrc is compiled

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from st_fast.core.command import run_command
from st_fast.core.errors import UserError
from st_fast.core.files import write_json_atomic
from st_fast.evaluate import inception, scores
from st_fast.evaluate.classifier import Say, classifier_metrics, load_classifier
from st_fast.sample.model import SampleRequest, sample_request, sampling, sampling_parser
from st_fast.sample.set import ImageFile, draw_set, open_npz, read_settings

Scores = tuple[dict[str, object], dict[str, object]]
"""Numbers by their metric's key, and the protocol."""


@dataclass(frozen=True)
class Request:
    """The command line. `weights` are Inception's, or None for the classifier; `file` holds samples drawn before."""

    samples: SampleRequest
    file: Path | None
    weights: Path | None
    reference: Path
    any_labels: bool


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = sampling_parser("evaluate", __doc__)
    parser.add_argument("--samples", type=Path, help="score this .npz (arr_0, arr_1) instead of drawing")
    names = ("auto", "inception", "classifier", "judge")  # the last is an older name of the classifier
    parser.add_argument("--features", choices=names, metavar="{auto,inception,classifier}", default="auto")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights (default: what torch-fidelity left)")
    parser.add_argument("--reference", type=Path, help="ADM's .npz, pictures or a data folder (default: the run's)")
    parser.add_argument("--any-labels", action="store_true", help="compare although a class has no sample")
    return parser


def parse(arguments: Sequence[str]) -> Request:
    """The command line over the run's own recipe; UserError in one line for what is missing, and what to pass."""
    given = parser().parse_args(arguments)
    samples = sample_request(given, "evaluate", needs_model=given.samples is None)
    data = Path(samples.recipe.data.path)
    images = (data / "images.safetensors").is_file()
    weights = None if given.features in ("classifier", "judge") else inception.find_weights(given.inception)
    if given.features == "inception" and weights is None:
        raise UserError(f"--features inception: no weights: pass --inception FILE ({inception.FILES[0]})")
    if weights is not None and given.reference is None and not images:
        raise UserError(f"--reference: none given, and {data} has no images.safetensors; pass ADM's .npz or pictures")
    if weights is None and not images:
        raise UserError(
            f"no Inception weights, and no images.safetensors in {data} for a classifier: pass --inception FILE "
            f"({inception.FILES[0]}) and --reference FILE"
        )
    return Request(samples, given.samples, weights, given.reference or data, given.any_labels)


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's text."""
    request = parse(arguments)
    if request.file is not None:
        score_file(request, request.file, torch.device("cuda" if torch.cuda.is_available() else "cpu"), print)
        return
    if request.weights is not None:
        scores.check_count(request.samples.settings.num)
        inception.load_inception(request.weights, torch.device("cpu"))  # to refuse a bad file before hours of drawing
        if not request.reference.exists():
            raise UserError(f"--reference {request.reference}: no such file or folder")
    with sampling(request.samples) as (ranks, stop, sampler, say):
        file = draw_set(sampler, request.samples.set_folder, False, ranks, stop, say)
        del sampler
        if ranks.first:
            score_file(request, file, ranks.device, say)
        ranks.barrier()


def score_file(request: Request, file: Path, device: torch.device, say: Say) -> None:
    """Scores a file of samples, prints every number with its protocol, and writes the record beside the samples."""
    samples = open_npz(file)
    if not request.any_labels:
        scores.check_classes(samples.labels, request.samples.recipe.model.num_classes)
    score = _by_classifier if request.weights is None else _by_inception
    numbers, protocol = score(request, samples, device, say)
    keys = ("reference", "resize", "features")
    brief = f"N = {protocol['num']}, " + ", ".join(f"{key} {protocol[key]}" for key in keys)
    for name, value in numbers.items():
        if isinstance(value, float):
            say(f"{name} {value:.5g} | {brief}, weights {str(protocol['weights_sha256'])[:12]}")
    drawn = read_settings(file.parent) if request.file is None else {}
    record = {
        "kind": "metrics", "stage": drawn.get("stage"), "step": drawn.get("step"), "metrics": numbers,
        "protocol": protocol, "samples": drawn or file.name,
    }  # fmt: skip
    target = file.with_name("metrics.json" if request.file is None else f"{file.stem}.metrics.json")
    write_json_atomic(target, record)
    say(str(target))


def _by_inception(request: Request, samples: ImageFile, device: torch.device, say: Say) -> Scores:
    assert request.weights is not None
    scores.check_count(samples.count)
    network = inception.load_inception(request.weights, device)
    reference = scores.read_reference(request.reference, network, samples.shape)
    return {**scores.score(samples, network, reference)}, scores.protocol(samples, network, reference)


def _by_classifier(request: Request, samples: ImageFile, device: torch.device, say: Say) -> Scores:
    if samples.labels is None:
        raise UserError(f"{samples.path}: no labels (arr_1); the classifier compares with the labels asked for")
    classifier, reference = load_classifier(Path(request.samples.recipe.data.path), say)
    images = np.concatenate(list(samples.blocks())).transpose(0, 3, 1, 2)
    numbers = classifier_metrics(classifier, images, samples.labels, reference)
    numbers |= {f"classifier_{name}": numbers.pop(name) for name in ("frechet", "precision", "recall")}
    return numbers, {
        "num": samples.count, "reference": f"{len(reference.features)} training images",
        "resize": "bilinear, antialiased" if samples.shape[:2] != classifier.size else "none",
        "features": "a classifier trained on the data; not FID", "weights_sha256": classifier.digest,
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main)
