"""The sampler's benchmark: what it compares draws the same, and what does not is not timed."""

import pytest
import torch

from bench import sampling
from bench.measure import Effort, WrongResult

CPU, ONCE = torch.device("cpu"), Effort(rounds=1, seconds=0, least=1, warmup=0)


def test_the_plain_sampler_draws_what_ours_draws():
    row = sampling.measure(CPU, "s", 1, 2, ONCE, depth=1)
    assert row["worst_error"]["ours"] < 1e-4 and row["worst_error"]["skipping"] < 1e-4
    assert row["guided_share"] == 0.75 and row["speedup"].keys() == {"plain", "skipping"}


def test_a_sampler_that_draws_something_else_is_not_timed(monkeypatch):
    drawn = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *arguments: drawn(*arguments) * 1.01)
    with pytest.raises(WrongResult, match="ours: off by"):
        sampling.measure(CPU, "s", 1, 1, ONCE, depth=1)
