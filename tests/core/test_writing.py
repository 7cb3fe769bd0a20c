"""What a run writes while it trains: a file system that refuses costs a line, and nothing that fits into memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from st_fast.core import writing
from st_fast.core.writing import Writer

ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "ESTALE", "EMFILE")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What os.write refuses with, after how many bytes of the write that meets it; nothing by default."""
    state: dict[str, Any] = {"error": None, "half": 0}
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        if state["error"] is None:
            return real(descriptor, data)
        if state["half"]:
            done, state["half"] = real(descriptor, data[: state["half"]]), 0
            return done
        raise OSError(state["error"], os.strerror(state["error"]))

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(writing, "RETRY", 0.0)
    yield state


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_disk_refused_is_written_in_order_when_it_takes_it_again(
    name: str, tmp_path: Path, disk: dict[str, Any]
) -> None:
    said: list[str] = []
    writer, log, picture = Writer(said.append), tmp_path / "log.jsonl", tmp_path / "new" / "1.png"
    writer.append(log, "one\n")
    disk.update(error=getattr(errno, name), half=2)
    for line in ("two\n", "three\n"):
        writer.append(log, line)
    writer.write(picture, b"picture")
    assert log.read_text() == "one\n"  # not half a line, though two of its bytes had been written
    assert writer.missing == {log: 2, picture: 1} and len(said) == 2
    assert os.strerror(disk["error"]) in said[0] and "training goes on" in said[0]
    disk["error"] = None
    writer.append(log, "four\n")
    assert log.read_text() == "one\ntwo\nthree\nfour\n" and picture.read_bytes() == b"picture"
    assert len(said) == 3 and "nothing is missing" in said[2] and writer.close() and len(said) == 3
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["1.png", "log.jsonl", "new"]


def test_memory_is_bounded_and_what_is_dropped_is_counted(
    tmp_path: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "ROOM", 40)
    said: list[str] = []
    writer, log = Writer(said.append), tmp_path / "log.jsonl"
    disk["error"] = errno.ENOSPC
    for number in range(10):
        writer.append(log, f"line {number}....\n")
    assert writer.missing == {log: 10}
    assert not writer.close() and f"{log} (10)" in said[-1]
    disk["error"] = None
    assert not writer.close() and writer.missing == {log: 7}  # those that were dropped stay missing
    assert log.read_text() == "".join(f"line {number}....\n" for number in (7, 8, 9))
    assert "7 lines and files" in said[-2]


def test_a_file_that_is_refused_holds_up_no_other(tmp_path: Path, disk: dict[str, Any]) -> None:
    said: list[str] = []
    writer = Writer(said.append)
    (tmp_path / "samples").write_text("a file where a folder should be")
    writer.write(tmp_path / "samples" / "1.png", b"x")
    writer.append(tmp_path / "log.jsonl", "line\n")
    assert (tmp_path / "log.jsonl").read_text() == "line\n" and len(said) == 1
    assert not writer.close() and "1.png (1)" in said[-1]


@pytest.mark.parametrize("left", [b"", b"ha", b"one\n", b"one\nha", b"one\n" + b"x" * (writing.CHUNK + 5)])
def test_half_a_line_of_a_killed_process_is_dropped(left: bytes, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(left)
    writer = Writer(pytest.fail)
    writer.mend(log)
    writer.append(log, "two\n")
    assert log.read_bytes() == left[: left.rfind(b"\n") + 1] + b"two\n"


def test_a_folder_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    writer, log = Writer(pytest.fail), tmp_path / "run" / "log.jsonl"
    writer.append(log, "one\n")
    log.unlink()
    log.parent.rmdir()
    writer.append(log, "two\n")
    assert log.read_text() == "two\n"
