"""Probes stages of runs, as they were saved last, and other models: checkpoints in, figures and `probe.json` out."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from st_fast import kernels
from st_fast.core.errors import UserError
from st_fast.core.files import make_folder, printable, write_json_atomic
from st_fast.evaluate.probe.examine import Findings, chosen_blocks, cka, cosine, examine, pca_colours
from st_fast.evaluate.probe.latents import SEED, load_split
from st_fast.model import DiffusionTransformer, stored
from st_fast.recipe.schema import Stage
from st_fast.report import plot
from st_fast.report.figures import Chart, Curve
from st_fast.sample.previews import grid
from st_fast.sample.source import Source, find_all


@dataclass(frozen=True)
class Subject:
    """One frozen model: its label in the figures, its stage, and its teacher's label where that one is probed too."""

    label: str
    stage: Stage
    model: DiffusionTransformer
    teacher: str | None
    loaded: dict[str, Any]
    """Of the checkpoint that was read: step, weights and their SHA-256."""

    @property
    def supervised(self) -> tuple[int, ...]:
        """The blocks that extra supervision reads; none in plain training."""
        tap: int | tuple[int, ...] = self.stage.method.tap
        return tuple(block for block in (tap if isinstance(tap, tuple) else (tap,)) if block)


Models = Sequence[tuple[Subject, Findings]]


def probe(given: argparse.Namespace, times: Sequence[float], bins: int) -> Path:
    """Probes every model that the options name, writes into the first one's folder or `given.out`, and returns that."""
    sources = [find_all(given, named) for named in given.runs]
    check_comparable(sources)
    subjects = load_subjects(sources)
    first = sources[0][0]
    split = load_split(Path(first.recipe.data.path), given.images)
    path = first.recipe.flow.path
    found = [
        examine(s.model, split, chosen_blocks(s.model.config.depth, s.supervised), times, bins, path) for s in subjects
    ]
    middle = int(np.abs(np.asarray(times) - 0.5).argmin())
    models = list(zip(subjects, found, strict=True))
    alignments = [aligned(subject, models, middle) for subject in subjects]
    folder = given.out or (first.path / "probe" if first.run else Path("probe") / first.stage)
    clean = split.pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy() / 255
    make_folder(folder)
    result = {
        "weights": given.weights, "times": list(times), "seed": SEED, "dataset": split.digest,
        "train_images": len(split.train.x), "held_out_images": len(split.held_out.x), "held_out_unseen": split.unseen,
        "models": [
            {
                "label": subject.label, "step": subject.loaded["step"], "sha256": subject.loaded["sha256"],
                "supervised_blocks": list(subject.supervised), "teacher": subject.teacher,
                "blocks": one.blocks, "accuracy": one.accuracy, "velocity_loss": one.loss, "alignment": alignment,
            }
            for subject, one, alignment in zip(subjects, found, alignments, strict=True)
        ],
        "figures": draw_all(folder, models, alignments, times, middle, clean, split.pictured),
    }  # fmt: skip
    write_json_atomic(folder / "probe.json", result)
    return folder


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
    values = [[measure(x, y) for y in b] for x in a]
    return [[value if np.isfinite(value) else None for value in line] for line in values]


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = kernels.select({}, device)
    subjects = []
    for group in sources:
        name = group[0].path.name
        alone = len(sources) == 1  # else a stage's name is preceded by its run's
        labels = {s.stage: s.stage if alone or not s.run or name == s.stage else f"{name} · {s.stage}" for s in group}
        for source in group:
            read, recipe = dict[str, Any](), source.recipe
            model = stored.frozen(source.weights(), recipe.model, table, device, torch.float32, record=read.update)
            stage = next((one for one in recipe.stages if one.name == source.stage), recipe.stages[-1])
            teacher = labels.get(stage.method.teacher_name or "")
            subjects.append(Subject(labels[source.stage], stage, model, teacher, read))
    return subjects


def draw_all(
    folder: Path, models: Models, alignments: Sequence[dict[str, Any]], times: Sequence[float], middle: int,
    clean: NDArray[Any], classes: Sequence[str],
) -> list[dict[str, str]]:  # fmt: skip
    """Writes every figure, each with a sentence on what to see in it; returns file, title and caption of each.

    `clean`: the images (n, H, W, 3), of `classes`; `middle`: the place of the time at which one alone is shown.
    """
    at = f"t = {times[middle]:g}"
    rows = [(subject.label, _pictures(subject, one.blocks, one.tokens[middle], clean)) for subject, one in models]
    pages = [
        (
            "knows.png", plot.sheet([_accuracy(models, times)], 2.6, 3.4), "Linear-probe accuracy by block",
            "Accuracy of a linear classifier on each block's mean-pooled features of held-out images, without the "
            "class label, from little noise (t near 0) to almost only noise (t near 1). Rings mark the block that "
            "supervision reads: higher there means that shallow blocks carry the class earlier.",
        ),
        (
            "patches.png", plot.pictures(rows, 1.05), f"Principal components of the patch features, {at}",
            "Three principal components of each block's patch features as red, green and blue, for the noisy versions "
            "of the images on the left. Where object and background differ in colour, the block tells them apart. The "
            f"images' classes, row by row: {', '.join(map(printable, classes))}.",
        ),
        (
            "alignment.png", _alignment(models, alignments), f"Similarity of blocks (CKA), {at}",
            "Linear CKA between the patch features of two blocks: 1 is equal up to rotation and scale. A shallow "
            "block that resembles deep ones, or its teacher's, has less left to do.",
        ),
        (
            "velocity_loss.png", plot.draw(_velocity_loss(models), title=False), "Held-out denoising loss by time",
            "Mean squared error of the velocity on held-out images with their labels, in bins of t, with the same "
            "noise for every model. Lower is better.",
        ),
    ]  # fmt: skip
    for number, (subject, one) in enumerate(models):
        by_time = [(f"t = {t:g}", _pictures(subject, one.blocks, tokens, clean))
                   for t, tokens in zip(times, one.tokens, strict=True)]  # fmt: skip
        title = f"Principal components by block and time: {subject.label}"
        pages.append((f"patches-{number}.png", plot.pictures(by_time, 1.05), title, "A row a time, a column a block."))
    for name, figure, _, _ in pages:
        plot.save(figure, folder / name)
    return [{"file": name, "title": title, "caption": caption} for name, _, title, caption in pages]


def _accuracy(models: Models, times: Sequence[float]) -> list[Chart]:
    """Linear-probe accuracy by block: a chart a time, a curve a model, the supervised blocks ringed."""
    charts = []
    for place, t in enumerate(times):
        curves = [
            Curve(s.label, [float(block) for block in f.blocks], f.accuracy[place], number,
                  ringed=[f.blocks.index(tap) for tap in s.supervised])
            for number, (s, f) in enumerate(models)
        ]  # fmt: skip
        charts.append(
            Chart("", f"t = {t:g}", "", "block (0: input)", "number", "linear-probe accuracy", "percent", False, curves)
        )
    return charts


def _velocity_loss(models: Models) -> Chart:
    """Held-out loss by bin of t, a curve a model."""
    curves = []
    for number, (subject, found) in enumerate(models):
        centres = (np.arange(len(found.loss)) + 0.5) / len(found.loss)
        curves.append(Curve(subject.label, centres.tolist(), found.loss, number))
    label = "t (0: data, 1: noise)"
    return Chart("velocity_loss", "", "", label, "number", "held-out denoising loss", "number", False, curves)


def _alignment(models: Models, alignments: Sequence[dict[str, Any]]) -> Figure:
    """CKA between blocks: a panel a model, and one more for each model whose teacher is here too."""
    panels: list[tuple[str, str, str, list[int], list[int], Any]] = []
    for (subject, found), values in zip(models, alignments, strict=True):
        panels.append((subject.label, "block", "block", found.blocks, found.blocks, values["cka"]))
        other = values["with_teacher"]
        if other:
            title, x = f"{subject.label} and its teacher", f"block of {other['teacher']}"
            panels.append((title, "its block", x, found.blocks, other["blocks"], other["cka"]))
    return plot.heat_maps(panels, "CKA")


def _pictures(
    subject: Subject, blocks: Sequence[int], tokens: Sequence[NDArray[Any]], clean: NDArray[Any]
) -> list[tuple[str, Any]]:
    """A row of pictures: the clean images, then each block's patches (n, N, D) as colours."""
    row = [("images", _tiled(clean))]
    for block, stream in zip(blocks, tokens, strict=True):
        colours = pca_colours(stream)[: len(clean)].reshape(-1, *subject.model.config.grid, 3)
        row.append((f"block {block}" if block else "input", _tiled(colours)))
    return row


def _tiled(pictures: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(n, H, W, 3) in 0..1 → one uint8 picture of two columns, white around and between them."""
    images = torch.from_numpy((255 * pictures).round().astype(np.uint8)).permute(0, 3, 1, 2)
    return grid(images, columns=2, gap=max(1, pictures.shape[1] // 8)).numpy()
