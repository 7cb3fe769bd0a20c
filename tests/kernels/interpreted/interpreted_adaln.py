"""kernels/adaln/triton.py under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from csrc_cases import Case, modulated
from harness import DTYPES, assert_as_exact_as_eager, assert_nan_comes_through

from st_fast import kernels
from st_fast.kernels.adaln import triton as adaln

torch.manual_seed(0)
# Two blocks with and without padding, one block alone, odd and tiny widths, one token, one sample.
CASES = [c for size in ((2, 3, 1152), (1, 1, 100), (1, 5, 64), (3, 2, 37), (2, 1, 1)) for c in modulated(*size)]
CASES += [c for lengths in ((3, 1, 9), (5,)) for c in modulated(2, lengths, 37)]
CASES += [c for size in ((2, 3, 1152), (1, 1, 64), (2, 9, 37)) for c in modulated(*size, per_token=True)]
CASES += [c for size in ((2, 3, 1152), (3, 2, 37), (2, 1, 1), (2, (3, 1, 9), 37)) for c in modulated(*size, norm="rms")]
CASES += modulated(2, 9, 37, per_token=True, norm="rms")
# Backward chunks of 8 and 3 tokens; of 8 and 8, 1 and 8, 2.
LONG = modulated(2, 11, 12) + modulated(2, (16, 1, 10), 12) + modulated(2, 11, 12, per_token=True)
LONG += modulated(2, 11, 12, norm="rms")
SMALL = modulated(2, 3, 20) + modulated(2, (1, 2), 20) + modulated(2, 3, 20, per_token=True)
SMALL += modulated(2, 3, 20, norm="rms")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    assert_as_exact_as_eager(case, dtype)


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_samples_cut_into_several_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaln, "FORWARD_PROGRAMS", 4)  # forward chunks of 4, 4 and 3, for instance
    assert adaln.cut_tokens(2, 11, adaln.FORWARD_PROGRAMS, 1, 16) == 4
    assert adaln.cut_tokens(2, 11, adaln.BACKWARD_PROGRAMS, 8, 128) == 8
    assert_as_exact_as_eager(case, torch.float32)


def test_runs_of_the_same_chunks_and_one_run_give_the_bits_of_a_modulation_a_sample() -> None:
    torch.manual_seed(0)
    x, a, slab = torch.randn(2, 16, 12), torch.randn(2, 16, 12), torch.randn(2, 36)
    for lengths in ([16], [8, 8]):  # backward chunks of 8 either way
        found = []
        for runs in (None, lengths):
            given = slab if runs is None else slab.unsqueeze(1).expand(-1, len(runs), -1)
            leaves = [t.clone().requires_grad_() for t in (x, a, given)]
            gate, shift, scale = leaves[2].chunk(3, -1)
            outs = kernels.gate_residual_norm_modulate(leaves[0], leaves[1], gate, shift, scale, lengths=runs)
            grads = torch.autograd.grad(outs, leaves, outs)
            found.append([*outs, *grads[:2], grads[2] if runs is None else grads[2].sum(1)])
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradients_may_arrive_with_any_strides(case: Case, strides: str) -> None:
    assert_as_exact_as_eager(case, torch.float32, strides)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_nan_in_gives_nan_out(case: Case) -> None:
    assert_nan_comes_through(case)


def test_no_sample_gives_empty_outputs() -> None:
    x, v = torch.empty(0, 3, 8), torch.empty(0, 8)
    x_out, y, mean, rstd = adaln.gate_residual_norm_modulate(x, x, v, v, v, 1e-6)
    assert x_out.shape == y.shape == (0, 3, 8) and mean.shape == (0, 3)
    *_, bias = adaln.gate_residual_norm_modulate_backward(x, x, x, x, v, v, mean, rstd, torch.ones(8))
    assert torch.equal(bias, torch.zeros(8))


def test_rms_norm_writes_no_mean() -> None:
    x, v = torch.randn(2, 3, 20) + 5, torch.randn(2, 20)
    _, mean, rstd = adaln.norm_modulate(x, v, v, 1e-3, rms=True)
    assert mean.shape == (0,)
    torch.testing.assert_close(rstd, 1 / (x.square().mean(-1) + 1e-3).sqrt())


def test_float32_stream_with_bfloat16_branch_and_modulation() -> None:
    torch.manual_seed(0)
    x, a, mod = torch.randn(1, 3, 40), torch.randn(1, 3, 40).bfloat16(), torch.randn(1, 120).bfloat16()
    gate, shift, scale = mod.chunk(3, 1)
    x_out, y, mean, rstd = torch.ops.st_fast.gate_residual_norm_modulate(x, a, gate, shift, scale, 1e-6, None)
    plain = torch.ops.st_fast_reference.gate_residual_norm_modulate(x, a, gate, shift, scale, 1e-6, None)
    for ours, theirs in zip((x_out, y, mean, rstd), plain, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    backward = torch.ops.st_fast.gate_residual_norm_modulate_backward
    dx, da, dmod, da_bias = backward(x, y, x_out, a, gate, scale, mean, rstd, gate[0])
    assert (dx.dtype, da.dtype, dmod.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(da_bias, da.float().sum((0, 1)).bfloat16(), rtol=2e-2, atol=2e-2)


def test_a_bias_is_summed_over_more_partial_sums_than_one_block_holds() -> None:
    torch.manual_seed(0)
    partial = torch.randn(3, 45, 80)  # 135 partial sums: 128 and 7
    slab, bias = adaln.add_partials(partial, 60, torch.float32, torch.empty(20))
    torch.testing.assert_close(slab, partial[..., :60].double().sum(1).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias, partial[..., 60:].double().sum((0, 1)).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "blocks"), [(1152, (1024, 256)), (1024, (1024, 0)), (384, (256, 128)),
                                               (1025, (1024, 256)), (3, (2, 64)), (1, (1, 0))])  # fmt: skip
def test_rows_are_cut_into_a_power_of_two_and_a_tail_that_covers_the_rest(width: int, blocks: tuple[int, int]) -> None:
    config = adaln.row_config(width, 4, torch.bfloat16)
    assert (config["MAIN"], config["TAIL"]) == blocks
    assert config["MAIN"] <= width <= config["MAIN"] + config["TAIL"]
    assert 4 * (config["STAGES"] - 1) * sum(blocks) * 2 <= 49152
