"""Options and fixtures of `pytest bench/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from bench import machine as results
from bench import op_times
from st_fast.kernels.heap import keep_freed_memory

keep_freed_memory()  # as a run does; ops measured beside ours gain as much, whole loops have processes of their own


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("st_fast")
    group.addoption("--full", action="store_true", help="more sizes, and the sweeps of the step: an hour or so")
    group.addoption("--base", metavar="REV", help="compare the fused ops with this revision; fail beyond the noise")
    group.addoption("--results", type=Path, default=results.FOLDER, help="folder of the JSON files")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--base compares, and does nothing else."""
    compares = bool(config.getoption("--base"))
    chosen = [item for item in items if (item.name == "bench_against_base") == compares]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def device() -> torch.device:
    return op_times.default_device()


@pytest.fixture(scope="session")
def store(request: pytest.FixtureRequest, device: torch.device) -> results.Store:
    """Takes rows; the machine's rates are measured when it is first asked for."""
    machine = results.measure_machine(device)
    if machine.busy:
        print(f"\nThis machine is busy (load {machine.load} a core): these figures are not results.")
    return results.Store(request.config.getoption("--results"), machine)


@pytest.fixture(autouse=True)
def _compiled_code_is_dropped() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Replay:
    """A clock that pytest-benchmark reads, moved by durations that were measured interleaved or by CUDA events."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Sequence[float]], None]:
    """Hands measured seconds to pytest-benchmark, for its table and its own JSON."""
    clock = Replay()
    request.node.add_marker(pytest.mark.benchmark(group=request.node.originalname, timer=clock.read))
    benchmark = request.getfixturevalue("benchmark")

    def show(seconds: Sequence[float]) -> None:
        left = iter(seconds)

        def run() -> None:
            clock.now += next(left)

        benchmark.pedantic(run, rounds=len(seconds), iterations=1)

    return show
