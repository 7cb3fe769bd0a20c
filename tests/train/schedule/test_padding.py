"""Supervised rows in one shape: how many make a pass, what fills it, and that it changes neither loss nor gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from st_fast.recipe.methods import Selection
from st_fast.recipe.schema import Flow
from st_fast.train.layouts import draw_times
from st_fast.train.supervision import Rows, select_rows
from st_fast.train.supervision.capacity import capacity, padded
from tests.train.schedule.loop import Loop

RANGE = Selection((0.4, 0.7), "sample", 0.5)


def counts(law: Flow, whole: int, part: int, steps: int = 400) -> list[int]:
    """Supervised rows of each micro-batch of these steps, as training draws them."""
    found = []
    for step in range(steps):
        t = draw_times(None, law, 7, step, whole)
        found += [len(select_rows(t, slice(start, start + part), RANGE)[0]) for start in range(0, whole, part)]
    return found


SHIFTED = Flow(time="stratified", shift=1.7)
LOGIT_NORMAL = Flow(time="logit_normal", time_mean=-0.3, time_std=0.8, shift=0.6)


@pytest.mark.parametrize("law", [Flow(time="stratified"), SHIFTED, LOGIT_NORMAL], ids=str)
@pytest.mark.parametrize("batch", [8, 10, 256])
def test_stratified_times_never_overflow_a_whole_batch_and_waste_at_most_two_rows(batch, law):
    rows = capacity(RANGE, law, batch, batch).rows
    found = counts(law, batch, batch)
    assert max(found) <= rows <= min(found) + 2


@pytest.mark.parametrize(
    ("law", "whole", "part"),
    [
        (Flow(), 64, 64),
        (Flow(time="stratified"), 64, 16),
        (Flow(time="lognormal"), 64, 64),
        (Flow(time="lognormal", shift=2.5), 64, 64),
        (Flow(shift=0.4), 64, 64),
        (SHIFTED, 64, 16),
        (LOGIT_NORMAL, 64, 16),
    ],
    ids=str,
)
def test_the_rows_expected_to_be_run_are_those_that_are(law, whole, part):
    found = capacity(RANGE, law, whole, part)
    drawn = counts(law, whole, part)
    ran = [found.rows * max(1, -(-count // found.rows)) for count in drawn]
    assert np.mean(drawn) == pytest.approx(found.supervised, rel=0.06)
    assert np.mean(ran) == pytest.approx(found.run, rel=0.04)


def test_the_capacity_costs_least():
    found, rng = capacity(RANGE, Flow(), 256, 256), np.random.default_rng(0)
    drawn = rng.binomial(256, 0.3, 200_000)
    cost = {k: k * np.mean(np.maximum(1, -(-drawn // k))) for k in range(77, 140)}
    assert cost[found.rows] <= 1.002 * min(cost.values())
    assert found.run == pytest.approx(cost[found.rows], rel=2e-3)


def exact(rows: int, chances: np.ndarray) -> float:
    """Rows that passes of `rows` run on average, at these chances of 0, 1, … supervised rows."""
    return sum(chance * rows * max(1, -(-count // rows)) for count, chance in enumerate(chances))


@pytest.mark.parametrize("t_range", [(0.4, 0.7), (0.0, 0.05), (0.1, 0.9), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize(("time", "whole", "part"), [("uniform", 24, 24), ("stratified", 24, 6), ("stratified", 7, 6)])
def test_the_capacity_is_the_least_of_all_by_scipys_chances(t_range, time, whole, part):
    found = capacity(Selection(t_range, "sample", 0.5), Flow(time=time), whole, part)
    counts, touched = np.arange(part + 1), bins(whole, t_range)
    share = min(max(t_range[1] - t_range[0], 1e-12), 1 - 1e-12)
    law = stats.binom(part, share) if time == "uniform" else stats.hypergeom(whole, touched, part)
    chances = law.pmf(counts)
    mean = float(counts @ chances)
    assert found.supervised == pytest.approx(mean, abs=1e-9)
    costs = {k: exact(k, chances) for k in range(max(1, int(np.ceil(mean - 1e-9))), part + 1)}
    assert found.run == pytest.approx(min(costs.values()), rel=1e-9)
    assert found.run == pytest.approx(costs[found.rows], rel=1e-9)


def bins(count: int, t_range: tuple[float, float]) -> int:
    """How many of so many equal bins of (0, 1) a range touches."""
    return sum(i / count <= t_range[1] and (i + 1) / count > t_range[0] for i in range(count))


@pytest.mark.parametrize("t_range", [(0.4, 0.7), (0.37, 0.71), (0.0, 1.0), (0.99, 1.0), (0.31, 0.32)])
def test_a_whole_stratified_batch_has_room_for_every_bin_that_the_range_touches(t_range):
    for batch in (8, 10, 37, 256):
        found = capacity(Selection(t_range, "sample", 0.5), Flow(time="stratified"), batch, batch)
        assert found.rows == found.run == bins(batch, t_range)
        assert found.supervised == pytest.approx((t_range[1] - t_range[0]) * batch)


def test_the_released_mask_fills_every_row_and_a_batch_of_one_works():
    assert capacity(Selection((0.4, 0.7), "released", 0.5), Flow(), 64, 16).rows == 16
    assert capacity(RANGE, Flow(), 1, 1).rows == 1
    assert capacity(Selection((0.0, 1.0), "sample", 0.5), Flow(time="stratified"), 8, 8).rows == 8


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("rows", [1, 4, 5, 12])
def test_padding_keeps_every_supervised_row_once_with_its_weight_and_fills_whole_passes(size, rows):
    generator = torch.Generator().manual_seed(size * 100 + rows)
    for count in range(size + 1):
        index = torch.randperm(size, generator=generator)[:count].sort().values
        weight = torch.rand(count, generator=generator) + 0.1
        filled, weights = padded(index, weight, size, rows)
        assert len(filled) == len(weights) == rows * max(1, -(-count // rows))
        total = torch.zeros(size).index_add(0, filled, weights)
        assert torch.equal(total, torch.zeros(size).index_put((index,), weight))
        assert int((weights > 0).sum()) == count and int(filled.min()) >= 0 and int(filled.max()) < size
        if len(filled) == size:  # what `Rows.take` then hands out without looking
            assert torch.equal(filled, torch.arange(size))
        spare = size - count >= len(filled) - count  # enough others to fill it without taking a row again
        assert len(set(filled.tolist())) == len(filled) or not spare
        passes = Rows(filled, weights, rows).passes(filled)
        assert all(len(one) == rows for one in passes) and torch.equal(torch.cat(passes), filled)


@pytest.mark.parametrize("name", ["align", "transcend"])
@pytest.mark.parametrize("options", [(), ("--flow.time=stratified",), ("--optim.accumulation=2",)], ids=str)
def test_padded_rows_give_the_same_loss_and_every_gradient(name, options, folder):
    def gradients(*more: str) -> tuple[list[torch.Tensor], list[int]]:
        loop = Loop(folder, name, (*options, *more))
        step, found, rows = loop.trainer.step, [], []
        for number, batches in enumerate(loop.iterator.steps(0, 6)):
            for batch in batches:
                step._learn(number, batch, last=True)
                rows.append(len(batch.rows.index))
            found += [gradient.clone() for gradient in step.optimizer.gradients()]
            for parameter in step.optimizer.parameters():
                parameter.grad = None
        return found, rows

    exact, counted = gradients()
    filled, sizes = gradients("--run.supervised_rows=padded")
    assert len(set(counted)) > 1 or "stratified" in str(options)
    assert all(size % min(sizes) == 0 for size in sizes)
    largest = max(float(gradient.abs().max()) for gradient in exact)
    for ours, theirs in zip(filled, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * largest)


def test_overflowing_steps_take_further_passes_of_the_same_shape(folder, monkeypatch):
    loop = Loop(folder, "transcend", ("--run.supervised_rows=padded",))
    loop.iterator.pass_rows = 2  # of 8: most steps overflow
    seen, teacher = [], loop.trainer.method.teacher
    guided = teacher.guided_features
    monkeypatch.setattr(teacher, "guided_features", lambda x, *rest: seen.append(len(x)) or guided(x, *rest))
    numbers, _ = loop.run()
    expected, _ = Loop(folder, "transcend").run()
    assert set(seen) == {2} and len(seen) > 12
    for ours, theirs in zip(numbers, expected, strict=True):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=2e-4, atol=1e-7)
