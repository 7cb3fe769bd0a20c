"""The Triton launches on a real GPU: what the interpreter cannot show, races, alignment, streams and syncs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from csrc_cases import Case, error, evaluate, features, heads, modulated, others
from torch import Tensor

from st_fast import kernels
from st_fast.kernels import reference
from st_fast.kernels.optimiser import triton as optimiser

DEVICE = "cuda"
SLACK = 2 * torch.finfo(torch.float32).eps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def cases() -> list[Case]:
    """Sizes of the models and odd ones."""
    torch.manual_seed(0)
    made = []
    for batch, tokens, width in ((3, 256, 1152), (2, 33, 100), (1, 1, 37), (4, 64, 384)):
        made += modulated(batch, tokens, width) + features(batch, tokens, width)
        made += modulated(batch, tokens, width, norm="rms")
    for size in ((2, 256, 16, 72), (2, 33, 3, 64), (1, 1, 1, 7)):
        made += others(*size) + heads(*size)
    return made


def there(case: Case) -> Case:
    """The case with its leaves, and an index made inside the call, on the device."""

    def call(ops: Any, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.device(DEVICE):
            return case.call(Moving(ops), leaves)

    return Case(case.name, {name: leaf.to(DEVICE) for name, leaf in case.leaves.items()}, call, case.frozen)


class Moving:
    """The ops, with tensor arguments that are still elsewhere brought over."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self.ops, name)
        return lambda *args, **named: op(*(v.to(DEVICE) if isinstance(v, Tensor) else v for v in args), **named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_values_and_gradients_are_as_exact_as_eager_and_the_same_twice(case: Case, dtype: torch.dtype) -> None:
    case = there(case)
    truth = evaluate(case, reference, torch.float64)
    eager, ours, again = (evaluate(case, ops, dtype) for ops in (reference, kernels, kernels))
    for name in truth:
        assert torch.equal(ours[name], again[name]), name
        assert error(ours[name], truth[name]) <= 2 * error(eager[name], truth[name]) + SLACK, name


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 32, 32), (2, 6, 5, 7), (1, 2, 1, 1)], ids=str)
def test_noisy_latents_are_the_bits_of_the_cpu(shape: tuple[int, ...], dtype: torch.dtype, path: str) -> None:
    """By Triton and by PyTorch's own kernels."""
    torch.manual_seed(0)
    given = torch.randn(shape).to(dtype), torch.randint(0, 2**62, shape[:1]), torch.rand(shape[:1])
    for seed in (7, -5, 2**63 + 2**32 + 1):
        truth = reference.noisy_latents(*given, seed, 0.18215, path)
        for ops in (kernels, reference):
            found = ops.noisy_latents(*(value.to(DEVICE) for value in given), seed, 0.18215, path)
            assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, truth, strict=True))


@contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class State:
    """Parameters of three sizes with all that a step reads and writes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = ((1152, 1152), (7,), (384, 3))
        self.params, self.grads = (
            [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes] for _ in range(2)
        )
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.emas, self.copies = [p.clone() for p in self.params], [p.bfloat16() for p in self.params]
        self.count, self.lr = torch.zeros((), device=DEVICE), torch.tensor(1e-2).to(DEVICE)

    def step(self, ops: Any) -> None:
        norm = ops.grad_norm(self.grads)
        ops.adamw_ema_(self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.emas, self.copies, self.count,
                       norm, self.lr, 0.9, 0.999, 1e-8, 0.1, 0.99, 1.0)  # fmt: skip

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.emas, self.count]


@pytest.mark.parametrize("ops", [kernels, optimiser], ids=["dispatched", "triton"])
def test_optimiser_steps_match_the_reference_and_never_wait_for_the_device(ops: Any) -> None:
    ours, truth = State(), State()
    ours.step(ops)
    truth.step(reference)
    with no_host_sync():
        ours.step(ops)
    truth.step(reference)
    for one, other in zip(ours.tensors(), truth.tensors(), strict=True):
        assert error(one, other) < 1e-6
    before = [t.clone() for t in ours.tensors()]
    ours.grads[1].fill_(torch.nan)
    ours.step(ops)
    assert all(torch.equal(one, other) for one, other in zip(ours.tensors(), before, strict=True))


def test_forward_backward_and_step_can_be_captured_and_replayed() -> None:
    torch.manual_seed(0)
    x, mod = torch.randn(2, 16, 384, device=DEVICE), torch.randn(2, 3 * 384, device=DEVICE, requires_grad=True)
    state = State()

    def work() -> Tensor:
        gate, shift, scale = mod.chunk(3, 1)
        x_out, y = kernels.gate_residual_norm_modulate(x, x, gate, shift, scale)
        (grad,) = torch.autograd.grad((x_out * y).sum(), mod)
        state.step(optimiser)
        return grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = work().clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    before = state.count.item()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager) and state.count.item() == before + 1
