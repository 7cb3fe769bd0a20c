"""Images of several aspect ratios → a folder of latents for each, of about as many pixels, and buckets.json over them.

An image belongs to the bucket whose own ratio is nearest to its, so that the least is cropped: a pure function of the
images, kept in the folder. Each bucket is a job of its own (see `job`), with the same VAE and options.
"""

import io
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, read_bytes, shown, write_atomic
from st_fast.core.machine import usable_cpus
from st_fast.core.progress import bar
from st_fast.data.images import image_sides
from st_fast.data.source import Source

AUTO = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")
RATIO = re.compile(r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})")
MOST_RATIOS = 64
ASSIGNED_FILE = "assigned.npy"
"""uint8 (images,): each image's bucket, by its place among the wanted ones."""
LEAST_AREA = 0.85
"""Of a bucket, as a share of the square of the same `--size`: batches of all buckets are to cost about the same."""
MOST_OFF = 1.25
"""How many times a bucket's ratio may be the wanted one, or less than it."""
PATCH = 2
"""What a model cuts latents into; sides are multiples of it on the latents, so that a patch of 1 or 2 fits all."""


def read_ratios(text: str) -> tuple[str, ...]:
    """ "auto" or WIDTH:HEIGHT, … → the ratios in their order; UserError for anything else."""
    ratios = AUTO if text == "auto" else tuple(part.strip() for part in text.split(","))
    if wrong := [ratio for ratio in ratios if not RATIO.fullmatch(ratio)]:
        raise UserError(f"--buckets {shown(text)}: {shown(wrong[0])}: auto, or WIDTH:HEIGHT such as 1:1,4:3,3:4")
    if len(ratios) > MOST_RATIOS:
        raise UserError(f"--buckets: {len(ratios)} ratios; at most {MOST_RATIOS}")
    return ratios


def bucket_sides(ratio: str, size: int, unit: int) -> tuple[int, int]:
    """(Height, width) of a bucket: multiples of `unit` with an area of at most size², near that and near the ratio.

    What is minimised is the sum of both deviations, as logarithms; of equal sums the nearer ratio is taken, so that 2:3
    is 3:2 turned. UserError where no sides are near enough.
    """
    wide, _, high = ratio.partition(":")
    wanted, best = int(wide) / int(high), (math.inf, math.inf, 0, 0)
    for height in range(unit, 2 * math.ceil(size / wanted**0.5) + unit, unit):
        below, most = int(height * wanted) // unit * unit, size * size // height // unit * unit
        for width in (min(below, most), min(below + unit, most)):  # the best on either side of the ratio
            off, area = width / height / wanted, height * width / size**2
            if area >= LEAST_AREA and 1 / MOST_OFF <= off <= MOST_OFF:
                unlike = abs(math.log(off))
                best = min(best, (round(unlike - math.log(area), 9), round(unlike, 9), height, width))
    if not best[2]:
        raise UserError(
            f"--buckets {ratio} at --size {size}: no sides that are multiples of {unit} (twice the VAE's factor) have "
            f"about that ratio and {LEAST_AREA:g} to 1 times {size} x {size} pixels; take a larger --size"
        )
    return best[2], best[3]


def all_sides(ratios: Sequence[str], size: int, unit: int) -> list[tuple[int, int]]:
    """(Height, width) of each bucket; UserError where two are the same. Of AUTO the later one is left out then."""
    sides: dict[tuple[int, int], str] = {}
    for ratio in ratios:
        pair = bucket_sides(ratio, size, unit)
        if pair in sides:
            if tuple(ratios) == AUTO:
                continue
            raise UserError(
                f"--buckets: {sides[pair]} and {ratio} would both be {pair[0]}x{pair[1]} at --size {size}: take one"
            )
        sides[pair] = ratio
    return list(sides)


def assign(source: Source, sides: Sequence[tuple[int, int]]) -> np.ndarray:
    """uint8 (images,): the bucket whose ratio is nearest to each image's, by its header and EXIF orientation.

    An image that can't be read goes to the bucket with most images, where encoding names it and leaves it out.
    """
    wanted = np.log([width / height for height, width in sides])

    def nearest(number: int) -> int:
        try:
            height, width = image_sides(source.read(number))
        except (UserError, OSError):
            return -1
        return int(np.abs(wanted - math.log(width / height)).argmin())

    count = len(source.names)
    with ThreadPoolExecutor(max(2, usable_cpus()), "st_fast images") as pool:
        found = np.array(list(bar(pool.map(nearest, range(count)), "looking", count, "image")), np.int64)
    most = int(np.bincount(found[found >= 0], minlength=len(sides)).argmax())
    return np.where(found < 0, most, found).astype(np.uint8)


def assigned(out: Path, source: Source, sides: Sequence[tuple[int, int]]) -> np.ndarray:
    """`assign`, or what it has found before for a folder whose job is the same."""
    if (out / ASSIGNED_FILE).is_file():
        return read_assigned(out, len(source.names), len(sides))
    found, file = assign(source, sides), io.BytesIO()
    np.save(file, found)
    write_atomic(out / ASSIGNED_FILE, file.getvalue())
    return found


def read_assigned(out: Path, count: int, buckets: int) -> np.ndarray:
    """uint8 (count,): what `assigned` has kept, each below `buckets`; `BadFile` where that is not there."""
    path = out / ASSIGNED_FILE
    try:
        there: np.ndarray = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadFile(f"{path}: no array ({error}); remove it, and the same command makes it again") from None
    if there.dtype != np.uint8 or there.shape != (count,) or (count and int(there.max()) >= buckets):
        what = f"{there.dtype} {shown(there.shape)}"
        raise BadFile(
            f"{path}: {what}, the buckets of {count} images are needed; remove it, and the same command makes it again"
        )
    return there


def part_of(source: Source, numbers: np.ndarray, first: bool) -> Source:
    """The source's images of these numbers; the first bucket's also tells what is no image."""
    return replace(
        source,
        names=[source.names[number] for number in numbers],
        labels=source.labels[numbers],
        read=lambda i: source.read(int(numbers[i])),
        stamp=lambda i: source.stamp(int(numbers[i])),
        captions=lambda i: source.captions(int(numbers[i])),
        left_out=source.left_out if first else {},
    )
