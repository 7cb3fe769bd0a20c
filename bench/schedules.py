"""What a schedule makes of the step: streams, fixed shapes, prefetching and graphs, each against the default.

Both loops train the same steps, whose numbers must agree before any time is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bench import measure as gate
from bench.machine import Row, notices
from bench.measure import Effort, paired
from bench.step import tidy
from bench.workload import Setup, ours

AHEAD, PADDED = "--run.teacher_placement=ahead", "--run.supervised_rows=padded"
TEACHER: dict[str, tuple[str, ...]] = {
    "branches on two streams": ("--run.teacher_branches=streams",),
    "teacher a step ahead": (AHEAD,),
    "teacher a step ahead on two streams": (AHEAD, "--run.teacher_branches=streams"),
    "teacher beside the student": ("--run.teacher_placement=beside",),
    "sequential branches": ("--run.teacher_branches=sequential",),
    "padded rows": (PADDED,),
    "padded rows, teacher a step ahead": (PADDED, AHEAD),
}
UNIFORM = ("--flow.time=uniform",)
STREAMED = ("--data.loader=torch",)
GRAPHS = (PADDED, "--run.cuda_graphs=true")
BLOCK = {"cuda": 5, "cpu": 1}
"""Steps a round."""


@dataclass(frozen=True)
class Point:
    """A schedule to measure: its options over `setup`, whose own options the default gets, too."""

    name: str
    setup: Setup
    options: tuple[str, ...]

    @property
    def label(self) -> str:
        more = "".join(f", {option.removeprefix('--')}" for option in self.setup.options)
        return f"{self.setup.label}{more}: {self.name}"

    @property
    def refusal(self) -> str | None:
        """Why it can't be measured here, if it can't."""
        cpu = self.setup.device.type == "cpu"
        return "needs CUDA" if cpu and "--run.cuda_graphs=true" in self.options else None


def points(device: torch.device, small: Setup | None) -> Iterator[Point]:
    """Graphs where launches cost most, then every schedule of the teacher at XL/2 and B/2; or all of them at `small`.

    XL/2 has a batch that two loops fit into one device's memory with.
    """
    large = [small] if small else [Setup("XL/2", "stage 2", 64, device), Setup("B/2", "stage 2", 256, device)]
    little = [small] if small else [Setup("B/2", stage, 16, device) for stage in ("plain", "stage 1", "stage 2")]
    for setup in little:
        yield Point("CUDA graphs", setup, GRAPHS)
    for setup in large:
        for name, options in TEACHER.items():
            yield Point(name, setup, options)
        yield Point("padded rows", replace(setup, options=UNIFORM), (PADDED,))
        yield Point("prefetch", setup, ("--run.prefetch=true",))
        yield Point("prefetch", replace(setup, options=STREAMED), ("--run.prefetch=true",))


def measure(point: Point, effort: Effort) -> Row:
    """Milliseconds a step of both, how many times faster the schedule is, and by how much their numbers differ."""
    setup = point.setup
    # Without CUDA the order of things is rehearsed on the one queue there is.
    other = replace(setup, options=(*setup.options, *point.options, "--run.streams=auto"))
    with ours(setup) as default, ours(other) as scheduled, tidy(setup.device):
        numbers = [[[float(v) for v in loop()] for _ in range(5)] for loop in (default, scheduled)]
        worst = gate.worst_difference(*numbers)
        if worst > gate.SAME_LOSS[setup.device.type]:
            return {"ok": False, "wrong": f"numbers differ by {worst:.1e}", "worst_difference": worst}
        timed = paired(default, scheduled, "schedule", setup.device, effort, BLOCK[setup.device.type])
        said = default.log.said + scheduled.log.said
    return {"ok": True, "worst_difference": worst} | timed | notices(said)
