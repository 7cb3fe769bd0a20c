"""Steps whose images have several times: they wait for nothing, compile once, and are recorded as graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.train.schedule.loop import Loop
from tests.train.schedule.test_graphs import PADDED, WARM_UP, graphed
from tests.train.schedule.test_no_waiting import NoCalls, NoOps, counters  # noqa: F401
from tests.train.schedule.test_schedules import values
from tests.train.supervision.test_dual_times import DUAL_STAGE, SELF_FLOW_STAGE

NAMES = ("self_flow", "sra_dual")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder with data and a recipe of both methods."""
    folder = tmp_path_factory.mktemp("two times")
    recipe = tiny.write_recipe(folder / "tiny.toml", tiny.write_data(folder / "latents"), folder / "out")
    recipe.write_text(recipe.read_text().split("[[stage]]")[0] + SELF_FLOW_STAGE + DUAL_STAGE)
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [(), ("--run.supervised_rows=padded", "--flow.path=cosine")])
def test_no_step_reads_a_value_on_the_host(name, options, two):
    loop = Loop(two, name, options)
    batches = list(loop.iterator.steps(0, 3))
    with NoOps(), NoCalls():
        losses = [loop.trainer.step(number, one)[0].denoise for number, one in enumerate(batches)]
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_compiled_once_whatever_the_groups_tokens(name, two, counters):  # noqa: F811
    loop, graphs = Loop(two, name, ("--run.compile=on",)), []
    for number, batches in enumerate(loop.iterator.steps(0, 6)):
        loop.trainer.step(number, batches)
        graphs.append(counters["stats"]["unique_graphs"])
    # A block followed by a block and the last one; of the average the first, which computes no gradient.
    assert graphs[1] == graphs[-1] == 3
    assert not counters["graph_break"] and not [text for text in loop.said if "torch.compile failed" in text]


@pytest.mark.parametrize("name", NAMES)
def test_replays_train_as_python_does_on_every_batch(name, two, monkeypatch):
    numbers, graphs, passes = graphed(monkeypatch, two, name)
    expected, _ = Loop(two, name, PADDED).run()
    assert torch.equal(numbers, values(expected))
    assert len(graphs) == 1 and graphs[0].replays == 8 - WARM_UP and passes == WARM_UP + 1
