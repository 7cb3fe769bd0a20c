"""Draws: exact to rounding against float64 for any word, the same bits in every implementation, frozen in their values.

Triton's are compared under its interpreter (interpreted/interpreted_noise.py); here, what a GPU would run is read.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from st_fast import kernels
from st_fast.kernels import native
from st_fast.kernels.noise import definition

WORDS = 2**32
EDGES = sorted(
    {(at + by) % WORDS for at in (0, *(2**k for k in range(8, 32)), *(k * 2**29 for k in range(8)))
     for by in range(-4, 5)} | {round(2 ** (k + 0.5)) + by for k in range(1, 32) for by in range(-2, 3)}
)  # fmt: skip
"""Both ends, powers of two, eighths of a turn, and where a logarithm's reduction changes."""


def some_words() -> Tensor:
    """EDGES, and a million at random."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.tensor(EDGES), torch.randint(0, WORDS, (1_000_000,), generator=generator)])


def ulps(found: Tensor, truth: np.ndarray) -> float:
    """The largest difference in units of the last place of the truth's own size in float32."""
    return float((np.abs(found.double().numpy() - truth) / np.spacing(np.abs(truth).astype(np.float32))).max())


def test_the_logarithm_is_right_for_every_word() -> None:
    word = some_words()
    odd = (word | 1).numpy().astype(np.float64)
    truth = np.where(odd > 2**31, -2 * np.log1p((odd - WORDS) / WORDS), -2 * np.log(odd / WORDS))
    found = definition.minus_two_log(word)
    assert found.dtype == torch.float32 and found.min() > 0 and ulps(found, truth) < 2


def test_normals_are_box_mullers_of_their_words_at_every_edge() -> None:
    radius, angle = some_words(), some_words().flip(0)
    uniform = (radius | 1).numpy() / WORDS
    length, turn = np.sqrt(-2 * np.log(uniform)), 2 * np.pi * angle.numpy() / WORDS
    first, second = definition.box_muller(radius, angle)
    for found, truth in ((first, length * np.cos(turn)), (second, length * np.sin(turn))):
        assert found.isfinite().all()
        assert (np.abs(found.numpy() - truth) <= 3e-7 * np.maximum(length, 0.01)).all()
    quarters = torch.arange(4) * 2**30  # the axes are hit exactly
    cos, sin = definition.box_muller(torch.zeros(4, dtype=torch.int64), quarters)
    assert (cos[[1, 3]] == 0).all() and (sin[[0, 2]] == 0).all()
    assert cos[0] == -cos[2] == sin[1] == -sin[3] and 6.66 < cos[0] < 6.67


@pytest.mark.parametrize("purpose", [definition.NOISE, definition.POSTERIOR, 9])
def test_draws_are_standard_normal_in_bulk_and_in_their_tails(purpose: int) -> None:
    drawn = definition.normal(5, purpose, torch.arange(3000) + 2**35, (4, 8, 8)).flatten().numpy()
    assert stats.kstest(drawn[:200_000], "norm").pvalue > 1e-3
    count, deviation = len(drawn), len(drawn) ** -0.5
    assert abs(drawn.mean()) < 4 * deviation and abs((drawn**2).mean() - 1) < 4 * 2**0.5 * deviation
    assert abs((drawn**4).mean() - 3) < 4 * 96**0.5 * deviation
    for bound in (2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(bound) * count
        assert abs((np.abs(drawn) > bound).sum() - expected) < 4 * expected**0.5, bound
    for lag in (1, 2, 3, 4, 256):  # within a block of four, between blocks and between ordinals
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 4 * deviation, lag


def test_draws_are_frozen_across_versions() -> None:
    """Written down once: a change would silently change what every resumed run sees."""
    drawn = definition.normal(2**63 + 5, definition.NOISE, torch.tensor([3, 2**40 + 1]), (3,))
    assert [[value.hex() for value in row] for row in drawn.double().numpy().tolist()] == FROZEN
    assert (definition.NOISE, definition.POSTERIOR) == (1, 2)


def test_words_where_the_reduction_changes_keep_their_bits() -> None:
    """Just above and below √½ either reduction is right to rounding, in other bits."""
    found = definition.minus_two_log(torch.tensor([0xB504F34D, 0xB504F24D])).double().tolist()
    assert [value.hex() for value in found] == ["0x1.62e42e0000000p-1", "0x1.62e4360000000p-1"]


FROZEN = [
    ["-0x1.7945360000000p+1", "-0x1.6cd8cc0000000p-1", "0x1.62e6f60000000p-2"],
    ["-0x1.894e9e0000000p-1", "0x1.64ae360000000p-1", "0x1.fc6aa80000000p-2"],
]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int, path: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    moments = torch.randn(shape, generator=generator).to(dtype)
    ordinals = torch.randint(0, 2**62, shape[:1], generator=generator)
    return moments, ordinals, torch.rand(shape[0], generator=generator), seed, 0.18215, path  # type: ignore[return-value]


@pytest.mark.skipif(not native.available(), reason="csrc is not built")
@pytest.mark.parametrize("path", definition.PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 16, 17), (2, 6, 5, 7), (70, 8, 32, 32), (1, 2, 1, 1), (0, 2, 3, 3)], ids=str)
def test_csrc_has_the_bits_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype, path: str) -> None:
    for seed in (0, -5, 2**63 + 2**32 + 1):
        given = arguments(shape, dtype, seed, path)
        assert all(map(torch.equal, kernels.noisy_latents(*given), definition.noisy_latents(*given)))


def test_strides_change_nothing() -> None:
    moments, *others = arguments((3, 8, 4, 6), torch.float32, 3, "cosine")
    strided = moments.transpose(1, 3).contiguous().transpose(1, 3)
    ordinals, t = (torch.stack([value, value + 1], 1)[:, 0] for value in others[:2])
    ours = kernels.noisy_latents(strided, ordinals, t, *others[2:])
    assert all(map(torch.equal, ours, definition.noisy_latents(moments, *others)))


@pytest.mark.parametrize("seed", [3, -1, 2**63, 2**64 - 1])
def test_a_seed_counts_by_its_lowest_64_bits_and_all_of_them(seed: int) -> None:
    given = arguments((2, 8, 4, 4), torch.float32, seed, "linear")
    noise = [kernels.noisy_latents(*given[:3], other, 1.0, "linear")[3] for other in (seed, seed + 2**64, seed + 2**32)]
    assert torch.equal(noise[0], noise[1]) and (noise[0] != noise[2]).float().mean() > 0.99
    assert torch.equal(noise[0], definition.normal(seed, definition.NOISE, given[1], (4, 4, 4)))


@pytest.mark.parametrize("path", definition.PATHS)
def test_latents_are_mixed_as_the_path_says(path: str) -> None:
    """Against float64 from the two draws."""
    moments, ordinals, t, seed, scale, _ = given = arguments((5, 6, 4, 4), torch.float16, 8, path)
    xi, eps = (definition.normal(seed, p, ordinals, (3, 4, 4)).double() for p in (2, 1))  # type: ignore[arg-type]
    at = t.double().view(-1, 1, 1, 1)
    alpha, sigma = (1 - at, at) if path == "linear" else (torch.cos(at * torch.pi / 2), torch.sin(at * torch.pi / 2))
    slopes = (-1, 1) if path == "linear" else (-torch.pi / 2 * sigma, torch.pi / 2 * alpha)
    x = scale * (moments[:, :3].double() + moments[:, 3:].double() * xi)
    truth = (x, alpha * x + sigma * eps, slopes[0] * x + slopes[1] * eps, eps)
    for found, exact in zip(kernels.noisy_latents(*given), truth, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    moments, ordinals, t, *rest = arguments((7, 8, 8, 8), torch.float16, 4, "linear")
    whole = kernels.noisy_latents(moments, ordinals, t, *rest)
    for part in (slice(0, 3), slice(3, 7)):  # as on two ranks
        alone = kernels.noisy_latents(moments[part], ordinals[part], t[part], *rest)
        assert all(torch.equal(one[part], other) for one, other in zip(whole, alone, strict=True))


@pytest.mark.parametrize("path", definition.PATHS)
def test_what_a_gpu_runs_rounds_every_operation_by_itself(path: str) -> None:
    pytest.importorskip("triton")
    from st_fast.kernels import resources
    from st_fast.kernels.noise import triton

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    given = meta(8, 8, 32, 32, dtype=torch.float16), meta(8, dtype=torch.int64), meta(8, dtype=torch.float32)
    (launch,) = resources.record(lambda: triton.noisy_latents(*given, 7, 0.18215, path))
    for architecture in resources.ARCHITECTURES:
        ptx = resources.compile_for(launch, architecture).asm["ptx"]
        assert "sqrt.rn.f32" in ptx and not re.findall(r"\bfma\.|\.approx|\.ftz|div\.full", ptx)
    contracted = replace(launch, options=launch.options | {"enable_fp_fusion": True})
    assert "fma.rn.f32" in resources.compile_for(contracted, 90).asm["ptx"]  # the option is what keeps it away
