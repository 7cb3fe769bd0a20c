"""The time that training waits for data is all counted, and once, whenever the data are asked for."""

from __future__ import annotations

import time

import pytest

from tests.schedule.loop import Loop


@pytest.mark.parametrize(
    "options",
    [(), ("--run.prefetch=true",), ("--run.prefetch=true", "--run.teacher_placement=ahead", "--optim.accumulation=2")],
    ids=str,
)
def test_every_wait_for_data_is_counted_once(options, folder):
    loop, answers = Loop(folder, "transcend", ("--run.streams=auto", *options)), []

    class Slow:
        def stream(self, requests):
            for answer in loader.stream(requests):
                time.sleep(0.02)
                answers.append(1)
                yield answer

    loader, loop.feed.loader = loop.feed.loader, Slow()
    start = time.perf_counter()
    list(loop.steps(0, 5))
    assert len(answers) == 5 * loop.feed.recipe.optim.accumulation
    assert 0.02 * len(answers) <= loop.feed.waited <= time.perf_counter() - start
