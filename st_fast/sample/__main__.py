"""Draws samples of a run: a picture of a few, or a set of many on any number of ranks.

    python -m st_fast.sample runs/digits
    python -m st_fast.sample runs/digits --stage transcend --num 100 --sampler heun --steps 50 --cfg-scale 2
    torchrun --nproc-per-node 8 -m st_fast.sample runs/sit_xl -n 50000 --preset self-transcendence
    python -m st_fast.sample runs/digits --interpolate 3 8
    python -m st_fast.sample runs/digits --num 20 --gif

A set (--num above 1000, --npz or --png) is a folder with samples.npz as ADM's evaluator reads it, sample.json with
every setting, and grid.png. The same command again continues where it stopped. Every sample's noise and label follow
from (seed, sample number), and every batch from its number, so the number of ranks changes no image.
"""

from __future__ import annotations

from st_fast.core.command import need_run_first

if __name__ == "__main__":
    need_run_first()  # the imports below take seconds, or a minute where csrc is compiled

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from st_fast.core.command import run_command
from st_fast.core.errors import UserError
from st_fast.recipe.schema import Recipe
from st_fast.sample.job import Wanted, draw_set
from st_fast.sample.request import drawing, parser_of, set_folder, wanted_of
from st_fast.sample.shows import draw_grid, draw_interpolation, draw_trajectory

PICTURE_MOST = 1_000
"""Samples above which a grid would be no picture, so that a set is drawn instead."""


@dataclass(frozen=True)
class Request:
    """What `python -m st_fast.sample` was asked for."""

    wanted: Wanted
    out: Path | None
    npz: bool
    png: bool
    interpolate: tuple[int, int] | None
    gif: bool

    @property
    def is_set(self) -> bool:
        """Whether a folder is asked for rather than one picture."""
        return self.npz or self.png or (self.wanted.settings.num > PICTURE_MOST and not (self.gif or self.interpolate))

    @property
    def target(self) -> Path:
        """The file or folder to write."""
        if self.out is not None:
            return self.out
        folder = self.wanted.run / self.wanted.stage / "samples"
        if self.interpolate:
            return folder / f"interpolate-{self.interpolate[0]}-{self.interpolate[1]}.png"
        return set_folder(self.wanted) if self.is_set else folder / ("trajectory.gif" if self.gif else "manual.png")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of("sample", __doc__)
    parser.add_argument("--out", type=Path, help="the picture, or the set's folder (default: in RUN/STAGE/samples)")
    parser.add_argument("--npz", action="store_true", help="a set, whatever its size")
    parser.add_argument("--png", action="store_true", help="a set with a folder of single images")
    shows = parser.add_mutually_exclusive_group()
    shows.add_argument("--interpolate", type=int, nargs=2, metavar=("A", "B"), help="between the noise of two samples")
    shows.add_argument("--gif", action="store_true", help="the way from noise to image")
    return parser


def parse(arguments: Sequence[str]) -> tuple[Request, Recipe]:
    """The command line over the run's own recipe. UserError for a folder without a run, SystemExit(2) for bad flags."""
    given = parser().parse_args(arguments)
    if (given.npz or given.png) and (given.gif or given.interpolate):
        raise UserError("--gif and --interpolate make one picture: without --npz and --png")
    wanted = wanted_of(given, lambda recipe: recipe.sample.num)
    ends = (given.interpolate[0], given.interpolate[1]) if given.interpolate else None
    request = Request(wanted, given.out, given.npz, given.png, ends, given.gif)
    ending = ".gif" if given.gif else ".png"
    if not request.is_set and request.target.suffix != ending:
        raise UserError(f"--out {given.out}: a picture's name ends in {ending}; a folder is for --npz and --png")
    return request, wanted.recipe


def main(arguments: Sequence[str]) -> None:
    """Writes a grid of samples of a run, or what else was asked for."""
    request, _ = parse(arguments)
    with drawing(request.wanted) as (ranks, stop, artist, say):
        if request.is_set:
            draw_set(artist, request.target, request.png, ranks, stop, say)
        elif ranks.first and request.interpolate:
            draw_interpolation(artist, request.interpolate, request.target)
        elif ranks.first:
            (draw_trajectory if request.gif else draw_grid)(artist, request.target)
        say(str(request.target))


if __name__ == "__main__":
    run_command(main)
