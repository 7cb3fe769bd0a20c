"""What each signal does, wherever it arrives: it ends what can be begun again, and never what must be saved first."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from st_fast.core import signals
from st_fast.core.errors import Interrupted, Stopped
from st_fast.core.ranks import Ranks
from st_fast.core.signals import STOPPING, StopConsensus, StopRequest, stop_on_signals
from tests import tiny

EARLY = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
import st_fast.core.signals as signals
signals.PATIENCE = 0.5
signals.catch_signals()
if sys.argv[1] == "call":  # which no signal wakes
    import ctypes
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
print("ready", flush=True)
import time
time.sleep(20)
"""


def ended(what: str, *numbers: signal.Signals) -> tuple[int, str]:
    """How a process of EARLY ends, sent these signals, and what it tells."""
    process = subprocess.Popen(
        [sys.executable, "-c", EARLY, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tiny.ROOT
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.3 if what == "call" else 0)
    for number in numbers:
        process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    return process.returncode, told


@pytest.mark.parametrize(
    ("what", "numbers"),
    [
        ("wait", [signal.SIGTERM]),
        ("wait", [signal.SIGHUP, signal.SIGUSR1]),  # SIGHUP is ignored, as `nohup` has it
        ("wait", [signal.SIGQUIT] * 3),
        ("call", [signal.SIGTERM]),
    ],
)
def test_before_anything_is_begun_a_signal_ends_the_process_with_75_and_one_line(what, numbers):
    code, told = ended(what, *numbers)
    name = signal.Signals(numbers[-1]).name
    assert (
        code == 75 and told.count("\n") == 1 and told.startswith(f"st_fast: {name}: nothing that was saved is lost")
    ), told
    script = (tiny.ROOT / "recipes" / "cluster" / "slurm.sh").read_text()
    assert "/the same command continues/" in script and "the same command continues" in told


def test_a_signal_as_the_interpreter_ends_changes_no_exit_code():
    late = """
import os, signal
from st_fast.core import signals
from st_fast.core.command import run_command
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)
last = Last()
signals.catch_signals()
run_command(lambda arguments: None, [])
"""
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, cwd=tiny.ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", STOPPING)
def test_every_signal_ends_work_that_has_nothing_to_save(number):
    with pytest.raises(Interrupted, match=f"^{number.name}: nothing that was saved is lost"), stop_on_signals():
        os.kill(os.getpid(), number)
        pytest.fail("it went on")


@pytest.fixture(autouse=True)
def let_go():
    """What a block leaves behind after a signal, which is for a process about to end."""
    yield
    signals._let_go()


def alone(stop: StopRequest) -> StopConsensus:
    import torch

    return StopConsensus(stop, Ranks(0, 1, torch.device("cpu")))


def test_once_steps_are_made_a_signal_waits_for_the_save_and_says_so_at_once(capfd):
    with pytest.raises(Interrupted) as told, stop_on_signals() as stop:
        consensus = alone(stop)
        consensus.begin()
        assert not consensus()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert capfd.readouterr().err == "st_fast: SIGUSR1: saving, then leaving\n"
        os.kill(os.getpid(), signal.SIGTERM)  # which changes nothing
        assert consensus() and consensus.now()
        consensus.end()
        raise consensus.interrupted("saved align at step 2")
    assert str(told.value) == "SIGUSR1: saved align at step 2; the same command continues"
    assert capfd.readouterr().err == ""
    os.kill(os.getpid(), signal.SIGTERM)  # nor does it here: the exit code is known


def test_a_signal_ends_drawing_at_once_and_then_waits_for_the_save():
    with pytest.raises(Interrupted, match=r"^SIGINT: saved"), stop_on_signals() as stop:
        consensus = alone(stop)
        consensus.begin()
        consensus()
        with pytest.raises(Stopped), stop.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("it went on")
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped), stop.interruptible():
            pytest.fail("it began")
        raise consensus.interrupted("saved")


def test_drawing_ends_even_if_a_library_swallows_the_first_exception(monkeypatch):
    monkeypatch.setattr("st_fast.core.signals.AGAIN", 0.1)
    with pytest.raises(Interrupted), stop_on_signals() as stop:
        consensus = alone(stop)
        consensus.begin()
        consensus()
        with pytest.raises(Stopped), stop.interruptible():
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        raise consensus.interrupted("saved")


def test_whatever_fails_after_a_signal_while_nothing_is_to_be_saved_is_an_interruption():
    """As a collective does that another rank has left. What fails while steps are unsaved is a failure."""
    with pytest.raises(Interrupted), stop_on_signals() as stop:
        stop.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError), stop_on_signals() as stop:
        alone(stop)()
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("the last checkpoint could not be written")


def test_blocks_in_one_another_share_the_request_and_restore_the_handlers_once_all_is_well():
    before = {number: signal.getsignal(number) for number in STOPPING}
    with stop_on_signals() as outer:
        with stop_on_signals() as inner:
            assert inner is outer and not inner and signal.getsignal(signal.SIGTERM) is inner
        assert signal.getsignal(signal.SIGTERM) is outer
    assert {number: signal.getsignal(number) for number in STOPPING} == before
    end = time.monotonic() + 30
    while "st_fast-signals" in [thread.name for thread in threading.enumerate()]:
        assert time.monotonic() < end, "its thread lives on"


def test_a_forked_child_is_not_the_run():
    """A loader's worker passes by what asks the run to stop, can be terminated, and its signals are not the run's."""
    with stop_on_signals() as stop:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert not stop
