"""A process that is started without standard streams, as daemons are, writes to no other file of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.tiny import ROOT

CHILD = """
import os, sys
from st_fast.core.signals import catch_signals
catch_signals()
from st_fast.core.streams import use_safe_streams
use_safe_streams()
print("x" * 100_000, flush=True)
sys.stderr.write("y")
print("to a file", file=open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("closed", [(1,), (0, 1), (0, 1, 2), (2,)])
def test_without_standard_streams_nothing_hangs_and_nothing_is_written_elsewhere(closed, tmp_path):
    found = tmp_path / "found"
    arguments = [sys.executable, "-c", CHILD, str(found)]
    child = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: [os.close(number) for number in closed],
        stdout=None if 1 in closed else subprocess.DEVNULL, stderr=None if 2 in closed else subprocess.DEVNULL,
    )  # fmt: skip
    assert child.wait(timeout=60) == 0
    assert found.read_text() == "to a file\n"
