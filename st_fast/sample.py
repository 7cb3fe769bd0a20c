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

from st_fast.errors import need_run_first

if __name__ == "__main__":
    need_run_first()  # the imports below take seconds, or a minute where csrc is compiled

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from st_fast import parallel
from st_fast.errors import UserError, need_run, run_command
from st_fast.formats.origin import newest_stage
from st_fast.interrupt import StopRequest, stop_on_signals
from st_fast.kernels.heap import keep_freed_memory
from st_fast.model.compiling import keep_compiled
from st_fast.parallel import Ranks
from st_fast.recipe import load_run
from st_fast.recipe.schema import Recipe
from st_fast.sampling.draw import Draw, balanced, read_labels
from st_fast.sampling.guided import guided_velocity, sample, sample_batches
from st_fast.sampling.job import DTYPES, Artist, Wanted, draw_set, load_artist, with_sampling
from st_fast.sampling.presets import PRESETS
from st_fast.sampling.shows import draw_grid, draw_interpolation, draw_trajectory
from st_fast.sampling.solvers import dopri5, euler, euler_maruyama, heun, score

__all__ = [
    "Draw",
    "balanced",
    "dopri5",
    "euler",
    "euler_maruyama",
    "guided_velocity",
    "heun",
    "main",
    "sample",
    "sample_batches",
    "score",
]

PICTURE_MOST = 1_000
"""Samples above which a grid would be no picture, so that a set is drawn instead."""
PATIENCE_S = 7 * 24 * 3_600.0
"""How long a rank waits for the others: batches of one may be cheaper than those of another."""


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


def set_folder(wanted: Wanted) -> Path:
    """Where a set goes by default: its name says how it was drawn."""
    drawn = wanted.settings
    steps = "" if drawn.sampler == "dopri5" else f"{drawn.steps}"
    return wanted.run / wanted.stage / "samples" / f"{drawn.num}-{drawn.sampler}{steps}-cfg{drawn.cfg_scale:g}"


def parser_of(command: str, text: str | None) -> argparse.ArgumentParser:
    """The flags that say which model draws which samples; other commands add their own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m st_fast.{command}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder, such as runs/digits")
    parser.add_argument("--stage", help="the stage whose model draws (default: the last one that was trained)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("-n", "--num", type=int, help="how many samples (torchrun takes --num for a flag of its own)")
    parser.add_argument("--labels", default="balanced", help="balanced (i mod classes), random, or such as 0,3,7")
    parser.add_argument("--seed", type=int, help="of the noise and of random labels (default: the run's)")
    parser.add_argument("--batch-size", type=int, help="of each rank; a dopri5 batch shares its steps")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="published settings; flags beside it win")
    parser.add_argument("--sampler", choices=("euler", "heun", "dopri5", "sde"))
    parser.add_argument("--steps", type=int, help="of all samplers but dopri5, which chooses its own")
    parser.add_argument("--cfg-scale", type=float, help="guidance ω; 1 is none")
    parser.add_argument("--cfg-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times t with guidance")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="auto: on CUDA")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help="of the model; solvers use fp32")
    return parser


def wanted_of(given: argparse.Namespace, num: Callable[[Recipe], int], needs_model: bool = True) -> Wanted:
    """The flags over the run's own recipe, which says `num` where no flag does; UserError without a run.

    Its weights have to be there if `needs_model`.
    """
    need_run(given.run)
    recipe = load_run(given.run)
    keys = ("num", "batch_size", "sampler", "steps", "cfg_scale")
    flags = {key: getattr(given, key) for key in keys} | {"cfg_range": given.cfg_range and tuple(given.cfg_range)}
    preset = PRESETS[given.preset] if given.preset else {}
    chosen = {"num": num(recipe)} | preset | {key: value for key, value in flags.items() if value is not None}
    stage = newest_stage(given.run, recipe, given.stage) if needs_model else given.stage or recipe.stages[-1].name
    return Wanted(
        given.run, recipe, stage, given.weights,
        with_sampling(recipe, chosen), read_labels(given.labels, recipe.model.num_classes),
        recipe.run.seed if given.seed is None else given.seed, given.precision, given.compile,
    )  # fmt: skip


@contextmanager
def drawing(wanted: Wanted) -> Iterator[tuple[Ranks, StopRequest, Artist, Callable[[str], None]]]:
    """This process among its ranks, with the model loaded; the last of the four speaks on the first rank only."""
    keep_compiled(wanted.run / "compiled")
    keep_freed_memory()
    with parallel.ranks("auto", PATIENCE_S) as ranks, stop_on_signals() as stop:
        say: Callable[[str], None] = functools.partial(print, flush=True) if ranks.first else (lambda text: None)
        yield ranks, stop, load_artist(wanted, ranks, say), say


def parse(arguments: Sequence[str]) -> tuple[Request, Recipe]:
    """The command line over the run's own recipe. UserError for a folder without a run, SystemExit(2) for bad flags."""
    parser = parser_of("sample", __doc__)
    parser.add_argument("--out", type=Path, help="the picture, or the set's folder (default: in RUN/STAGE/samples)")
    parser.add_argument("--npz", action="store_true", help="a set, whatever its size")
    parser.add_argument("--png", action="store_true", help="a set with a folder of single images")
    shows = parser.add_mutually_exclusive_group()
    shows.add_argument("--interpolate", type=int, nargs=2, metavar=("A", "B"), help="between the noise of two samples")
    shows.add_argument("--gif", action="store_true", help="the way from noise to image")
    given = parser.parse_args(arguments)
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
