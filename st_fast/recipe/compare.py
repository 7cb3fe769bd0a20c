"""What differs between two recipes in a way that a resumed run would notice."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from st_fast.recipe.error import show
from st_fast.recipe.methods import supervision_name
from st_fast.recipe.schema import SECTIONS, Recipe, Stage

HARMLESS_SECTIONS = frozenset({"sample", "evaluate", "kernels", "profile"})
"""Sections that only look at a run, or choose how the same mathematics is computed."""

HARMLESS = frozenset(
    {
        # The sizes that the name stands for are compared themselves.
        "model.name",
        "model.attention",
        "model.modulation",
        # Where the data lies; that it is the same data, its digest says.
        "data.path",
        "data.images",
        "data.images_subset",
        "data.loader",
        "data.verify",
        # The global batch is what the update sees, however it is split.
        "optim.accumulation",
        "optim.micro_batch",
        "optim.implementation",
        "run.out",
        "run.device",
        "run.compile",
        "run.checkpointing",
        # When the same work is done, and on which stream.
        "run.teacher_branches",
        "run.teacher_placement",
        "run.supervised_rows",
        "run.prefetch",
        "run.cuda_graphs",
        "run.streams",
        # The same sums in another order, as with another number of ranks.
        "run.sharding",
        "run.shard_teacher",
        "run.log_every",
        "run.save_every",
        "run.keep",
        "run.keep_every",
        "run.max_bad_steps",
        "run.spike_ratio",
        "run.spike_retries",
        "run.hang_timeout",
        "run.trackers",
    }
)
"""Single keys of the same kind."""


def changed_maths(old: Recipe, new: Recipe) -> list[str]:
    """One line for each difference that changes the mathematics or the stream of samples; empty: safe to resume.

    A stage may change its length and stages may be added at the end; no stage may be removed, renamed or moved.
    """
    lines: list[str] = []
    for name in SECTIONS:
        if name not in HARMLESS_SECTIONS:
            lines += _differences(name, getattr(old, name), getattr(new, name))
    for position, stage in enumerate(old.stages):
        lines += _stage_differences(stage, new.stages[position] if position < len(new.stages) else None)
    return lines


def _stage_differences(old: Stage, new: Stage | None) -> list[str]:
    if new is None:
        return [f"stage.{old.name}: removed"]
    if old.name != new.name:
        return [f"stage.{old.name}: its place is taken by stage.{new.name}"]
    if type(old.method) is not type(new.method):
        before, after = supervision_name(old.method), supervision_name(new.method)
        return [f"stage.{old.name}.supervision: {show(before)} → {show(after)}"]
    label = f"stage.{old.name}"
    return _differences(label, old.method, new.method) + _differences(label, old.start, new.start)


def _differences(prefix: str, old: Any, new: Any) -> list[str]:
    keys = [f.name for f in fields(old) if f"{prefix}.{f.name}" not in HARMLESS]
    pairs = [(key, getattr(old, key), getattr(new, key)) for key in keys]
    return [f"{prefix}.{key}: {show(before)} → {show(after)}" for key, before, after in pairs if before != after]
