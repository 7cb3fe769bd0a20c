"""Single pictures: a grid, the way between two noises, and the way from noise to image as a GIF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.progress import bar
from st_fast.sample import pictures
from st_fast.sample.draw import Draw, draw_of, slerp, starting_noise
from st_fast.sample.files import write_gif
from st_fast.sample.guided import sample_from
from st_fast.sample.job import GRID_COLUMNS, GRID_IMAGES, Artist

FRAMES = 40
"""At most, of a GIF."""


def draw_grid(artist: Artist, path: Path) -> None:
    """The first `num` samples as one PNG."""
    settings, images = artist.wanted.settings, []
    with bar(None, "drawing", settings.num, "image") as progress:
        for first in range(0, settings.num, settings.batch_size):
            images.append(artist.draw(first, min(settings.batch_size, settings.num - first))[0])
            progress.update(len(images[-1]))
    pictures.save_png(pictures.grid(torch.cat(images), GRID_COLUMNS), path)


def draw_interpolation(artist: Artist, ends: tuple[int, int], path: Path) -> None:
    """The noise of sample A turns into that of sample B in ten steps: one row with A's label, one with B's."""
    if min(ends) < 0:
        raise UserError(f"--interpolate {ends[0]} {ends[1]}: numbers of samples, from 0")
    wanted, device = artist.wanted, artist.model.pos_embed.device
    (a, label_a), (b, label_b) = (_noise_and_label(artist, number, device) for number in ends)
    noise = slerp(a, b, GRID_COLUMNS).repeat(2, 1, 1, 1)
    labels = torch.stack((label_a, label_b)).repeat_interleave(GRID_COLUMNS)
    draw = Draw(torch.full_like(labels, ends[0]), labels, wanted.seed)
    latents = sample_from(artist.model, noise, draw, wanted.settings, wanted.recipe.flow.path)
    pictures.save_png(pictures.grid(artist.decode(latents).cpu(), GRID_COLUMNS), path)


def _noise_and_label(artist: Artist, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of one sample: (C, S, S), ()."""
    draw = draw_of(artist.wanted.labels, artist.wanted.seed, number, 1, device)
    return starting_noise(draw, artist.model.config)[0], draw.labels[0]


class Film:
    """Decodes at most FRAMES of the states it is shown, evenly spread, the last among them."""

    def __init__(self, artist: Artist, steps: int) -> None:
        self.artist, self.seen = artist, 0
        count = min(FRAMES, steps)
        self.chosen = {round((i + 1) * steps / count) for i in range(count)}
        self.frames: list[NDArray[np.uint8]] = []

    def __call__(self, x: Tensor) -> None:
        self.seen += 1
        if self.seen in self.chosen:
            self.add(x)

    def add(self, x: Tensor) -> None:
        """One frame, a grid of x (B, C, S, S)."""
        self.frames.append(pictures.enlarged(pictures.grid(self.artist.decode(x).cpu(), GRID_COLUMNS)))


def draw_trajectory(artist: Artist, path: Path) -> None:
    """x_t from t = 1 to 0 of the first samples (as many as a grid holds) as a GIF."""
    wanted, device = artist.wanted, artist.model.pos_embed.device
    draw = draw_of(wanted.labels, wanted.seed, 0, min(wanted.settings.num, GRID_IMAGES), device)
    noise, film = starting_noise(draw, artist.model.config), Film(artist, wanted.settings.steps)
    film.add(noise)
    sample_from(artist.model, noise, draw, wanted.settings, wanted.recipe.flow.path, film)
    write_gif(path, film.frames)
