"""Runs interpreted/ in processes of their own: whether Triton interprets is settled when it is imported."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests import warm

HERE = Path(__file__).parent
FILES = sorted((HERE / "interpreted").glob("interpreted_*.py"))


def run_apart(files: list[Path], *options: str, **environment: str) -> str:
    """Test files in a process of their own: its report if a test failed or none ran, "" if all passed."""
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "ST_FAST_CSRC": ""} | environment
    done = warm.run("-m", "pytest", "-x", "-p", "no:cacheprovider", *options, *files, env=env)
    return "" if done.returncode == 0 else f"{done.stdout[-6000:]}{done.stderr[-2000:]}exit code {done.returncode}"


# Two processes, not one a file: each imports for two seconds.
@pytest.mark.parametrize("files", [FILES[::2], FILES[1::2]], ids=lambda files: " ".join(file.stem for file in files))
def test_triton_kernels_agree_with_the_reference_under_the_interpreter(files: list[Path]) -> None:
    triton = pytest.importorskip("triton")
    if triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    assert run_apart(files, TRITON_INTERPRET="1") == ""
