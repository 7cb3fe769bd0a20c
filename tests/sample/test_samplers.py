"""The samplers against Gaussian data, whose velocity and whose flow are known in closed form."""

import itertools
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from scipy.integrate import solve_ivp

from st_fast.convert.drawing import solve
from st_fast.core import random
from st_fast.core.errors import UserError, how_to_install
from st_fast.core.random import Purpose
from st_fast.recipe import cost
from st_fast.recipe.schema import Model, Sample
from st_fast.sample.draw import Draw, balanced, draw_of, read_labels, slerp, starting_noise
from st_fast.sample.guided import dopri5, euler, euler_maruyama, guided_velocity, sample_batches, sample_from, score

STD = 0.5
"""Of the data; the probability flow then maps noise z to STD · z."""


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[ε − x₀ | x_t] on the linear path for x₀ ~ N(0, STD²)."""
    return x * (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)


def noise(count: int) -> torch.Tensor:
    return random.normal(0, Purpose.SAMPLE_NOISE, torch.arange(count), (4, 4, 4))


@pytest.mark.parametrize(("heun", "steps", "tolerance"), [(False, 1000, 5e-3), (True, 100, 1e-3)])
def test_the_ode_solvers_follow_the_known_flow(heun, steps, tolerance):
    z = noise(8)
    torch.testing.assert_close(euler(velocity, z, steps, heun=heun), STD * z, atol=tolerance * 4, rtol=tolerance)


def test_the_sde_draws_from_the_data_distribution():
    draw = balanced(0, 0, 256, 10, torch.device("cpu"))
    x = euler_maruyama(velocity, noise(256), 250, "linear", draw)
    assert x.std().item() == pytest.approx(STD, rel=0.03)
    assert abs(x.mean().item()) < 0.02


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("shift", [1.0, 1.8])
def test_the_sde_sampler_written_out_in_float64(path, shift):
    def field(x, t):
        return torch.sin((2 + t) * x) - 0.3 * x

    x = start = noise(2).double()
    draw, seen, steps = Draw(torch.tensor([3, 8]), torch.tensor([0, 0]), 5), [], 7
    times = [1 - (1 - 0.04) * i / 6 for i in range(7)] + [0.0]
    times = [shift * t / (1 + (shift - 1) * t) for t in times]
    for number, (t, following) in enumerate(itertools.pairwise(times)):
        v, dt = field(x, t), t - following
        if path == "linear":
            sigma, epsilon = t, x + (1 - t) * v
        else:
            sigma = math.sin(math.pi / 2 * t)
            epsilon = sigma * x + math.cos(math.pi / 2 * t) * v / (math.pi / 2)
        x = x - dt * (v + t * epsilon / sigma)
        if number < 6:
            w = random.normal(5, Purpose.SAMPLE_PATH, torch.tensor([3 * 7 + number, 8 * 7 + number]), (4, 4, 4))
            x = x + (math.sqrt(2 * t * dt) * w).double()  # noise is float32
        seen.append(x)
    found: list[torch.Tensor] = []
    last = euler_maruyama(field, start, steps, path, draw, found.append, shift)
    assert torch.equal(last, found[-1])
    torch.testing.assert_close(torch.stack(found), torch.stack(seen), rtol=1e-9, atol=1e-9)


def test_a_step_of_euler_takes_one_look_and_one_of_heun_two():
    z = noise(2).double()
    end = z - velocity(z, 1.0)
    torch.testing.assert_close(euler(velocity, z, 1), end)
    torch.testing.assert_close(euler(velocity, z, 1, heun=True), z - (velocity(z, 1.0) + velocity(end, 0.0)) / 2)


def test_the_score_of_gaussian_data_is_minus_x_over_its_variance():
    x, t = noise(2), 0.3
    expected = -x / ((1 - t) ** 2 * STD**2 + t**2)
    torch.testing.assert_close(score(velocity(x, t), x, t, "linear"), expected, atol=1e-5, rtol=1e-5)


class Labelled:
    """A model whose velocity is its label, so that a guided velocity can be worked out by hand; counts its rows."""

    def null_condition(self, count: int) -> torch.Tensor:
        return torch.full((count,), 10)

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
    guided = guided_velocity(model, torch.tensor([4, 4]), settings)(noise(2), t)
    assert guided.eq(expected).all()
    assert model.rows == rows


def uneven(x: torch.Tensor, t: float) -> torch.Tensor:
    """A field with a stiff corner and a jump at t = 0.65, as guidance in an interval has."""
    return torch.sin(5 * t * x) + (2 * x if t <= 0.65 else -x / (0.05 + t))


def scipys(x: torch.Tensor, start: float, end: float, low: float) -> torch.Tensor:
    """SciPy's solution of `uneven` from start to end, with t held at or above `low`."""

    def field(t, y):
        return uneven(torch.from_numpy(y), max(t, low)).numpy()

    solved = solve_ivp(field, (start, end), x.reshape(-1).numpy(), rtol=1e-11, atol=1e-11)
    return torch.from_numpy(solved.y[:, -1]).view_as(x)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
@pytest.mark.parametrize(("shift", "expected"), [(1.0, 1.0), (0.4, 0.4), ("auto", (4 * 6 * 8 / 4096) ** 0.5)])
def test_a_shift_moves_the_times_that_the_model_sees_and_auto_goes_by_the_latents_drawn(sampler, shift, expected):
    seen: list[float] = []

    class Watched(Labelled):
        def __call__(self, x, t, labels):
            seen.extend(t.tolist())
            return super().__call__(x, t, labels)

    x, draw = torch.randn(1, 4, 6, 8), balanced(0, 0, 1, 10, torch.device("cpu"))
    sample_from(Watched(), x, draw, Sample(sampler=sampler, steps=4, cfg_scale=1.0, shift=shift), "linear")
    even = [1, 0.68, 0.36, 0.04] if sampler == "sde" else [1, 0.75, 0.5, 0.25]
    if sampler == "heun":
        even = [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0]
    assert seen == pytest.approx([expected * t / (1 + (expected - 1) * t) for t in even], rel=1e-6)
    pipe = SimpleNamespace(config=SimpleNamespace(shift=expected), progress_bar=list,
                           transformer=SimpleNamespace(config=SimpleNamespace(flow="linear")))  # fmt: skip
    exported: list[float] = []

    def field(x: torch.Tensor, t: float) -> torch.Tensor:
        exported.append(t)
        return x

    solve(pipe, x, field, sampler, 4, 0, torch.arange(1))
    assert exported == pytest.approx(seen, rel=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
@pytest.mark.parametrize(
    ("scale", "window", "shift"),
    [(2.0, (0.0, 1.0), 1.0), (2.0, (0.26, 0.74), 1.0), (1.0, (0.0, 1.0), 1.0), (2.0, (0.65, 0.95), 2.0)],
)
def test_the_formula_counts_the_rows_that_a_sampler_gives_the_model(sampler, scale, window, shift):
    model, settings = Labelled(), Sample(sampler=sampler, steps=5, cfg_scale=scale, cfg_range=window, shift=shift)
    draw = balanced(0, 0, 3, 10, torch.device("cpu"))
    sample_from(model, noise(3), draw, settings, "linear")
    assert model.rows == 3 * cost.drawing_rows(settings)


def test_dopri5_follows_scipys_solution_of_a_known_field_to_its_tolerance():
    x, seen = noise(3).double(), []
    found = dopri5(uneven, x, 5, (0.0, 0.65), seen.append, atol=1e-9, rtol=1e-9)
    above = math.nextafter(0.65, 1)
    expected = scipys(scipys(x, 1.0, above, above), 0.65, 0.0, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert len(seen) == 5 and torch.equal(seen[-1], found)


def test_dopri5_never_looks_beyond_the_data_and_needs_fewer_looks_than_fixed_steps():
    times = []

    def seen(x, t):
        times.append(t)
        return velocity(x, t)

    z = noise(4)
    torch.testing.assert_close(dopri5(seen, z, 1), STD * z, atol=2e-3, rtol=2e-3)
    assert min(times) >= 0 and max(times) <= 1 and len(times) < 150


def test_dopri5_asks_for_sits_tolerances_of_each_sample_and_for_steps_that_end_at_the_jumps(monkeypatch):
    asked = {}

    def solved(field, x, times, **options):
        asked.update(options, times=times.tolist())
        return torch.stack([x] * len(times))

    monkeypatch.setattr("torchdiffeq.odeint", solved)
    z, seen = noise(3), []
    dopri5(velocity, z, 4, (0.65, 0.0, 0.3, 1.0), seen.append)
    assert (asked["rtol"], asked["atol"], asked["method"]) == (1e-3, 1e-6, "dopri5")
    assert asked["times"] == [1.0, 0.75, 0.5, 0.25, 0.0] and len(seen) == 4
    options = asked["options"]
    assert options["step_t"].tolist() == [0.0] and options["jump_t"].tolist() == [0.3, 0.65]
    error = noise(5)
    expected = max(math.sqrt(sum(e * e for e in one) / 64) for one in error.flatten(1).tolist())
    assert options["norm"](error).item() == pytest.approx(expected, rel=1e-5)
    dopri5(velocity, z, 4)
    assert asked["times"] == [1.0, 0.0] and "jump_t" not in asked["options"]


@pytest.mark.parametrize(("scale", "jumps"), [(1.0, ()), (2.0, (0.1, 0.7))])
def test_dopri5_is_told_where_guidance_begins_and_ends(scale, jumps, monkeypatch):
    calls = []
    monkeypatch.setattr("st_fast.sample.guided.dopri5", lambda *given: calls.append(given) or given[1])
    settings = Sample(sampler="dopri5", steps=9, cfg_scale=scale, cfg_range=(0.1, 0.7))
    z, draw = noise(3), balanced(0, 0, 3, 10, torch.device("cpu"))
    assert sample_from(Labelled(), z, draw, settings, "linear", print) is z
    assert calls[0][1:] == (z, 9, jumps, print)


def test_batches_of_samples_hold_each_sample_once_without_a_gradient():
    class Model_(Labelled):
        config = Model("custom", channels=2, latent_size=4, num_classes=5)
        pos_embed = torch.zeros(1, requires_grad=True)
        device = torch.device("cpu")

        def __call__(self, x, t, labels):
            return super().__call__(x, t, labels)[0] + self.pos_embed, None

    settings = Sample(sampler="euler", steps=2, batch_size=3, cfg_scale=1.0)
    batches = list(sample_batches(Model_(), 6, 8, settings, "linear"))
    assert [len(x) for x, _ in batches] == [3, 3, 2] and not any(x.requires_grad for x, _ in batches)
    labels = torch.cat([y for _, y in batches])
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    expected = random.normal(6, Purpose.SAMPLE_NOISE, torch.arange(8), (2, 4, 4)) - labels.view(-1, 1, 1, 1)
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), expected)


def test_dopri5_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(UserError, match=f"sampler = 'dopri5': .*{re.escape(how_to_install('ode'))}"):
        dopri5(velocity, noise(1), 1)


def test_noise_and_random_labels_follow_from_seed_and_number(monkeypatch):
    draw = draw_of(read_labels("random", 7), 5, 20, 50, torch.device("cpu"))
    assert draw.ordinals.tolist() == list(range(20, 70)) and draw.seed == 5
    shares = random.uniform(5, Purpose.SAMPLE_LABELS, draw.ordinals)[:, 0]
    assert draw.labels.tolist() == [math.floor(share * 7) for share in shares.double().tolist()]
    noise_of = starting_noise(draw, Model("custom", channels=3, latent_size=6))
    assert torch.equal(noise_of, random.normal(5, Purpose.SAMPLE_NOISE, draw.ordinals, (3, 6, 6)))
    monkeypatch.setattr("st_fast.sample.draw.uniform", lambda seed, purpose, ordinals: torch.ones(len(ordinals), 1))
    assert draw_of(read_labels("random", 7), 5, 0, 3, torch.device("cpu")).labels.tolist() == [6, 6, 6]


@pytest.mark.parametrize("sign", [1, -1])
def test_slerp_turns_by_equal_angles_and_keeps_the_length(sign):
    a, b = noise(2)
    b = sign * (b + 0.7 * a)
    b = b * (a.norm() / b.norm())
    assert a.flatten() @ b.flatten() * sign > 0.1 * a.norm() ** 2
    path = slerp(a, b, 5).double()
    assert torch.equal(path[0].float(), a)
    torch.testing.assert_close(path[-1].float(), b)
    cosines = torch.stack([(one * other).sum() / a.norm() ** 2 for one, other in itertools.pairwise(path)])
    torch.testing.assert_close(cosines, cosines[:1].expand(4).clone(), rtol=1e-6, atol=0)
    torch.testing.assert_close(path.flatten(1).norm(dim=1), a.norm().double().expand(5), rtol=1e-6, atol=0)


def test_slerp_between_noises_of_other_lengths_and_where_no_arc_joins_them():
    a, b = noise(2)[0].double(), 3 * noise(2)[1].double()
    angle = math.acos((a * b).sum() / (a.norm() * b.norm()))
    expected = (math.sin(0.75 * angle) * a + math.sin(0.25 * angle) * b) / math.sin(angle)
    torch.testing.assert_close(slerp(a.float(), b.float(), 5)[1].double(), expected, rtol=1e-5, atol=1e-5)
    for one in noise(60):  # rounding makes some cosines more than 1
        torch.testing.assert_close(slerp(one, one, 3), one.expand(3, -1, -1, -1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slerp(one, -one, 3), torch.stack((one, 0 * one, -one)), rtol=1e-5, atol=1e-5)


def test_published_cards_find_what_they_import():
    import st_fast.sample as package

    assert package.balanced is balanced and package.sample.__module__ == "st_fast.sample.guided"
    with pytest.raises(AttributeError):
        _ = package.nothing
