"""`python -m st_fast real-images SOURCE DATA --size 32`: real images beside a data folder's latents.

The classifier of `evaluate.classifier = true` is trained on training images and tested on held-out ones; both come from
`images.safetensors` in the data folder. The digits bring theirs; for other data this writes it, from the folders
`train` and `test` (or `val`) of the source, or from one folder, of which some images are held out. The classes have the
numbers that they have in the data; images that can't be used are left out and named. A source that the latents were
not made from is refused, as far as the folder tells: the classifier would compare samples with other images.

  python -m st_fast real-images cifar10.zip data/cifar10
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as to_safetensors

from st_fast.core.command import command_parser, run_command
from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, read_json, shown, write_atomic
from st_fast.core.options import COUNT_MOST, SIDE_MOST, integer, path
from st_fast.core.progress import bar
from st_fast.core.random import epoch_order
from st_fast.core.writing import cannot_write
from st_fast.data.images import Size, load_image, named_size
from st_fast.data.manifest import Manifest, crop_of, is_upright, read_manifest
from st_fast.data.source import Source, numbered_by
from st_fast.data.sources import open_source
from st_fast.evaluate.classifier import FEATURES
from st_fast.prepare.job import JOB_FILE, reopened

SEED = 20260710
"""Of the choice of images where not all are taken."""


def open_subsets(path: Path, manifest: Manifest, **how: Any) -> tuple[Source, Source]:
    """Training and held-out images with the data's class numbers; the same source twice where it is one folder.

    how: of `open_source`, as it was when the latents were made.
    """
    found: list[Source] = []
    for names in (("train", "training"), ("test", "val", "valid", "validation")):
        for name in names:
            try:
                source = open_source(path, name, **how)
            except UserError:
                continue
            found.append(numbered_by(source, manifest.class_names, manifest.num_classes))
            break
    if len(found) == 2:
        return found[0], found[1]
    whole = found[0] if found else numbered_by(open_source(path, **how), manifest.class_names, manifest.num_classes)
    return whole, whole


def check_source(given: argparse.Namespace, sources: tuple[Source, Source]) -> None:
    """UserError where job.json, if it is there, tells that the latents were made from none of `sources`.

    Labels and content decide, wherever the set lies; of older versions' folders the content alone, or the names.
    """
    path = given.data / JOB_FILE
    made = read_json(path) if path.is_file() else {}
    of = {"probe": Source.probe, "content": Source.content, "images": Source.digest}
    key = next((key for key in of if key in made), "")
    if given.other_images or not key:
        return
    if type(made[key]) is not str:
        raise BadFile(f"{path}: {key} = {shown(str(made[key]))}: text is needed")
    if all(made[key] != of[key](source) for source in sources):
        raise UserError(
            f"real-images: {sources[0].description}: other images or labels than {given.data} was made from, "
            f"{made.get('count')} images of {shown(str(made.get('source')))}: give those, or --other-images to take "
            "these nevertheless"
        )


def read_chosen(
    source: Source, order: np.ndarray, count: int, size: Size, upright: bool, what: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """The first `count` usable images of `order`, sorted: uint8 (n, 3, H, W), labels (n,), and how many it took.

    Images that can't be used are named on stdout; UserError where none can.
    """
    images: list[np.ndarray] = []
    numbers, tried = [], 0
    for number in bar(order.tolist(), f"reading {what}", min(count, len(order)), "image"):
        if len(images) == count:
            break
        tried += 1
        try:
            images.append(load_image(source.read(number), size, 3, upright))
            numbers.append(number)
        except (UserError, OSError) as error:
            print(f"real-images: skipped {shown(source.names[number])}: {getattr(error, 'strerror', None) or error}")
    if not images:
        raise UserError(f"real-images: {source.description}: not one usable image for {what}")
    by_number = np.argsort(numbers)
    return np.stack(images)[by_number], source.labels[np.array(numbers)[by_number]], tried


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("real-images", __doc__)
    parser.add_argument("source", type=path, help="a folder or archive with train/ and test/")
    parser.add_argument("data", type=path, help="the folder of latents that `st_fast.prepare` wrote")
    parser.add_argument("--size", type=integer(1, SIDE_MOST), help="side in pixels (default: the data's)")
    parser.add_argument(
        "--train",
        type=integer(1, COUNT_MOST),
        default=10_000,
        help="training images for the classifier, at most (10000)",
    )
    parser.add_argument("--test", type=integer(1, COUNT_MOST), default=2_000, help="held-out images, at most (2000)")
    parser.add_argument(
        "--other-images", action="store_true", help="take SOURCE even if the latents were not made from its images"
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """The command; UserError for a source, folder or number that can't be used."""
    given = parser().parse_args(list(arguments))
    manifest = read_manifest(given.data)  # says so in one line where this is no data folder
    known, upright = crop_of(manifest.source), is_upright(manifest.source)
    size = given.size or known
    if size is None:
        raise UserError(f"real-images: {given.data} doesn't tell the size of its images: give --size")
    if known not in (None, size):
        of = "" if known is None else named_size(known)
        raise UserError(f"real-images: --size {size}: {given.data} is of {of}; leave --size out")
    path = given.data / "images.safetensors"
    tensors: dict[str, np.ndarray] = {}
    if path.exists():
        raise UserError(f"real-images: {path}: there already; remove it to choose other images")
    train, test = open_subsets(given.source, manifest, **reopened(given.data, manifest))
    check_source(given, (train, test))
    order = epoch_order(SEED, 0, len(train.names))
    held_out = min(given.test, max(1, len(order) // 5, min(FEATURES + 1, len(order) // 2))) if test is train else 0
    if test is train and len(order) < 2:
        raise UserError(f"real-images: {train.description}: one image can't be both for training and held out")
    tried = 0
    if test is train:
        tensors["test"], tensors["test_labels"], tried = read_chosen(test, order, held_out, size, upright, "test")
        print(f"real-images: one folder: {len(tensors['test'])} of its images are held out, as the classifier's test")
    else:
        rest = epoch_order(SEED, 0, len(test.names))
        tensors["test"], tensors["test_labels"], _ = read_chosen(test, rest, given.test, size, upright, "test")
    read = read_chosen(train, order[tried:], given.train, size, upright, "train")
    tensors["train"], tensors["train_labels"], _ = read
    for split in ("train", "test"):
        if (count := len(tensors[split])) <= FEATURES:
            print(f"real-images: warning: {count} images in {split!r}; the classifier's scores need {FEATURES + 1}")
    try:
        write_atomic(path, to_safetensors(tensors))
    except OSError as error:
        raise cannot_write(path, error) from None
    print(path)


if __name__ == "__main__":
    run_command(main)
