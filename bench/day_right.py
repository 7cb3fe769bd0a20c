"""A GPU day's first parts: is everything right on this device?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from bench import measure as gate
from bench import optimiser
from bench import step as step_times
from bench.cases import Case, Draw
from bench.day import Day, Task
from bench.machine import Row, notices
from bench.measure import Stopwatch, interleave
from bench.workload import Setup, ours
from st_fast.kernels import TABLE, native
from st_fast.model.attention import BACKENDS, Attend, verify

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 72)


def build(day: Day) -> Iterator[Task]:
    """Whether the compiled ops are loaded; on CUDA their build is part of importing st_fast."""
    for kind in ("cpu", "cuda") if day.device.type == "cuda" else ("cpu",):
        yield kind, partial(_loaded, kind)


def _loaded(kind: str) -> Row:
    if not native.available(kind):
        raise RuntimeError(f"csrc ({kind}) is not loaded: see the notice at the start")
    return {"ok": True, "file": str(native.path(kind))}


def truth(day: Day) -> Iterator[Task]:
    """Every op against float64, outputs and gradients, at three dtypes; the optimiser against the reference."""
    for size in day.sizes:
        for dtype in DTYPES:
            for op in TABLE:
                case = Case(op, size, dtype, day.device)
                yield case.key, partial(_true, case)
    for setting in optimiser.cases(day.device, full=False):
        yield setting.key, partial(_true_optimiser, setting)


def _true(case: Case) -> Row:
    inputs = case.inputs(0)
    gate.check(case, {"fused": case.fused}, inputs)
    exact = gate.results(case.eager, gate.in_float64(inputs))

    def worst(call: Callable[..., object]) -> float:
        return max(gate.errors(a, b)[1] for a, b in zip(gate.results(call, inputs), exact, strict=True))

    return {"ok": True, "worst_error": worst(case.fused), "eager_error": worst(case.eager)}


def _true_optimiser(setting: optimiser.OptimiserCase) -> Row:
    optimiser.check(setting)
    return {"ok": True}


def attention(day: Day) -> Iterator[Task]:
    """Every attention backend: is it right, forward and gradients, and how long does it take at XL/2's shape?"""
    for name, backend in BACKENDS.items():
        for head in HEAD_SIZES:
            refusal = backend.refusal(day.device, head)
            label = f"{name}, head_dim {head}"
            yield label, partial(_attention, day, backend.attend, head) if refusal is None else left_out(refusal)


def left_out(refusal: str) -> Callable[[], Row]:
    return lambda: {"ok": True, "left_out": refusal}


def _attention(day: Day, attend: Attend, head: int) -> Row:
    problem = verify(attend, day.device, day.dtype, head)
    if problem:
        return {"ok": False, "wrong": problem}
    batch, heads, tokens = (2, 2, 16) if day.small else (256, 16, 256)
    draw = Draw(day.device, day.dtype, 0)
    q, k, v = (draw.leaf(batch, heads, tokens, head) for _ in range(3))
    dout = draw(batch, tokens, heads, head).transpose(1, 2)

    def run(number: int, watch: Stopwatch) -> None:
        with watch("forward"):
            out = attend(q, k, v)
        with watch("backward"):
            torch.autograd.grad(out, (q, k, v), dout)

    samples = interleave({"it": run}, day.device, day.effort)["it"]
    return {"ok": True} | {f"{phase}_ms": 1e3 * statistics.median(values) for phase, values in samples.items()}


def compiled(day: Day) -> Iterator[Task]:
    """Compiled equals eager: every op, and three steps of every stage."""
    for op in TABLE:
        case = Case(op, day.sizes[-1], day.dtype, day.device)
        yield case.key, partial(_same_op, case)
    for setup in day.setups:
        yield f"step, {setup.label}", partial(_same_step, setup)


def _same_op(case: Case) -> Row:
    torch._dynamo.reset()
    inputs = case.inputs(0)
    eager = gate.results(case.fused, inputs)
    found = gate.results(torch.compile(case.fused, fullgraph=True, dynamic=False), inputs)
    worst = max(gate.errors(a, b.double())[1] for a, b in zip(found, eager, strict=True))
    return {"ok": worst <= gate.SLACK_ULPS * torch.finfo(case.dtype).eps, "worst_difference": worst}


def _same_step(setup: Setup) -> Row:
    values, said = {}, list[str]()
    for choice in ("off", "on"):
        with ours(replace(setup, compile=choice)) as loop, step_times.tidy(setup.device):
            values[choice] = [[float(v) for v in loop()] for _ in range(3)]
            said += loop.log.said
    worst = gate.worst_difference(values["off"], values["on"])
    ok = worst <= gate.SAME_LOSS[setup.device.type]
    return {"ok": ok, "worst_difference": worst, "eager_loss": values["off"][-1][0]} | notices(said)
