"""One writer a run folder, and a killed one never stands in the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from st_fast.core.errors import UserError
from st_fast.core.lock import process_start, run_lock

HOLD = """
import os, sys, time
from st_fast.core.lock import run_lock
with run_lock(sys.argv[1], print):
    if sys.argv[2] == "fork" and os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(0.2)
    print("held", flush=True)
    time.sleep(60 if sys.argv[2] != "leave" else 0)
"""


def holder(folder: Path, kind: str, env: dict[str, str]) -> tuple[subprocess.Popen[str], list[str]]:
    """A process that holds the lock, and what it printed before it said so."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, folder, kind], env=env, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines: list[str] = []
    while (line := child.stdout.readline().strip()) != "held":
        assert line, "the holder died"
        lines.append(line)
    return child, lines


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def test_a_second_writer_is_refused_and_the_first_named(tmp_path: Path, child_env: dict[str, str]) -> None:
    child, _ = holder(tmp_path, "stay", child_env)
    try:
        with pytest.raises(UserError) as caught, run_lock(tmp_path, pytest.fail):
            pass
        message = str(caught.value)
        assert f"process {child.pid} on {socket.gethostname()}" in message and str(tmp_path) in message
    finally:
        end(child)


def test_kill_9_frees_the_lock_and_the_next_is_told(tmp_path: Path, child_env: dict[str, str]) -> None:
    child, _ = holder(tmp_path, "stay", child_env)
    end(child)
    notices: list[str] = []
    with run_lock(tmp_path, notices.append):
        assert len(notices) == 1 and f"process {child.pid} on" in notices[0]
    with run_lock(tmp_path, pytest.fail):  # left properly: nothing to tell
        pass


def test_an_orphaned_worker_of_a_killed_run_holds_nothing(tmp_path: Path, child_env: dict[str, str]) -> None:
    child, lines = holder(tmp_path, "fork", child_env)
    child.kill()
    child.wait()
    worker = int(lines[0])
    try:
        assert process_start(worker) is not None
        with run_lock(tmp_path, lambda line: None):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        assert child.stdout is not None
        child.stdout.close()


def test_two_locks_in_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "made" / "yet"
    with (
        run_lock(folder, pytest.fail),
        pytest.raises(UserError, match=f"process {os.getpid()} "),
        run_lock(folder, print),
    ):
        pass
    with run_lock(folder, pytest.fail):
        pass


def test_the_lock_is_released_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), run_lock(tmp_path, pytest.fail):
        raise RuntimeError
    with run_lock(tmp_path, pytest.fail):
        pass


@pytest.mark.parametrize("text", [b"garbage", b"[1]", b"\xff\xfe", b"[" * 4096, b'{"pid": "\\n\\u001b[31m"}'])
def test_a_damaged_lock_file_is_taken_over(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_bytes(text)
    notices: list[str] = []
    with run_lock(tmp_path, notices.append):
        assert len(notices) == 1 and notices[0].isprintable()


def test_a_folder_that_cannot_be_locked_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"run\.lock: cannot be opened for writing"), run_lock(tmp_path / "file", print):
        pass


def test_without_flock_the_recorded_process_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    me = {"pid": os.getpid(), "host": socket.gethostname(), "start": process_start(os.getpid())}
    for record, held in (
        (me, True),
        ({**me, "start": 1}, False),  # the id was given to another process since
        ({**me, "pid": 2**22 + 1}, False),
        ({**me, "host": "elsewhere"}, True),
        ({}, False),
    ):
        (tmp_path / "run.lock").write_text(json.dumps(record))
        if held:
            with pytest.raises(UserError, match="another run is writing here"), run_lock(tmp_path, print):
                pass
        else:
            with run_lock(tmp_path, lambda line: None):
                pass


def test_the_start_of_a_process_tells_it_from_a_later_one_with_its_id() -> None:
    mine = process_start(os.getpid())
    child = subprocess.Popen(["sleep", "30"])
    try:
        time.sleep(0.05)
        theirs = process_start(child.pid)
        assert mine is not None and theirs is not None and theirs > mine == process_start(os.getpid())
    finally:
        child.kill()
        child.wait()
    assert process_start(child.pid) is None
