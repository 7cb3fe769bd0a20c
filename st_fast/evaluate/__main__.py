"""Metrics of a model's samples: FID and its like where Inception's weights are at hand, else by a small classifier.

    python -m st_fast.evaluate runs/digits
    python -m st_fast.evaluate runs/sit_xl -n 50000 --preset self-transcendence --inception weights.pth \\
        --reference VIRTUAL_imagenet256_labeled.npz
    python -m st_fast.evaluate runs/mmdit_coco -n 30000 --captions data/coco_val --clip openai/clip-vit-large-patch14
    python -m st_fast.evaluate SiT-XL-2-256x256.pt -n 50000 --inception weights.pth --reference VIRTUAL_imagenet256.npz
    python -m st_fast.evaluate runs/sit_xl --samples some.npz --inception weights.pth --reference images/

Draws the set of samples that the flags describe, or what is missing of it (as `python -m st_fast.sample --npz` would,
on as many ranks as torchrun starts), prints the protocol and every number, and writes metrics.json beside the samples.
Samples of other weights or settings, and scores by another protocol, get places of their own beside the first.
The classifier is trained on the data's real images; a distance in its features is never called FID. MODEL is what
st_fast.sample takes: a run, or another project's file, whose samples go to samples/ in this folder.
"""

from st_fast.core.command import need_model_first
from st_fast.core.options import given, path
from st_fast.core.signals import catch_signals

if __name__ == "__main__":
    catch_signals()
    need_model_first()  # the imports below take seconds, or a minute where csrc is compiled

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from st_fast.core.command import run_command
from st_fast.core.comparison import differences, place_for, short_digest
from st_fast.core.errors import Say, UserError
from st_fast.core.files import BadFile, read_json, write_json_atomic
from st_fast.core.machine import naming_lack_of_memory
from st_fast.evaluate import attributes, classifier, clip_score, inception, scores
from st_fast.evaluate.classifier import how_to_write_images
from st_fast.recipe import Recipe
from st_fast.report.metrics import apart
from st_fast.sample.model import sampling
from st_fast.sample.previews import save_png
from st_fast.sample.request import SampleRequest, sample_request, sampling_parser
from st_fast.sample.set import ImageFile, draw_set, open_npz, read_settings


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = sampling_parser("evaluate", __doc__)
    parser.add_argument("--samples", type=path, help="score this .npz (arr_0, arr_1) instead of drawing")
    names = ("auto", "inception", "classifier", "judge")  # the last is an older name of the classifier
    parser.add_argument("--features", choices=names, metavar="{auto,inception,classifier}", default="auto")
    parser.add_argument("--inception", type=path, metavar="FILE", help="weights (default: what torch-fidelity left)")
    parser.add_argument("--reference", type=path, help="ADM's .npz, pictures or a data folder (default: the model's)")
    parser.add_argument(
        "--clip", type=given, metavar="MODEL", help="also the CLIP score of samples drawn from text, by this CLIP"
    )
    parser.add_argument("--any-labels", action="store_true", help="compare although a class has no sample")
    return parser


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, SampleRequest]:
    """The flags over the model's recipe, with the `inception` weights (None: the classifier) and `reference` to use.

    UserError in one line for what is missing, and what to pass.
    """
    given = parser().parse_args(arguments)
    request = sample_request(given, "evaluate", needs_model=given.samples is None)
    data = request.source.data
    images = data is not None and (data / "images.safetensors").is_file()
    weights = None if given.features in ("classifier", "judge") else inception.find_weights(given.inception)
    if given.clip and (request.recipe.model.network == "sit" or given.samples is not None):
        raise UserError(f"--clip {given.clip}: scores samples that this command draws from text")
    if given.features == "inception" and weights is None:
        raise UserError(f"--features inception: no weights: pass --inception FILE ({inception.FILES[0]})")
    if weights is not None and given.reference is None and not images:
        told = f"{given.run} comes without data" if data is None else _without_images(data)
        raise UserError(f"--reference: none given, and {told}; pass ADM's .npz or pictures")
    of_text = request.recipe.model.network != "sit"
    given.by_attributes = of_text and weights is None and data is not None and (data / attributes.FILE).is_file()
    if of_text and weights is None and not given.by_attributes and not given.clip:
        raise UserError(
            f"no Inception weights: pass --inception FILE ({inception.FILES[0]}) and --reference FILE for FID, "
            "or --clip MODEL"
        )
    if not of_text and weights is None and not images:
        told = f"{given.run} comes without data (--data)" if data is None else _without_images(data)
        raise UserError(
            f"no Inception weights, and for a classifier {told}; or pass --inception FILE ({inception.FILES[0]}) and "
            "--reference FILE"
        )
    given.inception, given.reference = weights, given.reference or data
    return given, request


def _without_images(data: Path) -> str:
    return f"{data} has no images.safetensors ({how_to_write_images(data)})"


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's text."""
    given, request = parse(arguments)
    pictures = None
    if given.samples is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        score_file(given, request.recipe, given.samples, device, print)
        return
    if given.inception is not None:
        scores.check_count(request.settings.num)
        inception.load_inception(given.inception, torch.device("cpu"))  # to refuse a bad file before hours of drawing
        if not given.reference.exists():
            raise UserError(f"--reference {given.reference}: no such file or folder")
    elif given.by_attributes:
        pictures = attributes.check_pictures(Path(request.recipe.data.path))
    elif request.recipe.model.network == "sit":
        classifier.check_count(request.settings.num, f"--num {request.settings.num}")
        classifier.check_real_images(Path(request.recipe.data.path))
    if given.clip:
        clip_score.load_clip(given.clip, torch.device("cpu"))  # likewise
    with sampling(request) as (ranks, sampler, say):
        texts = () if sampler.prompts is None else sampler.prompts.texts
        if pictures:
            pictures.of_prompts(texts)
        if given.clip and not all(texts):
            raise UserError(f"--clip {given.clip}: a prompt or caption without a word, which nothing can be scored by")
        file = draw_set(sampler, None, False, ranks, say)
        del sampler
        if ranks.first:
            score_file(given, request.recipe, file, ranks.device, say, texts)
        ranks.barrier()


@naming_lack_of_memory("scoring")
def score_file(
    given: argparse.Namespace, recipe: Recipe, file: Path, device: torch.device, say: Say, texts: Sequence[str] = ()
) -> None:
    """Scores a file of samples, prints the protocol and every number, and writes the record beside the samples.

    texts: what the samples' labels number, where they were drawn from text.
    """
    samples = open_npz(file)
    if recipe.model.network == "sit" and not given.any_labels:
        scores.check_classes(samples.labels, recipe.model.num_classes)
    if given.inception is not None:
        scores.check_count(samples.count)
        network = inception.load_inception(given.inception, device)
        reference = scores.read_reference(given.reference, network, samples.shape)
        numbers: dict[str, Any] = {**scores.score(samples, network, reference)}
        protocol = scores.protocol(samples, network, reference)
    elif given.by_attributes:
        numbers, protocol = _by_attributes(Path(recipe.data.path), samples, texts, say)
    elif given.clip:
        numbers = {}
        protocol = {"num": samples.count, "reference": "their texts", "resize": "bicubic", "features": "CLIP"}
    else:
        numbers, protocol = _by_classifier(Path(recipe.data.path), samples, say)
    if given.clip:
        found, by = _by_clip(given.clip, samples, texts, device)
        numbers, protocol = numbers | found, protocol | by
        protocol.setdefault("weights_sha256", by["clip_sha256"])
    of_samples, of_real = apart(numbers)
    brief = ", ".join(f"{key} {protocol[key]}" for key in ("reference", "resize", "features"))
    say(f"N = {protocol['num']} samples, {brief}, weights {str(protocol['weights_sha256'])[:12]}:")
    for name, value in of_samples.items():
        say(f"{name} {value:.5g}")
    if of_real:
        say(f"the same of {numbers['floor_num']} held-out real images, the best that can be expected:")
        for name, value in of_real.items():
            say(f"real_{name} {value:.5g}")
    drawn = read_settings(file.parent) if given.samples is None else {}
    by_class = {key: value for key, value in numbers.items() if key == "accuracy_per_class"}
    record = {
        "kind": "metrics", "stage": drawn.get("stage"), "step": drawn.get("step"), "metrics": of_samples | by_class,
        "real_images": of_real, "protocol": protocol, "samples": drawn or file.name,
    }  # fmt: skip
    target = _place(file.with_name("metrics.json" if given.samples is None else f"{file.stem}.metrics.json"), protocol)
    write_json_atomic(target, record)
    say(str(target))


def _place(usual: Path, protocol: dict[str, Any]) -> Path:
    """The file `usual`, or where that holds scores by another protocol, one beside it."""

    def same(path: Path) -> bool:
        try:
            return not differences(read_json(path).get("protocol", {}), protocol)
        except BadFile:
            return False

    return place_for(usual, usual.with_stem(f"{usual.stem}-{short_digest(protocol)}"), same)


def _by_attributes(
    data: Path, samples: ImageFile, texts: Sequence[str], say: Say
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers by their metric's key, and the protocol, for samples drawn for captions of the data's real pictures."""
    asked = _texts_of(samples, texts, "evaluate")
    pictures, classes = attributes.read_pictures(data), attributes.load_attribute_classifier(data, say)
    images = torch.from_numpy(np.concatenate(list(samples.blocks())).transpose(0, 3, 1, 2))
    numbers = attributes.metrics(attributes.prompt_scores(classes, pictures, images, asked))
    beside = samples.path.with_name("nearest.png")
    save_png(attributes.nearest_sheet(pictures, images, asked), beside)
    say(f"{beside}: samples, each with the nearest real picture on its right")
    return numbers | {"floor_num": len(pictures.images) - pictures.trained}, {
        "num": samples.count, "reference": f"{len(pictures.images)} real pictures", "resize": "none",
        "features": "a classifier of attributes trained on the data", "weights_sha256": classes.digest,
    }  # fmt: skip


def _texts_of(samples: ImageFile, texts: Sequence[str], wanted: str) -> list[str]:
    """The text of each sample; UserError where they are not known."""
    if samples.labels is None or not texts:
        raise UserError(f"{wanted}: the texts of {samples.path} are not known: draw the samples with this command")
    return [texts[label] for label in samples.labels.tolist()]


def _by_clip(
    name: str, samples: ImageFile, texts: Sequence[str], device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mean CLIP score by its metric's key, and the protocol."""
    clip = clip_score.load_clip(name, device)
    asked, scores = _texts_of(samples, texts, f"--clip {name}"), list[torch.Tensor]()
    for block in samples.blocks():
        done = sum(map(len, scores))
        images = torch.from_numpy(block.transpose(0, 3, 1, 2).copy())
        scores.append(clip(images, asked[done : done + len(block)]))
    return {"clip_score": float(torch.cat(scores).mean())}, {"clip": clip.name, "clip_sha256": clip.hash}


def _by_classifier(data: Path, samples: ImageFile, say: Say) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers by their metric's key, and the protocol."""
    if samples.labels is None:
        raise UserError(f"{samples.path}: no labels (arr_1); the classifier compares with the labels asked for")
    classifier.check_count(samples.count, f"{samples.path}: {samples.count} samples")
    network, reference = classifier.load_classifier(data, say)
    images = np.concatenate(list(samples.blocks())).transpose(0, 3, 1, 2)
    numbers = classifier.classifier_metrics(network, images, samples.labels, reference)
    numbers |= {f"classifier_{name}": numbers.pop(name) for name in ("frechet", "precision", "recall")}
    return numbers, {
        "num": samples.count, "real_images": numbers["floor_num"],
        "reference": f"{len(reference.features)} training images",
        "resize": "bilinear, antialiased" if samples.shape[:2] != network.size else "none",
        "features": "a classifier trained on the data; not FID", "weights_sha256": network.digest,
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main)
