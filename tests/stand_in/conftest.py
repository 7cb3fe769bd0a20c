"""Runs checks in processes on the stand-in; without a CUDA build of torch they are skipped, with the reason."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.stand_in import driver, rehearse

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def found() -> driver.Installation:
    """A Python with a CUDA build of torch, for which there is a stand-in."""
    try:
        python = driver.installation()
        driver.build(python)
    except driver.Unavailable as error:
        pytest.skip(str(error))
    return python


@pytest.fixture(scope="session")
def on_stand_in(found: driver.Installation) -> Run:
    """Runs a Python module on the stand-in: `on_stand_in("bench.suite", "step", gates=True, gib=4)`."""

    def run(*command: str, gates: bool = False, **settings: float) -> subprocess.CompletedProcess[str]:
        environment = rehearse.variables(found, gates=gates, **settings)
        return subprocess.run(
            [found.python, "-m", *command],
            cwd=driver.ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def check(on_stand_in: Run) -> Callable[..., dict[str, Any]]:
    """What a check of `checks.py` found."""

    def run(name: str, *arguments: str, **settings: float) -> dict[str, Any]:
        done = on_stand_in("tests.stand_in.checks", name, *arguments, **settings)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1]) | {"stderr": done.stderr}

    return run
