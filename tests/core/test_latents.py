"""A normalisation is checked, told in one line and compared number by number, up to rounding."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from st_fast.core.latents import LatentSpace, Normalisation

HOW = Normalisation(0.75, 0.25, (1.5, -2.0, 0.5), (3.0, 0.5, 2.0))


@pytest.mark.parametrize(
    "how", [HOW, Normalisation(), Normalisation(1e4, -1e4, (1e4, -1e4, 0.0), (1e-9, 1e4, 1.0)), Normalisation(0.5)]
)
def test_what_can_be_is_no_problem(how: Normalisation) -> None:
    assert how.problem(3) == ""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"latents_mean": (1.0, 2.0)}, "latents_mean has 2 numbers; the latents have 3 channels"),
        ({"latents_std": (1.0,) * 4}, "latents_std has 4 numbers; the latents have 3 channels"),
        ({"latents_std": (1.0,)}, "latents_std has 1 numbers; the latents have 3 channels"),
        ({"scale": 0.0}, "scale = 0.0: a positive number, at most 1e+04, is needed"),
        ({"scale": 1.1e4}, "scale = 11000.0: a positive number, at most 1e+04, is needed"),
        ({"scale": float("inf")}, "scale = inf: a positive number, at most 1e+04, is needed"),
        ({"shift": -1.1e4}, "shift = -11000.0: a number, at most 1e+04, is needed"),
        ({"shift": float("nan")}, "shift = nan: a number, at most 1e+04, is needed"),
        ({"latents_mean": (1.0, 1.1e4, 0.0)}, "latents_mean = 11000.0: a number, at most 1e+04, is needed"),
        ({"latents_std": (1.0, 2.0, -1.0)}, "latents_std = -1.0: a positive number, at most 1e+04, is needed"),
    ],
)
def test_what_can_not_be_is_named(changes: dict[str, object], problem: str) -> None:
    assert replace(HOW, **changes).problem(3) == problem  # type: ignore[arg-type]


def test_a_line_tells_numbers_and_of_channels_how_many_with_a_hash_of_them() -> None:
    mean, std = (hashlib.sha256(repr(v).encode()).hexdigest()[:8] for v in (HOW.latents_mean, HOW.latents_std))
    assert str(HOW) == f"scale 0.75, shift 0.25, latents_mean of 3 channels ({mean}), latents_std of 3 channels ({std})"
    assert str(Normalisation()) == str(Normalisation(1.0, 0.0)) == "scale 1"
    assert str(Normalisation(0.18215, -0.5)) == "scale 0.18215, shift -0.5"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scale": 0.5}, ["scale 0.75 (0.5)"]),
        ({"shift": 0.5}, ["shift 0.25 (0.5)"]),
        ({"shift": None}, []),
        ({"shift": None, "latents_std": (3.0, 0.5, 4.0)}, ["latents_std 2 (4)"]),
        ({"latents_mean": (1.5, -2.0, 0.75)}, ["latents_mean 0.5 (0.75)"]),
        ({"latents_mean": ()}, ["latents_mean 1.5 (0)"]),
        ({"latents_std": ()}, ["latents_std 3 (1)"]),
        ({"latents_std": (3.0, 0.5)}, ["latents_std of 3 channels (of 2)"]),
        ({"scale": 0.5, "latents_std": (3.0, 0.25, 2.0)}, ["scale 0.75 (0.5)", "latents_std 0.5 (0.25)"]),
    ],
)
def test_differences_are_told_with_both_numbers_and_the_other_way_round(
    changes: dict[str, object], told: list[str]
) -> None:
    other = replace(HOW, **changes)  # type: ignore[arg-type]
    assert HOW.differences(other) == told and HOW.differences(HOW) == []
    assert len(other.differences(HOW)) == len(told)
    if changes.get("latents_mean") == ():
        assert other.differences(HOW) == ["latents_mean 0 (1.5)"]
    if changes.get("latents_std") == ():
        assert other.differences(HOW) == ["latents_std 1 (3)"]


def test_roundings_of_one_number_are_one_normalisation() -> None:
    """Up to 1e-5 of it, or 1e-5 where it is small."""
    for number, near, far in ((500.0, 500.0 * (1 + 9e-6), 500.0 * (1 + 1.2e-5)), (0.0, 9e-6, 1.2e-5)):
        mine = Normalisation(1.0, 0.25, (1.5, number))
        assert mine.differences(Normalisation(1.0, 0.25, (1.5, near))) == []
        assert len(mine.differences(Normalisation(1.0, 0.25, (1.5, far)))) == 1


def test_zeros_and_ones_are_what_no_numbers_are() -> None:
    assert Normalisation(1.0, 0.0, (0.0,) * 3, (1.0,) * 3).differences(Normalisation(1.0, 0.0)) == []
    assert Normalisation(1.0, 0.0).differences(Normalisation(1.0, 0.0, (0.0,) * 3, (1.0,) * 3)) == []


def test_the_vae_is_told_before_its_normalisation_and_by_twelve_digits_of_its_hash() -> None:
    mine, other = LatentSpace("mine", "a" * 64, HOW), LatentSpace("", "b" * 64, replace(HOW, scale=0.5))
    named = f"VAE mine, {'a' * 12} (without name, {'b' * 12})"
    assert mine.differences(other) == [named, "scale 0.75 (0.5)"]
    assert mine.differences(replace(mine, vae="another name")) == []
    assert replace(mine, vae_hash="").differences(other) == ["scale 0.75 (0.5)"]
    assert mine.differences(replace(other, vae_hash="")) == ["scale 0.75 (0.5)"]
    assert LatentSpace("sd-vae-ft-mse", "a", HOW).differences(LatentSpace("sd-vae-ft-ema", "b", HOW)) == []
    assert len(LatentSpace("sd-vae-ft-mse", "a", HOW).differences(LatentSpace("mine", "b", HOW))) == 1
