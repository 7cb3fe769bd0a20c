"""FAULT 22 and 36: a disk that is full for a while, or vanished, costs no weights, at whatever write it is met."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from st_fast.core.errors import EXIT_FAILED
from tests import tiny
from tests.faults.ranks import finish, wait_for

WAITS = "align: waits until its last checkpoint can be written"
WRITTEN = "align: its last checkpoint is written"


def blocked(out: Path) -> Path:
    """A file where the first stage's checkpoints would be: every save is refused until it is gone."""
    place = out / "align" / "checkpoints"
    place.parent.mkdir(parents=True)
    place.write_text("a file where a folder is needed")
    return place


def test_the_last_checkpoint_is_waited_for_longer_than_a_hang_may_last(recipe, nursery, pair, states):
    place = blocked(recipe.parent / "out")
    ranks = nursery.start(2, recipe, "--run.hang_timeout=8")
    wait_for(lambda: WAITS in ranks[0].text or ranks[0].poll() is not None)
    time.sleep(18)
    place.unlink()
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
    place = blocked(recipe.parent / "out")
    ranks = nursery.start(count, recipe)
    wait_for(lambda: WAITS in ranks[0].text or ranks[0].poll() is not None)
    ranks[-1].send(signal.SIGTERM)
    assert finish(ranks, 30) == [EXIT_FAILED] * count
    lost = "the last checkpoint of align could not be written, those before it stay; the same command continues"
    assert f"st_fast: SIGTERM: {lost}" in ranks[-1].text and "Traceback" not in ranks[0].text
    assert count == 1 or f"st_fast: a signal to another rank: {lost}" in ranks[0].text
    place.unlink()
    ranks = nursery.start(count, recipe)
    assert finish(ranks) == [0] * count and tiny.records(recipe.parent / "out", "start")[-1]["stage"] == "transcend"
