"""A process killed, or a disk that fills up, at any point of a save loses nothing that was saved before."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from st_fast.core.checkpoint import latest, save, valid
from st_fast.core.checkpoint.store import SaveFailed, candidates, sweep
from tests import warm

SCENARIOS = {
    "new": ([1], {1, 3}), "again": ([2], {2, 3}), "prune": ([1, 2], {2, 3}),
    "first": ([1, 2], {2, 3}), "second": ([1, 2], {2, 3}),
}  # fmt: skip
"""What is saved before, and which values may be found after a crash; the last two are of two ranks, by who dies."""


def filled(value: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3, 4), float(value))}, "ema": {"b": torch.tensor(value)}}


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is one: what a killed process left there is the same, and fsync takes no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_9_at_every_operation_leaves_the_old_or_the_new(
    scenario: str, memory_folder: Path, child_env: dict[str, str]
) -> None:
    steps, allowed = SCENARIOS[scenario]
    base, work = memory_folder / "base", memory_folder / "work"
    for step in steps:
        save(base, step, filled(step), {"value": step})
    command = ("-m", "tests.core.checkpoint.crash_child", base, work, scenario)
    output = warm.run(*command, env=child_env, check=True).stdout
    died_at = Counter(line.split()[1] for line in output.splitlines())
    assert died_at["done"] == 1 and died_at["write"] >= 8
    if scenario != "second":
        assert died_at["fsync"] >= 8 and died_at["rename"] >= 1
    assert scenario not in ("prune", "first") or died_at["unlink"] >= 6
    found = [value_left(root) for root in sorted(work.iterdir()) if not root.name.endswith("-mail")]
    assert len(found) == len(output.splitlines()) and set(found) == allowed and found[-1] == max(allowed)


def value_left(root: Path) -> int:
    """The value of the newest checkpoint; a crash leaves no broken ones, and the next run cleans up and saves."""
    found = latest(root, pytest.fail)
    assert found is not None
    assert [reason for candidate in candidates(root) if (reason := valid(candidate.path))] == []
    value = int(found.meta["value"])
    for group in found.groups.values():
        for tensor in group.values():
            assert bool((tensor == value).all())
    sweep(root)
    save(root, 9, filled(9), {})
    assert not [name for name in os.listdir(root) if "partial" in name or "deleted" in name]
    return value


def test_a_failing_operation_changes_nothing_whichever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, filled(1), {"value": 1})
    for fatal in itertools.count(1):
        with monkeypatch.context() as patch:
            counter = itertools.count(1)
            for name in ("write", "fsync", "rename", "mkdir"):
                patch.setattr(os, name, failing(getattr(os, name), counter, fatal))
            try:
                save(tmp_path, 1, filled(2), {"value": 2})
            except SaveFailed as error:
                message = str(error)
            else:
                break
        assert "00000001: not saved (No space left on device)" in message
        found = latest(tmp_path, pytest.fail)
        names = os.listdir(tmp_path)
        if names != ["00000001"]:  # the last fsync failed: all is in its place, only not known to be durable
            assert found is not None and found.meta["value"] == 2 and sorted(names) == ["00000001", "00000001.aside-1"]
            shutil.rmtree(tmp_path / "00000001")
            os.rename(tmp_path / "00000001.aside-1", tmp_path / "00000001")
        else:
            assert found is not None and found.meta["value"] == 1
    assert fatal > 15


def failing(real: Any, counter: Any, fatal: int) -> Any:
    def operation(*arguments: Any, **options: Any) -> Any:
        if next(counter) == fatal:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    return operation


def test_everything_is_fsynced_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("write", "fsync", "rename")}

    def traced(name: str) -> Any:
        def operation(first: Any, *rest: Any) -> Any:
            events.append((name, os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)))
            return real[name](first, *rest)

        return operation

    root = tmp_path / "new" / "checkpoints"
    for name in real:
        monkeypatch.setattr(os, name, traced(name))
    path = save(root, 1, filled(1), {})
    partial = f"{path}.partial-{os.getpid()}"
    rename = events.index(("rename", partial))
    last = {event: position for position, event in enumerate(events)}  # later events overwrite earlier ones
    for name in os.listdir(path):
        assert last["write", f"{partial}/{name}"] < last["fsync", f"{partial}/{name}"] < rename
    assert last["fsync", partial] < rename < last["fsync", str(root)]
    for folder in (tmp_path, tmp_path / "new"):  # the folders that were made on the way
        assert ("fsync", str(folder)) in events[:rename]


FULL_DISK = """
import os, pathlib, resource, sys, torch
from st_fast.core.checkpoint import Saver, latest
root = pathlib.Path(sys.argv[1]) / "checkpoints"
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20,) * 2)
lines = []
saver = Saver(root, lines.append)
for step, mebibytes in ((1, 1), (2, 8), (3, 1)):
    saver.save(step, {"model": {"x": torch.full((mebibytes * 2**20,), step, dtype=torch.uint8)}}, {})
    path = saver.wait()
    found = latest(root, lines.append)
    assert (path is None) == (step == 2) and found.step == (1, 1, 3)[step - 1], (step, path, found.step)
    assert not [name for name in os.listdir(root) if "partial" in name]
print(*lines, sep="\\n")
"""


def run_on_full_disk(folder: Path, kind: str, env: dict[str, str], before: list[str]) -> list[str]:
    command = [*before, sys.executable, "-c", FULL_DISK, str(folder), kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_costs_one_save_and_nothing_else(tmp_path: Path, child_env: dict[str, str]) -> None:
    # In a mount namespace of its own, so that the file system goes with the process, however the test ends.
    mounted = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=7m tmpfs "{tmp_path}" && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets us mount no tmpfs; the next test fills a file instead")
    lines = run_on_full_disk(tmp_path, "tmpfs", child_env, mounted)
    assert len(lines) == 1 and all("00000002: not saved (No space left on device)" in line for line in lines)


def test_a_file_too_large_for_its_limit_costs_one_save_and_nothing_else(
    tmp_path: Path, child_env: dict[str, str]
) -> None:
    lines = run_on_full_disk(tmp_path, "limit", child_env, [])
    assert len(lines) == 1 and all("00000002: not saved (File too large)" in line for line in lines)
