"""Which models a probe looks at: stages of runs, models by themselves, and the teachers that stages learnt from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from st_fast import kernels
from st_fast.core.errors import UserError
from st_fast.evaluate.probe.guided import Guide
from st_fast.model import DiffusionTransformer, stored
from st_fast.recipe.architecture import INTERNAL
from st_fast.recipe.methods import Plain, SelfTranscendence, VelocityHead
from st_fast.recipe.schema import Recipe, Stage
from st_fast.sample.source import Source

ROLES = {Plain: "plain", VelocityHead: "stage 1", SelfTranscendence: "stage 2"}
"""What a stage is in the paper's terms, by its method."""


@dataclass(frozen=True)
class Subject:
    """One frozen model: its label in the figures, its stage, and its teacher's label where that one is probed too."""

    label: str
    stage: Stage
    model: DiffusionTransformer
    teacher: str | None
    loaded: dict[str, Any]
    """Of the checkpoint that was read: path, step, weights and their SHA-256."""
    recipe: Recipe
    run: Path | None = None
    """None for a model without a run, whose method isn't known either."""

    @property
    def supervised(self) -> tuple[int, ...]:
        """The blocks that extra supervision reads; none in plain training."""
        tap: int | tuple[int, ...] = self.stage.method.tap
        internal = self.model.config.internal_head
        blocks = (internal if block == INTERNAL else block for block in (tap if isinstance(tap, tuple) else (tap,)))
        return tuple(block for block in blocks if block)

    @property
    def role(self) -> str:
        """One of ROLES, or "" for other methods and where the method isn't known."""
        return ROLES.get(type(self.stage.method), "") if self.run is not None else ""


def check_comparable(sources: Sequence[Sequence[Source]]) -> None:
    """UserError for a model that can't be probed, or not on the same latents as the first."""
    first = sources[0][0]
    for source in (group[0] for group in sources):
        recipe = source.recipe
        for section in ("data", "flow"):
            ours, theirs = getattr(first.recipe, section).path, getattr(recipe, section).path
            if section == "data" and not theirs:
                raise UserError(f"--data FOLDER: needed, {source.path} comes without latents to probe it on")
            if ours != theirs:
                raise UserError(
                    f"{source.path}: {section}.path = {theirs!r}, {first.path} has {ours!r}; probe them one by one"
                )
        if recipe.model.network != "sit":
            raise UserError(f"{source.path}: draws from text; the linear probe needs a network conditional on classes")
        if recipe.model.class_dropout == 0:
            raise UserError(
                f"{source.path}: model.class_dropout = 0; a probe needs the null label, or the class leaks in"
            )


def load_subjects(sources: Sequence[Sequence[Source]]) -> list[Subject]:
    """Every model, on the CUDA device if there is one."""
    device = _device()
    table = kernels.select({}, device)
    subjects: list[Subject] = []
    for group in sources:
        read = []
        for source in group:
            record = dict[str, Any]()
            model = stored.frozen(
                source.weights(), source.recipe.model, table, device, torch.float32, record=record.update
            )
            read.append((source, model, record))
        labels = {source.stage: _label(source, alone=len(sources) == 1) for source in group}
        for source, model, record in read:
            recipe = source.recipe
            stage = next((one for one in recipe.stages if one.name == source.stage), recipe.stages[-1])
            run = source.path if source.run else None
            subjects.append(Subject(labels[source.stage], stage, model, None, record, recipe, run))
    return with_teachers(told_apart(subjects))


def _label(source: Source, alone: bool) -> str:
    """A stage's name; where there are several runs, after its run's."""
    name = source.path.name
    return source.stage if alone or not source.run or name == source.stage else f"{name} · {source.stage}"


def told_apart(subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects under labels that differ: checkpoints of one stage by their steps, runs of a name by their paths."""
    count = Counter(one.label for one in subjects)
    new = [
        one if count[one.label] == 1 else replace(one, label=f"{one.label}, step {one.loaded['step']:,}")
        for one in subjects
    ]
    count = Counter(one.label for one in new)
    return [
        one if count[one.label] == 1 else replace(one, label=f"{one.run or one.loaded['path']} · {one.label}")
        for one in new
    ]


def with_teachers(subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects with the labels of their teachers, where those are other stages of their run that are here too."""
    stages = {(one.run, one.stage.name): one.label for one in reversed(subjects)}
    return [
        one if one.run is None else replace(one, teacher=stages.get((one.run, one.stage.method.teacher_name or "")))
        for one in subjects
    ]


def load_guides(subjects: Sequence[Subject], block: int | None) -> list[Guide]:
    """The teachers of every stage 2, each at the block and with the weights that its student learnt from.

    With a `block`: instead every subject itself, at that block. A teacher that can't be read is left out with a line.
    UserError for a block that a model does not have.
    """
    if block is not None:
        for one in subjects:
            if block > one.model.config.depth:
                raise UserError(f"--block {block}: {one.label} has blocks 1 to {one.model.config.depth}")
        return [Guide(one.label, one.model, block, {}, one.loaded) for one in subjects]
    guides: dict[tuple[str, int], Guide] = {}
    for one in subjects:
        method = one.stage.method
        if one.role != "stage 2" or not isinstance(method, SelfTranscendence):
            continue
        try:
            guide = _teacher(one, method)
        except UserError as error:
            print(f"probe: the features that {one.label} learnt from can't be measured: {error}")
            continue
        key = str(guide.loaded["sha256"]), guide.block
        students = guides[key].students if key in guides else {}
        guides[key] = replace(guides.get(key, guide), students={**students, one.label: method.cfg_scale})
    return list(guides.values())


def _teacher(student: Subject, method: SelfTranscendence) -> Guide:
    """The frozen teacher of a stage 2 of a run."""
    recipe = student.recipe
    here = replace(recipe, run=replace(recipe.run, out=str(student.run)))  # the folder may have been moved
    root = stored.checkpoint_root(here, method.teacher)
    device, record = _device(), dict[str, Any]()
    table, group = kernels.select({}, device), method.teacher_group
    config = recipe.teacher_model(method.teacher)
    model = stored.load_frozen(root, config, group, table, device, torch.float32, record=record.update)
    label = f"{root.parent.parent.name} · {root.parent.name}" if root.name == "checkpoints" else root.stem
    return Guide(label, model, method.teacher_depth, {}, record)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
