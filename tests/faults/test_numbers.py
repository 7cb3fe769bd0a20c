"""FAULT 31 and 32: steps that are not finite and losses that spike, on two real ranks."""

from __future__ import annotations

import math
import random
import shutil
import tracemalloc

import pytest
import torch

from st_fast.core import checkpoint
from st_fast.core.checkpoint.meta import SpikeHistory
from st_fast.core.errors import EXIT_FAILED, EXIT_INTERRUPTED, RunFailed
from st_fast.core.ranks import Ranks
from st_fast.recipe import load
from st_fast.train.log import SPIKE_STEPS, SPIKE_WARMUP, Meter, Readings, Skips, SpikeDetector, joined
from tests import tiny
from tests.faults.ranks import finish

NAN = math.nan


@pytest.mark.parametrize("log_every", [1, 4])
def test_nan_on_one_rank_makes_all_skip_together_and_names_its_samples(log_every, one_stage, nursery):
    out = one_stage.parent / "out"
    plan = {"at": "step", "do": "nan", "rank": 1, "steps": [4, 5, 8]}
    options = ("--run.save_every=1", "--run.keep=20", f"--run.log_every={log_every}", "--optim.warmup_steps=100")
    assert finish(nursery.start(2, one_stage, *options, breaks=plan)) == [0, 0]
    found = [checkpoint.load(out / "align" / "checkpoints" / f"{step:08d}") for step in range(1, 11)]
    for step in range(2, 11):
        before, after = found[step - 2].groups, found[step - 1].groups
        same = all(torch.equal(before[g][k], after[g][k]) for g in after for k in after[g])
        assert same == (step in (4, 5, 8)), step  # weights, moments, EMA, update count (the schedule): all or nothing
    assert found[-1].groups["optim"]["model.step"] == 7
    skips = tiny.records(out, "skip")
    assert [record["step"] for record in skips] == [4, 5, 8]
    for record in skips:
        first = (record["step"] - 1) * 8
        assert record["ranks"] == [1] and record["ordinals"] == list(range(first + 4, first + 8))
        assert len(record["records"]) == 4
    assert tiny.records(out, "train")[-1]["skipped"] == 3
    bad = {4, 5, 8} if log_every == 1 else set()  # a mean leaves skipped steps out, unless there are no others
    for record in tiny.records(out, "train"):
        assert math.isfinite(record["loss"]) == (record["step"] not in bad)


def test_skipping_goes_on_only_as_long_as_the_recipe_allows(one_stage, nursery):
    plan = {"at": "step", "do": "nan", "rank": 1, "steps": [3, 4, 5, 6, 7, 8]}
    ranks = nursery.start(2, one_stage, "--run.max_bad_steps=4", breaks=plan)
    assert finish(ranks) == [EXIT_FAILED] * 2
    assert "align: the gradients of the last 4 steps up to 6 were not finite (run.max_bad_steps = 4)" in ranks[0].text
    assert checkpoint.latest(one_stage.parent / "out" / "align" / "checkpoints", pytest.fail).step == 4


def test_a_spike_rolls_back_to_the_last_good_checkpoint_and_skips_its_window(one_stage, nursery):
    out = one_stage.parent / "out"
    plan = {"at": "step", "do": "blow up", "steps": [33]}
    options = ("--stage.align.steps=60", "--run.spike_ratio=3", "--run.log_every=6", "--run.save_every=5")
    more = ("--run.keep=20", "--optim.lr=1e-3")
    assert finish(nursery.start(2, one_stage, *options, *more, breaks=plan)) == [0, 0]
    (back,) = tiny.records(out, "rollback")
    assert back["spike"] == 33 and back["to"] == 30 and back["step"] == 40 and back["rollbacks"] == 1
    root = out / "align" / "checkpoints"
    good, bad, after = (checkpoint.load(root / f"{step:08d}") for step in (30, 35, 40))
    for group, tensors in good.groups.items():
        assert all(torch.equal(after.groups[group][key], tensor) for key, tensor in tensors.items())
    bias = "final_layer.linear.bias"
    assert not torch.equal(bad.groups["model"][bias], good.groups["model"][bias])
    losses = {record["step"]: record["denoise"] for record in tiny.records(out, "train")}
    assert losses[36] > 3 * losses[30]
    assert losses[48] < 1.5 * losses[30] and losses[60] < 1.5 * losses[30]
    assert after.meta["rollbacks"] == 1


def test_rollbacks_are_bounded(one_stage, nursery):
    plan = {"at": "step", "do": "blow up", "steps": [26, 50]}
    options = ("--stage.align.steps=90", "--run.spike_ratio=3", "--run.spike_retries=1", "--run.save_every=5")
    ranks = nursery.start(1, one_stage, *options, "--optim.lr=1e-3", "--run.log_every=3", breaks=plan)
    assert finish(ranks) == [EXIT_FAILED]
    assert "the loss spiked again at step 50, after 1 rollbacks" in ranks[0].text


def test_a_spike_ratio_that_would_always_strike_is_refused(recipe):
    from st_fast.recipe import RecipeError

    with pytest.raises(RecipeError, match=r"run.spike_ratio.*above 1"):
        load(recipe, ["--run.spike_ratio=0.9"])


def readings(first: int, denoise: list[float], norms: list[float] | None = None) -> Readings:
    return Readings(first, denoise, [0.0] * len(denoise), norms or [1.0] * len(denoise), [[]] * len(denoise), 0)


def noisy(count: int, mean: float, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [mean * rng.uniform(0.6, 1.4) for _ in range(count)]


def spike_of(detector: SpikeDetector, new: Readings) -> int | None:
    """What these readings show."""
    detector.add(new)
    return detector.take()


@pytest.mark.parametrize("every", [1, 7, 50])
def test_the_detector_finds_where_a_spike_began_however_often_it_looks(every):
    losses = noisy(120, 1.0, 0) + noisy(20, 4.0, 1)
    detector, found = SpikeDetector(2.5), list[int | None]()
    for at in range(0, len(losses), every):
        detector.add(readings(at + 1, losses[at : at + every]))
        found.append(detector.found)
    assert found[-1] == 121 and found[0] is None


def test_noise_single_outliers_a_falling_loss_and_steps_that_were_skipped_are_no_spike():
    detector = SpikeDetector(2.0)
    falling = [3.0 * 0.99**i for i in range(300)]
    for i in range(40, 300, SPIKE_STEPS):
        falling[i] *= 10
    falling[50] = NAN
    for i, loss in enumerate(falling):
        assert spike_of(detector, readings(i + 1, [loss])) is None
    early = SpikeDetector(2.0)
    assert spike_of(early, readings(1, [1.0] * (SPIKE_WARMUP - 1) + [9.0] * 3)) is None
    assert spike_of(SpikeDetector(0.0), readings(1, [1.0] * 100 + [99.0] * 100)) is None


def test_a_spike_is_above_the_ratio_for_so_many_steps_after_a_warm_up_and_counts_anew_after_it():
    assert spike_of(SpikeDetector(2.0), readings(1, [1.0] * SPIKE_WARMUP + [9.0] * SPIKE_STEPS)) == SPIKE_WARMUP + 1
    detector = SpikeDetector(2.0)
    assert spike_of(detector, readings(1, [1.0] * SPIKE_WARMUP + [2.0] * SPIKE_STEPS)) is None
    assert spike_of(detector, readings(26, [NAN] + [2.1] * SPIKE_STEPS)) == 27
    assert spike_of(detector, readings(32, [2.1] * (SPIKE_STEPS - 1))) is None
    assert spike_of(detector, readings(36, [2.1])) == 32
    assert spike_of(detector, readings(37, [2.1, 1.0, *[2.1] * (SPIKE_STEPS - 1)])) is None


def test_only_steps_in_a_row_count_towards_the_end():
    skips = Skips("align", allowed=3)
    skips.add(readings(1, [1.0] * 6, [NAN, NAN, 1.0, NAN, 1.0, math.inf]))
    skips.check(6)
    assert (skips.total, skips.in_row) == (4, 1)
    skips.add(readings(7, [NAN] * 2, [NAN] * 2))
    with pytest.raises(RunFailed, match="last 3 steps up to 8"):
        skips.check(8)


def test_a_meter_gives_back_each_steps_numbers_since_the_last_reading():
    meter, ranks = Meter(torch.device("cpu"), 4), Ranks(0, 1, torch.device("cpu"))
    rows = [(0.5, 0.25, 2.0, 1.0), (NAN, 0.5, NAN, 1.0), (0.75, NAN, math.inf, 1.0), (1.5, 2.0, 3.0, 2.0)]
    for first, part in ((7, rows), (11, rows[3:])):
        for row in part:
            meter.add(*map(torch.tensor, row))
        found = meter.read(ranks, first + len(part) - 1)
        assert found.first == first and found.updates == 2
        for values, column in zip((found.denoise, found.aux, found.norms), range(3), strict=True):
            assert list(values) == pytest.approx([row[column] for row in part], nan_ok=True)
        assert found.bad == ([1, 2] if len(part) == 4 else [])
        assert found.bad_ranks == ([[], [0], [0], []] if len(part) == 4 else [[]])


def test_means_are_over_each_number_and_the_loss_is_the_sum():
    found = Readings(1, [1.0, 3.0], [0.5, 0.25], [2.0, 4.0], [[], []], 2).means()
    assert found == {"loss": 2.375, "denoise": 2.0, "aux": 0.375, "grad_norm": 3.0}
    assert all(map(math.isnan, Readings(1, [1.0], [0.5], [NAN], [[]], 0).means().values()))


def test_a_meter_has_another_loss_where_a_stage_has_one():
    meter, whole, ranks = Meter(torch.device("cpu"), 4), Meter(torch.device("cpu"), 4), Ranks(0, 1, torch.device("cpu"))
    rows = [(0.5, 0.25, 2.0, 1.0, 0.125), (1.5, 0.5, NAN, 1.0, math.inf), (0.75, 0.25, 4.0, 2.0, 0.375)]
    parts = []
    for number, row in enumerate(rows, start=1):
        for one in (meter, whole):
            one.add(*map(torch.tensor, row))
        parts.append(meter.read(ranks, number))
    found = whole.read(ranks, 3)
    assert repr(joined(parts)) == repr(found) and found.bad_ranks == [[], [0], []]
    assert list(found.direction) == [0.125, math.inf, 0.375] and list(found.norms)[::2] == [2.0, 4.0]
    assert found.means() == {"loss": 1.125, "denoise": 0.625, "aux": 0.25, "grad_norm": 3.0, "direction": 0.25}
    meter.add(*map(torch.tensor, rows[0][:4]))
    assert "direction" not in meter.read(ranks, 4).means()


def test_means_leave_skipped_steps_out():
    means = readings(1, [1.0, NAN, 3.0], [1.0, NAN, 2.0]).means()
    assert means == {"loss": 2.0, "denoise": 2.0, "aux": 0.0, "grad_norm": 1.5}


def test_a_spike_costs_the_same_however_often_the_run_logs_draws_or_is_interrupted(one_stage, nursery):
    out, ends = one_stage.parent / "out", []
    plan = {"at": "step", "do": "blow up", "steps": [33, 52]}
    options = ("--stage.align.steps=65", "--run.spike_ratio=3", "--run.save_every=10", "--optim.lr=1e-3")
    for log_every, stops in ((1, []), (13, [36, 38, 39])):
        shutil.rmtree(out, ignore_errors=True)
        for stop in stops:  # more checkpoints than are kept, all of them younger than the one that is needed
            broken = plan | {"terms": [stop]}
            stopped = nursery.start(1, one_stage, *options, f"--run.log_every={log_every}", breaks=broken)
            assert finish(stopped) == [EXIT_INTERRUPTED], stopped[0].text
        assert finish(nursery.start(1, one_stage, *options, f"--run.log_every={log_every}", breaks=plan)) == [0]
        backs = [(r["step"], r["spike"], r["to"]) for r in tiny.records(out, "rollback")]
        assert backs == [(40, 33, 30), (60, 52, 50)]
        ends.append(checkpoint.latest(out / "align" / "checkpoints", pytest.fail).groups)
    for other in ends[1:]:
        assert all(torch.equal(ends[0][g][k], other[g][k]) for g in other for k in other[g])


def test_what_a_checkpoint_keeps_of_the_guards_goes_on_where_it_was():
    losses = [1.0] * SPIKE_WARMUP + [9.0] * (SPIKE_STEPS - 1)
    first, second = SpikeDetector(2.0), SpikeDetector(2.0)
    first.add(readings(1, losses))
    second.restore(first.state())
    assert second.state() == first.state() and second.take() is None
    assert spike_of(second, readings(len(losses) + 1, [9.0])) == SPIKE_WARMUP + 1
    found = SpikeDetector(2.0)
    found.add(readings(1, [*losses, 9.0, 1.0]))  # the last is not looked at any more
    assert found.state() == SpikeHistory((1.0,) * SPIKE_WARMUP, 0, SPIKE_WARMUP + 1)
    skips, later = Skips("align", allowed=3), Skips("align", allowed=3)
    skips.add(readings(1, [1.0] * 4, [NAN, 1.0, NAN, NAN]))
    later.restore(skips.state())
    later.check(4)
    later.add(readings(5, [1.0], [NAN]))
    assert (later.total, later.in_row) == (4, 3)
    with pytest.raises(RunFailed, match="last 3 steps up to 5"):
        later.check(5)


def test_a_meter_that_is_full_says_so_and_readings_in_parts_are_those_in_one():
    meter, whole = Meter(torch.device("cpu"), 2), Meter(torch.device("cpu"), 4)
    parts, alone = [], Ranks(0, 1, torch.device("cpu"))
    for step in range(1, 5):
        values = [torch.tensor(float(step * k)) for k in (1, 2, 3, 4)]
        if step == 3:
            values[2] = torch.tensor(NAN)
        assert not meter.full
        meter.add(*values)
        whole.add(*values)
        if step % 2 == 0:
            assert meter.full
            parts.append(meter.read(alone, step))
    one, other = joined(parts), whole.read(alone, 4)
    assert (one.first, list(one.denoise), list(one.aux), one.updates) == (1, [1, 2, 3, 4], [2, 4, 6, 8], 16)
    assert repr(one) == repr(other)


def test_a_million_steps_between_two_lines_cost_20_bytes_each():
    meter, alone, parts = Meter(torch.device("cpu")), Ranks(0, 1, torch.device("cpu")), []
    meter.values.fill_(0.5)
    tracemalloc.start()
    try:
        for step in range(len(meter.values), 101 * len(meter.values), len(meter.values)):
            meter.steps = len(meter.values)
            parts.append(meter.read(alone, step))
        kept, _ = tracemalloc.get_traced_memory()
        whole = joined(parts)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    steps = len(whole.norms)
    assert steps == 100 * len(meter.values) and kept < 24 * steps and most < 64 * steps
    assert whole.means() == {"loss": 1.0, "denoise": 0.5, "aux": 0.5, "grad_norm": 0.5}
