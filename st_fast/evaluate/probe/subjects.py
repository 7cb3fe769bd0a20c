"""The models that are probed: the stages of run folders, as they were saved last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from st_fast import kernels
from st_fast.core.command import need_run
from st_fast.core.errors import UserError
from st_fast.model import SiT, teacher
from st_fast.recipe import Recipe, load_run
from st_fast.recipe.schema import Stage


@dataclass(frozen=True)
class Subject:
    """One frozen model: its label in the figures, its stage, and its teacher's label where that one is probed too."""

    label: str
    stage: Stage
    model: SiT
    teacher: str | None

    @property
    def supervised(self) -> tuple[int, ...]:
        """The blocks that extra supervision reads; none in plain training."""
        tap: int | tuple[int, ...] = self.stage.method.tap
        return tuple(block for block in (tap if isinstance(tap, tuple) else (tap,)) if block)


def load_recipes(runs: Sequence[Path]) -> list[Recipe]:
    """The runs' recipes; UserError for a folder without one, and where two can't be probed on the same latents."""
    recipes = []
    for run in runs:
        need_run(run)
        recipes.append(load_run(run))
    first = recipes[0]
    for run, recipe in zip(runs, recipes, strict=True):
        for name, ours, theirs in (
            ("data.path", first.data.path, recipe.data.path),
            ("flow.path", first.flow.path, recipe.flow.path),
        ):
            if ours != theirs:
                raise UserError(f"{run}: {name} = {theirs!r}, but {runs[0]} has {ours!r}; probe them one by one")
        if recipe.model.class_dropout == 0:
            raise UserError(f"{run}: model.class_dropout = 0; a probe needs the null label, or the class leaks in")
    return recipes


def load_subjects(runs: Sequence[Path], recipes: Sequence[Recipe], weights: Literal["raw", "ema"]) -> list[Subject]:
    """Every trained stage of every run, on the CUDA device if there is one; UserError where a run has none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = kernels.select({}, device)
    subjects = []
    for run, recipe in zip(runs, recipes, strict=True):
        trained = [s for s in recipe.stages if (run / s.name / "checkpoints").is_dir()]
        if not trained:
            raise UserError(f"{run}: no checkpoints of any stage yet")
        labels = {s.name: label(run, s.name, alone=len(runs) == 1) for s in trained}
        for stage in trained:
            root = run / stage.name / "checkpoints"
            model = teacher.load_frozen(root, recipe.model, weights, table, device, torch.float32)
            subjects.append(Subject(labels[stage.name], stage, model, labels.get(stage.method.teacher_name or "")))
    return subjects


def label(run: Path, stage: str, alone: bool) -> str:
    """How a stage is called in the figures; among several runs with the run's name."""
    return stage if alone or run.name == stage else f"{run.name} · {stage}"
