"""Times one op, forward and backward: fused, eager reference, torch.compile of the reference, and a plain copy.

    python -m bench.op_times --out FILE     the fused ops alone, as JSON: what `--base REV` compares

Inputs are cold: on a CPU they rotate through more memory than its cache holds, on CUDA L2 is flushed before a phase.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import measure as gate
from bench import optimiser
from bench.cases import Case, Inputs, Size
from bench.machine import Row, notices
from bench.measure import Copy, Effort, Samples, Stopwatch, Variant, cache_bytes, interleave, noise, paired_ratio, total
from st_fast import kernels

log = logging.getLogger("bench")
PHASES = ("forward", "backward", "both")
MOST_SETS = 16


def default_device() -> torch.device:
    """CUDA where there is one: the current one by its number, as tensors name it."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def sizes(device: torch.device, full: bool) -> list[Size]:
    """What is measured on such a device."""
    if device.type == "cuda":
        named = [Size("B/2", 256), Size("XL/2", 256)]
        return [*named, Size("XL/2", 32), Size("L/2", 256), Size("XL/2", 64, 1024)] if full else named
    named = [Size("S/2", 8), Size("B/2", 8)]
    return [*named, Size("S/2", 32), Size("B/2", 32), Size("XL/2", 8), Size("B/2", 2, 1024)] if full else named


def cases(device: torch.device, full: bool) -> list[Case]:
    """Every op at every size, in the dtype that training has there."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [Case(op, size, dtype, device) for size in sizes(device, full) for op in kernels.TABLE]


def input_sets(case: Case) -> list[Inputs]:
    """Enough different inputs that on a CPU none is in the cache when its turn comes again; CUDA's L2 is flushed."""
    first = case.inputs(0)
    needed = 1 if case.device.type == "cuda" else math.ceil(2 * cache_bytes(case.device) / first.bytes) + 1
    return [first, *(case.inputs(seed) for seed in range(1, min(needed, MOST_SETS)))]


def variant(call: Callable[..., Any], sets: Sequence[Inputs]) -> Variant:
    """One forward and one backward pass a round. Results live as long as the inputs' turn, so their memory is cold."""
    kept: deque[Any] = deque(maxlen=len(sets))

    def run(number: int, watch: Stopwatch) -> None:
        inputs = sets[number % len(sets)]
        with watch("forward"):
            outputs = call(*inputs.args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        with watch("backward"):
            grads = torch.autograd.grad(outputs, inputs.leaves, inputs.grads[: len(outputs)])
        kept.append((outputs, grads))

    return run


def compiled(case: Case, inputs: Inputs) -> Callable[..., Any] | str:
    """The reference through torch.compile, compiled; why not, in a line, where there is no working compiler."""
    torch._dynamo.reset()
    function = torch.compile(case.eager, dynamic=False, fullgraph=True)
    try:
        gate.results(function, inputs)
    except Exception as error:  # the compiler's failures have no common class
        failure = f"torch.compile of the reference failed: {str(error).splitlines()[0]}"
        log.warning("%s: %s", case.key, failure)
        return failure
    return function


def measure(case: Case, effort: Effort, with_compile: bool = True) -> tuple[Row, dict[str, Samples]]:
    """The row of one case, and the samples behind it. Raises gate.WrongResult before anything is timed."""
    sets = input_sets(case)
    calls = {"fused": case.fused, "eager": case.eager}
    rival = compiled(case, sets[0]) if with_compile else ""
    if not isinstance(rival, str):
        calls["compile"] = rival
    gate.check(case, {name: call for name, call in calls.items() if name != "eager"}, sets[0])
    copy = Copy(case.device)
    timed = {name: variant(call, sets) for name, call in calls.items()} | {"copy": copy}
    samples = interleave(timed, case.device, effort)
    found = row(case, samples, copy.moved)
    return found | notices([rival] if isinstance(rival, str) and rival else []), samples


def row(case: Case, samples: dict[str, Samples], copy_moved: int) -> Row:
    """Figures of one case by phase; rates refer to the copy of the same rounds."""
    copy = statistics.median(samples["copy"]["copy"])
    rate = copy_moved / copy
    figures: Row = {"op": case.op, "size": case.size.label, "dtype": str(case.dtype).removeprefix("torch.")}
    figures["rounds"] = len(samples["copy"]["copy"])
    figures["copy_rate"] = rate
    for phase in PHASES:
        series = {n: total(s) if phase == "both" else s[phase] for n, s in samples.items() if n != "copy"}
        seconds = statistics.median(series["fused"])
        moved, floor = getattr(case.moved, phase), getattr(case.floor, phase)
        figures[phase] = {
            "ms": {name: 1e3 * statistics.median(values) for name, values in series.items()},
            "speedup": {n: paired_ratio(values, series["fused"]) for n, values in series.items() if n != "fused"},
            "gb_per_s": moved / seconds / 1e9,
            "of_copy_rate": moved / seconds / rate,
            "of_floor": floor / rate / seconds if floor else None,
            "noise": noise(series["fused"]),
        }
    return figures


def fused_times(device: torch.device, effort: Effort) -> dict[str, float]:
    """Median seconds of every fused op, forward plus backward, and of the optimiser's step: what is there, by key."""
    seconds = {}
    for case in cases(device, full=False):
        if not hasattr(kernels, case.op):  # a base that is older than the op
            continue
        sets = input_sets(case)
        gate.check(case, {"fused": case.fused}, sets[0])
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
