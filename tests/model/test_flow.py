"""The path, the velocity and the three ways to draw t."""

import numpy as np
import pytest
import torch
from scipy import stats

from st_fast.core import random
from st_fast.core.random import Purpose
from st_fast.model import flow
from st_fast.recipe.schema import Flow
from st_fast.recipe.times import shifted, with_shift


@pytest.mark.parametrize("path", flow.PATHS)
def test_the_path_runs_from_data_to_noise_and_velocity_is_its_derivative(path):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    ends = [flow.interpolate(x, noise, torch.full((3,), t, dtype=torch.float64), path)[0] for t in (0.0, 1.0)]
    torch.testing.assert_close(ends[0], x, atol=1e-12, rtol=0)
    torch.testing.assert_close(ends[1], noise, atol=1e-12, rtol=0)
    t, h = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-6
    difference = (flow.interpolate(x, noise, t + h, path)[0] - flow.interpolate(x, noise, t - h, path)[0]) / (2 * h)
    torch.testing.assert_close(flow.interpolate(x, noise, t, path)[1], difference, atol=1e-8, rtol=1e-8)


def test_the_linear_velocity_is_noise_minus_data():
    x, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    assert torch.equal(flow.interpolate(x, noise, torch.tensor([0.3, 0.8]), "linear")[1], -x + noise)


def draws(time, path="linear", steps=400, batch=64):
    return torch.cat([flow.sample_times(1, s, np.arange(batch), batch, time, path) for s in range(steps)]).numpy()


@pytest.mark.parametrize("time", ["uniform", "stratified"])
def test_uniform_and_stratified_times_are_marginally_uniform(time):
    assert stats.kstest(draws(time), "uniform").pvalue > 1e-3


def test_lognormal_times_have_normal_log_noise_levels_on_both_paths():
    t = draws("lognormal").astype(np.float64)
    assert stats.kstest(np.log(t / (1 - t)), "norm").pvalue > 1e-3
    t = draws("lognormal", "cosine").astype(np.float64)
    assert stats.kstest(np.log(np.tan(t * np.pi / 2)), "norm").pvalue > 1e-3


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.0), (0.7, 0.35)])
def test_logit_normal_times_are_its_quantiles_with_one_draw_in_each_bin(mean, std):
    for step, group in ((0, 0), (5, 0), (5, 2)):
        t, even = (
            flow.sample_times(9, step, np.arange(64), 64, time, "cosine", group, mean, std).double().numpy()
            for time in ("logit_normal", "stratified")
        )
        assert sorted(np.floor(even * 64).astype(int)) == list(range(64))
        np.testing.assert_allclose(stats.norm(mean, std).cdf(np.log(t / (1 - t))), even, rtol=0, atol=1e-6)
        np.testing.assert_allclose(t, 1 / (1 + np.exp(-stats.norm(mean, std).ppf(even))), rtol=1e-6)


@pytest.mark.parametrize("shift", [1.7, 0.3])
@pytest.mark.parametrize("time", flow.TIMES)
def test_a_shift_moves_every_time_by_its_formula(time, shift):
    for path in flow.PATHS:
        t = flow.sample_times(4, 7, np.arange(30), 30, time, path, 0, -0.2, 1.3).double().numpy()
        found = flow.sample_times(4, 7, np.arange(30), 30, time, path, 0, -0.2, 1.3, shift)
        assert found.dtype == torch.float32 and found.min() > 0 and found.max() <= 1
        np.testing.assert_allclose(found.numpy(), shift * t / (1 + (shift - 1) * t), rtol=1e-6)
    with pytest.raises(ValueError, match="shift = 'auto': a number"):
        flow.sample_times(4, 7, np.arange(30), 30, time, "linear", shift="auto")


def test_times_stay_below_1_where_a_shift_brings_them_nearer_than_float32_tells():
    law = 0, 0, np.arange(4096), 4096, "logit_normal", "linear"
    drawn = [flow.sample_times(*law, std=100.0, shift=shift) for shift in (1.0, 90.0)]
    assert all(t.min() > 0 and t.max() < 1 for t in drawn)


def test_times_that_are_not_shifted_have_the_same_bits_and_the_ends_stay():
    times = torch.linspace(0, 1, 9_973, dtype=torch.float64)
    assert torch.equal(shifted(times, 1.0), times)
    assert [shifted(t, 2.0**0.5) for t in (0.0, 1.0)] == [0.0, 1.0]
    torch.testing.assert_close(shifted(shifted(times, 6.93), 6.93, -1), times, rtol=1e-12, atol=0)


def test_auto_shifts_by_the_size_of_the_latent():
    """The square root of numbers in a latent over 4096, published for a latent of 32 × 16 × 16: √2."""
    for shape, expected in (
        ((32, 16, 16), 2**0.5),
        ((4, 32, 32), 1.0),
        ((4, 64, 48), 3**0.5),
        ((768, 16, 16), 48**0.5),
    ):
        assert with_shift(Flow(shift="auto"), shape).shift == pytest.approx(expected, rel=1e-12)
    assert with_shift(Flow(shift=3.0), (4, 64, 64)) == Flow(shift=3.0)


def test_stratified_times_put_one_draw_in_each_bin_so_a_range_holds_a_fixed_count_give_or_take_one():
    for step in range(50):
        t = flow.sample_times(9, step, np.arange(64), 64, "stratified", "linear").numpy()
        assert sorted(np.floor(t.astype(np.float64) * 64).astype(int)) == list(range(64))
        assert ((t >= 0.4) & (t <= 0.7)).sum() in (18, 19, 20)  # bins 26..43 lie inside, 25 and 44 in part


def test_stratified_times_lie_inside_0_and_1_at_the_ends_of_a_uniform_draw(monkeypatch):
    """A float32 uniform lies between 2⁻²⁵ and 1, both of which it may be."""
    for u, end, expected in ((2.0**-25, "min", 2.0**-25), (1.0, "max", 1 - 2.0**-24)):
        monkeypatch.setattr(
            random, "uniform", lambda seed, purpose, ordinals, count=1, u=u: torch.full((len(ordinals), 1), u)
        )
        t = flow.sample_times(9, 5, np.arange(64), 64, "stratified", "linear")
        assert getattr(t, end)().item() == expected


def test_times_are_the_draws_of_the_samples_own_ordinals():
    u = random.uniform(7, Purpose.TIME, torch.arange(3 * 6 + 1, 3 * 6 + 5))[:, 0]
    assert torch.equal(flow.sample_times(7, 3, np.arange(1, 5), 6, "uniform", "linear"), u)
    bins = torch.from_numpy(random.strata(7, 3, 6)[1:5])
    assert torch.equal(
        flow.sample_times(7, 3, np.arange(1, 5), 6, "stratified", "linear"), ((bins + u.double()) / 6).float()
    )


def test_the_denoising_loss_is_the_mean_square_of_each_sample():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 2, 4, 5, generator=generator).bfloat16() for _ in range(2))
    expected = ((a.double().numpy() - b.double().numpy()) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(flow.denoising_loss(a, b).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("time", flow.TIMES)
def test_a_part_of_the_batch_gets_the_same_times_as_the_whole(time):
    whole = flow.sample_times(2, 11, np.arange(16), 16, time, "linear")
    assert torch.equal(whole[4:8], flow.sample_times(2, 11, np.arange(4, 8), 16, time, "linear"))


@pytest.mark.parametrize("call", [lambda: flow.coefficients(torch.ones(1), "curved"),
                                  lambda: flow.sample_times(0, 0, np.arange(2), 2, "gamma", "linear")])  # fmt: skip
def test_unknown_names_are_refused_with_what_is_allowed(call):
    with pytest.raises(ValueError, match="one of "):
        call()
