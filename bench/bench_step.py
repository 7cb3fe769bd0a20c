"""The whole step: plain, stage 1 and stage 2, against the published loop written plainly, eager and compiled.

    pytest bench/bench_step.py           S/2 at batch 8 on a CPU; B/2 and XL/2 at batch 256 on CUDA
    pytest bench/bench_step.py -k demo   `make demo`'s step, with the ops that "auto" chooses and the reference's
    pytest bench/bench_step.py --full    also how cost grows with batch, tokens and depth, and a picture of it

Rows go to bench/results/<device>.json as they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from bench import demo_step, first_step, op_times, sweeps
from bench import step as step_times
from bench.machine import Store
from bench.workload import Setup

Report = Callable[[Sequence[float]], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = op_times.default_device()
    if "setup" in metafunc.fixturenames:
        setups = step_times.default_setups(device)
        metafunc.parametrize("setup", setups, ids=[setup.label.replace(" ", "") for setup in setups])
    if "point" in metafunc.fixturenames:
        points = sweeps.points(device) if metafunc.config.getoption("--full") else []
        metafunc.parametrize("point", points, ids=[point.label.replace(" ", "") for point in points])


def bench_stage(setup: Setup, store: Store, request: pytest.FixtureRequest, report: Report) -> None:
    wanted = step_times.default_wanted(setup.device, request.config.getoption("--full"))
    row = step_times.measure(setup, wanted, store.machine)
    store.put("step", setup.label, row)
    report([row["ms"]["ours"] / 1e3])


def bench_first_step(store: Store, device: torch.device) -> None:
    setup = step_times.default_setups(device)[0]
    seconds = first_step.cold_and_warm(setup)
    store.put("first step", setup.label, {"seconds": seconds})


def bench_demo(store: Store, device: torch.device, report: Report) -> None:
    row = demo_step.measure(device)
    store.put("demo", "digits, stage 2", row)
    report([row["ms"]["auto"] / 1e3])


def bench_sweep(point: Setup, store: Store, device: torch.device) -> None:
    store.put("sweep", point.label, sweeps.measure(point, store.machine))
    sweeps.draw(store.path)
