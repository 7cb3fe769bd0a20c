"""What latents look like, channel by channel, and when one line warns of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.data import statistics
from st_fast.data.ahead import RecordSet
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import open_data
from st_fast.data.statistics import LatentStatistics, latent_statistics, sampled_warning
from st_fast.prepare.writing import write_shards

TOLD = Manifest(0, (6, 3, 5), "float32", 0.75, VaeInfo("none"), "random", 5)
BY_CHANNEL = replace(TOLD, latents_mean=(0.5,) * 3, latents_std=(2.0,) * 3)


def written(folder: Path, moments: torch.Tensor, told: Manifest) -> RecordSet:
    write_shards(folder, [(moments, torch.zeros(len(moments), dtype=torch.int64))], told)
    return open_data(folder)


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_statistics_are_those_of_scaled_draws_in_float64(
    posterior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of 4, 4 and 3 of eleven records."""
    monkeypatch.setattr(statistics, "PART", 4)
    rng = np.random.default_rng(0)
    mean = rng.normal((1.5, -4.0, 0.25), (2.0, 0.5, 3.0), (13, 3, 5, 3)).transpose(0, 3, 2, 1).astype(np.float32)
    std = rng.uniform(0.1, 2.0, mean.shape).astype(np.float32)
    rows = mean if posterior == "mean" else np.concatenate((mean, std), 1)
    told = replace(TOLD, posterior=posterior, shape=rows.shape[1:])
    records, parts = written(tmp_path / "set", torch.from_numpy(rows), told), list[int]()
    chosen = np.array([12, 0, 1, 2, 3, 5, 6, 7, 8, 9, 10])
    found = latent_statistics(records, chosen, parts.append)
    assert parts == [4, 4, 3]
    x, own = 0.75 * mean[chosen].astype(np.float64), 0.75 * std[chosen].astype(np.float64)
    own *= posterior == "sample"
    np.testing.assert_allclose(found.mean, x.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(found.std, np.sqrt(x.var((0, 2, 3)) + (own**2).mean((0, 2, 3))), rtol=1e-9)
    np.testing.assert_allclose(found.posterior, np.sqrt((own**2).mean((0, 2, 3))), rtol=1e-9)
    assert found.whole == pytest.approx((x.mean(), np.sqrt(x.var() + (own**2).mean())), rel=1e-9)


def test_latents_that_are_all_one_number_have_no_spread(tmp_path: Path) -> None:
    """Whose square, summed in another order, may be a little less than that of their mean."""
    rows = torch.full((7, 3, 3, 5), 0.1)
    records = written(tmp_path / "set", rows, replace(TOLD, posterior="mean", shape=(3, 3, 5)))
    assert np.nanmax(latent_statistics(records, np.arange(7)).std) < 1e-7
    assert not np.isnan(latent_statistics(records, np.arange(7)).std).any()


def looks(mean: object, std: object) -> LatentStatistics:
    return LatentStatistics(*(np.array(part, np.float64) for part in (mean, std, (0.0,) * 3)))


@pytest.mark.parametrize(
    ("mean", "std", "line"),
    [
        ((0.5,) * 3, (1.0,) * 3, ""),
        ((-0.5,) * 3, (1.0,) * 3, ""),
        ((0.0,) * 3, (1.5,) * 3, ""),
        ((0.0,) * 3, (2 / 3,) * 3, ""),
        ((9.0, -9.0, 0.0), (0.1,) * 3, "mean 0 and std 7.35"),
        ((0.9, 0.6, 0.3), (1.0,) * 3, "mean 0.6 and std 1.03"),
        ((-0.9, -0.6, -0.3), (1.0,) * 3, "mean -0.6 and std 1.03"),
        ((0.0,) * 3, (1.6,) * 3, "mean 0 and std 1.6"),
        ((0.0,) * 3, (0.64,) * 3, "mean 0 and std 0.64"),
    ],
)
def test_all_channels_together_may_have_a_mean_of_a_half_and_a_std_half_as_much_more(
    mean: object, std: object, line: str
) -> None:
    told = f"the normalised latents have {line}; training expects about 0 and 1" if line else ""
    assert looks(mean, std).warning(TOLD) == told


@pytest.mark.parametrize(
    ("mean", "std", "line"),
    [
        ((0.5, -0.5, 0.0), (1.0,) * 3, ""),
        ((0.0,) * 3, (0.5, 2.0, 0.5), ""),
        ((0.0, 0.6, 0.0), (1.0,) * 3, "1 of 3 channels are far from mean 0 and std 1: channel 1 has 0.6 and 1"),
        ((0.0, 0.0, -0.6), (1.0,) * 3, "1 of 3 channels are far from mean 0 and std 1: channel 2 has -0.6 and 1"),
        ((0.0,) * 3, (2.1, 0.6, 0.6), "1 of 3 channels are far from mean 0 and std 1: channel 0 has 0 and 2.1"),
        ((0.0,) * 3, (1.1, 0.48, 0.45), "2 of 3 channels are far from mean 0 and std 1: channel 1 has 0 and 0.48"),
    ],
)
def test_a_channel_may_be_twice_as_wide_where_channels_are_normalised(mean: object, std: object, line: str) -> None:
    told = looks(mean, std).warning(BY_CHANNEL)
    assert told == line or told.startswith(f"the normalised latents of {line}; latents_mean")
    assert looks(mean, std).warning(TOLD) == ""


@pytest.mark.parametrize(("count", "seen"), [(1, 1), (255, 255), (256, 256), (257, 256), (700, 256)])
def test_training_looks_at_records_from_the_first_to_the_last(
    count: int, seen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[np.ndarray] = []

    def noted(records: RecordSet, indices: np.ndarray) -> LatentStatistics:
        asked.append(indices)
        return latent_statistics(records, indices)

    rows = torch.randn(count, 3, 1, 2, generator=torch.Generator().manual_seed(0))
    rows[-1] += 9_000  # so that the last one tells
    records = written(tmp_path / "set", rows, replace(TOLD, posterior="mean", shape=(3, 1, 2), scale=1.0))
    monkeypatch.setattr(statistics, "latent_statistics", noted)
    assert "training expects about 0 and 1" in sampled_warning(records)
    chosen = asked[0].tolist()
    assert chosen[0] == 0 and chosen[-1] == count - 1 and len(chosen) == seen == len(set(chosen))
    assert max(np.diff(chosen), default=1) <= -(-count // seen)
