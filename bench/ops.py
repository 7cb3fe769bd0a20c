"""The ops, as their families declare them, and what a call costs before any work: fused, eager, under torch.compile.

    python -m bench.ops --out FILE     the fused ops and the optimiser's step alone, as JSON: what `--base REV` compares

Inputs are cold: on a CPU they rotate through more memory than its cache holds, on CUDA L2 is flushed before a phase.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure, optimiser
from bench.goals import inputs_named
from bench.machine import Suite, Task, default_device, notices
from bench.measure import (
    Copy,
    Effort,
    Row,
    Samples,
    Stopwatch,
    Variant,
    cache_bytes,
    interleave,
    noise,
    paired_ratio,
    ratios,
    spread,
    total,
)  # fmt: skip
from st_fast import kernels
from st_fast.kernels import TABLE
from st_fast.kernels.common import trial
from st_fast.kernels.common.trial import Draw, Inputs
from st_fast.recipe.sizes import SIZES

TOKENS = 256


@dataclass(frozen=True)
class Traffic:
    """Bytes of a forward and a backward pass."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Size:
    """A model's size at one batch: "B/2" and so on."""

    name: str
    batch: int
    tokens: int = TOKENS

    @property
    def width(self) -> int:
        return SIZES[self.name.split("/")[0]][1]

    @property
    def heads(self) -> int:
        return SIZES[self.name.split("/")[0]][2]

    @property
    def shape(self) -> trial.Size:
        """What an op is tried with."""
        return trial.Size(self.batch, self.tokens, self.width, self.heads)

    @property
    def label(self) -> str:
        at = "" if self.tokens == TOKENS else f", {self.tokens} tokens"
        return f"{self.name}, batch {self.batch}{at}"


@dataclass(frozen=True)
class Case:
    """One op at one size and dtype; form: another fused form of it, by the name that a recipe has for it; kind: another
    kind of inputs, by the op's name for it."""

    op: str
    size: Size
    dtype: torch.dtype
    device: torch.device
    form: str = ""
    kind: str = ""

    @property
    def key(self) -> str:
        name = f"{self.op} {self.form}".strip() + (inputs_named(self.kind) if self.kind else "")
        return f"{name} | {self.size.label} | {str(self.dtype).removeprefix('torch.')}"

    @property
    def fused(self) -> Callable[..., Any]:
        declared = kernels.declared(self.op)
        return declared.forms[self.form] if self.form else declared.call

    @property
    def eager(self) -> Callable[..., Any]:
        return kernels.declared(self.op).definition

    def inputs(self, seed: int) -> Inputs:
        """Random inputs, drawn from `seed`."""
        declared = kernels.declared(self.op)
        make = declared.kinds[self.kind].trial if self.kind else declared.trial
        assert make is not None
        return make(Draw(self.device, self.dtype, seed), self.size.shape)

    @property
    def floor(self) -> Traffic:
        """Bytes that the mathematics must move."""
        return Traffic(*self._bytes[0])

    @property
    def moved(self) -> Traffic:
        """Bytes that the fused op's interface moves."""
        return Traffic(*self._bytes[1])

    @property
    def _bytes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        return kernels.declared(self.op).bytes(self.size.shape, self.dtype.itemsize, self.device.type, self.kind)


log = logging.getLogger("bench")
PHASES = ("forward", "backward", "both")
MOST_SETS = 16


def default_sizes(device: torch.device) -> list[Size]:
    """What is measured on such a device."""
    return [Size("XL/2", 256), Size("B/2", 256)] if device.type == "cuda" else [Size("S/2", 8)]


MORE_SIZES = {
    "cuda": (Size("XL/2", 32), Size("L/2", 256), Size("XL/2", 64, 1024)),
    "cpu": (Size("B/2", 8), Size("S/2", 32), Size("B/2", 32), Size("XL/2", 8), Size("B/2", 2, 1024)),
}


def sizes(suite: Suite) -> list[Size]:
    """What a suite measures."""
    if suite.small:
        return [Size("S/2", 2, 16)]
    return [*default_sizes(suite.device), *(MORE_SIZES[suite.device.type] if suite.full else ())]


def cases(size: Size, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Every op at a size, followed by its other forms and then its other kinds of inputs."""
    made = []
    for op in TABLE:
        made += [Case(op, size, dtype, device, form) for form in ("", *kernels.FORMS.get(op, ()))]
        made += [Case(op, size, dtype, device, kind=kind) for kind in kernels.declared(op).kinds]
    return made


def ops(suite: Suite) -> Iterator[Task]:
    """Every op at every size, in the dtype that training has there."""
    for size in sizes(suite):
        for case in cases(size, suite.dtype, suite.device):
            yield case.key, partial(measure_op, case, suite.effort)


def input_sets(case: Case) -> list[Inputs]:
    """Enough different inputs that on a CPU none is in the cache when its turn comes again; CUDA's L2 is flushed."""
    first = case.inputs(0)
    needed = 1 if case.device.type == "cuda" else math.ceil(2 * cache_bytes(case.device) / first.bytes) + 1
    return [first, *(case.inputs(seed) for seed in range(1, min(needed, MOST_SETS)))]


def variant(call: Callable[..., Any], sets: Sequence[Inputs]) -> Variant:
    """One forward pass a round, and a backward one if there is any.

    Results live as long as the inputs' turn, so their memory is cold.
    """
    kept: deque[Any] = deque(maxlen=len(sets))

    def run(number: int, watch: Stopwatch) -> None:
        inputs = sets[number % len(sets)]
        with watch("forward"):
            outputs = call(*inputs.args)
        if not inputs.leaves:
            return kept.append(outputs)
        with watch("backward"):
            grads = inputs.backward(outputs)
        kept.append((outputs, grads))

    return run


def compiled(case: Case, inputs: Inputs) -> Callable[..., Any] | str:
    """The reference through torch.compile, compiled; why not, in a line, where there is no working compiler."""
    torch._dynamo.reset()
    function = torch.compile(case.eager, dynamic=False, fullgraph=True)
    try:
        measure.results(function, inputs)
    except Exception as error:  # the compiler's failures have no common class
        failure = f"torch.compile of the reference failed: {str(error).splitlines()[0]}"
        log.warning("%s: %s", case.key, failure)
        return failure
    return function


def measure_op(case: Case, effort: Effort, with_compile: bool = True) -> Row:
    """The row of one case. Raises WrongResult before anything is timed.

    Of another kind of inputs the same op on those that the kind names is timed in the same rounds, as "usual".
    """
    sets = input_sets(case)
    calls = {"fused": case.fused, "eager": case.eager}
    rival = compiled(case, sets[0]) if with_compile else ""
    if not isinstance(rival, str):
        calls["compile"] = rival
    measure.check(case, {name: call for name, call in calls.items() if name != "eager"}, sets[0])
    copy = Copy(case.device)
    timed = {name: variant(call, sets) for name, call in calls.items()} | {"copy": copy}
    if case.kind:
        usual = replace(case, kind=kernels.declared(case.op).kinds[case.kind].usual)
        timed["usual"] = variant(case.fused, input_sets(usual))
    samples = interleave(timed, case.device, effort)
    return _row(case, samples, copy.moved) | notices([rival] if isinstance(rival, str) and rival else [])


def _row(case: Case, samples: dict[str, Samples], copy_moved: int) -> Row:
    """Figures of one case by phase; rates refer to the copy of the same rounds."""
    copy = statistics.median(samples["copy"]["copy"])
    rate = copy_moved / copy
    figures: Row = {"op": case.op, "size": case.size.label, "dtype": str(case.dtype).removeprefix("torch.")}
    figures |= {name: value for name, value in (("form", case.form), ("kind", case.kind)) if value}
    figures["rounds"] = len(samples["copy"]["copy"])
    figures["copy_rate"] = rate
    for phase in (*samples["fused"], "both"):
        series = {n: total(s) if phase == "both" else s[phase] for n, s in samples.items() if n != "copy"}
        usual = series.pop("usual", None)
        seconds = statistics.median(series["fused"])
        moved, floor = getattr(case.moved, phase), getattr(case.floor, phase)
        figures[phase] = {
            "ms": {name: 1e3 * statistics.median(values) for name, values in series.items()},
            "speedup": {n: paired_ratio(values, series["fused"]) for n, values in series.items() if n != "fused"},
            "gb_per_s": moved / seconds / 1e9,
            "of_copy_rate": moved / seconds / rate,
            "of_floor": floor / rate / seconds if floor else None,
            "noise": noise(series["fused"]),
            **({} if usual is None else {"times_usual": paired_ratio(series["fused"], usual)}),
            "noise_of": {
                **{name: noise(ratios(values, series["fused"])) for name, values in series.items() if name != "fused"},
                **({} if usual is None else {"times_usual": noise(ratios(series["fused"], usual))}),
                **dict.fromkeys(("of_copy_rate", "of_floor"), noise(ratios(samples["copy"]["copy"], series["fused"]))),
            },
        }
    return figures | {"spread_ms": spread(total(samples["fused"]))}


OVERHEAD_OPS = ("norm_modulate", "gate_residual_norm_modulate", "qk_norm", "align", "guided_feature_loss")
CALLS, REPEATS, WIDTH = 4, 10, 64
HOW: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "eager": lambda function: function,
    "opaque": partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False),
    "compiled": partial(torch.compile, fullgraph=True, dynamic=False),
}
"""How a call is made: by Python, inside a graph in which every op is a call, and inside Inductor's code."""


def overheads(suite: Suite) -> Iterator[Task]:
    """What a call of each op, and of `torch.nn.functional.layer_norm`, costs where there is nothing to compute."""
    effort = suite.effort if suite.small else Effort(rounds=60, seconds=1, least=10, warmup=3)
    for op in (*OVERHEAD_OPS, "layer_norm"):
        yield op, partial(measure_overhead, op, suite.device, effort)


def measure_overhead(op: str, device: torch.device, effort: Effort) -> Row:
    """Microseconds of a call on one row of WIDTH channels in float32, by the host's clock.

    Forward, and with the backward pass: what a graph with CALLS calls takes longer than the same graph without, by
    CALLS. Inductor does not call layer_norm but makes code of it, so that "opaque" is what compares the calls.
    """
    call, sets = (F.layer_norm, _layer_norm_inputs(device)) if op == "layer_norm" else _tiny(op, device)
    found: Row = {"op": op, "calls": CALLS, "us": {}}
    for how, make in HOW.items():
        variants = {
            name: _host_variant(make(_summed(call, sets, with_calls)), sets, device)
            for name, with_calls in (("with", True), ("without", False))
        }
        samples = interleave(variants, device, effort)
        pairs = {"forward": [s["forward"] for s in samples.values()], "both": [total(s) for s in samples.values()]}
        each = {phase: [1e6 * (a - b) / CALLS for a, b in zip(*pair, strict=True)] for phase, pair in pairs.items()}
        found["us"][how] = {phase: statistics.median(values) for phase, values in each.items()}
        found |= {"rounds": len(each["both"]), "noise": noise(each["both"])}  # of the last, the compiled one
    return found


def _tiny(op: str, device: torch.device) -> tuple[Callable[..., Any], list[Inputs]]:
    """An op, and CALLS different inputs of one row: equal ones would be computed once."""
    declared = kernels.declared(op)
    assert declared.trial is not None
    draws = (Draw(device, torch.float32, seed) for seed in range(CALLS))
    return declared.call, [declared.trial(draw, trial.Size(1, 1, WIDTH, 1)) for draw in draws]


def _layer_norm_inputs(device: torch.device) -> list[Inputs]:
    sets = []
    for seed in range(CALLS):
        draw = Draw(device, torch.float32, seed)
        leaves = (draw.leaf(1, 1, WIDTH), draw.leaf(WIDTH), draw.leaf(WIDTH))
        sets.append(Inputs((leaves[0], (WIDTH,), *leaves[1:]), leaves, (draw(1, 1, WIDTH),)))
    return sets


def _summed(call: Callable[..., Any], sets: Sequence[Inputs], with_calls: bool) -> Callable[..., Tensor]:
    """The sum of all outputs of a call on each of `sets`; without the calls, of as many of their inputs."""
    outputs = len(sets[0].grads)

    def run(all_args: list[tuple[Any, ...]], all_leaves: list[tuple[Tensor, ...]]) -> Tensor:
        sums = []
        for args, leaves in zip(all_args, all_leaves, strict=True):
            made = call(*args) if with_calls else leaves[:outputs]
            sums += [out.sum() for out in (made if isinstance(made, tuple) else (made,))]
        return torch.stack(sums).sum()

    run.__code__ = run.__code__.replace()  # compiled forms are kept by code, and looked through one after another
    return run


def _host_variant(function: Callable[..., Tensor], sets: Sequence[Inputs], device: torch.device) -> Variant:
    """The mean of REPEATS forward and backward passes a round."""
    all_args, all_leaves = [inputs.args for inputs in sets], [inputs.leaves for inputs in sets]
    flat = [leaf for leaves in all_leaves for leaf in leaves]

    def run(number: int, watch: Stopwatch) -> None:
        forward = backward = 0.0
        for _ in range(REPEATS):
            start = time.perf_counter()
            loss = function(all_args, all_leaves)
            middle = time.perf_counter()
            torch.autograd.grad(loss, flat, allow_unused=True)
            forward, backward = forward + middle - start, backward + time.perf_counter() - middle
        watch.add("forward", forward / REPEATS)
        watch.add("backward", backward / REPEATS)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def fused_times(device: torch.device, effort: Effort) -> dict[str, float]:
    """Median seconds of every fused op, forward plus backward, and of the optimiser's step: what is there, by key."""
    seconds = {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for case in (case for size in default_sizes(device) for case in cases(size, dtype, device)):
        sets = input_sets(case)
        measure.check(case, {"fused": case.fused}, sets[0])
        samples = interleave({"fused": variant(case.fused, sets)}, device, effort)
        seconds[case.key] = statistics.median(total(samples["fused"]))
    for setting in optimiser.cases(device, full=False):
        samples = interleave({"fused": optimiser.ours(setting)}, device, effort)
        seconds[setting.key] = statistics.median(total(samples["fused"]))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=1.0, help="at most so long a case")
    settings = parser.parse_args()
    times = fused_times(default_device(), Effort(rounds=40, seconds=settings.seconds))
    settings.out.write_text(json.dumps(times))


if __name__ == "__main__":
    main()
