"""kernels/optimiser/triton.py under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import harness  # noqa: F401  puts the launchers behind the dispatch
import pytest
import torch
from csrc_cases import error
from torch import Tensor

from st_fast import kernels
from st_fast.kernels import reference
from st_fast.kernels.optimiser import triton as optimiser

SHAPES = ((3, 5), (16390,), (1,), (8, 16))  # a chunk and a bit, less than a vector, whole vectors


class State:
    """Parameters, moments, EMA, copies and gradients, some of them bfloat16 or strided."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.grads[1] = self.grads[1].bfloat16()
        self.grads[0] = self.grads[0].T.contiguous().T
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.params]
        self.emas = [p.clone() for p in self.params]
        self.copies = [p.to(torch.float16 if i else torch.bfloat16) for i, p in enumerate(self.params)]
        self.count = torch.zeros((), dtype=torch.int64)

    def step(self, ops: Any, norm: Tensor, max_norm: float = 1.0, extras: bool = True, warmup: bool = False) -> None:
        ops.adamw_ema_(
            self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.emas if extras else [],
            self.copies if extras else [], self.count, norm, torch.tensor(1e-2), 0.9, 0.999, 1e-8, 0.1, 0.99, max_norm,
            warmup,
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.emas, self.count.float()]


@pytest.mark.parametrize("max_norm", [1.0, 0.0, 1e6], ids=["clipped", "off", "not reached"])
@pytest.mark.parametrize("extras", [True, False], ids=["with EMA and copies", "without"])
@pytest.mark.parametrize("warmup", [False, True])
def test_steps_match_the_reference(max_norm: float, extras: bool, warmup: bool) -> None:
    ours, truth = State(), State()
    for _ in range(2):
        norm = kernels.grad_norm(ours.grads)
        ours.step(kernels, norm, max_norm, extras, warmup)
        truth.step(reference, norm, max_norm, extras, warmup)
    for one, other in zip(ours.tensors(), truth.tensors(), strict=True):
        assert error(one, other) < 5e-7
    for copy, p in zip(ours.copies, ours.params, strict=True):
        assert not extras or torch.equal(copy, p.to(copy.dtype))


def test_the_norm_is_that_of_all_gradients_in_any_order() -> None:
    grads = State().grads
    norm = kernels.grad_norm(grads)
    assert error(norm, torch.cat([g.double().flatten() for g in grads]).norm()) < 5e-7
    assert torch.equal(norm, kernels.grad_norm(grads[::-1]))
    assert norm.shape == () and norm.dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    state, before = State(), State()
    state.grads[3].view(-1)[7] = bad
    norm = kernels.grad_norm(state.grads)
    assert not norm.isfinite()
    state.step(kernels, norm)
    for one, other in zip(state.tensors() + state.copies, before.tensors() + before.copies, strict=True):
        assert torch.equal(one, other)


def test_grouping_does_not_change_a_bit() -> None:
    whole, parts = State(), State()
    norm = kernels.grad_norm(whole.grads)
    whole.step(kernels, norm)
    for i in range(len(SHAPES)):
        lists = (parts.params, parts.grads, parts.exp_avgs, parts.exp_avg_sqs, parts.emas, parts.copies)
        one: list[Any] = [[tensors[i]] for tensors in lists]
        scalars: tuple[Any, ...] = (torch.zeros(()), norm, torch.tensor(1e-2), 0.9, 0.999, 1e-8, 0.1, 0.99, 1.0)
        kernels.adamw_ema_(*one, *scalars)
    for together, apart in zip(whole.tensors()[:-1], parts.tensors()[:-1], strict=True):
        assert torch.equal(together, apart)


def test_tables_are_kept_while_addresses_stay_and_dropped_when_too_many() -> None:
    optimiser._tables.clear()
    state = State()
    state.grads[0] = state.grads[0].contiguous()
    norm = kernels.grad_norm(state.grads)
    state.step(kernels, norm)
    kept = dict(optimiser._tables)
    state.step(kernels, norm)
    assert optimiser._tables == kept
    held = [torch.ones(1) for _ in range(optimiser.TABLES_KEPT + 3)]
    for g in held:
        kernels.grad_norm([g])
    assert len(optimiser._tables) == optimiser.TABLES_KEPT
