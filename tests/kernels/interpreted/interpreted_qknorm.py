"""kernels/qknorm/triton.py under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from csrc_cases import Case, heads, others
from harness import DTYPES, assert_as_exact_as_eager, assert_nan_comes_through

from st_fast.kernels.qknorm import triton as qknorm


def qk_norm(*size: int, bias: bool = False) -> Case:
    """With the layout "tokens", or that of heads and a gradient of qkv's bias."""
    return next(c for c in others(*size) if c.name.startswith("qk_norm") and ("bias" in c.name) == bias)


torch.manual_seed(0)
# samples × tokens × heads × head_dim: padded to a power of two or one already; heads in one group or several
CASES = [qk_norm(2, 5, 2, 72), qk_norm(1, 3, 4, 64), qk_norm(2, 1, 3, 33), qk_norm(1, 2, 6, 7), qk_norm(1, 1, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    assert_as_exact_as_eager(case, dtype)


def test_tokens_cut_into_several_tiles_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for programs in (1, 4, 2048):  # a chunk of all tokens, several of several tiles, one of each tile
        monkeypatch.setattr(qknorm, "PROGRAMS", programs)
        assert_as_exact_as_eager(qk_norm(1, 61, 1, 72), torch.float32)
        for case in (case for case in heads(2, 23, 1, 36) if "rope" in case.name):
            assert_as_exact_as_eager(case, torch.float32)


def test_more_programs_than_are_added_up_at_once() -> None:
    torch.manual_seed(0)
    affine, bias = torch.randn(99, 4 * 9), torch.randn(70, 50)  # 64 rows of sums and 35; 64 and 6; two blocks of each
    daffine, dbias = torch.full((36,), torch.nan), torch.full((50,), torch.nan)
    qknorm._qk_norm_add_kernel[(4,)](affine, daffine, 99, 36, bias, dbias, 70, 50, ROWS=64, BLOCK=32, num_warps=4)
    for ours, rows in ((daffine, affine), (dbias, bias)):
        torch.testing.assert_close(ours, rows.double().sum(0).float(), rtol=1e-5, atol=1e-5)
    assert_as_exact_as_eager(qk_norm(3, 1, 6, 2), torch.float32)  # three groups of heads of three samples: 9 programs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 5, 2, 72), (3, 2, 12, 5), (1, 9, 3, 33)])
def test_the_gradient_of_qkvs_bias_and_contiguous_heads_are_as_exact(size: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_exact_as_eager(qk_norm(*size, bias=True), dtype)


FORMS = [case for size in ((2, 5, 2, 72), (3, 2, 12, 6), (1, 3, 4, 16)) for case in heads(*size)]


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_other_norms_and_rotations_are_as_exact_as_eager(case: Case) -> None:
    assert_as_exact_as_eager(case, torch.float32 if "x12x" in case.name else torch.bfloat16)


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
def test_gradients_may_arrive_with_any_strides(strides: str) -> None:
    assert_as_exact_as_eager(qk_norm(2, 3, 2, 12), torch.float32, strides)


def test_nan_in_gives_nan_out() -> None:
    assert_nan_comes_through(qk_norm(1, 3, 2, 12))


def test_no_sample_gives_empty_outputs_and_zero_gradients_of_the_weights() -> None:
    qkv, weight = torch.empty(0, 3, 3, 2, 8), torch.ones(8)
    q, k, stats = qknorm.qk_norm(qkv, weight, weight, weight, weight, 1e-6)
    assert q.shape == k.shape == (0, 2, 3, 8)
    _, *grads = qknorm.qk_norm_backward(q, k, q, qkv, weight, weight, torch.ones(48), stats)
    assert all(torch.equal(grad, torch.zeros(size)) for grad, size in zip(grads, ((4, 8), (48,)), strict=True))


def test_without_weights_and_biases_nothing_is_added_up() -> None:
    qkv = torch.randn(1, 3, 3, 2, 8)
    for norm, kept in (("rms", 2), ("none", 0)):
        q, k, stats = qknorm.qk_norm(qkv, None, None, None, None, 1e-6, False, norm)
        _, daffine, dbias = qknorm.qk_norm_backward(q, k, q, qkv, None, None, None, stats, norm)
        assert (stats.shape, daffine.shape, dbias.shape) == ((kept, 1, 3, 2), (0, 8), (0,))
