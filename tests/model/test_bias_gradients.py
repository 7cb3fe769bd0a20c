"""A block's bias gradients summed by the ops after its layers: the same numbers, and no sum of the layer's own."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from st_fast import kernels
from st_fast.core.ranks import Ranks
from st_fast.kernels.common.plain import with_bias_gradient
from st_fast.model import SiT, build
from st_fast.model.compiling import CompiledBlocks, checkpoint_activations
from st_fast.model.layers import BlockLinear, SwiGLU, bias_left
from st_fast.model.smoke_test import validated_kernels
from st_fast.recipe.schema import Model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
OPS = {"gate_residual_norm_modulate": "fused", "gelu_tanh": "fused", "qk_norm": "fused"}
"""In csrc where it is built."""
SMALL = Model("custom", depth=2, width=48, heads=3, patch=2, channels=4, latent_size=8, num_classes=5)


def model(how: str, ops: dict[str, str] | None = None, dtype: torch.dtype = torch.float32) -> SiT:
    """The same trained-looking weights, rounded to bf16, whatever the choice."""
    made = build(SMALL, kernels.select({**(OPS if ops is None else ops), "bias_gradients": how}, CPU), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made.bfloat16().to(dtype)


def forward(net: SiT) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator).to(net.pos_embed.dtype)
    velocity, tapped = net(x, torch.tensor([0.2, 0.5, 0.7]), torch.tensor([1, 4, 2]), 1)
    return velocity.double().square().mean() + tapped.double().square().mean()


def gradients(net: SiT) -> dict[str, Tensor]:
    net.zero_grad()
    loss = forward(net)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def error(one: Tensor, truth: Tensor) -> float:
    return ((one.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("ops", [OPS, dict.fromkeys(OPS, "reference")], ids=["fused ops", "definitions"])
def test_all_gradients_are_those_of_the_layers_own_sums(ops: dict[str, str]) -> None:
    ours, plain = gradients(model("fused", ops)), gradients(model("reference", ops))
    assert ours.keys() == plain.keys() and torch.equal(ours["loss"], plain["loss"])
    for name, truth in plain.items():
        assert error(ours[name], truth.double()) < 1e-6, name


def test_in_bf16_they_are_as_exact_as_the_layers_own_sums() -> None:
    truth = gradients(model("reference", dict.fromkeys(OPS, "reference"), torch.float64))
    ours, plain = (gradients(model(how, dtype=torch.bfloat16)) for how in ("fused", "reference"))
    for name in truth:
        if name.endswith("bias"):
            assert error(ours[name], truth[name]) <= 2 * error(plain[name], truth[name]), name


def test_the_layers_of_a_block_take_no_sum_of_their_own() -> None:
    with torch.profiler.profile() as profile:  # bf16: no layer is oneDNN's, whose backward always sums
        gradients(model("fused", dtype=torch.bfloat16))
    sums = {event.key: event.count for event in profile.key_averages()}
    with torch.profiler.profile() as profile:
        gradients(model("reference", dtype=torch.bfloat16))
    more = {event.key: event.count for event in profile.key_averages()}
    assert more["aten::sum"] == sums["aten::sum"] + 4 * SMALL.depth  # qkv, proj, fc1, fc2


@pytest.mark.parametrize("what", ["attention", "block"])
def test_checkpointing_gives_the_same_bits(what: str) -> None:
    again = model("fused")
    checkpoint_activations(again, what)
    found, expected = gradients(again), gradients(model("fused"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("what", ["none", "attention", "block"])
def test_compiled_in_one_graph_it_is_as_eager(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    partitioned = functools.partial(torch.compile, backend="aot_eager_decomp_partition")  # Inductor's graphs
    monkeypatch.setattr(torch, "compile", partitioned)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = model("fused")
    compiled.run_block = CompiledBlocks(pytest.fail, dynamic=False)
    checkpoint_activations(compiled, what)
    found, expected = gradients(compiled), gradients(model("fused"))
    assert not torch._dynamo.utils.counters["graph_break"]
    for name, truth in expected.items():
        assert error(found[name], truth.double()) < 1e-5, name
    torch._dynamo.reset()


def test_a_frozen_bias_gets_no_gradient_and_the_others_theirs() -> None:
    net, whole = model("fused"), gradients(model("fused"))
    frozen = ["blocks.0.attn.proj.bias", "blocks.1.mlp.fc2.bias", "blocks.1.mlp.fc1.bias"]
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    found = gradients(net)
    assert found.keys() == whole.keys() - {*frozen}
    assert all(torch.equal(found[name], whole[name]) for name in found)


def test_without_gradients_no_bias_is_left_to_another_op() -> None:
    net = model("fused")
    layers = [layer for layer in net.modules() if isinstance(layer, BlockLinear)]
    assert len(layers) == 4 * SMALL.depth
    assert all(bias_left(layer) is layer.bias for layer in layers)
    with torch.no_grad():
        assert all(bias_left(layer) is None for layer in layers)
        assert torch.equal(forward(net), forward(model("reference")))
    assert all(bias_left(layer) is None for layer in model("reference").modules())


def test_a_layer_of_another_kind_in_its_place_sums_its_own() -> None:
    """As fp8 swaps them: the parameters stay, the forward is the new layer's."""
    net, expected = model("fused"), gradients(model("fused"))
    for block in net.blocks:
        for parent, name in ((block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            layer, other = getattr(parent, name), nn.Linear(1, 1)
            other.weight, other.bias = layer.weight, layer.bias
            setattr(parent, name, other)
    for name, grad in gradients(net).items():
        assert error(grad, expected[name].double()) < 1e-6, name


def test_every_bias_s_hook_runs_once() -> None:
    """What DDP and a sharded sum wait for."""
    net, seen = model("fused"), []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    assert sorted(seen) == [] and sorted(gradients(net).keys() - {"loss"}) == sorted(seen)


def test_the_smoke_test_before_training_keeps_the_choice() -> None:
    for how in ("fused", "reference"):
        said: list[str] = []
        table = validated_kernels({**OPS, "bias_gradients": how}, SMALL, Ranks(0, 1, CPU), torch.float32, said.append)
        assert table.bias_gradients == (how == "fused") and not said


def test_it_is_right_without_qk_norm() -> None:
    def made(how: str) -> SiT:
        net = build(replace(SMALL, qk_norm=False), kernels.select({"bias_gradients": how}, CPU), 0)
        generator = torch.Generator().manual_seed(0)
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return net

    ours, plain = gradients(made("fused")), gradients(made("reference"))
    assert all(error(ours[name], truth.double()) < 1e-6 for name, truth in plain.items())


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize("op", ["fused", "reference"])
def test_swiglu_is_its_formula_with_all_gradients_wherever_the_biases_are_summed(op: str, how: str) -> None:
    torch.manual_seed(0)
    mlp = SwiGLU(22, 17, kernels.select({"swiglu": op, "bias_gradients": how}, CPU))
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == {
        "w12.weight": (34, 22), "w12.bias": (34,), "w3.weight": (22, 17), "w3.bias": (22,),
    }  # fmt: skip
    assert mlp.w12.own_bias.requires_grad == mlp.w3.own_bias.requires_grad == (how == "reference")
    x, dy = 2 * torch.randn(3, 5, 22) + 0.3, torch.randn(3, 5, 22)
    y = with_bias_gradient(mlp(x.requires_grad_()), bias_left(mlp.w3))  # as the op after the MLP does
    leaves = {"x": x, **dict(mlp.named_parameters())}
    ours = torch.autograd.grad(y, list(leaves.values()), dy)

    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    h = exact["x"] @ exact["w12.weight"].T + exact["w12.bias"]
    gate, value = h[..., :17], h[..., 17:]
    truth = (gate / (1 + torch.exp(-gate)) * value) @ exact["w3.weight"].T + exact["w3.bias"]
    assert error(y.detach(), truth.detach()) < 1e-6
    expected = torch.autograd.grad(truth, list(exact.values()), dy.double())
    for name, found, right in zip(exact, ours, expected, strict=True):
        assert error(found, right) < 1e-6, name
