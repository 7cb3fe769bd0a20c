"""A GPU day's second parts: how fast is it, what does each switch bring, and where does the time go?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from bench import choices, first_step, op_times, optimiser, schedules, sweeps
from bench import measure as profiles
from bench import step as step_times
from bench.cases import Case
from bench.day import Day, Task
from bench.day_right import left_out
from bench.machine import Row, notices
from bench.step import Wanted
from bench.workload import Setup, ours
from st_fast.kernels import TABLE


def kernels(day: Day) -> Iterator[Task]:
    """Every op's figures, and the optimiser's."""
    for size in day.sizes:
        for op in TABLE:
            case = Case(op, size, day.dtype, day.device)
            yield case.key, partial(_first, op_times.measure, case, day.effort)
    for setting in optimiser.cases(day.device, full=False):
        yield setting.key, partial(_first, optimiser.measure, setting, day.effort)


def _first(measure: Callable[..., tuple[Row, object]], *args: object) -> Row:
    return measure(*args)[0]


def step(day: Day) -> Iterator[Task]:
    """The whole step's figures."""
    wanted = step_times.default_wanted(day.device, full=False)
    if day.small:
        wanted = Wanted(day.effort, wanted.block)
    for setup in day.setups:
        yield setup.label, partial(step_times.measure, setup, wanted, day.store.machine)


def schedule(day: Day) -> Iterator[Task]:
    """What streams, fixed shapes, prefetching and graphs make of the step, each beside the default."""
    small = replace(day.setups[-1], batch=4) if day.small else None
    for point in schedules.points(day.device, small):
        yield point.label, left_out(point.refusal) if point.refusal else partial(schedules.measure, point, day.effort)


def profile(day: Day) -> Iterator[Task]:
    """The longest kernels of a step, by name."""
    for setup in day.setups:
        yield setup.label, partial(_longest, setup)


def _longest(setup: Setup) -> Row:
    with ours(setup) as loop, step_times.tidy(setup.device):
        loop()
        found = profiles.by_kernel(loop, setup.device, times=3)
        longest = {name[:120]: 1e3 * spent for name, spent in list(found.items())[:30]}
        return {"ok": True, "kernels_ms": longest} | notices(loop.log.said)


def first(day: Day) -> Iterator[Task]:
    """Cold and warm start of the largest plain step."""
    setup = [s for s in step_times.default_setups(day.device) if s.stage == "plain"][-1]
    setup = replace(setup, batch=1, options=()) if day.small else setup
    yield setup.label, lambda: {"seconds": first_step.cold_and_warm(setup)}


def choice(day: Day) -> Iterator[Task]:
    """What each choice that leaves the mathematics alone, or fp8, does to the plain step's time and memory.

    At XL/2 with a batch that two loops fit into one device's memory with.
    """
    large = Setup("XL/2", "plain", 64, day.device) if day.device.type == "cuda" else day.setups[0]
    for setup in [day.setups[0] if day.small else large]:
        for name in choices.SOME if day.small else choices.others(day.device):
            block = 1 if day.small else 3
            yield f"{setup.label} | {name}", partial(choices.measure, setup, name, day.effort, block)


def sweep(day: Day) -> Iterator[Task]:
    """How the step's cost grows."""
    points = [replace(s, tokens=16, depth=2) for s in day.setups[:1]] if day.small else sweeps.points(day.device)
    for point in points:
        yield point.label, partial(sweeps.measure, point, day.store.machine)
