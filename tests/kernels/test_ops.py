"""The ops as PyTorch sees them: schemas, fakes, gradients, compilation, autocast. Run with csrc and without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from csrc_cases import error
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DIFFERENTIABLE, Calls, samples
from torch import Tensor

from st_fast import kernels
from st_fast.kernels import OPS as PUBLIC
from st_fast.kernels import declared, reference
from st_fast.kernels.common import registry
from st_fast.kernels.mlp import cublaslt

OPS = torch.ops.st_fast


def public(name: str, ops: Any) -> Callable[..., Any]:
    return getattr(ops, name)  # type: ignore[no-any-return]


def run(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor | None]:
    """Outputs, then the gradients of the inputs that require one."""
    leaves = [v for v in arguments if isinstance(v, Tensor) and v.requires_grad]
    outs = call(*arguments)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    grads = torch.autograd.grad(outs, leaves, [torch.sin(1 + out.detach()) for out in outs])
    return [out.detach() for out in outs] + list(grads)


for _op in PUBLIC:
    declared(_op)  # registers it


def test_every_op_has_a_sample() -> None:
    assert samples().keys() == registry.SCHEMAS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", registry.SCHEMAS)
def test_opcheck_finds_nothing(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(OPS, name).default, samples(dtype)[name])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_public_op_agrees_with_the_reference_in_value_and_gradient(name: str) -> None:
    ours, truth = (run(public(name, ops), samples()[name]) for ops in (kernels, reference))
    for one, other in zip(ours, truth, strict=True):
        assert one is not None and other is not None and one.dtype == other.dtype
        assert error(one, other) < 1e-5


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_the_reference_are_those_of_finite_differences(name: str) -> None:
    arguments = samples(torch.float64)[name]
    assert torch.autograd.gradcheck(public(name, reference), arguments)


@pytest.mark.parametrize("loss", reference.FEATURE_LOSSES)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0, 30.0])
def test_gradients_of_every_loss_are_those_of_finite_differences(loss: str, cfg_scale: float) -> None:
    q, cond, null, weight, _, _, index = samples(torch.float64)["guided_feature_loss"]
    weight = weight.double()
    assert torch.autograd.gradcheck(
        lambda q: reference.guided_feature_loss(q, cond, null, weight, cfg_scale, loss, index), (q,)
    )


PLAIN = torch.ops.st_fast_reference


def test_attention_and_linear_in_plain_pytorch_have_the_gradients_of_autograd() -> None:
    for name in ("attention", "attention_heads", "linear"):
        arguments = samples(torch.float64)[name]
        truth = run(public(name, reference), arguments)
        frozen = [v.detach() for v in arguments]
        outs = getattr(PLAIN, name)(*frozen)
        out, *rest = outs if isinstance(outs, tuple) else (outs,)
        saved = frozen[:2] if name == "linear" else [*frozen, out, *rest]
        grads = getattr(PLAIN, f"{name}_backward")(torch.sin(1 + out), *saved)
        grads = grads if isinstance(grads, tuple) else (grads,)
        out = out.transpose(1, 2) if name == "attention_heads" else out
        for one, other in zip([out, *grads], truth, strict=True):
            torch.testing.assert_close(one, other)


def test_attention_within_groups_is_attention_with_a_mask_in_plain_pytorch_and_has_its_gradients() -> None:
    qkv = torch.randn(2, 9, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    lengths, number = (4, 5), torch.tensor([0] * 4 + [1] * 5)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    same = number[:, None] == number
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=same).transpose(1, 2)
    (wanted,) = torch.autograd.grad(truth, qkv, torch.sin(1 + truth))
    torch.testing.assert_close(reference.attention(qkv, lengths), truth)
    frozen = qkv.detach()
    out, lse = PLAIN.attention(frozen, lengths)
    torch.testing.assert_close(out, truth)
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(~same, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(PLAIN.attention_backward(torch.sin(1 + out), frozen, out, lse, lengths), wanted)


@pytest.mark.parametrize("op", ["attention", "attention_heads"])
@pytest.mark.parametrize(
    ("lengths", "said"),
    [((4, 4), "lengths sum to 8; x's N = 9"), ((0, 9), r"lengths\[0\] = 0"), ((4.0, 5.0), r"lengths\[0\] = 4.0")],
)
def test_groups_that_are_not_the_tokens_are_refused(op: str, lengths: tuple[int, ...], said: str) -> None:
    packed, apart = torch.zeros(1, 9, 3, 1, 32), torch.zeros(3, 1, 1, 9, 32)
    with pytest.raises(ValueError, match=said):
        kernels.attention(packed, lengths) if op == "attention" else kernels.attention_heads(*apart, lengths)


@pytest.mark.parametrize("name", ["norm_modulate", "gate_residual_norm_modulate", "qk_norm"])
def test_closed_form_gradients_are_those_of_autograd(name: str) -> None:
    """In float64, where no csrc or Triton takes part: the op in plain PyTorch against differentiating the reference."""
    arguments = samples(torch.float64)[name]
    truth = run(public(name, reference), arguments)
    frozen = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
    outs = getattr(PLAIN, name)(*frozen)
    if name == "qk_norm":
        q, k, stats = outs
        qkv, q_weight, _, k_weight, _, _ = frozen
        v, bias = qkv[:, :, 2].transpose(1, 2), qkv.new_zeros(qkv[0, 0].numel())
        grads = [torch.sin(1 + out) for out in (q, k, v)]
        dqkv, daffine, dbias = PLAIN.qk_norm_backward(*grads, qkv, q_weight, k_weight, bias, stats)
        assert error(dbias, dqkv.sum((0, 1)).flatten()) < 1e-12
        ours = [q, k, v, dqkv, *daffine]
    elif name == "norm_modulate":
        y, mean, rstd = outs
        dx, slab = PLAIN.norm_modulate_backward(torch.sin(1 + y), frozen[0], frozen[2], mean, rstd)
        ours = [y, dx, *slab.chunk(2, 1)]
    else:
        x_out, y, mean, rstd = outs
        _, a, gate, _, scale, _, _ = frozen
        dx, da, slab, none = PLAIN.gate_residual_norm_modulate_backward(
            torch.sin(1 + x_out), torch.sin(1 + y), x_out, a, gate, scale, mean, rstd, None
        )
        assert none.shape == (0,)
        ours = [x_out, y, dx, da, *slab.chunk(3, 1)]
    for one, other in zip(ours, truth, strict=True):
        assert other is not None and error(one, other) < 1e-12


@pytest.mark.parametrize("name", ["gelu_tanh", "swiglu"])
def test_closed_form_gradients_of_activations_are_those_of_autograd(name: str) -> None:
    x, bias = 3 * torch.randn(2, 5, 14, dtype=torch.float64), torch.randn(14, dtype=torch.float64)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    y, *truth = run(public(name, reference), (x, bias))
    assert y is not None and error(getattr(PLAIN, name)(x.detach(), None), y) < 1e-12
    backward = getattr(PLAIN, f"{name}_backward")
    for one, other in zip(backward(torch.sin(1 + y), x.detach(), bias.detach()), truth, strict=True):
        assert other is not None and error(one, other) < 1e-12
    assert backward(torch.sin(1 + y), x.detach(), None)[1].shape == (0,)


@pytest.mark.parametrize("loss", reference.FEATURE_LOSSES)
@pytest.mark.parametrize("size", [1.0, 1e-9, 0.0])
def test_closed_form_loss_gradients_are_those_of_autograd(loss: str, size: float) -> None:
    """Also for vectors below the bound on lengths, where the length is a constant."""
    q, cond, null, weight, _, _, index = samples(torch.float64)["guided_feature_loss"]
    q = (q.detach() * size).requires_grad_()
    truth = reference.guided_feature_loss(q, cond, null, weight, 3.0, loss, index)
    truth.backward()
    value, dq = PLAIN.guided_feature_loss(q.detach(), cond, null, weight, 3.0, loss, index)
    assert q.grad is not None
    assert error(value, truth.detach()) < 1e-12 and error(dq, q.grad) < 1e-12


def everything(
    x: Tensor, mod: Tensor, qkv: Tensor, bias: Tensor, f: Tensor, weight: Tensor, index: Tensor
) -> tuple[Tensor, ...]:
    """All ops of a block and its losses, modulation as views of one tensor."""
    m = mod.chunk(6, 1)
    y = kernels.norm_modulate(x, m[0], m[1], 1e-6)
    x, y = kernels.gate_residual_norm_modulate(x, y, m[2], m[3], m[4], 1e-6, bias)
    inner = torch.cat((kernels.gelu_tanh(y, bias)[..., :8], kernels.swiglu(2 * y, bias)), -1)
    x = kernels.gate_residual(x, inner, m[5])
    ones = torch.ones(qkv.shape[-1])
    q, k, v = kernels.qk_norm(qkv, ones, 0 * ones, ones, 0 * ones)
    losses = [kernels.guided_feature_loss(x, f[index], f[index] * 2, weight[index], 30.0, loss, index)
              for loss in reference.FEATURE_LOSSES]  # fmt: skip
    return x, q * k + v, sum(losses) + kernels.align(y, kernels.cfg_extrapolate(f, f * 3, 0.5), weight)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_equals_eager(backend: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    compiled = torch.compile(everything, backend=backend, fullgraph=True, dynamic=dynamic)
    for batch in (3, 4) if dynamic else (3,):
        leaves = [torch.randn(batch, 5, 16), torch.randn(batch, 96), torch.randn(batch, 5, 3, 2, 8), torch.randn(16)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        rest = (torch.randn(batch, 5, 16), torch.rand(batch), torch.tensor([2, 0]))
        for one, other in zip(run(compiled, (*leaves, *rest)), run(everything, (*leaves, *rest)), strict=True):
            assert one is not None and other is not None and other.abs().max() > 0
            assert error(one, other) < 1e-5


@pytest.mark.parametrize(
    "name", [name for name in DIFFERENTIABLE if name not in ("linear", "gelu_mlp")]
)  # PyTorch's own
def test_autocast_leaves_dtypes_and_values_as_they_are(name: str) -> None:
    arguments = samples()[name]
    plain = run(public(name, kernels), arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(public(name, kernels), arguments)
    for one, other in zip(cast, plain, strict=True):
        assert one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("name", ["linear", "gelu_mlp"])
def test_autocast_takes_what_another_layer_made_with_weights_in_float32(name: str) -> None:
    x, *weights = samples()[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = public(name, kernels)(x.detach().bfloat16(), *weights)
        expected = public(name, kernels)(x.detach(), *weights)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert all(weight.grad is not None and weight.grad.dtype == weight.dtype for weight in weights)


def qk_norm_calls(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of qk_norm's public function in its other forms, all with a gradient of qkv's bias."""
    torch.manual_seed(0)
    shared, own = torch.randn(1, 4, 6), torch.randn(3, 6, 4).transpose(1, 2)
    made = {}
    for name, norm, rope in (("rms", "rms", None), ("rms rope", "rms", own), ("rope", "layer", shared),
                             ("none", "none", None), ("alone", "none", shared), ("plain", "layer", own)):  # fmt: skip
        qkv, bias = (torch.randn(size, dtype=dtype).requires_grad_() for size in ((3, 4, 3, 2, 6), (36,)))
        vectors = [torch.randn(6, dtype=dtype).requires_grad_() for _ in range(4)]
        given = {"layer": (0, 1, 2, 3), "rms": (0, 2), "none": ()}["none" if name == "plain" else norm]
        four = (vectors[at] if at in given else None for at in range(4))
        made[name] = (qkv, *four, 1e-3, bias, "tokens", norm, rope)
    return made


@pytest.mark.parametrize("name", qk_norm_calls(torch.float32))
def test_qk_norms_other_forms_have_the_gradients_of_finite_differences_and_of_autograd(name: str) -> None:
    qkv, *vectors, eps, bias, _, norm, rope = arguments = qk_norm_calls(torch.float64)[name]
    without = (qkv, *vectors, eps, None, "tokens", norm, rope)  # finite differences see no bias
    assert torch.autograd.gradcheck(reference.qk_norm, without)
    truth = run(reference.qk_norm, arguments)
    frozen = [None if v is None else v.detach() for v in (qkv, *vectors)]
    q, k, stats = PLAIN.qk_norm(*frozen, eps, False, norm, rope)
    v = frozen[0][:, :, 2].transpose(1, 2)
    grads = [torch.sin(1 + out) for out in (q, k, v)]
    dqkv, daffine, dbias = PLAIN.qk_norm_backward(
        *grads, frozen[0], frozen[1], frozen[3], bias.detach(), stats, norm, rope
    )  # fmt: skip
    for one, other in zip([q, k, v, dqkv, *daffine, dbias], truth, strict=True):
        assert other is not None and error(one, other) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", qk_norm_calls(torch.float32))
def test_opcheck_finds_nothing_in_qk_norms_other_forms(name: str, dtype: torch.dtype) -> None:
    qkv, *vectors, eps, bias, _, norm, rope = qk_norm_calls(dtype)[name]
    torch.library.opcheck(OPS.qk_norm.default, (qkv, *vectors, eps, True, norm, rope))
    with Calls() as calls:
        run(kernels.qk_norm, (qkv, *vectors, eps, bias, "heads", norm, rope))
    torch.library.opcheck(OPS.qk_norm_backward.default, calls.seen["qk_norm_backward"])


@pytest.mark.parametrize("dynamic", [False, True])
def test_qk_norms_other_forms_compiled_in_one_graph_equal_eager(dynamic: bool) -> None:
    def everything(*leaves: Tensor) -> tuple[Tensor, ...]:
        (qkv, q_weight, k_weight, bias), rope = leaves[:4], leaves[4]
        q, k, _ = kernels.qk_norm(qkv, q_weight, None, k_weight, None, 1e-3, bias, norm="rms", rope=rope)
        qkv = torch.stack((q, k, q * k), 2).transpose(1, 3)
        q, k, v = kernels.qk_norm(qkv, norm="layer", rope=rope)
        again, _, _ = kernels.qk_norm(torch.stack((q, k, v), 2).transpose(1, 3), norm="none", rope=rope[:1])
        return q, k, v, again

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (3, 4) if dynamic else (3,):
        torch.manual_seed(batch)
        leaves = [torch.randn(size).requires_grad_() for size in ((batch, 5, 3, 2, 8), (8,), (8,), (48,))]
        arguments = (*leaves, torch.randn(batch, 5, 8))
        for one, other in zip(run(compiled, arguments), run(everything, arguments), strict=True):
            assert one is not None and other is not None and other.abs().max() > 0
            assert error(one, other) < 1e-5


@pytest.mark.parametrize("layout", ["tokens", "heads"])
def test_qk_norms_layouts_are_as_promised(layout: str) -> None:
    qkv, *vectors = (torch.randn(2, 5, 3, 4, 8), *(torch.randn(8) for _ in range(4)))
    q, k, v = kernels.qk_norm(qkv, *vectors, layout=layout)
    if layout == "heads":
        assert all(tensor.is_contiguous() for tensor in (q, k, v))
    else:
        assert all(tensor.transpose(1, 2).is_contiguous() for tensor in (q, k)) and v._base is qkv


def test_an_empty_batch_goes_through_the_products_on_cuda_without_a_call() -> None:
    x, weights = torch.empty(0, 16, dtype=torch.bfloat16), [torch.ones(32, 16), torch.ones(32), torch.ones(8, 32)]
    w1, b1, w2 = (weight.bfloat16() for weight in weights)
    y, g, h = cublaslt.forward(x, w1, b1, w2, b1[:8])
    assert y.shape == (0, 8) and g.shape == h.shape == (0, 32)
    dh, db1 = cublaslt.backward(y, w2, h)
    assert dh.shape == (0, 32) and torch.equal(db1, torch.zeros_like(b1))


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name != "cfg_extrapolate"])  # which is linear
def test_second_derivatives_are_refused(name: str) -> None:
    arguments = samples()[name]
    if name in BIASED:  # no gradient depends on the bias
        arguments = (*arguments[:-1], None)
    leaf = [v for v in arguments if isinstance(v, Tensor) and v.requires_grad][-1]
    out = public(name, kernels)(*arguments)
    out = out[0] if isinstance(out, tuple) else out
    with pytest.raises(NotImplementedError, match=f"{name}: there is no second derivative"):
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        grad.sum().backward()


BIASED = {"gate_residual_norm_modulate": 1, "gelu_tanh": 0, "swiglu": 0}
"""Ops that sum the gradient of the bias before them, and the place of the argument that it was added to."""


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name not in BIASED])
def test_an_argument_whose_gradient_alone_is_wanted_gets_it(name: str) -> None:
    arguments = samples()[name]
    _, *expected = run(public(name, kernels), arguments)[-1 - len(wanting(arguments)) :]
    for number, gradient in zip(wanting(arguments), expected, strict=True):
        alone = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
        alone[number] = alone[number].requires_grad_()
        found = run(public(name, kernels), tuple(alone))[-1]
        assert found is not None and gradient is not None and error(found, gradient) < 1e-6, number


def wanting(arguments: tuple[Any, ...]) -> list[int]:
    """The places of the arguments that require a gradient."""
    return [at for at, value in enumerate(arguments) if isinstance(value, Tensor) and value.requires_grad]


@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_gets_the_gradient_that_adding_it_would_give(name: str, bias_dtype: torch.dtype, ops: Any) -> None:
    *arguments, _ = samples()[name]
    bias, place = (torch.randn(12) - 3).to(bias_dtype).requires_grad_(), BIASED[name]
    made = arguments[place].detach()
    arguments[place] = made + bias
    added = run(public(name, reference), (*arguments, bias))  # its own bias and the layer's: the same gradient twice
    arguments[place] = (made + bias.detach()).requires_grad_()
    ours = run(public(name, ops), (*arguments, bias))
    for one, other in zip(ours[:-1], run(public(name, ops), (*arguments, None)), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    assert ours[-1] is not None and added[-1] is not None and ours[-1].dtype == bias_dtype
    torch.testing.assert_close(ours[-1], added[-1] / 2)


@pytest.mark.parametrize("name", BIASED)
def test_no_sum_is_taken_for_a_bias_that_needs_no_gradient(name: str) -> None:
    *arguments, bias = samples()[name]
    for without in (bias.detach(), None):
        with Calls() as calls:
            out = public(name, kernels)(*arguments, without)
            (out[0] if isinstance(out, tuple) else out).sum().backward()
        assert calls.seen[name][-1] is None and calls.seen[f"{name}_backward"][-1] is None
    with torch.no_grad(), Calls() as calls:
        public(name, kernels)(*arguments, bias)
    assert calls.seen[name][-1] is None


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_derivatives_are_refused(name: str) -> None:
    """Without a word they would be zero."""
    first, *rest = (v.detach() if isinstance(v, Tensor) else v for v in samples()[name])
    with pytest.raises(NotImplementedError, match=f"{name}: there is no forward-mode derivative"):
        torch.func.jvp(lambda x: public(name, kernels)(x, *rest), (first,), (torch.ones_like(first),))


def test_an_output_that_is_not_used_gets_no_gradient() -> None:
    x, a, gate, shift, scale, eps, _ = samples()["gate_residual_norm_modulate"]
    for used in (0, 1):
        grads = [
            torch.autograd.grad(
                ops.gate_residual_norm_modulate(x, a, gate, shift, scale, eps)[used].sin().sum(),
                (x, a, gate), retain_graph=False,
            )
            for ops in (kernels, reference)
        ]  # fmt: skip
        for one, other in zip(*grads, strict=True):
            assert error(one, other) < 3e-6


def test_statistics_and_gradients_made_in_the_forward_pass_have_no_gradient() -> None:
    _, mean, rstd = OPS.norm_modulate(*samples()["norm_modulate"])
    loss, dq = OPS.align(*samples()["align"])
    assert not mean.requires_grad and not rstd.requires_grad and not dq.requires_grad and loss.requires_grad


@pytest.mark.parametrize("name", ["align", "guided_feature_loss"])
def test_a_loss_used_again_has_the_same_gradient_whatever_was_done_with_the_first(name: str) -> None:
    q, *rest = samples()[name]
    leaf = q.detach().clone().requires_grad_()
    doubled = leaf * 1.0  # so that the gradient passes through a tensor of its own, too
    loss = getattr(kernels, name)(doubled, *rest)
    (truth,) = torch.autograd.grad(getattr(reference, name)(leaf, *rest), leaf)
    for factor in (1.0, 1.0, -2.0, 1.0):
        leaf.grad = None
        loss.backward(torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(leaf.grad, factor * truth)
        leaf.grad.zero_()
    (at_q,) = torch.autograd.grad(loss, doubled, retain_graph=True)
    torch.testing.assert_close(at_q, truth)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * truth)


def test_a_float16_loss_has_a_gradient_at_the_sizes_of_training() -> None:
    """1/(B·N·D) is below float16's smallest number; the loss scale comes only in the backward pass."""
    torch.manual_seed(0)
    q = torch.randn(1, 256, 1152).half().requires_grad_()
    f, weight = torch.randn(1, 256, 1152).half(), torch.full((1,), 1 / 512)
    found = []
    for ops in (kernels, reference):
        (ops.guided_feature_loss(q, f, f, weight, 1.0) * 65536).backward()
        found.append(q.grad)
        q.grad = None
    assert found[0] is not None and found[1] is not None and found[0].dtype == torch.float16
    assert (found[0] != 0).float().mean() > 0.99 and error(found[0], found[1]) < 2e-3


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t,
    lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    lambda t: torch.cat([torch.full_like(t, torch.nan), t], 1)[:, t.shape[1] :],
    lambda t: t[:1].expand_as(t),
)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(2, 70)),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=6, max_size=6),
    loss=st.sampled_from(reference.FEATURE_LOSSES),
    cfg_scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_in_any_layout_agrees_with_the_reference(
    shape: tuple[int, int, int], layouts: list[Callable[[Tensor], Tensor]], loss: str, cfg_scale: float, seed: int
) -> None:
    batch, _, width = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = [random(*shape), random(*shape), *(random(batch, width) for _ in range(3)), random(*shape)]
    chosen = torch.randperm(batch, generator=generator)[: 1 + seed % batch]

    def evaluate(ops: Any, dtype: torch.dtype) -> list[Tensor]:
        views = [layout(t.to(dtype)).requires_grad_() for layout, t in zip(layouts, tensors, strict=True)]
        x, a, gate, shift, scale, f = views
        x_out, y = ops.gate_residual_norm_modulate(x, a, gate, shift, scale, 1e-3)
        x_out = ops.gate_residual(x_out, ops.norm_modulate(y, scale, shift, 1e-3), gate)
        f = f.detach()[chosen]
        value = ops.guided_feature_loss(x_out, f, 0.5 * f + 1, torch.ones(len(f)), cfg_scale, loss, chosen)
        outs = [x_out, y, value]
        weights = [torch.linspace(-1, 1.5, out.numel()).to(out.dtype).view(out.shape) for out in outs]
        grads = torch.autograd.grad(outs, views[:5], weights)
        sized = [x_out, y, value + 1.0]  # a cosine's errors are of its range, however near to 0 it is
        return [*(out.detach() for out in sized), *grads]

    truth, eager, ours = evaluate(reference, torch.float64), evaluate(reference, torch.float32), evaluate(
        kernels, torch.float32)  # fmt: skip
    for one, plain, exact in zip(ours, eager, truth, strict=True):
        assert error(one, exact) <= 4 * error(plain, exact) + 1e-5
