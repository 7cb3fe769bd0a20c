"""Ops that a trial decides: both ways are held to float32, then timed in turns at the size that a run has.

For ops of which a kernel's being there says too little (`Op.instead`). All ranks take the same way, and the answer is
the run's: whoever resumes it hands it in again, since the two ways round differently.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from st_fast import kernels
from st_fast.core.machine import lacks_memory
from st_fast.core.ranks import Ranks
from st_fast.kernels.common.registry import has_kernel
from st_fast.kernels.common.trial import Draw, Inputs, Size

WARM, ROUNDS = 3, 15
ALLOWED = 2.0
"""How many times plain PyTorch's own error a result may be off by."""

Call = Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    """Of one rank: why the fused way is out of the question, or how the two compare."""

    problem: str | None = None
    speedup: float = 0.0
    """Median of plain time over fused time, of pairs taken one right after the other."""
    sure: bool = False
    """Faster in three of four pairs."""


def timed_choices(
    choices: Mapping[str, str], size: Size, ranks: Ranks, dtype: torch.dtype, compiled: bool,
    before: Mapping[str, str] | None, say: Callable[[str], None],
) -> dict[str, str]:  # fmt: skip
    """By op "fused" or "reference", for each that a trial decides here: one with an alternative, a kernel and "auto".

    size: of one pass on one rank. compiled: whether the model runs compiled. before: what a run that goes on was
    trained with, None for one that begins; an op that is missing in it was not there. Each decision is told to `say`.
    """
    found = {}
    for op in kernels.TABLE:
        instead = kernels.declared(op).instead
        if instead is None or choices.get(op, "auto") != "auto":
            continue
        there = has_kernel(op, ranks.device.type)
        if before is not None:
            found[op] = before.get(op, "reference") if there else "reference"
            if before.get(op) == "fused":
                say(f"kernels: {op} " + ("fused, as before" if there else "was fused before; it has no kernel here"))
        elif there:
            table = kernels.select(
                {name: choice for name, choice in choices.items() if name != "adamw_ema"}, ranks.device
            )
            found[op] = _agreed(op, instead(table), size, ranks, dtype, compiled, say)
    return found


def _agreed(
    op: str, plain: Call, size: Size, ranks: Ranks, dtype: torch.dtype, compiled: bool, say: Callable[[str], None]
) -> str:
    """The first rank's times decide, unless the fused way fails on any rank."""
    verdict = _tried(op, plain, size, ranks.device, dtype, compiled)
    failed, slower = ranks.any([verdict.problem is not None, ranks.first and not verdict.sure])
    at = f"at {size.batch * size.tokens} x {size.width}"
    if failed:
        say(f"kernels: {op} reference, {verdict.problem or 'it failed on another rank'}")
    elif slower:
        say(f"kernels: {op} reference, fused is {verdict.speedup:.2f}x of plain {at}, not surely faster")
    else:
        say(f"kernels: {op} fused, {verdict.speedup:.2f}x of plain {at}")
    return "reference" if failed or slower else "fused"


def _tried(op: str, plain: Call, size: Size, device: torch.device, dtype: torch.dtype, compiled: bool) -> Verdict:
    declared = kernels.declared(op)
    assert declared.trial is not None
    try:
        inputs = declared.trial(Draw(device, dtype, seed=0), size)
        ways = [torch.compile(way, dynamic=False) if compiled else way for way in (declared.call, plain)]
        problem = wrong(ways[0], ways[1], declared.definition, inputs)
        return Verdict(problem) if problem else compared(*(seconds(ways, inputs, device)))
    except Exception as error:  # a compiler may raise anything
        reason = "too little memory to try it" if lacks_memory(error) else f"{type(error).__name__}: {error}"
        return Verdict(reason.splitlines()[0][:200])
    finally:
        inputs = ways = None  # type: ignore[assignment]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def results(call: Call, inputs: Inputs) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = call(*inputs.args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs.leaves, inputs.grads)]


def wrong(fused: Call, plain: Call, definition: Call, inputs: Inputs) -> str | None:
    """What is wrong with a result of the fused way: off by more than plain's rounding allows, or not the same twice."""
    ours = results(fused, inputs)
    if not all(torch.equal(one, again) for one, again in zip(ours, results(fused, inputs), strict=True)):
        return "its results are not the same twice"
    truth = results(definition, _in_float32(inputs))
    for number, (one, other, exact) in enumerate(zip(ours, results(plain, inputs), truth, strict=True)):
        size = exact.norm().item() + torch.finfo(torch.float32).tiny
        off, allowed = ((found.float() - exact).norm().item() / size for found in (one, other))
        allowed = ALLOWED * allowed + torch.finfo(torch.float32).eps
        if not off <= allowed:
            return f"result {number} is off by {off:.1e} (allowed: {allowed:.1e})"
    return None


def _in_float32(inputs: Inputs) -> Inputs:
    """The same numbers, with leaves of their own."""
    made = {id(leaf): leaf.detach().float().requires_grad_() for leaf in inputs.leaves}
    args = tuple(made.get(id(arg), arg.float() if isinstance(arg, Tensor) else arg) for arg in inputs.args)
    return replace(inputs, args=args, leaves=tuple(made.values()), grads=tuple(g.float() for g in inputs.grads))


def seconds(ways: list[Call], inputs: Inputs, device: torch.device) -> list[list[float]]:
    """Of forward and backward: a list a way, taken in turns, by the device's clock."""
    taken: list[list[Any]] = [[] for _ in ways]
    for number in range(WARM + ROUNDS):
        for way, into in zip(ways, taken, strict=True):
            start = _now(device)
            results(way, inputs)
            if number >= WARM:
                into.append((start, _now(device)))
    if device.type != "cuda":
        return [[end - start for start, end in pairs] for pairs in taken]
    torch.cuda.synchronize(device)
    return [[start.elapsed_time(end) / 1e3 for start, end in pairs] for pairs in taken]


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def compared(fused: list[float], plain: list[float]) -> Verdict:
    """Whether the fused way is faster by more than the pairs' noise."""
    ratios = [slow / quick for slow, quick in zip(plain, fused, strict=True)]
    return Verdict(speedup=statistics.median(ratios), sure=statistics.quantiles(ratios, n=4)[0] > 1.0)
