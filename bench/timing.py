"""Time, measured so that it can be compared: interleaved runs, medians of paired ratios, and the noise between runs.

On CUDA a phase is bracketed by events, and before each the L2 is flushed with enough work that the phase's launches
are queued by the time the device reaches them: what is measured is the device's time, not Python's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

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
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


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
