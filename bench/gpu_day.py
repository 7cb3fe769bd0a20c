"""Everything that only a GPU can tell, by one command that can be run again until it is done.

    python -m bench.gpu_day                    all parts, one after another, for at most --budget seconds
    python -m bench.gpu_day --parts truth      some of them
    python -m bench.gpu_day --small            the same at sizes that a CPU does in minutes: a rehearsal

Rows are written as they are measured, to $OUT or bench/results, and not measured again while the sources stay; a row
that fails or takes too long keeps its error and the next one goes on. Exit code: 0 done, 1 a check failed, 3 not done.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from bench import choices, first_step, gate, op_times, optimiser, profiles, results, schedules, step_times, sweeps
from bench.cases import MAKERS, Case, Draw, Size
from bench.results import Row, Store
from bench.step_times import Wanted
from bench.timing import Effort, Stopwatch, interleave
from bench.workload import Setup, ours
from st_fast.kernels import native
from st_fast.model.attention import BACKENDS, Attend, verify

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 72)
LEAST_SECONDS = 5.0
"""Left in the budget, or no further row is begun."""

Task = tuple[str, Callable[[], Row]]
"""A row's key and what measures it."""


@dataclass(frozen=True)
class Day:
    """What all parts share."""

    device: torch.device
    small: bool
    store: Store

    @property
    def effort(self) -> Effort:
        return Effort(rounds=3, seconds=1, least=2, warmup=1) if self.small else Effort()

    @property
    def sizes(self) -> list[Size]:
        """Of the ops."""
        return [Size("S/2", 2, 16)] if self.small else [Size("B/2", 256), Size("XL/2", 256)]

    @property
    def setups(self) -> list[Setup]:
        """Of the step."""
        setups = step_times.default_setups(self.device)
        return [replace(s, batch=4, tokens=16, depth=2) for s in setups] if self.small else setups

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


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
            for op in MAKERS:
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
            yield label, partial(_attention, day, backend.attend, head) if refusal is None else _left_out(refusal)


def _left_out(refusal: str) -> Callable[[], Row]:
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
    for op in MAKERS:
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
    values = {}
    for choice in ("off", "on"):
        with ours(replace(setup, compile=choice)) as loop, step_times.tidy(setup.device):
            values[choice] = [[float(v) for v in loop()] for _ in range(3)]
    worst = gate.worst_difference(values["off"], values["on"])
    ok = worst <= gate.SAME_LOSS[setup.device.type]
    return {"ok": ok, "worst_difference": worst, "eager_loss": values["off"][-1][0]}


def kernels(day: Day) -> Iterator[Task]:
    """Every op's figures, and the optimiser's."""
    for size in day.sizes:
        for op in MAKERS:
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
        yield point.label, _left_out(point.refusal) if point.refusal else partial(schedules.measure, point, day.effort)


def profile(day: Day) -> Iterator[Task]:
    """The longest kernels of a step, by name."""
    for setup in day.setups:
        yield setup.label, partial(_longest, setup)


def _longest(setup: Setup) -> Row:
    with ours(setup) as loop, step_times.tidy(setup.device):
        loop()
        found = profiles.kernels(loop, setup.device, times=3)
    return {"ok": True, "kernels_ms": {name[:120]: 1e3 * spent for name, spent in list(found.items())[:30]}}


def first(day: Day) -> Iterator[Task]:
    """Cold and warm start of the largest plain step."""
    setup = [s for s in step_times.default_setups(day.device) if s.stage == "plain"][-1]
    batch = 1 if day.small else setup.batch
    start = partial(first_step.cold_and_warm, setup.size, setup.stage, batch, day.device.type)
    yield replace(setup, batch=batch).label, lambda: {"seconds": start()}


def choice(day: Day) -> Iterator[Task]:
    """What each choice that leaves the mathematics alone, or fp8, does to the plain step's time and memory."""
    for setup in [s for s in day.setups if s.stage == "plain"]:
        for name in choices.CHOICES:
            block = 1 if day.small else 5
            yield f"{setup.label} | {name}", partial(choices.measure, setup, name, day.effort, block)


def sweep(day: Day) -> Iterator[Task]:
    """How the step's cost grows."""
    points = [replace(s, tokens=16, depth=2) for s in day.setups[:1]] if day.small else sweeps.points(day.device)
    for point in points:
        yield point.label, partial(sweeps.measure, point, day.store.machine)


PARTS: dict[str, tuple[Callable[[Day], Iterator[Task]], str]] = {
    "build": (build, "csrc"),
    "truth": (truth, "correctness"),
    "attention": (attention, "attention backends"),
    "compiled": (compiled, "compiled equals eager"),
    "kernels": (kernels, "kernels"),
    "step": (step, "step"),
    "schedule": (schedule, "schedules"),
    "first": (first, "first step"),
    "profile": (profile, "longest kernels"),
    "choice": (choice, "choices"),
    "sweep": (sweep, "sweep"),
}
"""Name on the command line → (what yields its tasks, its part in the results file)."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside when the time is up."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(task: Callable[[], Row], seconds: float) -> Row:
    """The row, or a row that says what went wrong."""
    try:
        with at_most(seconds):
            return task()
    except Exception as error:  # one broken row must not cost the others the device's time
        lines = str(error).strip().splitlines()
        return {"ok": False, "error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}


def run(day: Day, parts: list[str], budget: float, again: bool) -> int:
    """Goes through the parts until the budget is spent; the exit code."""
    start, failed = time.monotonic(), False
    for part in parts:
        tasks, section = PARTS[part]
        for key, task in tasks(day):
            row = day.store.rows(section).get(key, {})
            if row.get("code") != day.store.machine.code or (again and "error" in row):
                left = budget - (time.monotonic() - start)
                if left < LEAST_SECONDS:
                    print(f"stopped before {part}: {key}; run the same command again")
                    return 3
                row = attempt(task, left) | {"code": day.store.machine.code}
                if "TimeoutError" in row.get("error", "") and left < budget / 2:
                    print(f"stopped within {part}: {key}; run the same command again")
                    return 3
                day.store.put(section, key, row)
            failed |= not row.get("ok", True)
            print(f"{part}: {key}: {_said(row)}", flush=True)
    return 1 if failed else 0


def _said(row: Row) -> str:
    """A row in a few words."""
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    return row.get("error") or row.get("wrong") or ("ok" if row.get("ok", True) else "WRONG")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, separated by commas")
    parser.add_argument("--small", action="store_true", help="small sizes, for a rehearsal on any machine")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds")
    parser.add_argument("--again", action="store_true", help="try rows that failed once more")
    parser.add_argument("--results", type=Path, default=Path(os.environ.get("OUT") or results.FOLDER))
    settings = parser.parse_args()
    parts = settings.parts.split(",")
    for part in parts:
        if part not in PARTS:
            print(f"--parts {part}: one of {', '.join(PARTS)}", file=sys.stderr)
            return 2
    store = Store(settings.results, results.measure_machine(op_times.default_device()))
    earlier = results.FOLDER / store.path.name
    if earlier.exists() and not store.path.exists() and not settings.small:
        store.path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(earlier, store.path)
    return run(Day(op_times.default_device(), settings.small, store), parts, settings.budget, settings.again)


if __name__ == "__main__":
    raise SystemExit(main())
