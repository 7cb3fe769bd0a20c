"""kernels/qknorm/triton.py under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from csrc_cases import Case, others
from harness import DTYPES, assert_as_exact_as_eager, assert_nan_comes_through

from st_fast.kernels.qknorm import triton as qknorm


def qk_norm(*size: int) -> Case:
    return next(c for c in others(*size) if c.name.startswith("qk_norm"))


torch.manual_seed(0)
# head_dim 72 = 64 + 8, a power of two, odd, 7 = 4 + 3 padded to 4, one; samples × tokens × heads
CASES = [qk_norm(2, 5, 2, 72), qk_norm(1, 3, 2, 64), qk_norm(2, 1, 1, 33), qk_norm(1, 2, 2, 7), qk_norm(1, 1, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    assert_as_exact_as_eager(case, dtype)


def test_tokens_cut_into_several_tiles_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qknorm, "PROGRAMS", 1)  # chunks as long as they may be
    assert_as_exact_as_eager(qk_norm(1, 61, 1, 72), torch.float32)
    monkeypatch.setattr(qknorm, "PROGRAMS", 2048)  # chunks of one tile
    assert_as_exact_as_eager(qk_norm(1, 61, 1, 72), torch.float32)


def test_more_programs_than_one_round_of_sums_takes() -> None:
    assert_as_exact_as_eager(qk_norm(33, 1, 2, 2), torch.float32)  # 66 programs: rounds of 64 and 2


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
def test_gradients_may_arrive_with_any_strides(strides: str) -> None:
    assert_as_exact_as_eager(qk_norm(2, 3, 2, 12), torch.float32, strides)


def test_nan_in_gives_nan_out() -> None:
    assert_nan_comes_through(qk_norm(1, 3, 2, 12))


def test_no_sample_gives_empty_outputs_and_zero_gradients_of_the_weights() -> None:
    qkv, weight = torch.empty(0, 3, 3, 2, 8), torch.ones(8)
    q, k, v, stats = qknorm.qk_norm(qkv, weight, weight, weight, weight, 1e-6)
    assert q.shape == k.shape == v.shape == (0, 2, 3, 8)
    _, *grads = qknorm.qk_norm_backward(q, k, v, qkv, weight, weight, stats)
    assert all(torch.equal(grad, torch.zeros(8)) for grad in grads)
