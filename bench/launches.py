"""Launches and host time of every op and of whole steps: what Python and PyTorch cost before the device does anything.

    python -m bench.launches    prints a table and writes bench/results/launches.json

It runs itself on the stand-in driver (tests/stand_in), by a Python with a CUDA build of torch (ST_FAST_CUDA_PYTHON):
kernels take no time there, so that host time is all there is, at the real batch and memory. Host time is the process's
CPU time, all threads: medians, with the noise beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.ablations import GRAPHS
from bench.goals import Row
from bench.measure import give_memory_back, noise
from bench.ops import Case, Size
from bench.optimiser import OptimiserCase, fresh, fused_step, model_shapes
from bench.step import MICRO_BATCH
from bench.tables import anything
from bench.workload import STAGES, Setup, ours
from st_fast.kernels import TABLE
from st_fast.train.graphs import WARM_UP
from tests.stand_in import driver, rehearse

FILE = machine.FOLDER / "launches.json"
OPS_SIZE = Size("XL/2", 256)
CALLS, STEPS = 200, 12
WARM = WARM_UP + 2
"""Steps before any is looked at: all is compiled and, with graphs, captured."""

Call = Callable[[], object]


def cost(call: Call, prepare: Call, times: int) -> dict[str, Any]:
    """Median host µs of `call` after an untimed `prepare`, and what its last run asked the driver for."""
    seconds = []
    for _ in range(times):
        prepare()
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    prepare()
    counters = driver.Counters()
    before = counters.read()
    call()
    found = counters.since(before)
    counts = {key: found[key] for key in ("launches", "syncs", "graph_launches")}
    return counts | {"host_us": 1e6 * statistics.median(seconds), "noise": noise(seconds)}


def nothing() -> None:
    """For calls that need no preparation."""


def op_costs(case: Case) -> dict[str, Row]:
    """Forward, and backward if it has one, of a public op under autograd, as the model calls it."""
    inputs = case.inputs(0)
    outputs: list[Any] = []

    def forward() -> None:
        found = case.fused(*inputs.args)
        outputs[:] = found if isinstance(found, tuple) else (found,)

    def backward() -> None:
        inputs.backward(outputs)

    for _ in range(3):  # kernels are compiled
        forward()
        backward()
    costs: dict[str, Row] = {"forward": cost(forward, nothing, CALLS)}
    if inputs.leaves:
        costs["backward"] = cost(backward, forward, CALLS)
    return costs


def optimiser_cost(device: torch.device) -> dict[str, Row]:
    """The gradients' norm and the step of all of a model's tensors."""
    name = f"SiT-{OPS_SIZE.name}"
    case = OptimiserCase(name, device, model_shapes(name))
    state = fresh(case, case.shapes)
    for _ in range(3):
        fused_step(state)
    return {"step": cost(lambda: fused_step(state), nothing, CALLS // 10)}


def setups(device: torch.device) -> Iterator[tuple[str, Setup]]:
    """Steps by their names."""
    for size in ("B/2", "XL/2"):
        for stage in STAGES:
            setup = Setup(size, stage, 256, device, compile="on", options=MICRO_BATCH).untried
            yield setup.label, setup
            if size == "B/2":
                yield f"{setup.label}, CUDA graphs", replace(setup, options=(*setup.options, *GRAPHS))


def step_cost(setup: Setup) -> dict[str, Any]:
    """A step with its batch, without what happens between log lines. Host time in ms, memory in GiB.

    A graph's own memory counts as reserved, not as in use.
    """
    give_memory_back(setup.device)  # what the step before has left in reference cycles
    with ours(setup) as loop:
        for _ in range(WARM):
            loop()
        torch.cuda.reset_peak_memory_stats(setup.device)
        row = cost(loop, nothing, STEPS)
        host_us = row.pop("host_us")
        return {
            **row, "host_ms": host_us / 1e3, "passes": loop.recipe.optim.accumulation,
            "peak_gib": torch.cuda.max_memory_allocated(setup.device) / 2**30,
            "reserved_gib": torch.cuda.memory_reserved(setup.device) / 2**30,
        } | ({"notices": list(loop.log.said)} if loop.log.said else {})  # fmt: skip


def measured(device: torch.device) -> dict[str, Any]:
    """What is written: launches.json's content."""
    ops = {name: op_costs(Case(name, OPS_SIZE, torch.bfloat16, device)) for name in TABLE}
    ops["adamw_ema"] = optimiser_cost(device)
    steps = {}
    for name, setup in setups(device):
        steps[name] = step_cost(setup)
        torch._dynamo.reset()
        print(f"{name}: done", file=sys.stderr, flush=True)
    total = torch.cuda.get_device_properties(device).total_memory
    return {
        "torch": torch.__version__, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": machine._commit(),
        "cpu": machine.device_name(torch.device("cpu")),
        "device": f"stand-in for {torch.cuda.get_device_name(device)}",
        "gib": round(total / 2**30, 1),
        "attention": "torch's memory-efficient kernel in place of cuDNN's",
        "ops_size": OPS_SIZE.label, "ops": ops, "steps": steps,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    about = f"Torch {found['torch']}, {found['device']} ({found['gib']} GiB), {found['cpu']}; revision "
    about += f"{found['commit']}, {found['date']}. Attention: {found['attention']}. Ops at {found['ops_size']}."
    ops = [{"key": f"{op}, {name}", **row} for op, costs in found["ops"].items() for name, row in costs.items()]
    steps = [{"key": name, **row} for name, row in found["steps"].items()]
    return "\n\n".join([about, anything(ops), anything(steps)])


def on_the_stand_in(arguments: Sequence[str]) -> int:
    """Runs this command again, in a process on the stand-in driver."""
    try:
        found = driver.installation()
        environment = rehearse.variables(found)
    except driver.Unavailable as error:
        print(f"bench.launches: no GPU, and no stand-in: {error}", file=sys.stderr)
        return 2
    return subprocess.run(
        [found.python, "-m", "bench.launches", *arguments], cwd=machine.ROOT, env=environment
    ).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches")
    parser.add_argument("--out", type=Path, default=FILE, help="where the JSON goes (bench/results/launches.json)")
    given = parser.parse_args(arguments)
    if not driver.inside():
        return on_the_stand_in(["--out", str(given.out.absolute())])
    found = measured(torch.device("cuda", torch.cuda.current_device()))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(report(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
