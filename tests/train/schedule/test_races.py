"""Streams are right by what orders them, not by luck: checked without a GPU by vector clocks (see fake_cuda)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from st_fast.model.side_stream import Future, SideStream, apart
from tests.train.schedule import fake_cuda
from tests.train.schedule.fake_cuda import Races, Stream
from tests.train.schedule.loop import Loop

SCHEDULES = {
    "two streams": ("streams", "before", False),
    "beside": ("batched", "beside", False),
    "ahead": ("batched", "ahead", False),
    "all": ("streams", "ahead", True),
}
ACCUMULATED = "--optim.accumulation=2"


def raced(monkeypatch, folder, branches: str, placement: str, prefetch: bool, *options: str) -> Races:
    """Three steps of stage 2 with this schedule on fake streams, watched."""
    races = Races()
    with monkeypatch.context() as patch:
        fake_cuda.install(patch.setattr, races)
        named = (f"--run.teacher_branches={branches}", f"--run.teacher_placement={placement}")
        loop = Loop(
            folder, "transcend", ("--run.streams=auto", *named, f"--run.prefetch={str(prefetch).lower()}", *options)
        )
        sides = {"targets": placement != "before", "branches": branches == "streams", "batches": prefetch}
        made = {name: SideStream(Stream()) for name, wanted in sides.items() if wanted}
        loop.trainer.step.targets._side = made.get("targets", SideStream())
        loop.iterator._side = made.get("batches", SideStream())
        if "branches" in made:
            method = loop.trainer.method
            method.parts = replace(method.parts, branches=partial(apart, made["branches"]))
        with races:
            list(loop.steps(0, 3))
        assert races.ops > 1000 and all(side._stream.known[side._stream] > 10 for side in made.values())
    return races


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_read_before_it_is_written_nor_freed_under_its_reader(schedule, folder, monkeypatch):
    races = raced(monkeypatch, folder, *SCHEDULES[schedule], ACCUMULATED)
    assert races.found == [] and races.unrecorded() == []


def test_sras_teacher_beside_the_student_copies_weights_that_no_update_is_changing(folder, tmp_path, monkeypatch):
    text = (folder / "tiny.toml").read_text()
    text = text[: text.index("[[stage]]")] + '[[stage]]\nname = "transcend"\nsupervision = "sra"\nsteps = 3\n'
    (tmp_path / "tiny.toml").write_text(text + "student_depth = 1\nteacher_depth = 2\n")
    races = raced(monkeypatch, tmp_path, "batched", "beside", False, "--run.precision=bf16")
    assert races.found == [] and races.unrecorded() == []


def without(patch, broken: str) -> None:
    if broken == "a side stream that does not wait":
        patch(SideStream, "follow", lambda self: None)
    elif broken == "a result that is not waited for":
        patch(Future, "__call__", lambda self: self.unjoined)
    else:
        patch(torch.Tensor, "record_stream", lambda tensor, stream: None)


@pytest.mark.parametrize(
    "broken",
    ["a side stream that does not wait", "a result that is not waited for", "memory that the allocator is not told of"],
)
def test_the_checker_sees_what_is_left_out(broken, folder, monkeypatch):
    install = fake_cuda.install

    def installed(patch, races):
        install(patch, races)
        without(patch, broken)

    monkeypatch.setattr(fake_cuda, "install", installed)
    races = raced(monkeypatch, folder, *SCHEDULES["all"])
    assert races.unrecorded() if "allocator" in broken else races.found
