"""A run that a signal ends in its third step, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from st_fast.core import checkpoint
from st_fast.core.errors import Interrupted
from st_fast.recipe import Recipe, load
from st_fast.train.run import run
from tests import tiny
from tests.train.test_training import STOP, stop_at


def interrupt(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs to the third step, which a signal ends."""
    STOP.name = None
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            run(recipe)
    STOP.name = None


def states(out: Path, stage: str) -> dict[str, Tensor]:
    """Every tensor of the stage's newest checkpoint."""
    found = checkpoint.latest(out / stage / "checkpoints", print)
    assert found is not None
    return {f"{group}/{name}": t for group, tensors in found.groups.items() for name, t in tensors.items()}


def assert_it_resumes_bit_exactly_and_learns(recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a run of `recipe`, of one stage, which writes to `folder`/out, that nobody interrupted."""
    run(load(recipe))
    (stage,) = load(recipe).stages
    again = load(recipe, [f"--run.out={folder / 'again'}"])
    interrupt(again, monkeypatch)
    run(again)
    whole, resumed = states(folder / "out", stage.name), states(folder / "again", stage.name)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[k], whole[k]) for k in whole)
    losses = [record["aux"] for record in tiny.records(folder / "out", "train")]
    assert losses[-1] < losses[0]
