"""Signals become a request to stop, wherever between two blocks that catch them they arrive."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests import tiny

NESTED = """
import os, signal
from st_fast.core.signals import stop_on_signals
with stop_on_signals() as outer:
    os.kill(os.getpid(), signal.SIGTERM)
    with stop_on_signals() as inner:
        os.kill(os.getpid(), signal.SIGINT)
    print(outer.name, inner.name)
os.kill(os.getpid(), signal.SIGTERM)
print("lived on")
"""


def test_a_block_inside_another_knows_what_that_one_caught_and_both_name_the_first() -> None:
    done = subprocess.run([sys.executable, "-c", NESTED], capture_output=True, text=True, cwd=tiny.ROOT, timeout=300)
    assert done.stdout.splitlines() == ["SIGTERM SIGTERM", "lived on"], done.stderr


def test_without_a_signal_the_handlers_are_what_they_were() -> None:
    from st_fast.core.signals import stop_on_signals

    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert signal.getsignal(signal.SIGTERM) is not before and not stop
    assert signal.getsignal(signal.SIGTERM) is before
