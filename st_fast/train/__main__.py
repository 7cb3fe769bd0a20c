"""Runs a recipe: every stage in order, then the report. The same command again continues where it stopped.

    torchrun -m st_fast.train recipes/digits.toml
    torchrun --nproc-per-node 8 -m st_fast.train recipes/sit_xl.toml --data.path=/data/imagenet256
    python -m st_fast.train recipes/sit_xl.toml --dry-run

Options are `--section.key=value`, `--stage.NAME.key=value`, and

    --dry-run          print the resolved recipe, parameters, FLOPs and memory, and stop
    --accept-changes   resume although the recipe's mathematics changed since the run began
    --debug            show the traceback of an error

Exit codes: 0 done, 1 the run failed, 2 something given is wrong, 75 interrupted by a signal, with all saved.
"""

from st_fast.core.signals import catch_signals

if __name__ == "__main__":
    catch_signals()  # before the imports below, and torch's, which take seconds

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

from st_fast.core.command import command_parser, run_command
from st_fast.core.errors import UserError
from st_fast.core.machine import local_rank, rank, rank_count
from st_fast.core.streams import show
from st_fast.recipe import Recipe, cost, load, to_toml
from st_fast.recipe.batch import AUTO, images_a_pass, with_passes_of
from st_fast.recipe.check_run import graphs_problem
from st_fast.recipe.error import cut
from st_fast.recipe.keys import choices, describe, keys
from st_fast.recipe.schema import SECTIONS

CARD_BYTES = 78 * 2**30
"""What an 80 GB card leaves to a process, about: for a plan where there is no GPU."""


def parser() -> argparse.ArgumentParser:
    """The command line, with every key of a recipe, for --help and completion; `parse` reads it."""
    parser = command_parser("train", __doc__)
    parser.usage = "python -m st_fast train RECIPE [--section.key=value ...] [--stage.NAME.key=value ...]"
    parser.add_argument("recipe", help="a TOML file; the options below override it (docs/recipe.md has all keys)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and its costs, and stop")
    parser.add_argument("--accept-changes", action="store_true", help="resume although the mathematics changed")
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(f"[{section}]")
        for name, key in keys(cls).items():
            words = choices(key.kind)
            if key.kind is bool or bool in get_args(key.kind):
                words = ("true", "false", *words)
            text = f"{key.help} ({describe(key.kind)})".replace("%", "%%")
            group.add_argument(f"--{section}.{name}", choices=words or None, metavar="VALUE", help=text)
    return parser


def parse(arguments: Sequence[str]) -> tuple[str, list[str], set[str]]:
    """The recipe, the overrides and the flags. UserError for anything else."""
    flags = {"--dry-run", "--accept-changes"} & set(arguments)
    overrides = [a for a in arguments if a.startswith("--") and a not in flags]
    recipes = [a for a in arguments if not a.startswith("--")]
    if len(recipes) != 1:
        raise UserError(
            f"expected one recipe, got {len(recipes)}: {' '.join(map(cut, recipes)) or 'none'}{hint(arguments)}"
        )
    return recipes[0], overrides, flags


def hint(arguments: Sequence[str]) -> str:
    """How an override should have been written whose value stands beside it, without `=`; empty where none does."""
    for option, value in pairwise(arguments):
        if option.startswith("--") and "." in option and "=" not in option and not value.startswith("--"):
            return f"; write {cut(option)}={cut(value)}, with = between key and value"
    return ""


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's text."""
    if not arguments or {"-h", "--help"} & set(arguments):
        show(parser().format_help())
        return
    path, overrides, flags = parse(arguments)
    count = rank_count()
    try:
        recipe = load(path, overrides, count)
    except UserError as error:
        if count > 1 and "--dry-run" not in flags:
            from st_fast.train.agreement import refuse

            refuse(error)  # others, which may have been given another command, would wait for this rank
        raise
    if "--dry-run" in flags:
        if rank() == 0:
            show(f"{to_toml(recipe)}{summary(recipe, count)}")
        return
    from st_fast.train.run import run  # torch is imported only once the recipe is known to be right

    run(recipe, "--accept-changes" in flags, Path(path))


def summary(recipe: Recipe, ranks: int) -> str:
    """Parameters, FLOPs per step of each stage and memory, as comments under the recipe."""
    model = recipe.model
    bf16 = recipe.run.bf16(recipe.run.device)
    chosen, how = planned_passes(recipe, ranks, bf16)
    fixed, activations = cost.memory_bytes(chosen, ranks, bf16)
    tokens = f"{model.tokens} tokens"
    if model.text_length:
        tokens = f"{model.tokens} image and {model.text_length} text tokens"
    lines = [
        f"# {model.name}: {model.parameters / 1e6:.1f} M parameters, {tokens}, "
        f"{cost.trunk_macs(model) / 1e9:.2f} G multiply-adds forward",
    ]
    for stage in recipe.stages:
        each, images = cost.stage_cost(recipe, stage), recipe.optim.batch_size
        whole, own = cost.stage_flops(recipe, stage, 0, stage.steps), recipe.for_stage(stage).model.parameters
        more = f"{own / 1e6:.1f} M parameters, " if own != model.parameters else ""  # an internal head or a fusion
        turns = sorted({stage.method.stop_step, stage.routing.dense_after})  # where supervision or a route ends
        later = "".join(
            f", {cost.stage_flops(recipe, stage, turn, turn + 1) / 1e12:.3f} after step {turn}"
            for turn in turns
            if 0 < turn < stage.steps
        )
        lines.append(
            f"# {stage.name}: {more}{images * each.total / 1e12:.3f} TFLOP a step "
            f"(student {each.student / 1e9:.2f}, heads {each.heads / 1e9:.2f}, "
            f"teacher {each.teacher / 1e9:.2f} GFLOP an image){later}, {whole / 1e15:.4g} PFLOP in {stage.steps} steps"
        )
        if stage.method.stop_below != "off":
            comparison = cost.comparison_flops(recipe, stage) / 1e12
            lines.append(
                f"# {stage.name}: gradients are compared every {stage.method.stop_every} steps, {comparison:.3f} TFLOP "
                "each time, which is not in the sum; supervision may end sooner"
            )
    lines += inputs(recipe)
    of = f"each of {ranks} ranks" if ranks > 1 else "one rank (under torchrun: of each of its ranks)"
    lines.append(
        f"# memory of {of}, estimated in {'bf16' if bf16 else 'fp32'}: {fixed / 2**30:.2f} GiB weights and state + "
        f"{activations / 2**30:.2f} GiB activations of {images_a_pass(chosen.optim, ranks)} images"
    )
    lines += [f'# optim.micro_batch = "auto": {how}'] if how else []
    if recipe.run.cuda_graphs == "auto" and recipe.run.device != "cpu":
        problem = graphs_problem(chosen, ranks)
        how = "tried on a GPU at each stage's start" if problem is None else f"left out: {problem.short}"
        lines.append(f'# run.cuda_graphs = "auto": {how}')
    lines += [f"# {line}" for line in (*cost.untrained_averages(recipe), *cost.unfinished_warmups(recipe))]
    again = 2 * cost.recomputed_macs(model, recipe.run.checkpointing)
    if again:
        lines.append(
            f"# run.checkpointing = {recipe.run.checkpointing!r}: {again / 1e9:.2f} GFLOP an image are computed twice; "
            "neither FLOPs nor MFU count them"
        )
    return "\n".join(lines)


def inputs(recipe: Recipe) -> list[str]:
    """What the recipe reads that earlier stages don't write, and what of it is missing."""

    def missing(path: str) -> str:
        return "" if path in own or Path(path).exists() else ", which is missing"

    lines, own, data = list[str](), [stage.name for stage in recipe.stages], recipe.data
    if data.source == "shards":
        lines += [f"# data: {path}{missing(path)}" for path in (data.path, data.images) if path and missing(path)]
    for stage in recipe.stages:
        if (teacher := stage.method.teacher_name) and teacher not in own:
            lines.append(f"# {stage.name}: its teacher is {teacher} ({stage.method.teacher_group}){missing(teacher)}")
        if init := stage.start.init:
            lines.append(f"# {stage.name}: starts from {init} ({stage.start.init_weights}){missing(init)}")
    return lines


def planned_passes(recipe: Recipe, ranks: int, bf16: bool) -> tuple[Recipe, str]:
    """The recipe with the passes that "auto" would choose on this machine's device, and how it came to them.

    Where there is no such device, as a card of 80 GB would have it. An empty text where "auto" is not asked.
    """
    if recipe.optim.micro_batch != AUTO:
        return recipe, ""
    import torch

    from st_fast.core.checkpoint.meta import MicroBatch
    from st_fast.train import memory

    here = recipe.run.device == "cpu" or torch.cuda.is_available()
    device = torch.device("cpu" if recipe.run.device == "cpu" else f"cuda:{local_rank()}")
    room = memory.capacity(device) if here else CARD_BYTES
    where = f"{device}, {room / 2**30:.1f} GiB" if here else f"no GPU here; on a card with {room / 2**30:.1f} GiB"
    images = cost.largest_micro_batch(recipe, ranks, bf16, room)
    if not images:
        return recipe, f"not one image a pass fits ({where})"
    chosen = with_passes_of(images, recipe, ranks)
    badly = memory.splits_badly(recipe, MicroBatch(images, ranks), bf16, room)
    return chosen, f"{images} images a pass, {chosen.optim.accumulation} a step ({where}){badly}"


if __name__ == "__main__":
    run_command(main)
