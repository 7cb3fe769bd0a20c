"""The ops on a machine without a compiler: the same tests in a process where csrc is left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from test_interpreted import run_apart

HERE = Path(__file__).parent


def test_the_reference_takes_over_behind_the_same_ops() -> None:
    """But for tests of the definitions by themselves, in which csrc takes no part where it is built either."""
    left_out = ("inductor", "(opcheck and bfloat16)", "finite_differences", "closed_form", "plain_pytorch")
    assert run_apart([HERE / "test_ops.py"], "-k", " and ".join(f"not {each}" for each in left_out)) == ""


def test_one_line_says_so_once() -> None:
    program = "from st_fast.kernels import native; native.load(); print(native.available())"
    command = [sys.executable, "-c", program]
    env = {"PATH": "", "ST_FAST_CSRC": "/nowhere/_csrc_cpu.so", "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    notice = done.stderr.strip().splitlines()
    assert "/nowhere/_csrc_cpu.so" in notice[0] and "reference takes over" in notice[0]
