"""Pictures of a few samples: a grid, the interpolation of two noises, and a GIF from noise to image.

Each holds the settings that it was drawn with, a PNG as a text chunk and a GIF as its comment.
"""

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from st_fast.core.comparison import check_same, differences
from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, make_folder, read_bytes, write_atomic
from st_fast.core.progress import bar
from st_fast.sample.captioned import captioned_grid
from st_fast.sample.draw import Draw, slerp, starting_noise
from st_fast.sample.model import Sampler
from st_fast.sample.prompts import Prompts

GRID_COLUMNS, GRID_IMAGES = 10, 100
FRAMES = 40
"""At most, of a GIF."""
FRAME_MS, LAST_FRAME_MS = 80, 2_000

Record = Mapping[str, Any]
"""All that a picture follows from, as JSON has it."""
RECORD = "st_fast.sample"
"""The name of a PNG's text with its record."""


def grid(images: Tensor, columns: int = GRID_COLUMNS, gap: int = 2) -> Tensor:
    """uint8 (B, 1 or 3, H, W) → one uint8 picture (H', W', 1 or 3), row by row, on white."""
    batch, channels, height, width = images.shape
    rows = -(-batch // columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet.permute(1, 2, 0)


def enlarged(picture: Tensor, smallest: int = 480) -> NDArray[np.uint8]:
    """A picture (H, W, 1, 3 or 4) as an array, larger by a whole factor so that it is ≥ `smallest` wide."""
    factor = max(1, -(-smallest // picture.shape[1]))
    array = picture.repeat_interleave(factor, 0).repeat_interleave(factor, 1).numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


def png(picture: Tensor, smallest: int = 480, record: Record | None = None) -> bytes:
    """A picture (H, W, 1, 3 or 4) as PNG, enlarged by a whole factor until its width reaches `smallest` pixels."""
    file, texts = io.BytesIO(), PngInfo()
    if record is not None:
        texts.add_text(RECORD, json.dumps(record))
    Image.fromarray(enlarged(picture, smallest)).save(file, "png", pnginfo=texts)
    return file.getvalue()


def save_png(picture: Tensor, path: Path, smallest: int = 480, record: Record | None = None) -> None:
    """Writes `png` of a picture; on a full disk an OSError, and nothing under that name."""
    make_folder(path.parent)
    write_atomic(path, png(picture, smallest, record))


def read_record(path: Path) -> Record | None:
    """The settings that a picture was drawn with; None if it holds none, or is no picture."""
    opened = GifImageFile if path.suffix == ".gif" else PngImageFile  # Image.open refuses the size of large grids
    try:
        with opened(io.BytesIO(read_bytes(path))) as picture:  # never waits for a pipe
            found = json.loads(picture.info.get(RECORD) or picture.info.get("comment") or "")
    except (BadFile, OSError, ValueError, SyntaxError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def free_name(path: Path, record: Record) -> Path:
    """`path`, or with -2, -3, … behind its name: the first that is not there, or was drawn with the same settings."""
    names = itertools.chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists() or not differences(read_record(name) or {}, record))


def check_replaced(path: Path, record: Record) -> None:
    """UserError where a picture of other settings, or any other file, has the name."""
    if path.exists():
        if (there := read_record(path)) is None:
            raise UserError(f"{path}: is there already, without the settings of samples; choose another --out")
        check_same(there, record, f"{path}: holds samples drawn with", "choose another --out")


def draw_grid(sampler: Sampler, path: Path, record: Record) -> None:
    """The first `num` samples as one PNG."""
    settings, images, labels = sampler.request.settings, [], []
    with bar(None, "drawing", settings.num, "image") as progress:
        for first in range(0, settings.num, settings.batch_size):
            drawn = sampler.images(first, min(settings.batch_size, settings.num - first))
            images.append(drawn[0])
            labels += drawn[1].tolist()
            progress.update(len(images[-1]))
    save_png(sheet(torch.cat(images), labels, sampler.prompts), path, record=record)


def sheet(images: Tensor, labels: Sequence[int], prompts: Prompts | None) -> Tensor:
    """Samples as one picture (H', W', 1 or 3); drawn from text, each above its prompt, with an alpha channel (4)."""
    if prompts is None:
        return grid(images, class_columns(labels))
    count = len(prompts.texts)
    fitting = count if count < GRID_COLUMNS else next((n for n in range(GRID_COLUMNS, 4, -1) if count % n == 0), 0)
    columns = fitting if fitting and len(images) > count else GRID_COLUMNS  # a prompt's samples in one column
    return captioned_grid(images, [prompts.texts[label] for label in labels], columns)


def class_columns(labels: Sequence[int]) -> int:
    """How many columns put each class into columns of its own, where samples are of few classes in turn."""
    periods = range(1, min(GRID_COLUMNS, len(labels) - 1) + 1)
    period = next((n for n in periods if labels[n:] == labels[:-n]), 1)
    return GRID_COLUMNS // period * period


def draw_interpolation(sampler: Sampler, ends: tuple[int, int], path: Path, record: Record) -> None:
    """From the noise of sample A to that of sample B in ten images: one row with A's label, one with B's."""
    draws = [sampler.draw_of(number, 1) for number in ends]
    a, b = (starting_noise(draw, sampler.model.config)[0] for draw in draws)
    labels = torch.cat([draw.labels for draw in draws]).repeat_interleave(GRID_COLUMNS)
    draw = Draw(torch.full_like(labels, ends[0]), labels, sampler.request.seed, sampler.prompts)
    latents = sampler.latents(slerp(a, b, GRID_COLUMNS).repeat(2, 1, 1, 1), draw)
    save_png(grid(sampler.decode(latents).cpu()), path, record=record)


def draw_trajectory(sampler: Sampler, path: Path, record: Record) -> None:
    """x_t from t = 1 to 0 of the first samples (as many as a grid holds) as a GIF of evenly spread steps."""
    settings = sampler.request.settings
    draw = sampler.draw_of(0, min(settings.num, GRID_IMAGES))
    noise, count = starting_noise(draw, sampler.model.config), min(FRAMES, settings.steps)
    chosen = {round((i + 1) * settings.steps / count) for i in range(count)}
    frames: list[Image.Image] = []
    steps = itertools.count()

    def watch(x: Tensor) -> None:
        if (step := next(steps)) in chosen or step == 0:
            frames.append(Image.fromarray(enlarged(grid(sampler.decode(x).cpu()))))

    watch(noise)
    sampler.latents(noise, draw, watch)
    times, file = [*[FRAME_MS] * (len(frames) - 1), LAST_FRAME_MS], io.BytesIO()
    comment = json.dumps(record).encode()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=times, loop=0, comment=comment)
    make_folder(path.parent)
    write_atomic(path, file.getvalue())
