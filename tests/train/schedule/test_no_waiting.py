"""The step asks the device for nothing and compiles nothing once it is warm."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.schedule.loop import Loop

STAGES = ("plain", "align", "transcend")
TENSOR = torch.Tensor
ASKING = {
    TENSOR.item, TENSOR.tolist, TENSOR.cpu, TENSOR.numpy, TENSOR.__bool__, TENSOR.__float__, TENSOR.__int__,
    TENSOR.__index__, TENSOR.nonzero, TENSOR.equal, torch.equal, torch.nonzero, torch.allclose,
}  # fmt: skip
"""What Python calls to see a value; on the CPU most of these are no op at all, so that only Python knows of them."""
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}
"""Ops that a CUDA device is waited for in, wherever they are called from."""


class Asked(RuntimeError):
    """A value was brought to the host."""


class NoOps(TorchDispatchMode):
    """Raises for an op whose result's size or value the host must know."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or masks:
            raise Asked(str(func))
        return func(*args, **(kwargs or {}))


class NoCalls(TorchFunctionMode):
    """Raises where Python reads a value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKING or (func is TENSOR.to and "cpu" in map(str, args[1:])):
            raise Asked(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x.sum() > 0), lambda x: float(x.sum()),
        lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.numpy(), lambda x: x[x > 0], lambda x: x.nonzero(),
        lambda x: torch.masked_select(x, x > 0), lambda x: 1 if x.sum() > 0 else 0, lambda x: range(x.sum().long()),
    ],
)  # fmt: skip
def test_the_guards_see_every_way_of_asking(asks):
    with NoOps(), NoCalls(), pytest.raises(Asked):
        asks(torch.ones(3))


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "options",
    [
        (), ("--run.streams=auto", "--run.teacher_placement=ahead", "--run.supervised_rows=padded"),
        ("--optim.accumulation=2", "--kernels.qk_norm=reference", "--kernels.guided_feature_loss=reference"),
    ],
    ids=("plain", "ahead, padded", "accumulation, reference ops"),
)  # fmt: skip
def test_no_step_reads_a_value_on_the_host(name, options, folder):
    loop = Loop(folder, name, options)
    batches = list(loop.iterator.steps(0, 4))
    loop.trainer.step.following = lambda: batches[number + 1] if number + 1 < len(batches) else None
    losses = []
    with NoOps(), NoCalls():
        for number, one in enumerate(batches):
            losses.append(loop.trainer.step(number, one)[0].denoise)
    assert len(losses) == 4 and torch.stack(losses).isfinite().all()


@pytest.fixture
def counters(monkeypatch):
    """Dynamo's, from nothing; code is guarded as ever, and its backend is eager, which compiles in no time."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr("st_fast.model.compiling.torch.compile", partial(torch.compile, backend="eager"))
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "time", "rows"),
    [
        *((name, time, "exact") for name in STAGES for time in ("uniform", "stratified")),
        *(("transcend", time, "padded") for time in ("uniform", "stratified")),
    ],
)
def test_nothing_is_compiled_once_the_step_is_warm(name, time, rows, folder, counters):
    options = (f"--flow.time={time}", f"--run.supervised_rows={rows}", "--optim.batch_size=16", "--run.compile=on")
    loop = Loop(folder, name, (*options, f"--stage.{name}.steps=14"))
    graphs, sizes = [], set()
    for number, batches in enumerate(loop.iterator.steps(0, 14)):
        loop.trainer.step(number, batches)
        sizes.add(len(batches[0].rows.index))
        graphs.append(counters["stats"]["unique_graphs"])
    # Blocks that are followed by a block and the one that is followed by the final layer; of the teacher the first.
    assert graphs[1] == graphs[-1] == (3 if name == "transcend" else 2)
    assert not counters["graph_break"] and not [text for text in loop.said if "torch.compile failed" in text]
    if name != "plain" and rows == "exact" and time == "uniform":
        assert len(sizes) > 3  # so many that the shapes did change


def test_padded_rows_that_overflow_compile_nothing_either(folder, counters):
    options = ("--run.supervised_rows=padded", "--run.compile=on", "--run.teacher_branches=sequential")
    loop = Loop(folder, "transcend", options)
    loop.iterator.pass_rows, graphs, sizes = 2, [], set()
    for number, batches in enumerate(loop.iterator.steps(0, 10)):
        loop.trainer.step(number, batches)
        sizes.add(len(batches[0].rows.index))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] == 3 and len(sizes) > 1
