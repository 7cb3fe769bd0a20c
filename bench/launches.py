"""Launches and host time of every op and of whole steps: what Python and PyTorch cost before the device does anything.

    python -m bench.launches                   prints a table and writes bench/results/launches.json
    python -m bench.launches --only "B/2"      of the steps, those whose name has this in it

Without a GPU it runs itself on the stand-in driver (tests/stand_in), by a Python with a CUDA build of torch
(ST_FAST_CUDA_PYTHON): kernels take no time there, so that host time is all there is, at the real batch and memory.
On a GPU launches are the profiler's. Host time is the process's CPU time, all threads: medians, with the noise beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench import machine as results
from bench import schedules
from bench.cases import MAKERS, Case, Size
from bench.measure import noise
from bench.optimiser import OptimiserCase, fresh, fused_step, model_shapes
from bench.step import MICRO_BATCH, give_memory_back
from bench.workload import STAGES, Setup, ours
from st_fast.train.step import WARM_UP
from tests.stand_in import driver, rehearse

FILE = results.FOLDER / "launches.json"
OPS_SIZE = Size("XL/2", 256)
CALLS, STEPS = 200, 12
WARM = WARM_UP + 2
"""Steps before any is looked at: all is compiled and, with graphs, captured."""


@dataclass(frozen=True)
class Cost:
    """Of one call. `noise` is the share by which the host time may be off; None: nothing counts it here."""

    launches: int
    host_us: float
    noise: float
    syncs: int | None
    graph_launches: int | None = None


class StandIn:
    """Counts by the stand-in driver."""

    def __init__(self) -> None:
        self._counters = driver.Counters()

    def __call__(self, call: Callable[[], object]) -> dict[str, int]:
        before = self._counters.read()
        call()
        return self._counters.since(before)


def by_profiler(call: Callable[[], object]) -> dict[str, int]:
    """Kernels that a GPU ran, those of graphs included."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if str(e.device_type) == "DeviceType.CUDA"]
    return {"launches": sum(not event.name.startswith(("Mem", "Activity")) for event in kernels)}


def cost(call: Callable[[], object], prepare: Callable[[], object], count: Any, times: int) -> Cost:
    """Median host time of `call` after an untimed `prepare`, and the counts of its last run."""
    seconds = []
    for _ in range(times):
        prepare()
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    prepare()
    found = count(call)
    host_us = 1e6 * statistics.median(seconds)
    return Cost(found["launches"], host_us, noise(seconds), found.get("syncs"), found.get("graph_launches"))


def nothing() -> None:
    """For calls that need no preparation."""


def op_costs(case: Case, count: Any) -> dict[str, Cost]:
    """Forward and backward of a public op under autograd, as the model calls it."""
    inputs = case.inputs(0)
    outputs: list[Any] = []

    def forward() -> None:
        found = case.fused(*inputs.args)
        outputs[:] = found if isinstance(found, tuple) else (found,)

    def backward() -> None:
        torch.autograd.grad(outputs, inputs.leaves, inputs.grads[: len(outputs)])

    for _ in range(3):  # kernels are compiled
        forward()
        backward()
    return {
        "forward": cost(forward, nothing, count, CALLS),
        "backward": cost(backward, forward, count, CALLS),
    }


def optimiser_cost(device: torch.device, count: Any) -> dict[str, Cost]:
    """The gradients' norm and the step of all of a model's tensors."""
    name = f"SiT-{OPS_SIZE.name}"
    case = OptimiserCase(name, device, model_shapes(name))
    state = fresh(case, case.shapes)
    for _ in range(3):
        fused_step(state)
    return {"step": cost(lambda: fused_step(state), nothing, count, CALLS // 10)}


def setups(device: torch.device) -> Iterator[tuple[str, Setup]]:
    """Steps by their names."""
    for size in ("B/2", "XL/2"):
        for stage in STAGES:
            setup = Setup(size, stage, 256, device, compile="on", options=MICRO_BATCH)
            yield setup.label, setup
            if size == "B/2":
                yield f"{setup.label}, CUDA graphs", replace(setup, options=(*MICRO_BATCH, *schedules.GRAPHS))


def step_cost(setup: Setup, count: Any) -> dict[str, Any]:
    """A step with its batch, without what happens between log lines. Host time in ms, memory in GiB.

    A graph's own memory counts as reserved, not as in use.
    """
    give_memory_back(setup.device)  # what the step before has left in reference cycles
    with ours(setup) as loop:
        for _ in range(WARM):
            loop()
        torch.cuda.reset_peak_memory_stats(setup.device)
        found = asdict(cost(loop, nothing, count, STEPS))
        peak = torch.cuda.max_memory_allocated(setup.device) / 2**30
        reserved = torch.cuda.memory_reserved(setup.device) / 2**30
        passes = loop.recipe.optim.accumulation
        given_up = list(loop.log.said)
    row = {"launches": found["launches"], "host_ms": found["host_us"] / 1e3, "noise": found["noise"]}
    row |= {key: found[key] for key in ("syncs", "graph_launches")} | {
        "passes": passes,
        "peak_gib": peak,
        "reserved_gib": reserved,
    }
    return row | ({"notices": given_up} if given_up else {})


def measure(device: torch.device, only: str) -> dict[str, Any]:
    """What is written: launches.json's content."""
    stand_in = driver.inside()
    count = StandIn() if stand_in else by_profiler
    ops = {}
    for name in MAKERS:
        ops[name] = {k: asdict(v) for k, v in op_costs(Case(name, OPS_SIZE, torch.bfloat16, device), count).items()}
        print(f"{name}: done", file=sys.stderr, flush=True)
    ops["adamw_ema"] = {k: asdict(v) for k, v in optimiser_cost(device, count).items()}
    steps = {}
    for name, setup in setups(device):
        if only in name:
            steps[name] = step_cost(setup, count)
            torch._dynamo.reset()
            print(f"{name}: done", file=sys.stderr, flush=True)
    total = torch.cuda.get_device_properties(device).total_memory
    return {
        "torch": torch.__version__, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": results._commit(),
        "cpu": results.device_name(torch.device("cpu")),
        "device": f"stand-in for {torch.cuda.get_device_name(device)}" if stand_in else results.device_name(device),
        "gib": round(total / 2**30, 1),
        "attention": "torch's memory-efficient kernel in place of cuDNN's" if stand_in else "as chosen",
        "ops_size": OPS_SIZE.label, "ops": ops, "steps": steps,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"Torch {found['torch']}, {found['device']} ({found['gib']} GiB), {found['cpu']}; revision "]
    lines[0] += f"{found['commit']}, {found['date']}. Attention: {found['attention']}."
    lines += ["", f"| op, {found['ops_size']} | pass | launches | host µs | noise |", "|---|---|---:|---:|---:|"]
    for name, costs in found["ops"].items():
        for part, one in costs.items():
            spread = f"± {one['noise']:.0%}"
            lines.append(f"| {name} | {part} | {one['launches']} | {one['host_us']:.0f} | {spread} |")
    lines += ["", "| step | passes | launches | graph launches | host ms | noise | syncs | peak GiB | reserved |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name, one in found["steps"].items():
        graphs, syncs = ("–" if one[key] is None else one[key] for key in ("graph_launches", "syncs"))
        lines.append(
            f"| {name} | {one['passes']} | {one['launches']} | {graphs} | {one['host_ms']:.1f} | ± {one['noise']:.0%} "
            f"| {syncs} | {one['peak_gib']:.1f} | {one['reserved_gib']:.1f} |"
        )
    return "\n".join(lines)


def on_the_stand_in(arguments: list[str]) -> int:
    """Runs this command again, in a process on the stand-in driver."""
    try:
        found = driver.installation()
        environment = rehearse.variables(found)
    except driver.Unavailable as error:
        print(f"bench.launches: no GPU, and no stand-in: {error}", file=sys.stderr)
        return 2
    command = [found.python, "-m", "bench.launches", *arguments]
    return subprocess.run(command, cwd=results.ROOT, env=environment).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches")
    parser.add_argument("--only", default="", help="part of the names of the steps to measure")
    parser.add_argument(
        "--out", type=Path, default=FILE, help=f"where the JSON goes ({FILE.relative_to(results.ROOT)})"
    )
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        return on_the_stand_in(["--only", given.only, "--out", str(given.out.absolute())])
    found = measure(torch.device("cuda", torch.cuda.current_device()), given.only)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
