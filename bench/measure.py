"""Time, measured so that it can be compared, and the correctness gate that comes before any figure.

Variants run interleaved; figures are medians of paired ratios with the noise between runs of the same code. On CUDA a
phase is bracketed by events, and before each the L2 is flushed with enough work that the phase's launches are queued by
the time the device reaches them: what is measured is the device's time, not Python's.

The gate compares every variant's outputs and gradients with the reference in float64. The kernel may err at most twice
as much as eager PyTorch does at that dtype, in the mean square and at the worst element; a rival may err ten times as
much, since only a wrong one is to be kept out.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from st_fast.train import profiling

if TYPE_CHECKING:
    from st_fast.kernels.common.trial import Inputs

Row = dict[str, Any]
"""One measurement, as it stands in the results file."""

MIB = 2**20
QUEUE_FILL_S = 1e-3
"""Work put in front of a timed phase on CUDA, so that launching it is hidden."""

Samples = dict[str, list[float]]
"""Seconds of each round, by phase."""


class Stopwatch:
    """Times named phases on one device; `read` gives their seconds in the order they were run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: Samples = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._flush = torch.empty(4 * cache_bytes(device), dtype=torch.uint8, device=device) if self._cuda else None
        self._fills = self._fills_needed() if self._cuda else 0

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def _fills_needed(self) -> int:
        assert self._flush is not None
        self._flush.zero_()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(20):
            self._flush.zero_()
        torch.cuda.synchronize(self.device)
        return max(1, math.ceil(QUEUE_FILL_S * 20 / (time.perf_counter() - start)))

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times what happens inside as one run of `phase`."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self.add(phase, time.perf_counter() - start)
            return
        assert self._flush is not None
        for _ in range(self._fills):
            self._flush.zero_()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        yield
        after.record()
        self._events.append((phase, before, after))

    def add(self, phase: str, seconds: float) -> None:
        """Takes one run of `phase` that another clock has timed."""
        self._seconds.setdefault(phase, []).append(seconds)

    def read(self) -> Samples:
        """Waits for the device; all phases so far."""
        if self._events:
            torch.cuda.synchronize(self.device)
            for phase, before, after in self._events:
                self._seconds.setdefault(phase, []).append(before.elapsed_time(after) / 1e3)
            self._events.clear()
        return self._seconds


Variant = Callable[[int, Stopwatch], None]
"""Runs one round, whose number it is given, and times its phases."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: whole rounds over all variants until `rounds` are done or `seconds` are spent."""

    rounds: int = 30
    seconds: float = 4.0
    least: int = 5
    warmup: int = 2


def interleave(variants: Mapping[str, Variant], device: torch.device, effort: Effort) -> dict[str, Samples]:
    """Runs the variants in turn, round after round, forwards and backwards, and returns each one's samples."""
    order = list(variants)
    unmeasured = Stopwatch(device)
    for number in range(effort.warmup):
        for name in order:
            variants[name](number, unmeasured)
    unmeasured.read()
    watches = {name: Stopwatch(device) for name in order}
    start, number = time.perf_counter(), 0
    while number < effort.rounds and (number < effort.least or time.perf_counter() - start < effort.seconds):
        for name in order if number % 2 == 0 else reversed(order):
            variants[name](number, watches[name])
        number += 1
    return {name: watch.read() for name, watch in watches.items()}


def total(samples: Samples) -> list[float]:
    """The sum over phases, round by round."""
    return [sum(phases) for phases in zip(*samples.values(), strict=True)]


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster `fast` is: the median of the ratios of runs of the same round."""
    return statistics.median(ratios(slow, fast))


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Those of runs of the same round."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def noise(seconds: Sequence[float]) -> float:
    """The share by which the median of such a series may be off without meaning anything.

    The larger of two estimates: the difference between the medians of even and odd rounds, which are two interleaved
    runs of the same code, and twice the standard error of the median (1.25·σ/√n, σ from the median deviation).
    """
    middle = statistics.median(seconds)
    if len(seconds) < 4:
        return (max(seconds) - min(seconds)) / middle
    halves = abs(statistics.median(seconds[::2]) - statistics.median(seconds[1::2]))
    deviation = 1.4826 * statistics.median(abs(s - middle) for s in seconds)
    return max(halves, 2 * 1.2533 * deviation / math.sqrt(len(seconds))) / middle


def spread(seconds: Sequence[float]) -> list[float]:
    """Milliseconds: least, lower quartile, median, upper quartile, most."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * [*seconds]
    return [1e3 * value for value in (min(seconds), *quartiles, max(seconds))]


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: L2 on CUDA, the largest of /sys on the CPU (32 MiB where it does not say)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1024, "M": MIB}.get(text[-1], 1))
    return max(sizes, default=32 * MIB)


@dataclass
class Copy:
    """A plain copy far larger than the cache, as a variant: what the machine's memory can do at this very moment."""

    device: torch.device
    bytes_each: int = 0
    source: torch.Tensor = field(init=False)
    target: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.bytes_each = self.bytes_each or 4 * cache_bytes(self.device)
        self.source = torch.ones(self.bytes_each // 4, device=self.device)
        self.target = torch.zeros_like(self.source)

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return 2 * self.bytes_each

    def __call__(self, number: int, watch: Stopwatch) -> None:
        with watch("copy"):
            self.target.copy_(self.source)


def copy_rate(device: torch.device, effort: Effort | None = None) -> float:
    """Bytes a second, read and written, of a copy that no cache holds; the median."""
    copy = Copy(device)
    samples = interleave({"copy": copy}, device, effort or Effort(rounds=15, seconds=2))
    return copy.moved / statistics.median(samples["copy"]["copy"])


def paired(
    default: Callable[[], object],
    other: Callable[[], object],
    name: str,
    device: torch.device,
    effort: Effort,
    block: int,
) -> Row:
    """Milliseconds a call of both, the ratio of medians in pairs and the default's noise; `block` calls a round.

    A round ends when the device is idle, so that work started for the call to come is paid for by who started it.
    """

    def variant(call: Callable[[], object]) -> Variant:
        def run(number: int, watch: Stopwatch) -> None:
            with watch("step"):
                for _ in range(block):
                    call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

        return run

    found = interleave({"default": variant(default), name: variant(other)}, device, effort)
    steps = {key: samples["step"] for key, samples in found.items()}
    return {
        "ms": {key: 1e3 * statistics.median(values) / block for key, values in steps.items()},
        "speedup": paired_ratio(steps["default"], steps[name]),
        "noise": noise(steps["default"]),
        "rounds": len(steps["default"]),
    }


def by_kernel(run: Callable[[], object], device: torch.device, times: int) -> dict[str, float]:
    """Seconds a call of `run` by kernel (CUDA) or op (CPU, the calling thread's), the longest first."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(times):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    return {name: spent / times for name, spent in profiling.by_kernel(profiler, device).items()}


def give_memory_back(device: torch.device) -> None:
    """What nothing holds any more, reference cycles included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def tidy(device: torch.device) -> Iterator[None]:
    """Gives memory back on leaving."""
    try:
        yield
    finally:
        give_memory_back(device)


OURS, RIVALS = 2.0, 10.0
SLACK_ULPS = 4.0
"""Rounding steps of the dtype that are always allowed, to rivals RIVALS / OURS times as many: eager may by chance be
exact."""


class WrongResult(AssertionError):
    """A variant that must not be timed."""


def results(call: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """The outputs of a call and the gradients to its leaves, in order."""
    outputs = call(*inputs.args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [t.detach() for t in (*outputs, *inputs.backward(outputs))]


def in_float64(inputs: Inputs) -> Inputs:
    """The same values, exactly, with leaves of their own."""
    seen: dict[int, Tensor] = {}

    def up(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        return seen.setdefault(id(value), value.detach().double().requires_grad_(value.requires_grad))

    args, leaves = tuple(map(up, inputs.args)), tuple(map(up, inputs.leaves))
    return replace(inputs, args=args, leaves=leaves, grads=tuple(g.double() for g in inputs.grads))


def errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Root mean square and worst error, relative to the truth's own root mean square and largest value."""
    difference, scale = found.double() - truth, truth.abs().max().clamp_min(1e-30)
    rms = difference.square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-30)
    return float(rms), float(difference.abs().max() / scale)


class Checked(Protocol):
    """What `check` needs to know of an op's case."""

    @property
    def key(self) -> str: ...
    @property
    def eager(self) -> Callable[..., Any]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def check(case: Checked, variants: dict[str, Callable[..., Any]], inputs: Inputs) -> None:
    """Raises WrongResult, naming case, variant, result and both errors; "fused" is held to OURS, others to RIVALS."""
    truth = results(case.eager, in_float64(inputs))
    eager = [errors(found, true) for found, true in zip(results(case.eager, inputs), truth, strict=True)]
    ulps = SLACK_ULPS * torch.finfo(case.dtype).eps
    for name, call in variants.items():
        factor = OURS if name == "fused" else RIVALS
        slack = ulps * factor / OURS
        for i, (found, true) in enumerate(zip(results(call, inputs), truth, strict=True)):
            mine = errors(found, true)
            for kind, ours, theirs in zip(("rms", "worst"), mine, eager[i], strict=True):
                if not ours <= factor * theirs + slack:
                    raise WrongResult(
                        f"{case.key}: {name}, result {i}: {kind} error {ours:.2e}, eager's is {theirs:.2e}; "
                        f"at most {factor:g} times that + {slack:.1e} is allowed"
                    )


SAME_LOSS = {"cuda": 5e-3, "cpu": 1e-4}
"""Relative difference of losses and norms that compiling or scheduling may make: bf16's rounding, float32's."""


def worst_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The largest relative difference of two loops' scalars, step by step."""
    pairs = (pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True))
    return max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs)
