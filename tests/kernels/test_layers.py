"""The ops as modules: definitions, shapes, compilation, autocast, FSDP2, and what Hugging Face's `kernels` asks."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from samples import Calls
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from st_fast.kernels import layers, reference

B, N, D, H = 3, 5, 24, 2
EPS = 3e-2  # not a default, and large enough to be seen


def draw(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).requires_grad_(grad)


def run(call: Callable[..., Any], *inputs: Tensor | None) -> list[Tensor]:
    """Outputs, and the gradients of the inputs that require one."""
    outs = call(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.cos(out.detach().float()).to(out.dtype) for out in outs])]


def agree(call: Callable[..., Any], truth: Callable[..., Any], *inputs: Tensor | None) -> None:
    """In value and gradient, with the definition in float64."""
    doubles = [x if x is None or not x.is_floating_point() else x.detach().double() for x in inputs]
    for one, x in zip(doubles, inputs, strict=True):
        if one is not None and x is not None:
            one.requires_grad_(x.requires_grad)
    for ours, theirs in zip(run(call, *inputs), run(truth, *doubles), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def modulations(form: str, count: int) -> list[Tensor]:
    shape = {"(B, D)": (B, D), "(B, 1, D)": (B, 1, D), "(1, D)": (1, D)}[form]
    return [draw(*shape, seed=10 * i) for i in range(1, count + 1)]


def flat(definition: Callable[..., Any], images: int, *tail: Any) -> Callable[..., Any]:
    """The definition, its modulations (all but the first inputs, which are images) brought to (B, D)."""

    def call(*inputs: Tensor) -> Any:
        rows = [v.reshape(-1, D).expand(B, D) for v in inputs[images:]]
        return definition(*inputs[:images], *rows, *tail)

    return call


@pytest.mark.parametrize("form", ["(B, D)", "(B, 1, D)", "(1, D)"])
def test_the_modulated_layers_are_their_definitions_for_every_form_of_a_modulation(form: str) -> None:
    x, a = draw(B, N, D), draw(B, N, D, seed=1)
    agree(layers.AdaLNModulate(EPS), flat(reference.norm_modulate, 1, EPS), x, *modulations(form, 2))
    agree(layers.GateResidual(), flat(reference.gate_residual, 2), x, a, *modulations(form, 1))
    both = flat(reference.gate_residual_norm_modulate, 2, EPS)
    agree(layers.GatedResidualAdaLN(EPS), both, x, a, *modulations(form, 3))
    rms = flat(partial(reference.norm_modulate, norm="rms"), 1, EPS)
    agree(layers.AdaLNModulate(EPS, norm="rms"), rms, x, *modulations(form, 2))
    both = flat(partial(reference.gate_residual_norm_modulate, norm="rms"), 2, EPS)
    agree(layers.GatedResidualAdaLN(EPS, norm="rms"), both, x, a, *modulations(form, 3))


def test_modulations_that_are_chunks_of_one_projection_get_their_gradients() -> None:
    x, projected = draw(B, N, D), draw(B, 6 * D)

    def through(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, projected: op(x, *projected.chunk(6, dim=1)[3:5])

    agree(through(layers.AdaLNModulate(EPS)), through(flat(reference.norm_modulate, 1, EPS)), x, projected)


def test_qk_norm_is_its_definition_with_gradients_to_its_parameters() -> None:
    layer = layers.QKNorm(D // H, EPS)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"]
    values = [draw(D // H, seed=i) for i in range(4)]

    def ours(qkv: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), qkv)

    agree(ours, lambda *inputs: reference.qk_norm(*inputs, EPS), draw(B, N, 3, H, D // H), *values)


class Normed(nn.Module):
    """q_norm and k_norm as a block of someone else's has them, and the packed forward beside PyTorch's own."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.q_norm, self.k_norm = make(), make()
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, qkv: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        q, k, v = qkv.transpose(1, 3).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            cos, sin = rope.unsqueeze(1).chunk(2, -1)
            factor = torch.complex(cos.to(q.dtype), sin.to(q.dtype))
            pairs = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
            q, k = (torch.view_as_real(pair * factor).flatten(-2) for pair in pairs)
        return q, k, v


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.RMSNorm(D // H, eps=EPS),
        lambda: nn.RMSNorm(D // H, eps=EPS, elementwise_affine=False),
        lambda: nn.LayerNorm(D // H, eps=EPS, elementwise_affine=False),
        nn.Identity,
    ],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_the_norms_that_a_block_has_are_computed_with_its_parameters_and_rope(
    make: Callable[[], nn.Module], rotated: bool
) -> None:
    torch.manual_seed(0)
    module, qkv = Normed(make), draw(B, N, 3, H, D // H)
    rope = torch.randn(1, N, D // H) if rotated else None
    leaves = (qkv, *module.parameters())

    def gradients(compute: Callable[..., Any]) -> list[Tensor]:
        outs = compute(qkv, rope)
        return [*outs, *torch.autograd.grad(outs, leaves, [torch.cos(out.detach()) for out in outs])]

    ours = gradients(layers.PackedQKNorm.forward.__get__(module))
    for one, other in zip(ours, gradients(module), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_qk_norm_by_rms_has_weights_alone() -> None:
    layer, qkv = layers.QKNorm(D // H, EPS, norm="rms"), draw(B, N, 3, H, D // H)
    assert [name for name, _ in layer.named_parameters()] == ["q_norm.weight", "k_norm.weight"]
    for one, other in zip(layer(qkv), reference.qk_norm(qkv, eps=EPS, norm="rms"), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="QKNorm: norm = 'l2'; one of layer, rms is needed"):
        layers.QKNorm(4, norm="l2")


def test_the_losses_are_means_over_the_samples() -> None:
    q, f, null = draw(B, N, D), draw(B, N, D, seed=1), draw(B, N, D, seed=2)  # gradients of targets aren't taken
    weight = torch.tensor([0.2, 0.0, 1.7])
    cosine = -nn.functional.cosine_similarity(q, f, dim=-1).mean(1)
    torch.testing.assert_close(layers.AlignLoss()(q, f), cosine.mean())
    torch.testing.assert_close(layers.AlignLoss()(q, f, weight), (weight * cosine).mean())
    guided = null + 3.5 * (f - null)
    torch.testing.assert_close(layers.GuidedFeatureLoss(3.5)(q, f, null), (q - guided).square().mean())
    index = torch.tensor([2, 0])
    value = layers.GuidedFeatureLoss(3.5, "cosine")(q, f[:2], null[:2], weight[:2], index)
    expected = -nn.functional.cosine_similarity(q[index], guided[:2], dim=-1).mean(1)
    torch.testing.assert_close(value, (weight[:2] * expected).mean())
    (dq,) = torch.autograd.grad(value, q)
    torch.testing.assert_close(dq, torch.autograd.grad((weight[:2] * expected).mean(), q)[0], rtol=1e-5, atol=1e-7)


def test_no_supervised_sample_gives_zero_and_not_nan() -> None:
    none, index = torch.zeros(0, N, D), torch.zeros(0, dtype=torch.int64)
    assert layers.GuidedFeatureLoss(2.0)(draw(B, N, D), none, none, None, index) == 0


def test_one_row_a_token_is_refused_in_one_line() -> None:
    x, per_token = draw(B, N, D), draw(B, N, D, seed=1)
    for call in (
        lambda: layers.AdaLNModulate()(x, per_token, per_token),
        lambda: layers.GateResidual()(x, x, per_token),
        lambda: layers.GatedResidualAdaLN()(x, x, per_token, per_token, per_token),
        lambda: layers.AdaLNModulate()(x, draw(2, D), draw(2, D)),
    ):
        with pytest.raises(ValueError, match=r"^\w+: \w+ has shape .* \(B, D\) or \(B, 1, D\) is needed.*$") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="GuidedFeatureLoss: loss = 'l1'; one of mse, cosine, normalized_mse"):
        layers.GuidedFeatureLoss(1.0, "l1")
    with pytest.raises(ValueError, match="AdaLNModulate: norm = 'l2'; one of layer, rms is needed"):
        layers.AdaLNModulate(norm="l2")


WITHOUT_CONSTRUCTOR = [
    layers.NormModulate, layers.GateResidual, layers.GateResidualNormModulate, layers.PackedQKNorm, layers.AlignLoss,
    layers.FusedDiTBlock, layers.FusedFinalLayer, layers.FusedAttention, layers.FusedGELU, layers.FusedSwiGLU,
    layers.FusedLinear,
]  # fmt: skip


@pytest.mark.parametrize("layer", WITHOUT_CONSTRUCTOR, ids=lambda layer: layer.__name__)
def test_a_layer_for_kernelize_has_no_constructor_and_no_member_of_its_own(layer: type[nn.Module]) -> None:
    """The rules of `kernels.layer._validate_layer` in kernels 0.17."""
    assert layer.__init__ is nn.Module.__init__ and layer.has_backward and layer.can_torch_compile
    members = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert members == {"has_backward", "can_torch_compile"}


class Plain(nn.Module):
    """A modulated norm as others write it."""

    def __init__(self, affine: bool = False, norm: type[nn.Module] = nn.LayerNorm, eps: float | None = EPS) -> None:
        super().__init__()
        self.norm = norm(D, elementwise_affine=affine, eps=eps)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_layer_bound_to_a_module_takes_its_norm_and_eps_and_refuses_its_affine(norm: type[nn.Module]) -> None:
    inputs = draw(B, N, D), draw(B, D), draw(B, D, seed=1)
    plain = Plain(norm=norm)
    ours = run(lambda *tensors: layers.NormModulate.forward(plain, *tensors), *inputs)
    for one, other in zip(ours, run(plain, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Plain: norm has a weight"):
        layers.NormModulate.forward(Plain(affine=True, norm=norm), *inputs)
    with pytest.raises(ValueError, match="Plain: norm has eps = None; a number is needed"):
        layers.NormModulate.forward(Plain(norm=nn.RMSNorm, eps=None), *inputs)
    packed = layers.QKNorm(4)
    packed.k_norm = nn.RMSNorm(4)
    with pytest.raises(
        ValueError, match="q_norm and k_norm are LayerNorm and RMSNorm; two LayerNorms, RMSNorms or Iden"
    ):
        packed(draw(B, N, 3, H, 4))
    packed.k_norm = nn.LayerNorm(4, eps=EPS)
    with pytest.raises(ValueError, match="of one eps"):
        packed(draw(B, N, 3, H, 4))
    packed.q_norm = packed.k_norm = nn.RMSNorm(4)
    with pytest.raises(ValueError, match="q_norm has eps = None; a number is needed"):
        packed(draw(B, N, 3, H, 4))
    packed.q_norm = packed.k_norm = nn.LayerNorm(4, bias=False)
    with pytest.raises(ValueError, match="norm = 'layer' with q_weight, k_weight"):
        packed(draw(B, N, 3, H, 4))


def test_a_block_s_rms_norm_without_weight_runs_as_the_op_and_with_one_as_it_is() -> None:
    x, a, vectors = draw(B, N, D), draw(B, N, D, seed=1), [draw(B, D, seed=i) for i in (2, 3, 4)]
    for affine in (False, True):
        norm, weight = nn.RMSNorm(D, eps=EPS, elementwise_affine=affine), torch.ones(D)
        if affine:
            weight = nn.init.normal_(norm.weight)
        with Calls() as calls:
            ours = run(partial(layers.gated_modulated, norm), x, a, *vectors)
            ours += run(partial(layers.modulated, norm), x, *vectors[1:])
        used = {"gate_residual_norm_modulate", "norm_modulate"}
        assert used <= {*calls.seen} if not affine else not used & {*calls.seen}
        x_out = x + vectors[0].unsqueeze(1) * a
        shift, scale = (vector.unsqueeze(1) for vector in vectors[1:])
        h, h_out = (v * (v.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight for v in (x, x_out))
        for found, truth in ((ours[0], x_out), (ours[1], h_out * (1 + scale) + shift)):
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[2 + 5], h * (1 + scale) + shift, rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    """As in timm, with whatever `between` puts there."""

    def __init__(self, width: int, heads: int, **between: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        for name, module in between.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


class SwiGLUFFN(nn.Module):
    """As in LightningDiT and DINOv2."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden, bias), nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(nn.functional.silu(gate) * value)


REST_OF_A_BLOCK = [
    (layers.FusedAttention, lambda: Attention(64, 2, q_norm=nn.Identity(), proj_drop=nn.Dropout(0.0)), (2, 32, 64)),
    (layers.FusedAttention, lambda: Attention(D, H), (B, N, D)),  # sizes that no kernel takes
    (layers.FusedGELU, lambda: nn.GELU(approximate="tanh"), (B, N, D)),
    (layers.FusedGELU, nn.GELU, (B, N, D)),
    (layers.FusedSwiGLU, lambda: SwiGLUFFN(D, 31, bias=True), (B, N, D)),
    (layers.FusedSwiGLU, lambda: SwiGLUFFN(D, 20, bias=False), (N, D)),
    (layers.FusedLinear, lambda: nn.Linear(384, 400), (1, 260, 384)),  # large enough for oneDNN
    (layers.FusedLinear, lambda: nn.Linear(D, 7), (B, N, D)),
    (layers.FusedLinear, lambda: nn.Linear(D, 7, bias=False), (N, D)),
]


@pytest.mark.parametrize(("layer", "make", "shape"), REST_OF_A_BLOCK)
def test_the_rest_of_a_block_computes_what_its_modules_do(
    layer: type[nn.Module], make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module, x = make(), draw(*shape)
    leaves = (x, *module.parameters())

    def gradients(compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = compute(x)
        return [y, *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel()).float()).view_as(y))]

    truth = gradients(module)
    bound = layer.forward.__get__(module)
    for compute in (bound, torch.compile(bound, fullgraph=True, backend="aot_eager")):
        for ours, theirs in zip(gradients(compute), truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(bound(x), module(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("between", [nn.LayerNorm(12), nn.Dropout(0.1)])
def test_attention_with_something_in_between_is_refused(between: nn.Module) -> None:
    module = Attention(D, H, between=between)
    with pytest.raises(ValueError, match=r"^FusedAttention: between = .* would be left out; only qkv and proj are"):
        layers.FusedAttention.forward(module, draw(B, N, D))


class Block(nn.Module):
    """A block of one's own made of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(D, 5 * D)
        self.enter, self.between = layers.AdaLNModulate(EPS), layers.GatedResidualAdaLN(EPS)
        self.qkv, self.qk_norm, self.mlp = nn.Linear(D, 3 * D), layers.QKNorm(D // H, EPS), nn.Linear(D, D)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp = self.modulation(c).unsqueeze(1).chunk(5, dim=-1)  # (B, 1, D)
        q, k, v = self.qk_norm(self.qkv(self.enter(x, shift, scale)).unflatten(-1, (3, H, -1)))
        # Attention alone has no gradient to the bias of its keys, as softmax doesn't see a shift.
        a = nn.functional.scaled_dot_product_attention(q, k, k * v).transpose(1, 2).flatten(2)
        x, y = self.between(x, a, gate, shift_mlp, scale_mlp)
        return x + self.mlp(y)


class Trained(nn.Module):
    """Two blocks and both losses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.align, self.guided = layers.AlignLoss(), layers.GuidedFeatureLoss(2.5, "normalized_mse")

    def forward(self, x: Tensor, c: Tensor, f: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return self.align(x, f) + self.guided(x, f, f.flip(0))


@pytest.fixture
def model() -> Trained:
    torch.manual_seed(1)
    model = Trained()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


INPUTS = draw(B, N, D, grad=False), draw(B, D, grad=False), draw(B, N, D, seed=3, grad=False)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, whole, and the loss."""
    model.zero_grad()
    loss = model(*INPUTS)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    assert all(grad is not None and bool(grad.any()) for grad in whole.values())
    return {"loss": loss.detach(), **whole}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        error = (grad.double() - theirs[name].double()).abs().max() / theirs[name].double().abs().max()
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_model_of_layers_compiles_into_one_graph(backend: str, model: Trained) -> None:
    torch._dynamo.reset()
    exact = gradients(model)
    model.compile(fullgraph=True, backend=backend)
    close(gradients(model), exact, 1e-5)


def test_autocast_keeps_the_stream_in_its_dtype_and_the_gradients_near_those_of_float32(model: Trained) -> None:
    exact = gradients(model)
    seen = []
    model.blocks[0].between.register_forward_hook(lambda module, inputs, outs: seen.extend(out.dtype for out in outs))
    with torch.autocast("cpu", torch.bfloat16):
        close(gradients(model), exact, 0.1)
    assert seen == [torch.float32] * 2
    x, shift, scale = draw(B, N, D).bfloat16(), draw(B, D), draw(B, D)
    assert layers.AdaLNModulate()(x, shift, scale).dtype == torch.bfloat16


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_fsdp2_shards_a_model_of_layers(one_rank: None, compiled: bool, model: Trained) -> None:
    exact = gradients(model)
    for block in model.blocks:
        if compiled:
            block.compile(fullgraph=True, backend="aot_eager")
        fully_shard(block)
    fully_shard(model)
    close(gradients(model), exact, 1e-5)


def test_fsdp2_may_keep_parameters_in_bfloat16(one_rank: None, model: Trained) -> None:
    exact = gradients(model)
    for block in model.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True))
    fully_shard(model)
    close(gradients(model), exact, 0.1)


def test_layers_are_copied_pickled_and_printed_like_others(model: Trained) -> None:
    exact = gradients(model)
    close(gradients(copy.deepcopy(model)), exact, 1e-6)
    close(gradients(pickle.loads(pickle.dumps(model))), exact, 1e-6)
    assert "AdaLNModulate(eps=0.03)" in repr(model)
    assert repr(layers.GatedResidualAdaLN(0.03, norm="rms")) == "GatedResidualAdaLN(eps=0.03, norm='rms')"
    assert "GuidedFeatureLoss(cfg_scale=2.5, loss='normalized_mse')" in repr(model)
