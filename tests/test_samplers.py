"""The samplers against Gaussian data, whose velocity and whose flow are known in closed form."""

import pytest
import torch

from st_fast import sample, streams
from st_fast.streams import Purpose

STD = 0.5
"""Of the data; the probability flow then maps noise z to STD · z."""


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[ε − x₀ | x_t] on the linear path for x₀ ~ N(0, STD²)."""
    return x * (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)


def noise(count: int) -> torch.Tensor:
    return streams.normal(0, Purpose.SAMPLE_NOISE, torch.arange(count), (4, 4, 4))


@pytest.mark.parametrize(("solver", "steps", "tolerance"), [(sample.euler, 1000, 5e-3), (sample.heun, 100, 1e-3)])
def test_the_ode_solvers_follow_the_known_flow(solver, steps, tolerance):
    z = noise(8)
    torch.testing.assert_close(solver(velocity, z, steps), STD * z, atol=tolerance * 4, rtol=tolerance)


def test_the_sde_draws_from_the_data_distribution():
    draw = sample.balanced(0, 0, 256, 10, torch.device("cpu"))
    x = sample.euler_maruyama(velocity, noise(256), 250, "linear", draw)
    assert x.std().item() == pytest.approx(STD, rel=0.03)
    assert abs(x.mean().item()) < 0.02


def test_the_score_of_gaussian_data_is_minus_x_over_its_variance():
    x, t = noise(2), 0.3
    expected = -x / ((1 - t) ** 2 * STD**2 + t**2)
    torch.testing.assert_close(sample.score(velocity(x, t), x, t, "linear"), expected, atol=1e-5, rtol=1e-5)
