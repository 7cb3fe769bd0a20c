"""Which model draws which samples: the flags that every command that draws understands, and the model, ready."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from st_fast.core.command import command_parser, need_run
from st_fast.core.ranks import Ranks, process_group
from st_fast.core.signals import StopRequest, stop_on_signals
from st_fast.kernels.heap import keep_freed_memory
from st_fast.model.compiling import keep_compiled
from st_fast.model.formats.model_source import newest_stage
from st_fast.recipe import load_run
from st_fast.recipe.schema import Recipe
from st_fast.sample.draw import read_labels
from st_fast.sample.job import DTYPES, Artist, Wanted, load_artist, with_sampling
from st_fast.sample.presets import PRESETS

PATIENCE_S = 7 * 24 * 3_600.0
"""How long a rank waits for the others: batches of one may be cheaper than those of another."""


def set_folder(wanted: Wanted) -> Path:
    """Where a set goes by default: its name says how it was drawn."""
    drawn = wanted.settings
    steps = "" if drawn.sampler == "dopri5" else f"{drawn.steps}"
    return wanted.run / wanted.stage / "samples" / f"{drawn.num}-{drawn.sampler}{steps}-cfg{drawn.cfg_scale:g}"


def parser_of(command: str, text: str | None) -> argparse.ArgumentParser:
    """The flags that say which model draws which samples; other commands add their own."""
    parser = command_parser(command, text)
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
    with process_group("auto", PATIENCE_S) as ranks, stop_on_signals() as stop:
        say: Callable[[str], None] = functools.partial(print, flush=True) if ranks.first else (lambda text: None)
        yield ranks, stop, load_artist(wanted, ranks, say), say
