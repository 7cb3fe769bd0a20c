"""kernels/mlp/triton.py under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from csrc_cases import Case, evaluate, gated, others
from harness import DTYPES, assert_as_exact_as_eager, assert_nan_comes_through

from st_fast import kernels
from st_fast.kernels import reference
from st_fast.kernels.mlp import triton as mlp


def activations(*size: int) -> list[Case]:
    """GELU and SwiGLU, with a bias and without, of x (samples, tokens, channels), or h, twice as wide."""
    batch, tokens, channels = size
    gelu = [case for case in others(batch, tokens, 1, channels) if case.name.startswith("gelu_tanh")]
    return gelu + gated(batch, tokens, channels)


torch.manual_seed(0)
# Several blocks of columns with and without a rest, one block, odd and tiny widths, one row; rows × columns beyond one
# block of the forward pass.
CASES = [c for size in ((2, 3, 1024), (1, 5, 1000), (3, 2, 37), (1, 1, 1), (9, 1, 520)) for c in activations(*size)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    assert_as_exact_as_eager(case, dtype)


@pytest.mark.parametrize("case", activations(3, 47, 20), ids=lambda case: case.name)
def test_rows_cut_into_several_chunks_and_partial_sums_into_several_blocks(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mlp.cut_tokens(1, 141, mlp.PROGRAMS, mlp.ROWS, 4096) == 4  # 36 chunks, the last of one row
    assert_as_exact_as_eager(case, torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(mlp, "PROGRAMS", 3)
        assert mlp.cut_tokens(1, 141, mlp.PROGRAMS, mlp.ROWS, 4096) == 32  # read in 8 steps, the last chunk in 4
        assert_as_exact_as_eager(case, torch.float32)
    monkeypatch.setattr(mlp, "ROWS", 1)
    assert mlp.cut_tokens(1, 141, mlp.PROGRAMS, mlp.ROWS, 4096) == 1  # 141 partial sums: a block of 128, and 13
    assert_as_exact_as_eager(case, torch.float32)


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("case", activations(2, 3, 20), ids=lambda case: case.name)
def test_gradients_may_arrive_with_any_strides(case: Case, strides: str) -> None:
    assert_as_exact_as_eager(case, torch.float32, strides)


@pytest.mark.parametrize("case", activations(1, 3, 12), ids=lambda case: case.name)
def test_nan_in_gives_nan_out(case: Case) -> None:
    assert_nan_comes_through(case)


def test_any_number_of_axes_and_none() -> None:
    for shape in ((), (7,), (2, 3, 4, 5)):
        x = {"x": torch.randn(shape, dtype=torch.float64)}
        assert_as_exact_as_eager(Case("gelu", x, lambda ops, t: (ops.gelu_tanh(t["x"]),)), torch.float32)
    for shape in ((14,), (2, 3, 4, 10)):
        h = {"h": torch.randn(shape, dtype=torch.float64)}
        assert_as_exact_as_eager(Case("swiglu", h, lambda ops, t: (ops.swiglu(t["h"]),)), torch.float32)


def test_gelu_far_from_zero_is_x_or_nothing_and_its_slope_one_or_nothing() -> None:
    x = torch.tensor([-3e38, -1e20, -1e4, -31.0, -10.5, -9.5, -5.0, 5.0, 9.5, 10.5, 31.0, 1e4, 1e20, 3e38])
    case = Case("far", {"x": x.double()}, lambda ops, t: (ops.gelu_tanh(t["x"]),))
    ours, truth = evaluate(case, kernels, torch.float32), evaluate(case, reference, torch.float64)
    for name in truth:
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-6, atol=1e-6)


def test_swiglu_far_from_zero_is_the_definition_in_float32() -> None:
    gate = torch.tensor([-3e38, -1e4, -88.5, -86.5, -31.0, 31.0, 86.5, 88.5, 1e4, 3e38])
    found = []
    for ops in (kernels, reference):
        h = torch.stack((gate, torch.full_like(gate, 0.37)), -1).requires_grad_()
        y = ops.swiglu(h)
        found.append((y, *torch.autograd.grad(y, h, torch.full_like(y, -1.9))))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-30)
    for ops in (kernels, reference):  # whatever made an infinite gate is not to be hidden
        assert ops.swiglu(torch.tensor([-torch.inf, 0.37])).isnan()


def test_nothing_in_gives_nothing_out_and_no_gradient_of_the_bias() -> None:
    x = torch.empty(0, 8)
    dx, bias = mlp.gelu_tanh_backward(x, x, torch.ones(8))
    assert mlp.gelu_tanh(x).shape == dx.shape == (0, 8) and torch.equal(bias, torch.zeros(8))
    dh, bias = mlp.swiglu_backward(x[:, :4], x, torch.ones(8))
    assert mlp.swiglu(x).shape == (0, 4) and dh.shape == (0, 8) and torch.equal(bias, torch.zeros(8))
