"""Encoders that run while training, on every schedule: the same numbers, no race, no wait for the device."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from st_fast.core.ranks import Ranks
from st_fast.model.side_stream import SideStream
from st_fast.train.batches import BatchIterator
from tests.model.test_vision import FAMILIES, load_encoder, saved
from tests.train.schedule import fake_cuda
from tests.train.schedule.fake_cuda import Races, Stream
from tests.train.schedule.loop import Loop
from tests.train.schedule.test_no_waiting import NoCalls, NoOps
from tests.train.supervision.encoders import images
from tests.train.supervision.test_live import place, recipe  # noqa: F401

CPU = torch.device("cpu")
SCHEDULES = {
    "beside": ("--run.teacher_placement=beside",),
    "ahead": ("--run.teacher_placement=ahead", "--run.prefetch=true"),
    "ahead, accumulated": ("--run.teacher_placement=ahead", "--optim.accumulation=2"),
}


def looped(recipe: Path, *options: str) -> Loop:  # noqa: F811
    """The live stage's own loop, whose iterator brings the images."""
    recipe.rename(recipe.with_name("tiny.toml")) if recipe.exists() else None
    loop = Loop(recipe.parent, "repa", ("--run.streams=auto", *options))
    loaders = loop.trainer.features.loaders(CPU)
    iterator = loop.iterator
    loop.iterator = BatchIterator(
        iterator.recipe, iterator.stage, iterator.loader, iterator.records, Ranks(0, 1, CPU), loaders
    )
    return loop


@pytest.mark.parametrize("schedule", ["beside", "ahead"])
def test_a_schedule_changes_no_number(recipe: Path, schedule: str, one_thread: None) -> None:  # noqa: F811
    numbers, state = looped(recipe).run()
    others, other_state = looped(recipe, *SCHEDULES[schedule]).run()
    assert all(aux != 0 for _, aux, _ in numbers) and len(numbers) == 8
    ours, theirs = (torch.stack([torch.stack(one) for one in each]) for each in (numbers, others))
    assert torch.equal(ours, theirs)
    assert all(torch.equal(state[key], other_state[key]) for key in state)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_images_and_features_cross_streams_without_a_race(
    recipe: Path,  # noqa: F811
    schedule: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    races = Races()
    with monkeypatch.context() as patch:
        fake_cuda.install(patch.setattr, races)
        loop = looped(recipe, *SCHEDULES[schedule])
        loop.trainer.step.targets._side = SideStream(Stream())
        loop.iterator._side = SideStream(Stream()) if "--run.prefetch=true" in SCHEDULES[schedule] else SideStream()
        with races:
            list(loop.steps(0, 3))
    assert races.ops > 1000 and races.found == [] and races.unrecorded() == []


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_encoder_reads_no_value_on_the_host(kind: str, tmp_path: Path) -> None:
    make, patch, _, _ = FAMILIES[kind]
    encoder = load_encoder(str(saved(tmp_path / kind, make, patch, native=3)[1]), CPU, torch.float32)
    encoder(images(2))  # which gives it the positions for this size
    # MAE's code moves its own indices to the device where they are, which looks like asking on the CPU.
    with NoOps(), nullcontext() if kind == "vit_mae" else NoCalls():
        features = encoder(images(2))
    assert features.isfinite().all()
