"""A grid of pictures, each above the text that it was drawn from."""

import functools
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from st_fast.core.files import printable

TILE, FONT, LINES, GAP = 120, 11, 3, 6
"""Pixels of a picture's side at least, of the text, lines of text at most, pixels between."""
INK = (117, 123, 134)
"""Of texts: as far from white as from black, for the sheet is transparent and lies on light and dark pages."""


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries: Latin, Greek, Cyrillic, Arabic and Hebrew; others become boxes."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), FONT)


def wrapped(text: str, width: int) -> list[str]:
    """At most LINES lines that fit `width` pixels, ending in "…" where there is more."""
    font, text = _font(), printable(" ".join(text[:400].split()))
    characters = max(4, int(width / font.getlength("n")))
    lines = textwrap.wrap(text, characters, max_lines=LINES, placeholder=" …") or [""]
    while characters > 4 and any(font.getlength(line) > width for line in lines):
        characters -= 1
        lines = textwrap.wrap(text, characters, max_lines=LINES, placeholder=" …")
    return lines


def captioned_grid(images: Tensor, captions: Sequence[str], columns: int) -> Tensor:
    """uint8 (B, 1 or 3, H, W) and B texts → one uint8 picture (H', W', 4), row by row, on nothing."""
    factor = max(1, -(-TILE // images.shape[-1]))
    pictures = images.expand(-1, 3, -1, -1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = pictures.shape[2:]
    texts = [wrapped(caption, width) for caption in captions]
    line = FONT + 3
    rows = [range(start, min(start + columns, len(texts))) for start in range(0, len(texts), columns)]
    heights = [height + GAP + line * max(len(texts[i]) for i in row) for row in rows]
    size = GAP + min(columns, len(texts)) * (width + GAP), GAP + sum(heights) + GAP * len(rows)
    sheet = Image.new("RGBA", size, (*INK, 0))
    draw, top = ImageDraw.Draw(sheet), GAP
    for row, used in zip(rows, heights, strict=True):
        for column, number in enumerate(row):
            left = GAP + column * (width + GAP)
            sheet.paste(Image.fromarray(pictures[number].permute(1, 2, 0).numpy()), (left, top))
            for place, text in enumerate(texts[number]):
                at = left + width / 2, top + height + GAP // 2 + place * line
                draw.text(at, text, fill=INK, font=_font(), anchor="ma")
        top += used + GAP
    return torch.from_numpy(np.array(sheet))
