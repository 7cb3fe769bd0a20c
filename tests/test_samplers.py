"""The samplers against Gaussian data, whose velocity and whose flow are known in closed form."""

import pytest
import torch

from st_fast import sample, streams
from st_fast.recipe.schema import Sample
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


class Labelled:
    """A model whose velocity is its label, so that a guided velocity can be worked out by hand; counts its rows."""

    null_label = 10

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.rows += len(x)
        return torch.ones_like(x) * labels.view(-1, 1, 1, 1), None


@pytest.mark.parametrize(
    ("t", "scale", "expected", "rows"),
    [
        (0.2, 3.0, 10 + 3.0 * (4 - 10), 4),
        (0.5, 3.0, 10 + 3.0 * (4 - 10), 4),  # the range is closed at both ends
        (0.5001, 3.0, 4.0, 2),
        (0.1999, 3.0, 4.0, 2),
        (0.3, 1.0, 4.0, 2),  # ω = 1 is the conditional branch, and only that one is run
        (0.3, 0.0, 10.0, 4),
    ],
)
def test_guidance_acts_inside_its_interval_only(t, scale, expected, rows):
    model, settings = Labelled(), Sample(cfg_scale=scale, cfg_range=(0.2, 0.5))
    guided = sample.guided_velocity(model, torch.tensor([4, 4]), settings)(noise(2), t)
    assert guided.eq(expected).all()
    assert model.rows == rows
