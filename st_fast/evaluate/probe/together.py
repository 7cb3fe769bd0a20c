"""Probes the stages of run folders, as they were saved last: checkpoints in, figures and `probe.json` out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from st_fast import kernels
from st_fast.core.command import need_run
from st_fast.core.errors import UserError
from st_fast.core.files import make_folder, write_json_atomic
from st_fast.evaluate.probe.drawing import Drawn, Subject, draw_all
from st_fast.evaluate.probe.examine import Findings, chosen_blocks, examine
from st_fast.evaluate.probe.latents import SEED, load_split
from st_fast.evaluate.probe.measures import cka, cosine
from st_fast.model import stored
from st_fast.recipe import Recipe, load_run


def probe(runs: Sequence[Path], weights: Literal["raw", "ema"], images: int, times: Sequence[float], bins: int) -> Path:
    """Probes every trained stage of the runs, writes into the first one's `probe` folder and returns that."""
    recipes = load_recipes(runs)
    subjects = load_subjects(runs, recipes, weights)
    split = load_split(Path(recipes[0].data.path), images)
    path = recipes[0].flow.path
    found = [
        examine(s.model, split, chosen_blocks(s.model.config.depth, s.supervised), times, bins, path) for s in subjects
    ]
    middle = int(np.abs(np.asarray(times) - 0.5).argmin())
    alignments = [aligned(subject, subjects, found, middle) for subject in subjects]
    folder = runs[0] / "probe"
    clean = split.pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy() / 255
    make_folder(folder)
    result = {
        "weights": weights, "times": list(times), "seed": SEED, "dataset": split.digest,
        "train_images": len(split.train.x), "held_out_images": len(split.held_out.x), "held_out_unseen": split.unseen,
        "models": [
            {
                "label": subject.label, "supervised_blocks": list(subject.supervised), "teacher": subject.teacher,
                "blocks": one.blocks, "accuracy": one.accuracy, "velocity_loss": one.loss, "alignment": alignment,
            }
            for subject, one, alignment in zip(subjects, found, alignments, strict=True)
        ],
        "figures": draw_all(folder, Drawn(subjects, found, alignments, list(times), middle, clean)),
    }  # fmt: skip
    write_json_atomic(folder / "probe.json", result)
    return folder


def aligned(subject: Subject, subjects: Sequence[Subject], found: Sequence[Findings], at: int) -> dict[str, Any]:
    """CKA and mean cosine of the tokens of a model's blocks, with one another and with its teacher's blocks.

    Cosines with the teacher are left out: the channels of two networks do not correspond.
    """
    own = found[subjects.index(subject)].tokens[at]
    result: dict[str, Any] = {"cka": matrix(own, own, cka), "cosine": matrix(own, own, cosine), "with_teacher": None}
    for other, theirs in zip(subjects, found, strict=True):
        if other.label == subject.teacher:
            shared = matrix(own, theirs.tokens[at], cka)
            result["with_teacher"] = {"teacher": other.label, "blocks": theirs.blocks, "cka": shared}
    return result


def matrix(rows: Sequence[Any], columns: Sequence[Any], measure: Any) -> list[list[float | None]]:
    """`measure` of every pair of token sets (n, N, D), taken as (n·N, D); None where it isn't defined."""
    a, b = ([tokens.reshape(-1, tokens.shape[-1]) for tokens in side] for side in (rows, columns))
    values = [[measure(x, y) for y in b] for x in a]
    return [[value if np.isfinite(value) else None for value in line] for line in values]


def load_recipes(runs: Sequence[Path]) -> list[Recipe]:
    """The runs' recipes; UserError for a folder without one, and where two can't be probed on the same latents."""
    for run in runs:
        need_run(run)
    recipes = [load_run(run) for run in runs]
    first = recipes[0]
    for run, recipe in zip(runs, recipes, strict=True):
        for section in ("data", "flow"):
            ours, theirs = getattr(first, section).path, getattr(recipe, section).path
            if ours != theirs:
                raise UserError(f"{run}: {section}.path = {theirs!r}, {runs[0]} has {ours!r}; probe them one by one")
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
        alone = len(runs) == 1  # else a stage's name is preceded by its run's
        labels = {s.name: s.name if alone or run.name == s.name else f"{run.name} · {s.name}" for s in trained}
        for stage in trained:
            root = run / stage.name / "checkpoints"
            model = stored.load_frozen(root, recipe.model, weights, table, device, torch.float32)
            subjects.append(Subject(labels[stage.name], stage, model, labels.get(stage.method.teacher_name or "")))
    return subjects
