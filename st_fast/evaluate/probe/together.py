"""Probes stages of runs, as they were saved last, and other models: checkpoints in, figures and `probe.json` out."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from st_fast.core.files import make_folder, write_json_atomic
from st_fast.evaluate.probe.claims import Evidence, decide
from st_fast.evaluate.probe.drawing import Models, draw_all
from st_fast.evaluate.probe.examine import Findings, chosen_blocks, examine
from st_fast.evaluate.probe.guided import Guidance, Guide, guidance, scales_of
from st_fast.evaluate.probe.latents import SEED, load_split
from st_fast.evaluate.probe.measures import Estimate, cka, cosine
from st_fast.evaluate.probe.page import check_page, write_page
from st_fast.evaluate.probe.subjects import Subject, check_comparable, load_guides, load_subjects
from st_fast.sample.source import find_all


def probe(given: argparse.Namespace, times: Sequence[float], bins: int) -> Path:
    """Probes every model that the options name, writes into the first one's folder or `given.out`, and returns that."""
    if given.write is not None:
        check_page(given.write)
    sources = [find_all(given, named) for named in given.runs]
    check_comparable(sources)
    subjects = load_subjects(sources)
    guides = load_guides(subjects, given.block)
    first = sources[0][0]
    split = load_split(Path(first.recipe.data.path), given.images)
    path, looked_at = first.recipe.flow.path, pointed_out(subjects, guides)
    models = []
    for one in subjects:
        depth = one.model.config.depth
        blocks = chosen_blocks(depth, [block for block in looked_at if block <= depth])
        models.append((one, examine(one.model, split, blocks, times, bins, path)))
    scales = scales_of(guides)
    guided = [(guide, guidance(guide, split, times, path, scales)) for guide in guides]
    middle = int(np.abs(np.asarray(times) - 0.5).argmin())
    alignments = [aligned(subject, models, middle) for subject in subjects]
    folder = given.out or (first.path / "probe" if first.run else Path("probe") / first.stage)
    clean = split.pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy() / 255
    make_folder(folder)
    entries = [told(*one, alignment) for one, alignment in zip(models, alignments, strict=True)]
    result = {
        "given": list(map(str, given.runs)), "images": given.images, "data": first.recipe.data.path,
        "weights": given.weights, "times": list(times), "seed": SEED, "dataset": split.digest,
        "train_images": len(split.train.x), "held_out_images": len(split.held_out.x), "held_out_unseen": split.unseen,
        "classes": split.classes, "rules_at": times[middle],
        "models": entries,
        "guided": [told_guide(*one) for one in guided],
        "claims": [asdict(claim) for claim in decide(Evidence(models, guided, middle, times[middle]))],
        "figures": draw_all(folder, models, entries, times, middle, clean, split.pictured),
    }  # fmt: skip
    write_json_atomic(folder / "probe.json", result)
    if given.write is not None:
        write_page(result, given.write)
    return folder


def pointed_out(subjects: Sequence[Subject], guides: Sequence[Guide]) -> set[int]:
    """The blocks that are supervised or teach anywhere: they are looked at in every model."""
    taught = [one.stage.method.frozen_depth for one in subjects]
    return {*(block for one in subjects for block in one.supervised), *taught, *(one.block for one in guides)} - {0}


def told(subject: Subject, found: Findings, alignment: dict[str, Any]) -> dict[str, Any]:
    """A model's entry of probe.json."""
    return {
        "label": subject.label, "role": subject.role, "run": subject.run.name if subject.run else None,
        "stage": subject.stage.name, "step": subject.loaded["step"],
        "weights": subject.loaded["weights"], "sha256": subject.loaded["sha256"],
        "supervised_blocks": list(subject.supervised), "teacher": subject.teacher, "blocks": found.blocks,
        "accuracy": values(found.accuracy), "accuracy_error": errors(found.accuracy),
        "clean": values(found.clean), "clean_error": errors(found.clean),
        "steady": values(found.steady), "steady_error": errors(found.steady),
        "velocity_loss": found.loss, "alignment": alignment,
    }  # fmt: skip


def told_guide(guide: Guide, found: Guidance) -> dict[str, Any]:
    """A teacher's entry of probe.json."""
    return {
        "teacher": guide.label, "step": guide.loaded["step"], "weights": guide.loaded["weights"],
        "sha256": guide.loaded["sha256"], "block": guide.block, "students": guide.students, "scales": found.scales,
        "measures": {
            name: {"value": values(rows), "error": errors(rows)} for name, rows in found.measures.items()
        },
    }  # fmt: skip


def values(rows: Sequence[Sequence[Estimate]]) -> list[list[float | None]]:
    """Their values; None where one isn't defined."""
    return [[one.value if math.isfinite(one.value) else None for one in row] for row in rows]


def errors(rows: Sequence[Sequence[Estimate]]) -> list[list[float | None]]:
    """Their standard errors; None where one isn't defined."""
    return [[one.error if math.isfinite(one.error) else None for one in row] for row in rows]


def aligned(subject: Subject, models: Models, at: int) -> dict[str, Any]:
    """CKA and mean cosine of the tokens of a model's blocks, with one another and with its teacher's blocks.

    Cosines with the teacher are left out: the channels of two networks do not correspond.
    """
    own = next(found.tokens[at] for one, found in models if one is subject)
    result: dict[str, Any] = {"cka": matrix(own, own, cka), "cosine": matrix(own, own, cosine), "with_teacher": None}
    for other, theirs in models:
        if other.label == subject.teacher:
            shared = matrix(own, theirs.tokens[at], cka)
            result["with_teacher"] = {"teacher": other.label, "blocks": theirs.blocks, "cka": shared}
    return result


def matrix(rows: Sequence[Any], columns: Sequence[Any], measure: Any) -> list[list[float | None]]:
    """`measure` of every pair of token sets (n, N, D), taken as (n·N, D); None where it isn't defined."""
    a, b = ([tokens.reshape(-1, tokens.shape[-1]) for tokens in side] for side in (rows, columns))
    found = [[measure(x, y) for y in b] for x in a]
    return [[value if np.isfinite(value) else None for value in line] for line in found]
