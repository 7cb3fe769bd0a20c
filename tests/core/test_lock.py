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
from contextlib import nullcontext
from pathlib import Path

import pytest

from st_fast.core.errors import RunFailed, UserError
from st_fast.core.lock import process_start, run_lock
from tests.faults.races import leave_a_dead_holder, without_flock

ROOT = Path(__file__).resolve().parents[2]
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
    monkeypatch.setattr(fcntl, "flock", without_flock)
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


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.parametrize("kind", ["races", "turns"])
def test_of_many_that_come_at_once_just_one_is_inside_and_nothing_stays(kind: str, flock: bool, tmp_path: Path) -> None:
    """In a process without torch, which forks a hundred times as fast: so the rivals come closer together, too."""
    program = f"from tests.faults.races import {kind}; print({kind}(Path({str(tmp_path)!r}), 45, {flock}))"
    command = [sys.executable, "-c", f"from pathlib import Path; {program}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == (f"{[1] * 45}\n", "")


@pytest.fixture(params=[True, False], ids=["flock", "no flock"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(fcntl, "flock", without_flock)


@pytest.mark.usefixtures("either")
def test_a_removed_lock_is_taken_again_or_the_first_writer_gives_up(tmp_path: Path) -> None:
    path, notices = tmp_path / "run.lock", list[str]()
    with run_lock(tmp_path, notices.append) as check:
        check()
        assert not notices
        path.unlink()
        check()
        assert len(notices) == 1 and str(path) in notices[0] and json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match="another run is writing"), run_lock(tmp_path, print):
            pass
        path.unlink()
        with run_lock(tmp_path, pytest.fail) as second:
            for _ in range(2):
                with pytest.raises(RunFailed, match=f"another run is writing here now .process {os.getpid()}"):
                    check()
            second()
        assert not path.exists()
        check()
        assert path.exists() and len(notices) == 2
    assert not path.exists()


@pytest.mark.usefixtures("either")
def test_one_that_gave_up_leaves_the_others_lock_alone(tmp_path: Path) -> None:
    with pytest.raises(RunFailed), run_lock(tmp_path, print) as check:
        (tmp_path / "run.lock").unlink()
        second = run_lock(tmp_path, print)
        second.__enter__()
        check()
    assert (tmp_path / "run.lock").exists()
    with pytest.raises(UserError, match="another run"), run_lock(tmp_path, print):
        pass
    second.__exit__(None, None, None)
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.usefixtures("either")
def test_storage_that_fails_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with run_lock(tmp_path, pytest.fail) as check:
        for call in ("stat", "open"):
            with monkeypatch.context() as patch:
                patch.setattr(os, call, refused)
                check()
        (tmp_path / "run.lock").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refused)
            check()
            check()
        with pytest.raises(pytest.fail.Exception, match="made again"):
            check()


@pytest.mark.usefixtures("either")
def test_a_full_disk_has_room_for_a_lock_or_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("pwrite", "write", "ftruncate", "fsync"):
        monkeypatch.setattr(os, call, full)
    monkeypatch.setattr(Path, "write_bytes", full)
    refused = pytest.raises(UserError, match=r"cannot be locked \(No space left on device\)")
    with refused if fcntl.flock is without_flock else nullcontext(), run_lock(tmp_path, pytest.fail):
        pass
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size], "half a lock"


@pytest.mark.usefixtures("either")
def test_a_folder_is_removed_again_only_if_it_was_made_here_and_nothing_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name, stays in (("new/inner", False), ("there", True), ("used/inner", True)):
        with run_lock(tmp_path / name, pytest.fail):
            if name.startswith("used"):
                (tmp_path / name / "log").write_text("")
        assert (tmp_path / name).exists() == stays
    assert not (tmp_path / "new").exists()


def test_who_died_while_taking_over_does_not_stand_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", without_flock)
    leave_a_dead_holder(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda self: None)
        with run_lock(tmp_path, print):
            pass
    (right,) = tmp_path.glob("run.lock.after-*")
    right.write_text(json.dumps(json.loads(right.read_text()) | {"start": 1}))  # it is no more
    with run_lock(tmp_path, lambda line: None):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match="another run"), run_lock(tmp_path, print):
            pass


@pytest.mark.usefixtures("either")
def test_what_a_killed_start_left_an_hour_ago_is_swept_by_the_next(tmp_path: Path) -> None:
    names = (".run.lock.0123", "run.lock.after-4567", "run.locksmith", ".run.lockup")
    for name in names:
        (tmp_path / name).write_text("{}")
    with run_lock(tmp_path, pytest.fail):
        assert {path.name for path in tmp_path.iterdir()} == {*names, "run.lock"}  # perhaps of a start just now
    for folder in (folders := (".run.lock.", "run.lock.after-")):  # nobody's; they come first and last in their order
        (tmp_path / folder).mkdir()
    for name in (*names, *folders):
        os.utime(tmp_path / name, (time.time() - 3_700,) * 2)
    with run_lock(tmp_path, pytest.fail):
        assert {path.name for path in tmp_path.iterdir()} == {*names[2:], *folders, "run.lock"}


NOT_EXCLUDING = """
import errno, fcntl, sys, time
from pathlib import Path
def flock(*_):
    if sys.argv[2] == "none":
        raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
from st_fast.core.lock import run_lock
with run_lock(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("theirs", ["none", "local"])
def test_a_live_holder_is_heeded_where_flock_is_free_all_the_same(
    theirs: str, tmp_path: Path, child_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", NOT_EXCLUDING, str(tmp_path), theirs]
    with subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "held\n"
            if theirs == "local":
                monkeypatch.setattr(fcntl, "flock", lambda *_: None)
            refused = pytest.raises(UserError, match=f"another run is writing here .process {child.pid} ")
            with refused, run_lock(tmp_path, pytest.fail):
                pass
            assert json.loads((tmp_path / "run.lock").read_text())["pid"] == child.pid
        finally:
            child.kill()


def test_of_two_hosts_that_each_grant_flock_the_first_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with run_lock(tmp_path, pytest.fail) as check:
        check()
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with run_lock(tmp_path, lambda line: None) as second:
            second()
            for _ in range(2):
                with pytest.raises(RunFailed, match=r"another run is writing here now .process .* on elsewhere"):
                    check()
            second()
            assert json.loads((tmp_path / "run.lock").read_text())["host"] == "elsewhere"


def test_a_killed_holder_that_its_parent_never_asks_after_holds_nothing(
    tmp_path: Path, child_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_flock)
    command = [sys.executable, "-c", NOT_EXCLUDING, str(tmp_path), "none"]
    with subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still listed
        with run_lock(tmp_path, lambda line: None):
            assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_who_died_on_another_host_while_taking_over_is_told_with_the_file_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_flock)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        leave_a_dead_holder(tmp_path)
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda self: None)
        with run_lock(tmp_path, print):
            pass
    assert list(tmp_path.glob("run.lock.after-*"))
    refused = pytest.raises(UserError, match=rf"on elsewhere.*; if it is no more, remove {tmp_path / 'run.lock'}$")
    with refused, run_lock(tmp_path, print):
        pass
    (tmp_path / "run.lock").unlink()
    with run_lock(tmp_path, pytest.fail):
        pass
