"""The time that training waits for data is all counted, and once, whenever the data are asked for."""

from __future__ import annotations

import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from st_fast.train.batches import sent_to
from tests.train.schedule.loop import Loop


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

    loader, loop.iterator.loader = loop.iterator.loader, Slow()
    start = time.perf_counter()
    list(loop.steps(0, 5))
    assert len(answers) == 5 * loop.iterator.recipe.optim.accumulation
    assert 0.02 * len(answers) <= loop.iterator.waited <= time.perf_counter() - start


@pytest.mark.parametrize("named", ["cuda", "cuda:0"], ids=["without a number", "with its number"])
def test_what_is_on_the_device_already_is_not_sent_again_however_the_device_is_named(named, monkeypatch):
    """Pinning memory of a device is an error, which "cuda" against "cuda:0" once led to."""
    copies: list[str] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copies.append("pinned") or tensor)
    with FakeTensorMode():
        there, here = torch.empty(3, device="cuda:0"), torch.empty(3)
        assert sent_to(torch.device(named), there) is there and not copies
        assert sent_to(torch.device("cuda:0"), here).device == torch.device("cuda:0") and copies == ["pinned"]
        assert sent_to(torch.device("cpu"), here) is here
