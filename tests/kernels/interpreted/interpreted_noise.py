"""Triton's noisy latents, under its interpreter: the definition's bits, whatever the shape, dtype, seed and path."""

from __future__ import annotations

import harness
import pytest
import torch
import triton
import triton.language as tl
from test_noise import EDGES
from torch import Tensor

from st_fast import kernels
from st_fast.kernels import reference
from st_fast.kernels.noise import definition
from st_fast.kernels.noise.triton import _box_muller

CASES = [
    ((3, 8, 16, 17), torch.float16, 7, "linear"),
    ((2, 6, 5, 7), torch.bfloat16, 2**64 - 3, "cosine"),
    ((1, 8, 33, 32), torch.float32, -5, "cosine"),
    ((4, 2, 1, 1), torch.float32, 2**63 + 2**32 + 1, "linear"),
    ((0, 8, 4, 4), torch.float16, 0, "linear"),
]


@pytest.mark.parametrize(("shape", "dtype", "seed", "path"), CASES)
def test_bits_are_those_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype, seed: int, path: str) -> None:
    harness.LAUNCHED.clear()
    torch.manual_seed(0)
    moments, ordinals = torch.randn(shape).to(dtype), torch.tensor([2**40 + 3, 5, 2**33 - 1, 2**62])[: shape[0]]
    arguments = (moments, ordinals, torch.rand(shape[0]), seed, 0.7, path)
    ours, theirs = kernels.noisy_latents(*arguments), reference.noisy_latents(*arguments)
    assert {"noisy_latents"} == harness.LAUNCHED
    assert all(map(torch.equal, ours, theirs))


def test_strided_inputs_give_the_same_bits() -> None:
    torch.manual_seed(1)
    moments, ordinals, t = torch.randn(3, 8, 4, 6), torch.arange(3) * 2**35, torch.rand(3)

    def strided(value: Tensor) -> Tensor:
        return torch.stack([value, torch.zeros_like(value)], -1)[..., 0]

    arguments = (strided(moments), strided(ordinals), strided(t), 11, 0.18, "linear")
    theirs = reference.noisy_latents(moments, ordinals, t, 11, 0.18, "linear")
    assert all(map(torch.equal, kernels.noisy_latents(*arguments), theirs))


@triton.jit
def _pairs_kernel(words_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    first, second = _box_muller(tl.load(words_ptr + at).to(tl.uint32), tl.load(words_ptr + N + at).to(tl.uint32))
    tl.store(out_ptr + at, first)
    tl.store(out_ptr + N + at, second)


def test_the_words_at_every_edge_give_the_bits_of_the_definition() -> None:
    """Words that no seed is known to draw."""
    count = triton.next_power_of_2(len(EDGES))
    edges = torch.tensor(EDGES + EDGES[: count - len(EDGES)])
    words, out = torch.stack([edges, edges.flip(0)]), torch.empty(2, count)
    _pairs_kernel[(1,)](words, out, count)
    assert torch.equal(out, torch.stack(definition.box_muller(*words)))
