"""FAULT 34: a rank that hangs, freezes or dies is named within a deadline, and every rank ends with a code."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch

from st_fast.core.errors import EXIT_FAILED
from st_fast.core.ranks import Heartbeat, Ranks, ends_process
from st_fast.data.shards import open_data
from st_fast.train.run import joining_patience
from st_fast.train.watchdog import WAITING, Watchdog
from tests.faults.ranks import finish, wait_for

DEADLINE = 6


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"at": "data", "do": "hang", "rank": 1, "steps": [3]}, ("rank 1 of 2", "align step 3, phase data", "no prog")),
        ({"at": "pictures", "do": "hang", "rank": 0, "steps": [2]}, ("rank 0 of 2", "align step 2, phase sample")),
        ({"at": "step", "do": "kill", "rank": 1, "steps": [3]}, ("rank 1 of 2", "dead or frozen")),
        ({"at": "step", "do": "fail", "rank": 1, "steps": [3]}, ("rank 1 of 2", "ended: data: the storage stalls")),
    ],
    ids=["hung in data", "hung in sampling", "killed", "failed"],
)
def test_the_rank_at_fault_is_named_and_the_other_ends(plan, words, recipe, nursery, tmp_path):
    options = (f"--run.hang_timeout={DEADLINE}", "--sample.every=2")
    marker = tmp_path / "marker"
    ranks = nursery.start(2, recipe, *options, breaks=plan | {"marker": str(marker)})
    wait_for(marker.exists)
    start = time.monotonic()
    codes = finish(ranks)
    text = ranks[0].text
    assert codes[0] == EXIT_FAILED and codes[1] in (EXIT_FAILED, -9), text
    assert time.monotonic() - start < 3 * DEADLINE
    line = [line for line in text.splitlines() if line.startswith("st_fast:")][-1]
    assert all(word in line for word in words), line
    assert "Traceback" not in text


def test_a_frozen_rank_is_named_by_the_others(recipe, nursery, tmp_path):
    marker = tmp_path / "marker"
    plan = {"at": "step", "do": "freeze", "rank": 0, "steps": [2], "marker": str(marker)}
    ranks = nursery.start(3, recipe, f"--run.hang_timeout={DEADLINE}", "--optim.batch_size=9", breaks=plan)
    wait_for(marker.exists)
    finish(ranks[1:])
    codes = finish(ranks, timeout=0)
    assert codes == [-9, EXIT_FAILED, EXIT_FAILED]
    assert any("rendezvous" in rank.text or "rank 0 of 3" in rank.text for rank in ranks[1:])


def test_a_single_process_that_hangs_names_its_own_place(recipe, nursery):
    plan = {"at": "data", "do": "hang", "steps": [4]}
    ranks = nursery.start(1, recipe, "--run.hang_timeout=5", breaks=plan)
    assert finish(ranks) == [EXIT_FAILED]
    assert "no progress for 5 s: rank 0 of 1" in ranks[0].text and "align step 4, phase data" in ranks[0].text


def test_verifying_shows_signs_of_progress_and_no_phase_that_works_counts_as_waiting(data):
    seen: list[int] = []
    open_data(data, beat=lambda: seen.append(1)).close()
    assert len(seen) == 2  # shards
    assert not {"join", "prepare", "verify", "read", "build", "step", "data", "sample", "save"} & set(WAITING)


def test_joining_longer_than_its_bound_ends_the_process_with_a_line(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr("st_fast.core.ranks.os._exit", lambda code: ended.set() if code == EXIT_FAILED else None)
    with ends_process(0.02, "joining: too late"):
        assert ended.wait(20)
    assert capfd.readouterr().err == "st_fast: joining: too late\n"
    assert [joining_patience(seconds) for seconds in (0, 5, 100, 1800)] == [300, 60, 100, 300]


class Memory:
    """A board in this process."""

    where = "memory"

    def __init__(self, count: int) -> None:
        self.words: list[str | None] = [None] * count

    def write(self, key: str, message: str) -> None:
        self.words[int(key)] = message

    def read_all(self) -> list[str | None]:
        return list(self.words)


class Job:
    """Watchdogs of several ranks on one board, with a clock that only moves when told to."""

    def __init__(self, count: int, monkeypatch, deadline: float = 60.0) -> None:
        self.now, board = 0.0, Memory(count)
        monkeypatch.setattr("st_fast.train.watchdog.time.monotonic", lambda: self.now)
        self.dogs = [Watchdog(Ranks(r, count, torch.device("cpu"), Heartbeat()), deadline, board) for r in range(count)]

    def stand(self, *places: tuple[int, str]) -> None:
        """Every rank gets to a place: (step, phase)."""
        for dog, (step, phase) in zip(self.dogs, places, strict=True):
            dog.ranks.heartbeat.step = step
            dog.ranks.heartbeat.beat(phase)
        self.turn(0)

    def turn(self, seconds: float, silent: tuple[int, ...] = ()) -> list[str | None]:
        """Time passes, in small parts; the verdicts of those who are not silent."""
        for _ in range(10):
            self.now += seconds / 10
            for _ in range(2):
                for rank, dog in enumerate(self.dogs):
                    if rank not in silent:
                        dog._share()
        return [dog.verdict() for rank, dog in enumerate(self.dogs) if rank not in silent]


def test_nobody_is_blamed_while_all_get_on_or_wait_for_one_that_does(monkeypatch):
    job = Job(3, monkeypatch, deadline=20)
    job.stand((5, "step"), (5, "all-reduce"), (5, "all-reduce"))
    for _ in range(5):  # rank 0 samples for long, but shows signs of life; the others only wait
        job.dogs[0].ranks.heartbeat.beat("sample")
        assert job.turn(15) == [None] * 3


@pytest.mark.parametrize(
    ("places", "culprit"),
    [
        (((7, "all-reduce"), (7, "data"), (7, "all-reduce")), "rank 1 of 3"),
        (((9, "log"), (9, "log"), (4, "step")), "rank 2 of 3"),  # on CUDA hosts run ahead of the one that hangs
        (((0, "save"), (0, "agree"), (0, "agree")), "rank 0 of 3"),
    ],
)
def test_who_stands_still_and_does_not_wait_is_named_by_every_rank(places, culprit, monkeypatch):
    job = Job(3, monkeypatch, deadline=20)
    job.stand(*places)
    assert job.turn(19) == [None] * 3
    for verdict in job.turn(2):
        assert verdict is not None and verdict.startswith("no progress for 20 s: " + culprit)
        assert verdict.count("rank") == 1 and "test_hangs" not in verdict


def test_every_rank_hears_of_a_signal_to_any_and_only_then(monkeypatch):
    job, heard = Job(2, monkeypatch), list[str]()
    monkeypatch.setattr("st_fast.train.watchdog.pass_on", heard.append)
    job.stand((5, "step"), (5, "step"))
    assert not heard
    monkeypatch.setattr("st_fast.train.watchdog.asked_to_stop", lambda: "SIGHUP")
    job.dogs[1]._share()
    monkeypatch.undo()
    monkeypatch.setattr("st_fast.train.watchdog.pass_on", heard.append)
    heard.clear()
    job.dogs[0]._share()
    assert heard == ["SIGHUP"]


def test_silence_and_last_words_are_told_apart(monkeypatch):
    job = Job(3, monkeypatch)
    job.stand((7, "all-reduce"), (7, "step"), (7, "all-reduce"))
    assert job.turn(20, silent=(1,)) == [None, None]
    for verdict in job.turn(10, silent=(1,)):
        assert verdict is not None and verdict.startswith("rank 1 of 3") and "dead or frozen" in verdict
    job = Job(3, monkeypatch)
    job.stand((7, "step"), (7, "step"), (7, "step"))
    job.dogs[2]._left = "disk on fire"
    job.dogs[0]._left, job.dogs[0]._blames = "rank 2 of 3 (…), ended: disk on fire", True
    verdict = job.turn(1)[1]
    assert verdict is not None and verdict.startswith("rank 2 of 3") and verdict.count("disk on fire") == 1
    json.dumps(verdict)
