"""grad_norm and adamw_ema_ as compiled for the CPU, against torch's own optimiser and against themselves."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from st_fast.kernels import native

pytestmark = pytest.mark.skipif(
    not native.available() and not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no compiler here"
)

OPS = torch.ops.st_fast
LR, BETAS, EPS, DECAY, EMA = 3e-3, (0.9, 0.95), 1e-8, 0.1, 0.999
SIZES = [(33, 17), (5,), (1,), (40_000,), (16_384,), (3, 1, 7)]


@dataclass
class State:
    params: list[Tensor]
    copies: list[Tensor] = field(default_factory=list)
    step: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.params]
        self.emas = [p.clone() for p in self.params]

    def update(self, grads: list[Tensor], norm: Tensor | None = None, max_norm: float = 1.0, ema: bool = True,
               warmup: bool = False) -> None:  # fmt: skip
        norm = OPS.grad_norm(grads) if norm is None else norm
        OPS.adamw_ema_(
            self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.emas if ema else [], self.copies, self.step,
            norm, torch.tensor(LR), *BETAS, EPS, DECAY, EMA, max_norm, warmup,
        )  # fmt: skip

    def everything(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.emas, *self.copies, self.step]


def random_like(sizes: Sequence[tuple[int, ...]], seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) * scale for size in sizes]


def test_thousand_steps_match_torch_adamw_clip_and_lerp() -> None:
    sizes = [(33, 17), (257,), (1,)]
    ours = State(random_like(sizes, 0))
    theirs = [torch.nn.Parameter(p.clone()) for p in ours.params]
    emas = [p.detach().clone() for p in theirs]
    optimizer = torch.optim.AdamW(theirs, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False)
    for step in range(1000):
        grads = random_like(sizes, step + 1, 0.01 + (step % 7) * 0.1)  # some clipped, some not
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        for e, p in zip(emas, theirs, strict=True):
            e.lerp_(p.detach(), 1 - EMA)
        ours.update(grads)
    assert ours.step.item() == 1000
    for mine, their in zip(ours.params + ours.emas, theirs + emas, strict=True):
        assert (mine - their.detach()).abs().max().item() <= 1e-6


def test_one_step_is_exact_against_float64() -> None:
    ours = State(random_like(SIZES, 0))
    before = [p.double() for p in ours.params]
    grads = random_like(SIZES, 1)
    ours.update(grads, max_norm=0.5)
    clip = 0.5 / (torch.cat([g.double().flatten() for g in grads]).norm() + 1e-6)
    for p, g, new, ema in zip(before, grads, ours.params, ours.emas, strict=True):
        g = g.double() * clip  # at step 1, m / (1 - beta1) = g and v / (1 - beta2) = g²
        want = p * (1 - LR * DECAY) - LR * g / (g.abs() + EPS)
        assert (new - want).abs().max().item() < 3e-7 * p.abs().max().item()
        assert (ema - (EMA * p + (1 - EMA) * want)).abs().max().item() < 3e-7 * p.abs().max().item()


@pytest.mark.parametrize("done", [0, 7, 8_990, 8_991, 20_000])
def test_a_warm_up_of_the_average_bounds_its_decay_by_the_updates_before(done: int) -> None:
    """Of 0.999 up to 8,990 updates: (1 + n)/(10 + n) is less."""
    sizes = [(33, 17), (5,)]
    ours = State(random_like(sizes, 0), step=torch.tensor(float(done)))
    ours.emas = random_like(sizes, 4)
    before = [e.double() for e in ours.emas]
    ours.update(random_like(sizes, 1), warmup=True)
    decay = min(EMA, (1 + done) / (10 + done))
    assert (decay == EMA) == (done >= 8_990)
    for old, p, ema in zip(before, ours.params, ours.emas, strict=True):
        moved = (1 - decay) * (p.double() - old)
        assert ((ema - old) - moved).abs().max().item() <= 4e-7 + 2e-6 * moved.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_is_bit_for_bit_the_same_however_parameters_are_grouped(dtype: torch.dtype) -> None:
    """Separate tensors, one flat tensor, and views that start at odd addresses, on one thread and on two."""
    grads = [[g.to(dtype) for g in random_like(SIZES, seed)] for seed in (1, 2)]
    flat = torch.cat([p.flatten() for p in random_like(SIZES, 0)])
    sizes = [g.numel() for g in grads[0]]
    shifted = torch.empty(len(flat) + 1)[1:].copy_(flat)
    groups = {
        "separate": State(random_like(SIZES, 0)),
        "flat": State([flat.clone()]),
        "views": State(list(shifted.split(sizes))),
        "threads": State(random_like(SIZES, 0)),
    }
    before = torch.get_num_threads()
    try:
        for name, state in groups.items():
            torch.set_num_threads(1 if name == "threads" else 2)
            for step in grads:
                one = [torch.cat([g.flatten() for g in step])]
                parts = [g.flatten() for g in step] if name == "views" else step
                state.update(one if name == "flat" else parts, norm=torch.tensor(2.5))
    finally:
        torch.set_num_threads(before)
    joined = {
        name: [torch.cat([t.flatten() for t in part]) for part in (s.params, s.exp_avgs, s.exp_avg_sqs, s.emas)]
        for name, s in groups.items()
    }
    for name, parts in joined.items():
        for part, truth in zip(parts, joined["separate"], strict=True):
            assert torch.equal(part, truth), name


@pytest.mark.parametrize("norm", [torch.nan, torch.inf, -torch.inf])
def test_nothing_changes_when_the_norm_is_not_finite(norm: float) -> None:
    state = State(random_like(SIZES, 0), copies=[p.bfloat16() for p in random_like(SIZES, 5)])
    state.update(random_like(SIZES, 1))
    before = [t.clone() for t in state.everything()]
    state.update(random_like(SIZES, 2), norm=torch.tensor(norm))
    for now, then in zip(state.everything(), before, strict=True):
        assert torch.equal(now, then)


def test_one_bad_gradient_makes_the_norm_bad_and_the_step_is_skipped() -> None:
    for bad in (torch.nan, torch.inf):
        grads = random_like(SIZES, 1)
        grads[3][39_999] = bad
        assert not OPS.grad_norm(grads).isfinite()
        state = State(random_like(SIZES, 0))
        state.update(grads)
        assert torch.equal(state.params[3], random_like(SIZES, 0)[3]) and state.step.item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_the_parameters_rounded(dtype: torch.dtype) -> None:
    state = State(random_like(SIZES, 0), copies=[torch.full(size, torch.nan, dtype=dtype) for size in SIZES])
    state.update(random_like(SIZES, 1))
    for copy, p in zip(state.copies, state.params, strict=True):
        assert torch.equal(copy, p.to(dtype))


def test_without_ema_without_clip_with_integer_step_and_strided_gradients() -> None:
    sizes = [(6, 40), (40, 6)]
    plain, odd = State(random_like(sizes, 0)), State(random_like(sizes, 0), step=torch.zeros((), dtype=torch.int64))
    untouched = [e.clone() for e in odd.emas]
    grads = random_like(sizes, 1)
    plain.update(grads, max_norm=0.0)
    odd.update([g.t().contiguous().t() for g in grads], max_norm=-1.0, ema=False)
    assert odd.step.item() == 1 and odd.step.dtype == torch.int64
    for a, b in zip(plain.params + untouched, odd.params + odd.emas, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_is_the_float64_norm_rounded(dtype: torch.dtype) -> None:
    grads = [g.to(dtype) for g in random_like(SIZES, 1)]
    truth = torch.cat([g.double().flatten() for g in grads]).norm()
    assert OPS.grad_norm(grads).item() == pytest.approx(truth.item(), rel=6e-8)


def test_norm_of_large_and_tiny_numbers_neither_overflows_nor_vanishes() -> None:
    assert OPS.grad_norm([torch.full((10,), 1e30)]).item() == pytest.approx(1e30 * 10**0.5, rel=1e-6)
    assert OPS.grad_norm([torch.full((10,), 1e-30)]).item() == pytest.approx(1e-30 * 10**0.5, rel=1e-6)


def test_norm_does_not_depend_on_order_threads_or_strides() -> None:
    grads = random_like([*SIZES, (50, 60)], 1)
    truth = OPS.grad_norm(grads)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(OPS.grad_norm(grads[::-1]), truth)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(OPS.grad_norm([*grads[:-1], grads[-1].t().contiguous().t()]), truth)


def test_wrong_lists_are_refused_by_name() -> None:
    state, grads = State(random_like(SIZES, 0)), random_like(SIZES, 1)
    one = torch.ones(())
    with pytest.raises(RuntimeError, match="grads: 5 tensors, expected 6 as params has"):
        state.update(grads[:-1], norm=one)
    with pytest.raises(RuntimeError, match=r"grads\[1\]: shape \(6\), expected \(5\) as its parameter"):
        state.update([grads[0], torch.ones(6), *grads[2:]], norm=one)
    state.emas[0] = state.emas[0].double()
    with pytest.raises(RuntimeError, match=r"emas\[0\]: dtype must be float32"):
        state.update(grads, norm=one)
