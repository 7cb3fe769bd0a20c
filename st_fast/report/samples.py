"""Sample grids as data URIs, small enough to embed, each read as an image first."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from st_fast.core.errors import UserError
from st_fast.core.files import inside, shown
from st_fast.report.arms import Arm
from st_fast.report.collect import Record, number

MAX_BYTES = 160_000
MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class Grid:
    """One picture: when it was drawn, what had been spent by then (teacher included), and the picture itself."""

    label: str
    step: int
    flops: float
    uri: str
    width: int
    height: int


def strip(arm: Arm, notes: list[str], most: int = 5) -> list[Grid]:
    """At most `most` grids of a stage, the first and last among them; notes on those that can't be shown."""
    records = arm.stage.records["sample"]
    if len(records) > most:
        records = [records[round(i * (len(records) - 1) / (most - 1))] for i in range(most)]
    grids = (embed(arm, record, notes, width=520) for record in records)
    return [grid for grid in grids if grid]


def last(arm: Arm, notes: list[str]) -> Grid | None:
    """The stage's last grid, larger; None where it has none."""
    records = arm.stage.records["sample"]
    return embed(arm, records[-1], notes, width=960) if records else None


def at_budget(arms: Sequence[Arm], notes: list[str]) -> tuple[float, list[Grid]]:
    """(total FLOPs, the last grid that each of these arms had drawn within it): the most that all of them spent."""
    drawn = [arm for arm in arms if arm.stage.records["sample"] and arm.total.known]
    if len(drawn) < 2:
        return 0.0, []
    budget = min(arm.total.flops for arm in drawn)
    grids = []
    for arm in drawn:
        left = budget * (1 + 1e-9) - arm.teacher.flops
        within = [record for record in arm.stage.records["sample"] if number(record, "flops") <= left]
        grid = embed(arm, within[-1], notes, width=520) if within else None
        if grid:
            grids.append(grid)
    return (budget, grids) if len(grids) > 1 else (0.0, [])


def embed(arm: Arm, record: Record, notes: list[str], width: int) -> Grid | None:
    """The picture of a sample record, at most `width` wide; None, and a note, where it can't be read as an image."""
    name = record["file"]
    try:
        picture = narrowed(open_picture(arm.run.path, name), width)
    except (UserError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "not a picture inside the run folder"
        note = f"The sample {shown(name)} of stage “{arm.stage.name}” is {reason}; it is left out."
        if note not in notes:
            notes.append(note)
        return None
    flops = number(record, "flops") + arm.teacher.flops
    return Grid(arm.label, int(record["step"]), flops, data_uri(picture), picture.width, picture.height)


def narrowed(picture: Image.Image, width: int) -> Image.Image:
    """The picture, at most `width` wide."""
    if picture.width <= width:
        return picture
    height = max(1, round(picture.height * width / picture.width))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def open_picture(folder: Path, name: str) -> Image.Image:
    """Decodes a PNG inside the folder; never follows a path out of it, never opens an absurdly large one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(inside(folder, name), formats=("PNG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError("too large")
                return image.convert("RGB" if image.mode not in ("L", "1") else "L")
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from None


def data_uri(picture: Image.Image) -> str:
    """PNG where that is small, else JPEG: photographs need no exact pixels at this size."""
    for format_, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        picture.save(buffer, format_, **options)
        if buffer.tell() <= MAX_BYTES:
            break
    return f"data:image/{format_};base64,{base64.b64encode(buffer.getvalue()).decode()}"
