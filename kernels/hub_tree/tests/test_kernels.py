"""Ops and layers against their definitions, with gradients."""

import copy

import pytest
import torch
from dit_block import Attention, DiTBlock

pytestmark = pytest.mark.kernels_ci

B, N, D, H = 3, 64, 96, 3


def inputs(*shapes, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


CASES = {
    "norm_modulate": (((B, N, D), (B, D), (B, D)), (1e-5,)),
    "gate_residual": (((B, N, D), (B, N, D), (B, D)), ()),
    "gate_residual_norm_modulate": (((B, N, D), (B, N, D), (B, D), (B, D), (B, D)), (1e-5,)),
    "qk_norm": (((B, N, 3, H, D // H), *[(D // H,)] * 4), (1e-5,)),
    "cfg_extrapolate": (((B, N, D), (B, N, D)), (1.7,)),
    "gelu_tanh": (((B, N, D),), ()),
    "swiglu": (((B, N, 2 * D),), ()),
    "linear": (((B, N, D), (2 * D, D), (2 * D,)), ()),
}


def results(op, tensors, rest):
    """Outputs, and gradients of a weighted sum of them."""
    out = op(*tensors, *rest)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((y * torch.linspace(-1, 2, y.numel(), device=y.device).to(y).view_as(y)).sum() for y in out)
    return [*out, *torch.autograd.grad(total, tensors)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_op_and_its_gradients_are_those_of_its_definition(kernel, device, name, compiled):
    shapes, rest = CASES[name]
    tensors = inputs(*shapes, device=device)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    op = getattr(kernel, name)
    op = torch.compile(op, fullgraph=True, backend="aot_eager") if compiled else op
    for ours, truth in zip(results(op, tensors, rest), results(getattr(kernel.reference, name), exact, rest)):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


@pytest.mark.parametrize("loss", ["mse", "cosine", "normalized_mse"])
def test_feature_losses_and_their_gradient(kernel, device, loss):
    q, cond, null = inputs((B, N, D), (2, N, D), (2, N, D), device=device)
    weight, index = torch.tensor([0.3, 0.9], device=device), torch.tensor([2, 0], device=device)
    arguments = cond.detach(), null.detach(), weight, 1.7, loss, index
    value = kernel.guided_feature_loss(q, *arguments)
    truth = kernel.reference.guided_feature_loss(q, *arguments)
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(*(torch.autograd.grad(each, q)[0] for each in (value, truth)))


def gradients(block, x, c):
    x, c = x.clone().requires_grad_(), c.clone().requires_grad_()
    y = block(x, c)
    weights = torch.linspace(-1, 2, y.numel(), device=y.device).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, c, *block.parameters()])]


@pytest.mark.parametrize("compiled", [False, True])
def test_kernelize_gives_a_plain_block_the_kernels_gradients(kernel, build, device, compiled):
    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    torch.manual_seed(0)
    plain = DiTBlock(D, H).to(device)
    fast, x, c = copy.deepcopy(plain), torch.randn(B, N, D, device=device), torch.randn(B, D, device=device)
    mapping = {}
    for layer in (DiTBlock, Attention, torch.nn.GELU, torch.nn.Linear):
        name = layer.__name__
        replace_kernel_forward_from_hub(layer, name)
        mapping[name] = {device.type: LocalLayerRepository(build, layer_name=f"Fused{name}")}
    with use_kernel_mapping(mapping):
        kernelize(fast, mode=Mode.TRAINING | Mode.TORCH_COMPILE, use_fallback=False)
    assert fast.forward.__func__ is kernel.layers.FusedDiTBlock.forward
    assert fast.attn.forward.__func__ is kernel.layers.FusedAttention.forward
    block = torch.compile(fast, fullgraph=True, backend="aot_eager") if compiled else fast
    for ours, theirs in zip(gradients(block, x, c), gradients(plain, x, c)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_the_compiled_ops_serve_the_cpu_where_the_build_has_them(kernel):
    namespace = kernel._ops.add_op_namespace_prefix("norm_modulate")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(namespace, "CPU") == kernel.native.available()
    assert (kernel.native.isa() is None) == (not kernel.native.available())
