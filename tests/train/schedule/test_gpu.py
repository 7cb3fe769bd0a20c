"""Schedules on a real GPU: streams under random delays, no wait for the device, graphs that train as Python does."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from st_fast.model.side_stream import SideStream
from st_fast.train.graphs import WARM_UP
from tests.train.schedule.loop import Loop
from tests.train.schedule.test_schedules import values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CALM = ("--run.precision=fp32", "--optim.lr=1e-4", "--stage.transcend.steps=25")
ROUNDING = 1e-3
"""Relative: atomics add in any order. A race reads NaN, or another batch's target."""
CYCLES = 2_000_000
"""About a millisecond, many times a tiny step's kernels."""
SCHEDULES = {
    f"{branches}, {placement}" + ", prefetch" * prefetch: (
        f"--run.teacher_branches={branches}", f"--run.teacher_placement={placement}",
        f"--run.prefetch={str(prefetch).lower()}",
    )
    for branches in ("batched", "streams", "sequential")
    for placement in ("before", "beside", "ahead")
    for prefetch in (False, True)
}  # fmt: skip


@pytest.fixture
def delayed(monkeypatch) -> Iterator[random.Random]:
    """Streams that dawdle at random, and freed memory that is NaN as soon as another may have it."""
    dice, start = random.Random(0), SideStream.start

    def poison() -> None:
        for size in (64, 512, 4_096, 65_536):
            torch.full((size,), float("nan"), device="cuda")

    def dawdling(self, work, reads=()):
        def slow():
            torch.cuda._sleep(dice.randrange(CYCLES))
            value = work()
            poison()
            torch.cuda._sleep(dice.randrange(CYCLES))
            return value

        later = start(self, slow, reads)
        if dice.random() < 0.5:
            torch.cuda._sleep(dice.randrange(CYCLES))
        poison()
        return later

    monkeypatch.setattr(SideStream, "start", dawdling)
    yield dice


@pytest.mark.parametrize("shape", [(), ("--optim.accumulation=2",)], ids=("one batch", "accumulation"))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_random_delays_change_no_loss(schedule, shape, folder, delayed):
    inline = Loop(folder, "transcend", (*CALM, *shape, "--run.streams=off"), "cuda")
    expected = values(inline.run()[0])
    loop = Loop(folder, "transcend", (*CALM, *shape, *SCHEDULES[schedule]), "cuda")
    assert torch.isfinite(expected).all() and (expected[:, 1] > 0).any()
    torch.testing.assert_close(values(loop.run()[0]), expected, rtol=ROUNDING, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "align", "transcend"])
@pytest.mark.parametrize("schedule", ["batched, before", "streams, ahead, prefetch"])
def test_neither_the_step_nor_its_batches_wait_for_the_device(name, schedule, folder):
    loop = Loop(folder, name, SCHEDULES[schedule], "cuda")
    steps = loop.steps()
    for _ in range(4):  # kernels are compiled, memory is there
        next(steps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [next(steps)[0] for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("name", ["plain", "align", "transcend"])
def test_graphs_train_as_python_does(name, compile, folder, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    options = ("--run.precision=fp32", "--optim.lr=1e-4", "--run.supervised_rows=padded", "--flow.time=stratified")
    options += (f"--run.compile={compile}", f"--stage.{name}.steps=12")
    expected = values(Loop(folder, name, options, "cuda").run()[0])
    assert not replays
    numbers = values(Loop(folder, name, (*options, "--run.cuda_graphs=true"), "cuda").run()[0])
    torch.testing.assert_close(numbers, expected, rtol=ROUNDING, atol=1e-6)
    assert len(replays) == 12 - WARM_UP
