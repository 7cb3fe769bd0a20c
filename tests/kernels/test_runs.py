"""adaLN with a modulation of every run of tokens, or of every token, LayerNorm or RMSNorm, against NumPy in float64 and
against itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from csrc_cases import error
from numpy.typing import NDArray
from samples import Calls
from test_ops import run
from torch import Tensor

from st_fast import kernels
from st_fast.kernels import native, reference

B, D, EPS = 3, 20, 1e-3
UNEQUAL = (33, 5, 1, 70)
"""Runs of more and of fewer tokens than the CPU takes at once, and of one."""
N = sum(UNEQUAL)
Array, Indices = NDArray[np.float64], NDArray[np.int64]
PLAIN = torch.ops.st_fast_reference

Call = Callable[[Any, list[Tensor], Any], tuple[Tensor, ...]]
CALLS: dict[str, Call] = {
    "norm_modulate": lambda ops, t, lengths: (ops.norm_modulate(t[0], t[3], t[4], EPS, lengths),),
    "gate_residual": lambda ops, t, lengths: (ops.gate_residual(t[0], t[1], t[2], lengths),),
    "gate_residual_norm_modulate": lambda ops, t, lengths: ops.gate_residual_norm_modulate(
        *t, EPS, lengths=lengths
    ),
    "norm_modulate rms": lambda ops, t, lengths: (ops.norm_modulate(t[0], t[3], t[4], EPS, lengths, norm="rms"),),
    "gate_residual_norm_modulate rms": lambda ops, t, lengths: ops.gate_residual_norm_modulate(
        *t, EPS, lengths=lengths, norm="rms"
    ),
}  # fmt: skip
"""Each op, of x, a, gate, shift and scale; with RMSNorm, too."""


def tensors(vectors: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, a, and three views of one (B, vectors, 6D) tensor, apart from each other and none of scale 1."""
    torch.manual_seed(0)
    x, a, slab = 3 * torch.randn(B, N, D) + 1, torch.randn(B, N, D) - 0.5, 0.7 * torch.randn(B, vectors, 6 * D)
    return [x.to(dtype), a.to(dtype), *slab.to(dtype).chunk(6, -1)[::2]]


def results(ops: Any, op: str, inputs: list[Tensor], lengths: Any) -> list[Tensor | None]:
    """Outputs, and the gradients of x, a, gate, shift and scale; None where the op does not take one."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outs = CALLS[op](ops, leaves, lengths)
    weights = [(torch.sin(torch.arange(out.numel())) + 0.5).view(out.shape).to(out.dtype) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, weights, allow_unused=True)]


def summed(grad: Array, vector_of: Indices) -> Array:
    """(B, N, D) → (B, vectors, D): the sums over the tokens that share a vector."""
    return np.stack([grad[:, vector_of == vector].sum(1) for vector in range(vector_of.max() + 1)], 1)


def truth(op: str, inputs: list[Tensor], vector_of: Indices) -> list[Array | None]:
    """The same in NumPy; vector_of (N,): which vector a token has. Derived by hand, not by autograd."""
    x, a, *modulation = (t.double().numpy() for t in inputs)
    gate, shift, scale = (vector[:, vector_of] for vector in modulation)
    weight = (np.sin(np.arange(x.size)) + 0.5).reshape(x.shape)
    op, _, rms = op.partition(" ")
    residual, normed = op != "norm_modulate", op != "gate_residual"
    stream = x + gate * a if residual else x
    outs, dstream = [stream] if residual else [], weight if residual else np.zeros_like(x)
    dshift = dscale = None
    if normed:
        middle = 0 * stream if rms else stream.mean(-1, keepdims=True)
        deviation = np.sqrt(np.square(stream - middle).mean(-1, keepdims=True) + EPS)
        h = (stream - middle) / deviation
        outs.append(h * (1 + scale) + shift)
        dh, dshift, dscale = weight * (1 + scale), summed(weight, vector_of), summed(weight * h, vector_of)
        through_middle = 0 if rms else dh.mean(-1, keepdims=True)
        dstream = dstream + (dh - through_middle - h * (dh * h).mean(-1, keepdims=True)) / deviation
    da, dgate = (gate * dstream, summed(dstream * a, vector_of)) if residual else (None, None)
    return [*outs, dstream, da, dgate, dshift, dscale]


LAYOUTS = {
    "runs": (UNEQUAL, np.repeat(np.arange(len(UNEQUAL)), UNEQUAL)),
    "one run": ((N,), np.zeros(N, dtype=int)),
    "tokens": (None, np.arange(N)),
    "runs of one token": ((1,) * N, np.arange(N)),
}


@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", CALLS)
def test_values_and_gradients_are_those_of_numpy(
    op: str, layout: str, dtype: torch.dtype, allowed: float, ops: Any
) -> None:
    lengths, vector_of = LAYOUTS[layout]
    inputs = tensors(vector_of.max() + 1, dtype)
    assert not inputs[3].is_contiguous()
    for ours, exact in zip(results(ops, op, inputs, lengths), truth(op, inputs, vector_of), strict=True):
        if exact is None:
            assert ours is None
        else:
            assert ours is not None and ours.dtype == dtype and error(ours, torch.from_numpy(exact)) < allowed


@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("op", CALLS)
def test_one_run_is_a_modulation_of_the_sample_bit_for_bit(op: str, ops: Any) -> None:
    inputs = tensors(1)
    alone = results(ops, op, [*inputs[:2], *(vector[:, 0] for vector in inputs[2:])], None)
    for one, other in zip(results(ops, op, inputs, (N,)), alone, strict=True):
        if other is None:
            assert one is None
        else:
            assert one is not None and torch.equal(one.view_as(other), other)


@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("op", CALLS)
def test_runs_of_one_token_are_a_modulation_of_every_token_bit_for_bit(op: str, ops: Any) -> None:
    inputs = tensors(N)
    pairs = zip(results(ops, op, inputs, [1] * N), results(ops, op, inputs, None), strict=True)
    assert all(one is other is None or torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("op", CALLS)
def test_the_same_vector_for_all_gives_the_outputs_of_one_a_sample(op: str, ops: Any) -> None:
    inputs = tensors(1)
    alone = CALLS[op](ops, [*inputs[:2], *(vector[:, 0] for vector in inputs[2:])], None)
    for lengths, vectors in ((UNEQUAL, len(UNEQUAL)), (None, N)):
        spread = [*inputs[:2], *(vector.expand(-1, vectors, -1) for vector in inputs[2:])]
        assert all(map(torch.equal, CALLS[op](ops, spread, lengths), alone))


@pytest.mark.parametrize(("lengths", "vectors"), [((2, 1, 3), 3), (None, 6)], ids=["runs", "tokens"])
@pytest.mark.parametrize("op", CALLS)
def test_gradients_are_those_of_finite_differences(op: str, lengths: Any, vectors: int) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, n, 5, dtype=torch.float64).requires_grad_() for n in (6, 6, *[vectors] * 3)]
    assert torch.autograd.gradcheck(lambda *t: CALLS[op](kernels, list(t), lengths), leaves)


REGISTERED = {
    "norm_modulate": lambda x, a, m: (x, m[1], m[2], EPS),
    "norm_modulate_backward": lambda x, a, m: (a, x, m[2], x[..., 0], a[..., 0].exp()),
    "gate_residual": lambda x, a, m: (x, a, m[0]),
    "gate_residual_backward": lambda x, a, m: (x, a, m[0]),
    "gate_residual_norm_modulate": lambda x, a, m: (x, a, *m, EPS, a[0, 0]),
    "gate_residual_norm_modulate_backward": lambda x, a, m: (x, a, x.cos(), a.cos(), m[0], m[2], x[..., 0].contiguous(),
                                                             a[..., 0].exp(), a[0, 0]),
}  # fmt: skip
NORMED = [name for name in REGISTERED if "norm" in name]
BY = [(name, rms) for rms in (False, True) for name in (NORMED if rms else REGISTERED)]
"""Every op, and those that have a norm with RMSNorm."""


def registered(name: str, vectors: int, lengths: Any, rms: bool, grad: bool) -> tuple[Any, ...]:
    """Arguments of a registered op."""
    x, a, *modulation = tensors(vectors)
    arguments = REGISTERED[name](x, a, modulation)
    arguments = tuple(t.contiguous() if isinstance(t, Tensor) and t.dim() == 2 else t for t in arguments)
    if rms and name.endswith("backward"):
        mean = next(at for at, t in enumerate(arguments) if isinstance(t, Tensor) and t.dim() == 2)
        arguments = (*arguments[:mean], torch.empty(0), *arguments[mean + 1 :])
    made = tuple(t.detach().requires_grad_(grad) if isinstance(t, Tensor) else t for t in arguments)
    return (*made, lengths, True) if rms else (*made, lengths)


@pytest.mark.parametrize(("lengths", "vectors"), [(UNEQUAL, len(UNEQUAL)), (None, N)], ids=["runs", "tokens"])
@pytest.mark.parametrize(("name", "rms"), BY)
def test_opcheck_finds_nothing(name: str, rms: bool, lengths: Any, vectors: int) -> None:
    arguments = registered(name, vectors, lengths, rms, grad="backward" not in name)
    torch.library.opcheck(getattr(torch.ops.st_fast, name).default, arguments)


@pytest.mark.parametrize(("lengths", "vectors"), [(UNEQUAL, len(UNEQUAL)), (None, N)], ids=["runs", "tokens"])
@pytest.mark.parametrize(("name", "rms"), BY)
def test_the_ops_in_plain_pytorch_say_the_same(name: str, rms: bool, lengths: Any, vectors: int) -> None:
    """Also what csrc sends there, which is float64."""
    arguments = registered(name, vectors, lengths, rms, grad=False)
    doubled = tuple(t.double() if isinstance(t, Tensor) else t for t in arguments)
    ours, plain, exact = (
        getattr(ops, name)(*args)
        for ops, args in ((torch.ops.st_fast, arguments), (PLAIN, arguments), (torch.ops.st_fast, doubled))
    )
    for one, other, truth in zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, plain, exact)), strict=True):
        assert truth.dtype == torch.float64 and one.shape == other.shape == truth.shape
        assert error(one, truth) < 2e-6 and error(other, truth) < 2e-6


def test_the_gradients_of_runs_come_in_one_slab_of_a_vector_a_run() -> None:
    inputs = [t.requires_grad_() for t in tensors(len(UNEQUAL))]
    with Calls() as calls:
        outs = kernels.gate_residual_norm_modulate(*inputs, EPS, lengths=UNEQUAL)
        grads = torch.autograd.grad(outs, inputs, outs)
    assert list(calls.seen["gate_residual_norm_modulate_backward"][-1]) == list(UNEQUAL)
    slab = grads[2]._base
    assert slab is not None and slab.shape == (B, len(UNEQUAL), 3 * D)
    assert all(grad._base is slab for grad in grads[2:])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("lengths", "vectors"), [(UNEQUAL, len(UNEQUAL)), (None, N)], ids=["runs", "tokens"])
def test_compiled_in_one_graph_equals_eager(lengths: Any, vectors: int, dynamic: bool) -> None:
    def all_ops(x: Tensor, a: Tensor, *modulation: Tensor) -> tuple[Tensor, ...]:
        gate, shift, scale = modulation
        y = kernels.norm_modulate(x, shift, scale, EPS, lengths)
        x, y = kernels.gate_residual_norm_modulate(x, y * a, gate, shift, scale, EPS, lengths=lengths)
        x, y = kernels.gate_residual_norm_modulate(x, y * a, gate, shift, scale, EPS, lengths=lengths, norm="rms")
        y = kernels.norm_modulate(y + a, shift, scale, EPS, lengths, "rms")
        return x, kernels.gate_residual(y, a, gate, lengths)

    compiled = torch.compile(all_ops, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    leaves = tuple(t.detach().requires_grad_() for t in tensors(vectors))
    for one, other in zip(run(compiled, leaves), run(all_ops, leaves), strict=True):
        assert one is not None and other is not None and error(one, other) < 1e-6


@pytest.mark.skipif(not native.available(), reason="csrc is not built")
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((33, 76, 1), r"lengths\[2\] = 1: allowed are 1 to 0"),
        ((33, 75), "lengths: they sum to 108, expected 109"),
        ((109, 0), r"lengths\[1\] = 0: allowed are 1 to 0"),
        ((-1, 110), r"lengths\[0\] = -1: allowed are 1 to 109"),
        ((2**62, 2**62), r"lengths\[0\] = 4611686018427387904: allowed are 1 to 109"),
        ((50, 59), r"shift: shape \(3, 3, 20\), expected \(3, 2, 20\)"),
        (None, r"shift: shape \(3, 3, 20\), expected \(3, 109, 20\)"),
    ],
)
def test_csrc_refuses_runs_that_are_not_those_of_x(lengths: Any, message: str) -> None:
    x, _, _, shift, scale = tensors(3)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.st_fast.norm_modulate(x, shift, scale, EPS, lengths)
