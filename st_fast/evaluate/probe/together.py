"""All probes of some runs: models and latents in, figures and `probe.json` out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from st_fast.core.files import make_folder, write_json_atomic
from st_fast.evaluate.probe.drawing import Drawn, draw_all
from st_fast.evaluate.probe.examine import Findings, chosen_blocks, examine
from st_fast.evaluate.probe.latents import SEED, load_split
from st_fast.evaluate.probe.measures import cka, cosine
from st_fast.evaluate.probe.subjects import Subject, load_recipes, load_subjects


def probe(runs: Sequence[Path], weights: Literal["raw", "ema"], images: int, times: Sequence[float], bins: int) -> Path:
    """Probes every trained stage of the runs, writes into the first one's `probe` folder and returns that."""
    recipes = load_recipes(runs)
    subjects = load_subjects(runs, recipes, weights)
    split = load_split(Path(recipes[0].data.path), images)
    path = recipes[0].flow.path
    found = [
        examine(s.model, split, chosen_blocks(s.model.config.depth, s.supervised), times, bins, path) for s in subjects
    ]
    middle = nearest(times, 0.5)
    alignments = [aligned(subject, subjects, found, middle) for subject in subjects]
    folder = runs[0] / "probe"
    clean = split.pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy() / 255
    make_folder(folder)
    drawn = draw_all(folder, Drawn(subjects, found, alignments, list(times), middle, clean))
    write_json_atomic(
        folder / "probe.json",
        {
            "weights": weights,
            "times": list(times),
            "seed": SEED,
            "dataset": split.digest,
            "train_images": len(split.train.x),
            "held_out_images": len(split.held_out.x),
            "held_out_unseen": split.unseen,
            "models": [
                _numbers(s, f, a) for s, f, a in zip(subjects, found, alignments, strict=True)
            ],
            "figures": drawn,
        },
    )  # fmt: skip
    return folder


def nearest(times: Sequence[float], wanted: float) -> int:
    """The place of the time nearest to `wanted`."""
    return int(np.abs(np.asarray(times) - wanted).argmin())


def aligned(subject: Subject, subjects: Sequence[Subject], found: Sequence[Findings], at: int) -> dict[str, Any]:
    """CKA and mean cosine of the tokens of a model's blocks, with one another and with its teacher's blocks.

    Cosines with the teacher are left out: two networks' channels have nothing to do with one another.
    """
    mine = found[subjects.index(subject)]
    own = mine.tokens[at]
    result: dict[str, Any] = {
        "cka": matrix(own, own, cka),
        "cosine": matrix(own, own, cosine),
        "with_teacher": None,
    }
    for other, theirs in zip(subjects, found, strict=True):
        if other.label == subject.teacher:
            result["with_teacher"] = {
                "teacher": other.label,
                "blocks": theirs.blocks,
                "cka": matrix(own, theirs.tokens[at], cka),
            }
    return result


def matrix(rows: Sequence[Any], columns: Sequence[Any], measure: Any) -> list[list[float | None]]:
    """`measure` of every pair of token sets (n, N, D), taken as (n·N, D); None where it isn't defined."""
    a, b = ([tokens.reshape(-1, tokens.shape[-1]) for tokens in side] for side in (rows, columns))
    values = [[measure(x, y) for y in b] for x in a]
    return [[value if np.isfinite(value) else None for value in line] for line in values]


def _numbers(subject: Subject, found: Findings, alignment: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": subject.label,
        "supervised_blocks": list(subject.supervised),
        "teacher": subject.teacher,
        "blocks": found.blocks,
        "accuracy": found.accuracy,
        "velocity_loss": found.loss,
        "alignment": alignment,
    }
