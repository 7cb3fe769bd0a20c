"""FAULT 22 and 36: a disk that is full for a while, or vanished, costs no weights, at whatever write it is met."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from st_fast.core import checkpoint, writing
from st_fast.core.errors import EXIT_FAILED, UserError
from st_fast.recipe import load
from st_fast.train import trainer
from st_fast.train.log import Log
from st_fast.train.run import run
from tests import pixels, tiny
from tests.faults.ranks import Rank, finish, wait_for

WAITS = "align: waits until its last checkpoint can be written"
WRITTEN = "align: its last checkpoint is written"


def full(ranks: list[Rank], limit: int = 65_536) -> None:
    """From now on the ranks may write no file above this size, which every checkpoint is, and no log or output."""
    for rank in ranks:
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_the_last_checkpoint_is_waited_for_longer_than_a_hang_may_last(recipe, nursery, pair, states):
    ranks = nursery.start(2, recipe, "--run.hang_timeout=5")
    full(ranks)
    wait_for(lambda: WAITS in ranks[0].text or ranks[0].poll() is not None)
    time.sleep(11)
    full(ranks, resource.RLIM_INFINITY)
    wait_for(lambda: WRITTEN in ranks[0].text or ranks[0].poll() is not None)
    for rank in ranks:
        rank.send(signal.SIGTERM)  # the rest without so short a patience, which a busy machine may exceed
    finish(ranks)
    text = ranks[0].text
    assert text.count(WAITS) == text.count(WRITTEN) == 1 and WAITS not in ranks[1].text, text
    refused = [line for line in text.splitlines() if "not saved (" in line]
    assert len(refused) == 3 and "00000010: not saved (" in refused[-1]  # each once, however often it was tried
    assert finish(nursery.start(2, recipe)) == [0, 0]
    assert [r["stage"] for r in tiny.records(recipe.parent / "out", "train")].count("align") == 10  # made once
    ours, theirs = states(recipe.parent / "out"), states(pair)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_ends_the_waiting_for_the_last_checkpoint(count, recipe, nursery):
    ranks = nursery.start(count, recipe)
    full(ranks)
    wait_for(lambda: WAITS in ranks[0].text or ranks[0].poll() is not None)
    ranks[-1].send(signal.SIGTERM)
    assert finish(ranks, 30) == [EXIT_FAILED] * count
    lost = "the last checkpoint of align could not be written, those before it stay; the same command continues"
    assert f"st_fast: SIGTERM: {lost}" in ranks[-1].text and "Traceback" not in ranks[0].text
    assert re.search(f"st_fast: (SIGTERM|a signal to another rank): {lost}", ranks[0].text)
    ranks = nursery.start(count, recipe)
    assert finish(ranks) == [0] * count and tiny.records(recipe.parent / "out", "start")[-1]["stage"] == "transcend"


def test_ranks_that_each_write_their_part_try_it_again_together(recipe, nursery, states):
    ranks = nursery.start(2, recipe, "--run.sharding=fsdp2")
    full(ranks)
    wait_for(lambda: WAITS in ranks[0].text or ranks[0].poll() is not None)
    full(ranks, resource.RLIM_INFINITY)
    assert finish(ranks) == [0, 0], [rank.text for rank in ranks]
    assert ranks[0].text.count(WRITTEN) == 1 and states(recipe.parent / "out")
    assert len(list((recipe.parent / "out" / "align" / "checkpoints" / "00000010").iterdir())) == 2 * 4 + 1


# Every kind of write in turn

CHECKPOINT = "out/align/checkpoints/N"
BEFORE_THE_START = ("out", "out/run.lock")
"""Where a run may end with an error: nothing is trained yet."""
KINDS = (
    *BEFORE_THE_START, "out/recipe.toml", "out/log.jsonl", "out/report.html", "out/align", "out/align/samples",
    "out/align/samples/N.png", "out/align/checkpoints", CHECKPOINT,
    *(f"{CHECKPOINT}/{name}" for name in (
        "model.safetensors", "ema.safetensors", "optim.safetensors", "heads.safetensors", "manifest.json"
    )),
    "out/tracker.json", "out/tensorboard", "out/tensorboard/align", "out/tensorboard/align/events",
    "data/classifier", "data/classifier/model.safetensors", "data/classifier/manifest.json",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def plain(name: str) -> str:
    """A file's name without the numbers of steps and processes."""
    name = re.sub(r"(/events)\.out\..*", r"\1", re.sub(r"\.partial-\d+", "", name))
    name = re.sub(r"/\.run\.lock\.[0-9a-f]{32}$", "/run.lock", name)  # by which it is tried whether there is flock
    return re.sub(r"\d{8}", "N", name)


class Disk:
    """What is written below `home`, by kind, and a kind that it refuses as a full disk does.

    By turns a file can't be made or opened, and half of it is written.
    """

    def __init__(self) -> None:
        self.home, self.refused, self.struck = Path(), "", 0
        self.seen: set[str] = set()

    def kind(self, path: object) -> str | None:
        """A path below `home` without numbers; None for others."""
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)  # type: ignore[arg-type]
        return plain(name.removeprefix(f"{self.home}/")) if name.startswith(f"{self.home}/") else None

    def audit(self, event: str, given: tuple[Any, ...]) -> None:
        """Every opening of a file by Python, and every folder that it makes."""
        if self.home == Path() or event not in ("open", "os.mkdir"):
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & WRITING):
            return
        kind = None if isinstance(given[0], int) else self.kind(given[0])
        if kind is None or kind.startswith("out/compiled"):  # torch's own, once a process
            return
        self.seen.add(kind)
        if kind == self.refused:
            self.struck += 1
            if self.struck % 2 or event == "os.mkdir":
                raise self.full(given[0])

    def write(self, descriptor: int, data: Any, real: Any = os.write) -> int:
        """os.write, of which only half is done where the file's kind is refused; then it fails."""
        if self.home != Path() and self.refused and self.kind(descriptor) == self.refused:
            if len(data) > 1:
                return real(descriptor, data[: len(data) // 2])
            raise self.full(descriptor)
        return real(descriptor, data)

    @staticmethod
    def full(path: object) -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


DISK = Disk()
sys.addaudithook(DISK.audit)


@pytest.fixture
def disk(monkeypatch) -> Iterator[Disk]:
    monkeypatch.setattr(os, "write", DISK.write)
    monkeypatch.setattr(writing, "RETRY", 0.02)
    monkeypatch.setattr(trainer, "RETRY", 0.02)
    monkeypatch.setattr("st_fast.train.run.matmul_rate", lambda device, dtype: 1e11)
    DISK.seen, DISK.struck = set(), 0
    yield DISK
    DISK.home, DISK.refused = Path(), ""


def trained(home: Path, *options: str) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint of a run of four steps, with pictures and scores."""
    text = pixels.RECIPE.format(data=home / "data")
    (home / "one.toml").write_text(text[: text.rindex("[[stage]]")])
    options += (
        f"--run.out={home / 'out'}", "--stage.align.steps=4", "--run.log_every=1", "--run.save_every=2",
        "--sample.every=2", "--evaluate.every=4", "--evaluate.num=70", "--evaluate.classifier=true",
    )  # fmt: skip
    run(load(home / "one.toml", options))
    return last(home)


def last(home: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(home / "out" / "align" / "checkpoints", pytest.fail)
    assert found and found.step == 4
    return {f"{group}/{key}": tensor for group, tensors in found.groups.items() for key, tensor in tensors.items()}


def files(home: Path) -> set[str]:
    """The kinds of files below a folder, without the classifier's and what torch keeps for itself."""
    names = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    return {plain(name) for name in names if not name.startswith(("data/classifier", "out/compiled"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("undisturbed")
    pixels.write_data(home / "data")
    return home, trained(home)


def test_every_kind_of_file_that_a_run_writes_is_among_those_refused_below(disk, tmp_path):
    pytest.importorskip("tensorboard")
    before = {"one.toml", *(f"data/{path.name}" for path in pixels.write_data(tmp_path / "data").iterdir())}
    disk.home = tmp_path
    trained(tmp_path, '--run.trackers=["tensorboard"]')
    assert disk.seen - {"one.toml"} == set(KINDS)
    assert files(tmp_path) - before <= disk.seen  # nor does anything write that is no Python


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_at_any_kind_of_write_changes_no_weight(kind, undisturbed, disk, tmp_path, capsys, monkeypatch):
    whole, expected = undisturbed
    options = []
    if "track" in kind or "tensorboard" in kind:
        pytest.importorskip("tensorboard")
        options = ['--run.trackers=["tensorboard"]']
    pixels.write_data(tmp_path / "data")
    if not kind.startswith("data/classifier"):
        (tmp_path / "data" / "classifier").symlink_to(whole / "data" / "classifier")
    say = Log.say

    def told(log: Log, text: str) -> None:
        if WAITS in text:
            disk.refused = ""  # room is made; for other kinds it never is
        say(log, text)

    monkeypatch.setattr(Log, "say", told)
    disk.home, disk.refused = tmp_path, kind
    if kind in BEFORE_THE_START:
        with pytest.raises((UserError, OSError), match="No space left on device"):
            trained(tmp_path)
        disk.refused = ""
    found = trained(tmp_path, *options)
    assert disk.struck and (not disk.refused or not kind.startswith("out/align/checkpoints"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    text = capsys.readouterr().out
    assert kind in BEFORE_THE_START or "tensorboard" in kind or "tracker" in kind or "No space left on device" in text
    lacking = {name for name in files(whole) - files(tmp_path) if not (disk.refused and name.startswith(disk.refused))}
    without = {"out/report.html"} if kind in ("out/recipe.toml", "out/log.jsonl") else set()
    assert lacking == without and (not without or "no report: " in text), lacking
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


LIMITED = """
import resource, sys
from pathlib import Path
from tests.faults.test_full_disk import WAITS, Log, torch, trained

say, (_, most) = Log.say, resource.getrlimit(resource.RLIMIT_FSIZE)

def told(log, text):
    if WAITS in text:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    say(log, text)

Log.say = told
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, most))
trained(Path(sys.argv[1]))
"""


def test_a_run_that_may_write_no_file_above_a_size_catches_up_once_it_may(undisturbed, tmp_path):
    """For real, from its first write to its last checkpoint (`ulimit -f`)."""
    whole, expected = undisturbed
    pixels.write_data(tmp_path / "data")
    (tmp_path / "data" / "classifier").symlink_to(whole / "data" / "classifier")
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "recipe.toml: cannot be written (File too large)" in done.stdout
    assert "00000004: not saved (File too large)" in done.stdout and "nothing is missing" in done.stdout
    found = last(tmp_path)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert files(tmp_path) == files(whole)
    ours, theirs = ((home / "out" / "log.jsonl").read_text().splitlines() for home in (tmp_path, whole))
    assert [place(line) for line in ours] == [place(line) for line in theirs]


def place(line: str) -> tuple[str, int]:
    """Of a line of the log."""
    record = json.loads(line)
    return record["kind"], record["step"]
