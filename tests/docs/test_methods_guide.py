"""The guide's example does what the guide says: its code trains as it stands, and its loss is the formula."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from st_fast.recipe.methods import METHODS
from st_fast.recipe.schema import Stage
from st_fast.train.supervision import Parts, Supervision, create
from tests import tiny, warm
from tests.train.supervision.test_losses import MODEL, TABLE, fill, hidden, noisy, weights_of

GUIDE = (tiny.ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, re.S)
    return found


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "time_head.py"
    path.write_text(block("python"), encoding="utf-8")
    return path


def test_the_example_trains_from_its_one_file_and_resumes(script: Path, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "t.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out")
    recipe.write_text(recipe.read_text().split("[[stage]]")[0] + block("toml"))
    for steps in (6, 10):
        environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
        done = warm.run(script, recipe, f"--stage.timed.steps={steps}", cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
    losses = [record["aux"] for record in tiny.records(tmp_path / "out", "train")]
    assert len(losses) == 10 and 0 < losses[-1] < losses[0]
    assert (tmp_path / "out" / "report.html").is_file()


def imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("time_head", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "time_head", module)
    spec.loader.exec_module(module)
    return module


def test_the_examples_loss_is_the_formula_of_its_docstring(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = imported(script, monkeypatch)
    try:
        method = module.TimeHeadSettings(depth=1, weight=0.3)
        supervision = create(Stage("s", method, 10), Parts(MODEL, TABLE, None), seed=1)
        fill(supervision.heads, 4)
        batch, h = noisy(method.selection), hidden()
        w = weights_of(supervision.heads)
        predicted = h.detach().numpy().mean(1) @ w["weight"][0] + w["bias"][0]
        expected = 0.3 * np.square(predicted - batch.t.numpy()).mean()
        loss = supervision.loss(h, supervision.target(batch), batch)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    finally:
        METHODS.pop("time_head", None)


def test_the_guide_explains_every_member_of_the_protocol_and_names_files_that_exist() -> None:
    members = {*Supervision.__annotations__, "active", "target", "loss"}
    assert members == {"tap", "heads", "active", "target", "loss"}
    assert members <= set(re.findall(r"^- `(\w+)", GUIDE, re.M))
    named = re.findall(r"`(\w+\.py)`", GUIDE)
    assert len(named) == 4 and all((tiny.ROOT / "st_fast" / "train" / "supervision" / name).is_file() for name in named)
    for path in re.findall(r"`(st_fast/[\w/]+\.py)`", GUIDE):
        assert (tiny.ROOT / path).is_file(), path
