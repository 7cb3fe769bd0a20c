"""Run folders as the trainer would leave them, with made-up but plausible numbers, for the report's tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from st_fast.report import plot

TEACHER_FLOPS = 0.4e9
FLOPS = 1.5e9
BATCH = 128
RECIPE = """[model]
depth = 8
width = 128
heads = 4
patch = 2

[data]
path = "data/digits"
source = "digits"

[optim]
batch_size = {batch}
lr = 0.001

[run]
out = "runs/some"
seed = {seed}

"""
ALIGN = """[[stage]]
name = "align"
supervision = "velocity_head"
depth = 2
target = "velocity"
weight = 0.5
t_range = [0.4, 0.7]
steps = 600

"""
TRANSCEND = """[[stage]]
name = "transcend"
supervision = "self_transcendence"
teacher = "align"
student_depth = 3
teacher_depth = 5
cfg_scale = 3.0
t_range = [0.4, 0.7]
steps = 1000

"""
PLAIN = """[[stage]]
name = "plain"
supervision = "none"
steps = 1600

"""


def two_stages(path: Path, seed: int = 0) -> Path:
    """A finished run of both stages."""
    rng = np.random.default_rng(seed)
    records = stage_records(path, rng, "align", 600, 1.0, teacher=False)
    records += stage_records(path, rng, "transcend", 1000, 1.5, teacher=True)
    return write_run(path, RECIPE.format(batch=BATCH, seed=seed) + ALIGN + TRANSCEND, records)


def plain(path: Path, seed: int = 0) -> Path:
    """A finished run of plain training."""
    records = stage_records(path, np.random.default_rng(seed), "plain", 1600, 0.8, teacher=False, aux=False)
    return write_run(path, RECIPE.format(batch=BATCH, seed=seed) + PLAIN, records)


def write_run(path: Path, recipe: str, records: list[dict[str, Any]]) -> Path:
    """Writes recipe.toml and log.jsonl."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.toml").write_text(recipe, encoding="utf-8")
    (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def stage_records(
    path: Path, rng: np.random.Generator, stage: str, steps: int, pace: float, teacher: bool, aux: bool = True
) -> list[dict[str, Any]]:
    """Start to end of one stage: a training record every 10 steps, samples and evaluations every 200."""
    per_step = BATCH * (FLOPS + (TEACHER_FLOPS if teacher else 0.0))

    def at(kind: str, step: int, **more: Any) -> dict[str, Any]:
        spent = {"seconds": 0.1 * step * (1.2 if teacher else 1), "flops": per_step * step}
        return {"kind": kind, "stage": stage, "step": step, "time": 1.7e9 + step, **spent, **more}

    records = [
        at(
            "start", 0, params=2_345_678, trunk_params=2_000_000, flops_per_image=FLOPS, steps=steps, batch_size=BATCH,
            teacher_flops_per_image=TEACHER_FLOPS if teacher else 0.0, device="cpu", resumed_from=0,
            versions={"torch": "2.13.0", "st_fast": "0.1.0"}, matmul_flops_per_s=1.1e11,
        )
    ]  # fmt: skip
    for step in range(10, steps + 1, 10):
        denoise = 0.25 + 0.9 * math.exp(-step * pace / 150) + 0.03 * rng.normal()
        extra = (1.2 if not teacher else 9.0) * math.exp(-step / 300) + 0.3 + 0.05 * rng.random() if aux else 0.0
        records.append(
            at(
                "train", step, loss=denoise + 0.5 * extra, denoise=denoise, aux=extra, grad_norm=0.4, lr=1e-3,
                images_per_s=1280 * (1 + 0.03 * rng.normal()) / (1.2 if teacher else 1), data_wait=0.01, skipped=0,
                mfu=0.42 + 0.01 * rng.normal(),
            )
        )  # fmt: skip
        if step % 200 == 0:
            learnt = 1 - math.exp(-step * pace / 500)
            records.append(at("eval", step, metrics=metrics(learnt)))
            records.append(at("sample", step, file=picture(path, stage, step, learnt)))
    return [*records, at("end", steps)]


def metrics(learnt: float) -> dict[str, Any]:
    """What the classifier would return for a model that has learnt this share of the task."""
    return {
        "accuracy": 0.1 + 0.87 * learnt, "frechet": 0.3 + 30 * (1 - learnt) ** 2, "floor_frechet": 0.152,
        "precision": 0.8 * learnt, "recall": 0.7 * learnt, "classifier_accuracy": 0.9944,
        "classifier_digest": "ab" * 32, "num": 1000, "cfg_scale": 1.9,
    }  # fmt: skip


def picture(path: Path, stage: str, step: int, learnt: float) -> str:
    """A grid of 10 × 4 blobs under noise; returns its name in the run folder."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:128, 0:320] / 32 * 2 * np.pi
    grid = learnt * (127 - 120 * np.cos(x) * np.cos(y)) + (1 - learnt) * rng.uniform(0, 255, (128, 320))
    name = f"{stage}/samples/{step:08d}.png"
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.clip(0, 255).astype(np.uint8)).save(path / name)
    return name


class Runs:
    """Makes run folders under one temporary folder; the functions above, for tests."""

    batch, flops, teacher_flops = BATCH, FLOPS, TEACHER_FLOPS

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def two_stages(self, name: str = "digits", seed: int = 0) -> Path:
        """A finished run of both stages."""
        return two_stages(self.folder / name, seed)

    def plain(self, name: str = "plain", seed: int = 0) -> Path:
        """A finished run of plain training."""
        return plain(self.folder / name, seed)

    def custom(self, recipe: str, records: list[dict[str, Any]], name: str = "custom") -> Path:
        """A run of this recipe and log; RECIPE's placeholders are for `two_stages`."""
        return write_run(self.folder / name, recipe, records)

    def log(self, run: Path) -> list[dict[str, Any]]:
        """A run's records."""
        return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    def change(self, run: Path, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Path:
        """Passes each record of a run through `edit`; None drops it."""
        records = [edit(record) for record in self.log(run)]
        return write_run(run, (run / "recipe.toml").read_text(encoding="utf-8"), [r for r in records if r is not None])


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """A maker of run folders."""
    return Runs(tmp_path)


DRAWN: dict[str, Markup] = {}
"""What figures look like, by all that is known of one: the same runs have the same figures in most tests."""


@pytest.fixture(autouse=True)
def draws_no_figure_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's figure that an earlier test's page had too is not drawn again."""
    svg = plot.svg

    def once(figure: plot.Figure) -> Markup:
        key = repr(figure)
        return DRAWN[key] if key in DRAWN else DRAWN.setdefault(key, svg(figure))

    monkeypatch.setattr(plot, "svg", once)
