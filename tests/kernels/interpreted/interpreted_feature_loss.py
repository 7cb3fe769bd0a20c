"""kernels/feature_loss/triton.py under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from csrc_cases import Case, assert_nothing_supervised_is_nothing, error, features, others
from harness import DTYPES, assert_as_exact_as_eager, assert_nan_comes_through

from st_fast import kernels
from st_fast.kernels import reference
from st_fast.kernels.feature_loss import triton as feature_loss

torch.manual_seed(0)
CASES = [c for size in ((3, 2, 100), (1, 1, 7), (2, 3, 64)) for c in features(*size)]
CASES += [c for c in features(2, 1, 1152) if "mse-30-indexed" in c.name or "cosine-1-indexed" in c.name]
EXTRAPOLATE = [c for c in others(3, 5, 1, 70) if c.name.startswith("cfg")]
SMALL = [c for c in features(2, 3, 20) if "indexed" not in c.name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + EXTRAPOLATE, ids=lambda case: case.name)
def test_values_and_gradients_are_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        case = scaled_for_float16(case)
    assert_as_exact_as_eager(case, dtype)


def scaled_for_float16(case: Case) -> Case:
    """The loss times 2¹⁰, as a loss scale does: eager's own float16 gradient has the room it has in training."""

    def call(ops: object, leaves: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(out * 1024 if out.dim() == 0 else out for out in case.call(ops, leaves))

    return Case(case.name, case.leaves, call, case.frozen)


@pytest.mark.parametrize("loss", reference.FEATURE_LOSSES)
def test_float16_in_gives_a_float16_gradient_to_who_launches_directly(loss: str) -> None:
    torch.manual_seed(0)
    q, c, n = (torch.randn(2, 3, 20).half() for _ in range(3))
    value, dq = feature_loss.guided_feature_loss(q, c, n, torch.full((2,), 64.0), 3.0, loss, None)
    plain, plain_dq = torch.ops.st_fast_reference.guided_feature_loss(q, c, n, torch.full((2,), 64.0), 3.0, loss, None)
    assert (value.dtype, dq.dtype) == (torch.float32, torch.float16)
    assert error(value, plain) < 1e-6 and error(dq, plain_dq) < 1e-3


@pytest.mark.parametrize("case", features(2, 9, 12), ids=lambda case: case.name)
def test_samples_cut_into_several_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_loss, "PROGRAMS", 4)  # chunks of 4, 4 and 1 token
    assert_as_exact_as_eager(case, torch.float32)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_nan_in_gives_nan_out(case: Case) -> None:
    assert_nan_comes_through(case)


@pytest.mark.parametrize("loss", reference.FEATURE_LOSSES)
def test_no_supervised_sample_gives_zero_loss_and_zero_gradient(loss: str) -> None:
    assert_nothing_supervised_is_nothing(loss, 2, 3, 16)


def test_an_index_longer_than_one_block_is_searched_to_its_end() -> None:
    torch.manual_seed(0)
    q, f, w = torch.randn(132, 1, 2), torch.randn(131, 1, 2), torch.rand(131)
    index = torch.randperm(132)[:131]
    ours = feature_loss.guided_feature_loss(q, f, f, w, 1.0, "mse", index)
    truth = torch.ops.st_fast_reference.guided_feature_loss(q, f, f, w, 1.0, "mse", index)
    assert error(ours[0], truth[0]) < 1e-6 and error(ours[1], truth[1]) < 1e-6


@pytest.mark.parametrize("index", [[0, 0], [0, 2], [-1, 0]], ids=["repeated", "too large", "negative"])
def test_an_index_that_names_no_two_samples_makes_the_loss_nan(index: list[int]) -> None:
    q = torch.randn(2, 3, 8)
    loss, _ = feature_loss.guided_feature_loss(q, q, q, torch.ones(2), 1.0, "mse", torch.tensor(index))
    assert loss.isnan()


@pytest.mark.parametrize("size", [0.0, 1e-8])
@pytest.mark.parametrize("loss", ["cosine", "normalized_mse"])
def test_vectors_below_the_bound_have_the_reference_loss_and_gradient(loss: str, size: float) -> None:
    torch.manual_seed(0)
    q, f, w = size * torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.ones(2)
    for one, other in ((q, f), (f, q)):
        leaves = [one.clone().requires_grad_() for _ in range(2)]
        ours, truth = (
            ops.guided_feature_loss(leaf, other, other, w, 1.0, loss)
            for ops, leaf in zip((kernels, reference), leaves, strict=True)
        )
        (ours + truth).backward()
        assert error(ours.detach(), truth.detach()) < 1e-6
        assert leaves[0].grad is not None and leaves[1].grad is not None
        assert error(leaves[0].grad, leaves[1].grad) < 1e-6
