"""Every op, forward and backward, against eager PyTorch and torch.compile, at the sizes of training.

    pytest bench/bench_kernels.py                 the table's figures
    pytest bench/bench_kernels.py --full          more sizes
    pytest bench/bench_kernels.py --base main     only: is anything slower than at that revision?

Every figure comes after its correctness gate; rows go to bench/results/<device>.json as they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from bench import compare as against
from bench import op_times, optimiser
from bench.cases import Case
from bench.machine import Store
from bench.measure import Effort, total
from bench.optimiser import OptimiserCase

Report = Callable[[Sequence[float]], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, full = op_times.default_device(), metafunc.config.getoption("--full")
    if "case" in metafunc.fixturenames:
        cases = op_times.cases(device, full)
        metafunc.parametrize("case", cases, ids=[case.key.replace(" ", "") for case in cases])
    if "setting" in metafunc.fixturenames:
        settings = optimiser.cases(device, full)
        metafunc.parametrize("setting", settings, ids=[setting.name for setting in settings])


def bench_op(case: Case, store: Store, report: Report) -> None:
    row, samples = op_times.measure(case, Effort())
    store.put("kernels", case.key, row)
    report(total(samples["fused"]))


def bench_optimiser(setting: OptimiserCase, store: Store, report: Report) -> None:
    row, samples = optimiser.measure(setting, Effort())
    store.put("kernels", setting.key, row)
    report(total(samples["fused"]))


def bench_against_base(request: pytest.FixtureRequest, device: torch.device) -> None:
    verdicts = against.compare(request.config.getoption("--base"))
    print("\n" + "\n".join(str(verdict) for verdict in verdicts))
    slower = [verdict for verdict in verdicts if verdict.slower]
    assert not slower, "slower than the base: " + "; ".join(str(verdict) for verdict in slower)
