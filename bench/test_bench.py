"""`pytest bench/`: the default parts of `python -m bench`, a test a row, and pytest-benchmark's table of them.

pytest bench/                        all of it; what these sources have measured already is not measured again
pytest bench/ -k "step and plain"    some rows
pytest bench/ --full                 more; --base REV compares the ops with a revision instead
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import pytest
import torch

from bench import __main__ as command
from bench import compare, machine
from bench.machine import Suite
from bench.measure import Row
from bench.suite import PARTS, defaults, said

pytestmark = pytest.mark.timeout(0)  # the first row of a part waits for all of them


def _settings(config: pytest.Config) -> argparse.Namespace:
    """The command's own, from pytest's options."""
    options = [f"--{name}" for name in ("full", "small", "again") if config.getoption(name)]
    options += [f"--{name}={value}" for name in ("base", "results") if (value := config.getoption(name))]
    return command.settings_of(options)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" not in metafunc.fixturenames:
        return
    given = _settings(metafunc.config)
    suite = Suite(torch.device(machine.device_kind()), None, given.small, given.full)  # type: ignore[arg-type]
    parts = [] if given.base else defaults(suite.device.type, given.small, given.full)
    rows = [(part, key) for part in parts for key, _ in PARTS[part].tasks(suite)]
    metafunc.parametrize("row", rows, indirect=True, ids=[f"{part}: {key}".replace(" ", "") for part, key in rows])


@pytest.fixture(scope="session")
def call(request: pytest.FixtureRequest) -> Iterator[command.Call]:
    given = _settings(request.config)
    wrong = command.problem(given)
    if wrong:
        pytest.exit(wrong, returncode=2)
    with command.started(given) as started:
        yield started


@pytest.fixture(scope="session")
def rows_of(request: pytest.FixtureRequest, call: command.Call) -> Callable[[str], dict[str, Row]]:
    """Measures those rows of a part that this session has tests for; all rows of its section."""
    chosen: dict[str, list[str]] = {}
    for item in request.session.items:
        if hasattr(item, "callspec"):
            part, key = item.callspec.params["row"]
            chosen.setdefault(part, []).append(key)
    ended: dict[str, int] = {}

    def measured(part: str) -> dict[str, Row]:
        if part not in ended:
            ended[part] = command.run_part(part, call, chosen[part])
        return call.store.rows(PARTS[part].section)

    return measured


@pytest.fixture
def row(request: pytest.FixtureRequest, rows_of: Callable[[str], dict[str, Row]]) -> Row:
    part, key = request.param
    return rows_of(part).get(key, {"ok": False, "error": "not measured: see what is printed above"})


class Replay:
    """A clock that pytest-benchmark reads, moved by durations that were measured interleaved or by CUDA events."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now


def test_row(row: Row, request: pytest.FixtureRequest) -> None:
    assert row.get("ok", True), said(row)
    if "spread_ms" not in row:
        return
    clock = Replay()
    part, _ = request.node.callspec.params["row"]
    request.node.add_marker(pytest.mark.benchmark(group=part, timer=clock.read, disable_gc=True))
    left = iter(row["spread_ms"])

    def run() -> None:
        clock.now += next(left) / 1e3

    request.getfixturevalue("benchmark").pedantic(run, rounds=len(row["spread_ms"]), iterations=1)


def test_no_op_is_slower_than_at_the_base(request: pytest.FixtureRequest) -> None:
    base = request.config.getoption("--base")
    if not base:
        pytest.skip("no --base REV")
    verdicts = compare.compare(base)
    print("\n" + "\n".join(map(str, verdicts)))
    slower = [verdict for verdict in verdicts if verdict.slower]
    assert not slower, "slower than the base: " + "; ".join(map(str, slower))
