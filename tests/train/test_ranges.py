"""The stretches of a step: all are opened, in the plain schedule's order, and only while someone looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from st_fast.recipe import load
from st_fast.train import ranges
from st_fast.train.run import run
from tests import tiny


def test_every_stretch_of_every_step_is_named_and_closed_in_order(tmp_path):
    opened: list[str] = []

    @contextmanager
    def opener(name: str) -> Iterator[None]:
        opened.append(name)
        yield
        opened.append(f"/{name}")

    recipe = tiny.write_recipe(tmp_path / "tiny.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out")
    with ranges.showing(opener):
        run(load(recipe, ["--stage.align.steps=2", "--stage.transcend.steps=2"]))
    within = [mark for name in ranges.NAMES for mark in (name, f"/{name}")]
    assert opened == 4 * [ranges.STEP, *within, f"/{ranges.STEP}"]


def test_a_name_costs_nothing_while_nobody_looks():
    assert ranges.named("data") is ranges.named("teacher")


def test_nobody_looks_any_more_after_an_error():
    with pytest.raises(ValueError, match="stop"), ranges.showing(lambda name: pytest.fail(name)):
        raise ValueError("stop")
    with ranges.named("data"):
        pass
