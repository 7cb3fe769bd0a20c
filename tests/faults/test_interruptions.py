"""FAULT 33 and 21 on two ranks: signals and kills at any moment; the same command continues to the same bits."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import torch

from st_fast.core.errors import EXIT_INTERRUPTED
from tests import tiny
from tests.faults.ranks import finish, logged, torchrun, wait_for

OPTIONS = ("--sample.every=3", "--run.save_every=3")


def stopped(ranks, out: Path, by: str) -> None:
    """Both ranks left with the documented code after one save, and say what to do."""
    codes = finish(ranks)
    texts = [rank.text for rank in ranks]
    assert codes == [EXIT_INTERRUPTED] * 2, texts
    saves = [(record["stage"], record["step"]) for record in tiny.records(out, "save")]
    assert len(set(saves)) == len(saves) and f"saved {saves[-1][0]} at step {saves[-1][1]};" in texts[0]
    assert re.search(f"st_fast: ({by}): saved", texts[0]) and "the same command continues" in texts[0]
    assert ": saved " not in texts[1], "the first rank alone says so"
    assert not any("Traceback" in text for text in texts)


def test_signals_at_any_moment_end_in_one_save_and_the_same_weights(recipe, nursery, pair, states, tmp_path):
    out, marker = recipe.parent / "out", tmp_path / "marker"

    def broken(seconds=0.4, **plan):
        marker.unlink(missing_ok=True)
        plan |= {"do": "pause", "seconds": seconds, "marker": str(marker)}
        ranks = nursery.start(2, recipe, *OPTIONS, breaks=plan)
        wait_for(marker.exists)
        return ranks

    ranks = broken(at="step", stage="align", steps=[1], rank=1)  # the first step, where compilation happens
    ranks[1].send(signal.SIGTERM)
    stopped(ranks, out, "SIGTERM|a signal to another rank")

    ranks = broken(100.0, at="pictures", stage="align", steps=[3], rank=0)  # only the other one is asked
    asked = time.monotonic()
    ranks[1].send(signal.SIGUSR1)
    stopped(ranks, out, "SIGUSR1")
    assert time.monotonic() - asked < 30

    ranks = broken(at="pictures", stage="align", steps=[6], rank=0)  # evaluation, which only the first rank does
    for rank in ranks:
        rank.send(signal.SIGINT)
    stopped(ranks, out, "SIGINT")

    ranks = broken(at="write", stage="align", steps=[9])  # a save under way in its thread; and again and again
    for _ in range(5):
        for rank in ranks:
            rank.send(signal.SIGTERM)
        time.sleep(0.1)
    stopped(ranks, out, "SIGTERM")

    ranks = broken(at="data", stage="transcend", steps=[2], rank=0)  # waiting for data, one rank, both signals
    ranks[0].send(signal.SIGINT)
    time.sleep(0.1)  # of two that are both still to be delivered the system chooses
    ranks[0].send(signal.SIGTERM)  # which changes nothing: the first one is named
    stopped(ranks, out, "SIGINT")

    assert finish(nursery.start(2, recipe, *OPTIONS)) == [0, 0]
    ours, theirs = states(out), states(pair)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_sigterm_to_torchrun_itself_stops_all_ranks_with_a_save(recipe):
    """What a cluster does: the launcher is told to end. Its own exit code is 1; the run's is in its report."""
    out = recipe.parent / "out"
    job = torchrun(2, recipe, "--stage.align.steps=100000", "--run.log_every=20", "--run.save_every=100000")
    wait_for(lambda: logged(out, "train") > 0)
    os.kill(job.pid, signal.SIGTERM)
    output = job.communicate(timeout=90)[0]
    assert job.returncode == 1, output
    assert "st_fast: SIGTERM: saved align at step" in output
    assert len(list((out / "align" / "checkpoints").iterdir())) == 1


def test_what_waited_for_a_full_disk_is_written_when_an_interruption_ends_the_run(one_stage, nursery):
    """The disk takes files again long before the log is tried again, and the signal comes in between."""
    plan = {"at": "step", "do": "fill the disk", "stage": "align", "steps": [3], "writes": 1, "terms": [8]}
    ranks = nursery.start(1, one_stage, breaks=plan)
    assert finish(ranks) == [EXIT_INTERRUPTED], ranks[0].text
    assert [text in ranks[0].text for text in ("cannot be written", "nothing is missing")] == [True, True]
    out = one_stage.parent / "out"
    assert [record["step"] for record in tiny.records(out, "train")] == list(range(1, 9))
    assert [record["step"] for record in tiny.records(out, "save")] == [4, 8]


def test_kill_9_at_random_moments_never_changes_the_final_weights(recipe, nursery, pair, states):
    out, rng, kills = recipe.parent / "out", random.Random(0), 0
    options = ("--run.save_every=2", "--run.keep=1", "--run.hang_timeout=20")
    while True:
        ranks = nursery.start(2, recipe, *options)
        # Kills end after six, so that a slow machine can't be killed for ever before its first step.
        moment = time.monotonic() + (rng.uniform(0, 4) if kills < 6 else 90)
        while time.monotonic() < moment and any(rank.poll() is None for rank in ranks):
            time.sleep(0.01)
        if all(rank.poll() == 0 for rank in ranks):
            break
        for rank in rng.sample(ranks, 2):
            rank.send(signal.SIGKILL)
        kills += 1
        finish(ranks)
    ours, theirs = states(out), states(pair)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [record["step"] for record in tiny.records(out, "end")][-2:] == [10, 10]
