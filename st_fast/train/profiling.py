"""Profiles some steps of a stage, by `[profile]` of the recipe: for nsys, or by torch.profiler with a table of its own.

Nothing here touches a step that is not profiled. A profiled one computes the same, only later.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from st_fast.core.errors import UserError
from st_fast.core.ranks import Ranks
from st_fast.recipe import schema
from st_fast.train import families, ranges
from st_fast.train.log import Clock, Log

T = TypeVar("T")

UNDER_NSYS = "NSYS_PROFILING_SESSION_ID"
"""nsys sets this in what it starts."""
OUTSIDE = "outside kernels"
"""Time of a step in which nothing ran: the device waiting for work, or Python between two ops."""


def choose_tool(settings: schema.Profile, device: torch.device) -> Literal["nsys", "torch"]:
    """What profiles. UserError where "nsys" is asked for without CUDA, whose calls tell it when to begin."""
    if settings.tool == "nsys" and device.type != "cuda":
        raise UserError(f'profile.tool = "nsys": needs CUDA, this run is on {device}; "torch" works here')
    if settings.tool == "auto":
        return "nsys" if device.type == "cuda" and os.environ.get(UNDER_NSYS) else "torch"
    return settings.tool


class StageProfile:
    """The profile of one stage: `watch` its batches, and say when a step is `stepped`.

    By torch.profiler on the first rank alone, into `folder`; by nsys on each rank that it started.
    """

    def __init__(
        self, settings: schema.Profile, ranks: Ranks, log: Log, stage: schema.Stage, folder: Path, clock: Clock
    ) -> None:
        self.settings, self.ranks, self.log, self.stage = settings, ranks, log, stage.name
        self.folder, self.clock = folder, clock
        self._steps, self.last = stage.steps, min(settings.start + settings.steps - 1, stage.steps)
        self.tool = choose_tool(settings, ranks.device)
        self._open = ExitStack()  # the profiler
        self._step = ExitStack()  # the stretch that is the whole step

    def watch(self, batches: Iterator[T], first: int) -> Iterator[T]:
        """The same batches, of the steps after `first`; a step's stretch begins before its batch is there."""
        if 0 < self.settings.start <= first:
            self.log.say(
                f"{self.stage}: profile.start = {self.settings.start} lies behind: goes on at step {first + 1}"
            )
        with self._open, self._step:
            for number in range(first + 1, self._steps + 1):
                if number == self.settings.start and (self.tool == "nsys" or self.ranks.first):
                    with self.clock.paused():
                        self._open.enter_context(self._nsys() if self.tool == "nsys" else self._torch())
                self._step.enter_context(ranges.named(ranges.STEP))
                yield next(batches)

    def stepped(self, step: int) -> None:
        """Says that a step's work is launched; after the last one that is profiled, ends the profile."""
        self._step.close()
        if self.settings.start and step == self.last:
            self._open.close()

    @contextmanager
    def _nsys(self) -> Iterator[None]:
        torch.cuda.synchronize(self.ranks.device)
        torch.cuda.profiler.start()
        try:
            with ranges.showing(torch.cuda.nvtx.range):
                yield
        finally:
            torch.cuda.synchronize(self.ranks.device)
            torch.cuda.profiler.stop()

    @contextmanager
    def _torch(self) -> Iterator[None]:
        device, cuda = self.ranks.device, self.ranks.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities, acc_events=True) as profiler, ranges.showing(record_function):
            start = time.perf_counter()
            yield
            if cuda:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
        with self.clock.paused():
            self._tell(profiler, seconds)

    def _tell(self, profiler: profile, seconds: float) -> None:
        first, last, device = self.settings.start, self.last, self.ranks.device
        count, path = last - first + 1, self.folder / f"steps-{first}-{last}.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        found = families.by_family(families.by_kernel(profiler, device))
        found[OUTSIDE] = max(0.0, seconds - families.busy(profiler, device))
        each = {name: spent / count for name, spent in found.items()}
        host = {name: spent / count for name, spent in families.annotated(profiler).items()}
        stretches = {name: host[name] for name in ranges.NAMES if name in host}
        self.log.write("profile", self.stage, last, first=first, file=path.name, families=each, stretches=stretches)
        self.log.say(f"{self.stage}: steps {first} to {last} profiled, trace in {path}")
        self.log.say(table("family of kernel", each, seconds / count))
        self.log.say(table("stretch, on the host", stretches, host[ranges.STEP]))


def table(title: str, seconds: Mapping[str, float], whole: float) -> str:
    """Milliseconds and shares of `whole`, one line a name."""
    rows = [*seconds.items(), ("the step, as profiled", whole)]
    width = max(len(title), *(len(name) for name, _ in rows))
    lines = [f"  {title:<{width}}  ms a step  share"]
    lines += [f"  {name:<{width}}  {1e3 * spent:>9.3f}  {100 * spent / whole:>4.0f} %" for name, spent in rows]
    return "\n".join(lines)
