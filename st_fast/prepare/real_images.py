"""`python -m st_fast real-images SOURCE DATA --size 32`: real images beside a data folder's latents.

The classifier of `evaluate.classifier = true` is trained on training images and tested on held-out ones; both come from
`images.safetensors` in the data folder. The digits bring theirs; for other data this writes it, from the folders
`train` and `test` of the source:

  python -m st_fast.prepare.real_images cifar10.zip data/cifar10 --size 32
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save as to_safetensors

from st_fast.core.command import command_parser, run_command
from st_fast.core.errors import UserError
from st_fast.core.files import write_atomic
from st_fast.core.options import COUNT_MOST, SIDE_MOST, integer
from st_fast.core.progress import bar
from st_fast.core.random import epoch_order
from st_fast.data.images import load_image
from st_fast.data.manifest import read_manifest
from st_fast.data.sources import open_source

SEED = 20260710
"""Of the choice of images where not all are taken."""


def chosen_images(source: Path, subset: str, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images of a subset of the source, chosen at random: uint8 (n, 3, size, size), int64 labels (n,)."""
    images = open_source(source, subset)
    chosen = np.sort(epoch_order(SEED, 0, len(images.names))[:count])
    read = [load_image(images.read(int(i)), size, 3) for i in bar(chosen, f"reading {subset}", len(chosen), "images")]
    return np.stack(read), images.labels[chosen]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("real-images", __doc__)
    parser.add_argument("source", type=Path, help="a folder or archive with train/ and test/")
    parser.add_argument("data", type=Path, help="the folder of latents that `st_fast.prepare` wrote")
    parser.add_argument(
        "--size", type=integer(1, SIDE_MOST), required=True, help="side in pixels, as given to st_fast.prepare"
    )
    parser.add_argument(
        "--train",
        type=integer(1, COUNT_MOST),
        default=10_000,
        help="training images for the classifier, at most (10000)",
    )
    parser.add_argument("--test", type=integer(1, COUNT_MOST), default=2_000, help="held-out images, at most (2000)")
    return parser


def main(arguments: Sequence[str]) -> None:
    """The command; UserError for a source, folder or number that can't be used."""
    given = parser().parse_args(list(arguments))
    read_manifest(given.data)  # says so in one line where this is no data folder
    path, tensors = given.data / "images.safetensors", {}
    if path.exists():
        raise UserError(f"{path}: there already; remove it to choose other images")
    for subset, count in (("train", given.train), ("test", given.test)):
        tensors[subset], tensors[f"{subset}_labels"] = chosen_images(given.source, subset, count, given.size)
    try:
        write_atomic(path, to_safetensors(tensors))
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None
    print(path)


if __name__ == "__main__":
    run_command(main)
