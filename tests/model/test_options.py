"""The options of a network's block, alone and together, against the block written out plainly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from st_fast.kernels.table import KernelTable, select
from st_fast.model.layers import unpatchify
from st_fast.model.layout import Layout, Route
from st_fast.model.mmdit import MMDiT
from st_fast.model.sit import SiT
from st_fast.recipe import RecipeError, cost
from st_fast.recipe.architecture import Model, check_shapes, ratio_of, resolve_model

BASE = Model(
    depth=4, width=48, heads=4, patch=2, channels=3, latent_size=(8, 12), num_classes=5, mlp_ratio=3.5, zero_init=False
)  # 4 × 6 = 24 tokens, heads of 12  # fmt: skip
TOKENS = 24
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""Times and angles are float32."""
TEXT = replace(BASE, network="mmdit", text_width=7, text_length=5)
ALL = {
    "mlp": "swiglu", "norm": "rms_affine", "position": "both", "qk_norm": "rms", "qkv_bias": False,
    "value_residual": True, "registers": 3,
}  # fmt: skip
SINGLE = [
    {"mlp": "swiglu"}, {"mlp": "relu2"}, {"norm": "rms"}, {"norm": "rms_affine"}, {"position": "rope"},
    {"position": "both"},
    {"qk_norm": "rms"}, {"qk_norm": "off"}, {"qk_norm": "off", "position": "rope"},
    {"qk_norm": "rms", "position": "rope"}, {"qkv_bias": False}, {"value_residual": True},
    {"value_residual": True, "qk_norm": "off"}, {"registers": 3}, {"registers": 2, "position": "rope"},
]  # fmt: skip
OF_TEXT = [option for option in SINGLE if not {"value_residual", "registers"} & set(option)]


def network(config: Model, table: KernelTable | None = None) -> SiT | MMDiT:
    """In float64, every weight of a size that matters; of the ops' definitions, or another table."""
    torch.manual_seed(0)
    config = resolve_model(config)
    check_shapes(config)
    reference = ("norm_modulate", "gate_residual_norm_modulate", "qk_norm", "swiglu")
    table = table or select(dict.fromkeys(reference, "reference"), torch.device("cpu"))
    model = (SiT if config.network == "sit" else MMDiT)(config, table).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 8, 12, generator=generator, dtype=torch.float64)
    t = torch.rand(batch, generator=generator, dtype=torch.float64)
    order = torch.stack([torch.randperm(TOKENS, generator=generator) for _ in range(batch)])
    return x, t, torch.arange(batch) % 5, order


def normed(config: Model, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if config.norm == "layer":
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    h = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return h * weights[f"{name}.weight"] if config.norm == "rms_affine" else h


def turned(x: Tensor, place: Tensor, head: int) -> Tensor:
    """x (B, N, H, d) as complex numbers, turned by each token's (row, column): place (B, N, 2)."""
    angles = []
    for axis in (0, 1):
        for k in range(head // 4):
            angles.append(place[..., axis] * 10_000 ** (-2 * k / (head / 2)))
    turn = torch.polar(torch.ones_like(place[..., :1]), torch.stack(angles, -1))  # (B, N, d/2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, :, None]).flatten(-2)


def by_hand(
    model: SiT, x: Tensor, t: Tensor, labels: Tensor, kept: Tensor | None = None, route: Route | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The velocity and the streams; blocks first + 1 … last of a route see the tokens at `kept` (B, K) alone."""
    config, w = model.config, model.state_dict()
    registers, rows = config.registers, torch.arange(len(x))[:, None]
    stream = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    if config.position != "rope":
        stream = stream + w["pos_embed"]
    c = F.silu(model.t_embedder(t) + model.y_embedder(labels))
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"), -1).flatten(0, 1).double()
    places = torch.cat((torch.zeros(registers, 2, dtype=torch.float64), places)).expand(len(x), -1, -1)
    if registers:
        stream = torch.cat((w["register_tokens"].expand(len(x), -1, -1), stream), 1)
    first, streams = None, []
    for number in range(1, config.depth + 1):
        name = f"blocks.{number - 1}"

        def linear(what: str, y: Tensor, name: str = name) -> Tensor:
            return F.linear(y, w[f"{name}.{what}.weight"], w.get(f"{name}.{what}.bias"))

        inside = route is not None and route.first < number <= route.last
        at = torch.arange(stream.shape[1]).expand(len(x), -1)
        if inside:
            assert kept is not None
            at = torch.cat((torch.arange(registers).expand(len(x), -1), kept + registers), 1)
        h, place = stream[rows, at], places[rows, at]
        m = [v[:, None] for v in linear("adaLN_modulation.1", c).chunk(6, dim=1)]
        y = normed(config, w, f"{name}.norm1", h) * (1 + m[1]) + m[0]
        q, k, v = linear("attn.qkv", y).unflatten(-1, (3, config.heads, -1)).unbind(2)  # (B, N, H, d)
        if config.qk_norm:
            of_heads = replace(config, norm="layer" if config.qk_norm is True else "rms_affine")
            q, k = (normed(of_heads, w, f"{name}.attn.{n}", z) for n, z in (("q_norm", q), ("k_norm", k)))
        if config.qk_norm is True:
            q, k = (
                z * w[f"{name}.attn.{n}.weight"] + w[f"{name}.attn.{n}.bias"] for n, z in (("q_norm", q), ("k_norm", k))
            )
        if config.position != "sincos":
            q, k = (turned(z, place, config.head) for z in (q, k))
        if config.value_residual:
            if first is None:
                first = v
            else:
                share = w[f"{name}.attn.v1_lambda"]
                v = share * first[rows, at] + (1 - share) * v
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(config.head)
        a = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)
        h = h + m[2] * linear("attn.proj", a)
        y = normed(config, w, f"{name}.norm2", h) * (1 + m[4]) + m[3]
        if config.mlp == "swiglu":
            gate, value = linear("mlp.w12", y).chunk(2, -1)
            made = linear("mlp.w3", gate * gate.sigmoid() * value)
        else:
            h1 = linear("mlp.fc1", y)
            made = linear("mlp.fc2", h1.clamp(min=0) ** 2 if config.mlp == "relu2" else F.gelu(h1, approximate="tanh"))
        h = h + m[5] * made
        streams.append(h[:, registers:])
        stream = stream.index_put((rows, at), h) if inside else h
    shift, scale = F.linear(c, w["final_layer.adaLN_modulation.1.weight"],
                            w["final_layer.adaLN_modulation.1.bias"])[:, None].chunk(2, -1)  # fmt: skip
    y = normed(config, w, "final_layer.norm_final", stream[:, registers:]) * (1 + scale) + shift
    return unpatchify(model.final_layer.linear(y), 2, 3, (4, 6)), streams


@pytest.mark.parametrize("options", [{}, *SINGLE, ALL], ids=str)
def test_a_network_with_options_is_the_one_written_out(options):
    model, (x, t, labels, order) = network(replace(BASE, **options)), inputs()
    velocity, streams = by_hand(model, x, t, labels)
    found, taps = model(x, t, labels, (1, 4))
    torch.testing.assert_close(found, velocity, **CLOSE)
    for ours, theirs in zip(taps, (streams[0], streams[3]), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    moved, _ = model(x, t, labels, 0, Layout(order, (TOKENS,)))
    torch.testing.assert_close(moved, velocity, **CLOSE)
    of_y, of_null = model.guided_features(x, t, labels, 2)
    torch.testing.assert_close(of_y, streams[1], **CLOSE)
    assert (of_null - of_y).abs().max() > 1e-3


@pytest.mark.parametrize("route", [Route(1, 3, (10,)), Route(2, 3, (1,))])
@pytest.mark.parametrize("options", [{"position": "rope"}, {"value_residual": True}, {"registers": 3}, ALL], ids=str)
def test_what_goes_with_a_token_goes_with_it_on_a_route(options, route):
    model, (x, t, labels, order) = network(replace(BASE, **options)), inputs()
    layout = Layout(order, (TOKENS,), route=route)
    velocity, streams = model(x, t, labels, (1, 2, 3, 4), layout)
    expected, by_block = by_hand(model, x, t, labels, layout.kept, route)
    torch.testing.assert_close(velocity, expected, **CLOSE)
    for ours, theirs in zip(streams, by_block, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("config", [replace(BASE, **o) for o in [*SINGLE, ALL]] + [replace(TEXT, **o) for o in OF_TEXT])
def test_parameters_layers_and_flops_follow_from_the_declaration(config):
    model = network(replace(config, internal_head=2)).float()
    config = model.config
    assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters
    found = model.state_dict()
    blocks = "blocks" if config.network == "sit" else "joint_blocks"
    declared = {f"{blocks}.1.{layer.name}": layer for layer in config.block_layers()}
    linear = {key.removesuffix(".weight") for key, tensor in found.items()
              if key.startswith(f"{blocks}.1.") and key.endswith("weight") and tensor.ndim == 2}  # fmt: skip
    assert set(declared) == linear
    for name, layer in declared.items():
        assert found[f"{name}.weight"].shape == (layer.outputs, layer.inputs)
        assert (f"{name}.bias" in found) == layer.bias
    x, t, labels, _ = inputs(2)
    condition = labels if config.network == "sit" else torch.randn(2, 5, 7)
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_only:
        model(x.float(), t.float(), condition, (-1,))
    expected = 2 * 2 * cost.trunk_macs(config)
    assert expected * 0.99 <= counter.get_total_flops() <= expected


def test_every_weight_of_a_modern_block_learns_and_an_attention_may_be_computed_again():
    from st_fast.model.compiling import checkpoint_activations

    gradients = []
    for again in ("none", "attention", "block"):
        model, (x, t, labels, order) = network(replace(BASE, **ALL)), inputs()
        checkpoint_activations(model, again)
        velocity, stream = model(x, t, labels, 3, Layout(order, (TOKENS,), route=Route(1, 3, (10,))))
        (velocity.square().mean() + stream.square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert all(torch.equal(gradient, others[name]) for others in gradients[1:]), name


@pytest.mark.parametrize("bias_gradients", ["fused", "reference"])
@pytest.mark.parametrize("config", [replace(BASE, **ALL), replace(TEXT, **{k: ALL[k] for k in list(ALL)[:4]})], ids=str)
def test_the_ops_of_a_modern_block_give_what_their_definitions_give(config, bias_gradients):
    config, found = replace(config, qkv_bias=True, width=64, heads=2, num_classes=6), []
    for choice in ("fused", "reference"):
        names = ("norm_modulate", "gate_residual_norm_modulate", "qk_norm", "swiglu")
        table = select(dict.fromkeys(names, choice) | {"bias_gradients": bias_gradients}, torch.device("cpu"))
        model = network(config, table).float()
        x, t, labels, order = (value.float() if value.is_floating_point() else value for value in inputs())
        condition = (
            labels if config.network == "sit" else torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2))
        )
        velocity, stream = model(x, t, condition, 3, Layout(order, (TOKENS,), route=Route(1, 3, (10,))))
        (velocity.square().mean() + stream.square().mean()).backward()
        found.append((velocity.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (ours, gradients), (theirs, expected) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    for name, gradient in gradients.items():
        if (wanted := expected[name]) is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=name)


def test_rope_of_another_grid_has_places_of_the_same_range():
    model = network(replace(BASE, position="rope", registers=1))
    own, larger = model.rope((4, 6)), model.rope((8, 12))
    assert own is model.rope((4, 6)) and own.shape == (1, 25, 12) and larger.shape == (1, 97, 12)
    of_token = {grid: table[0, 1:].unflatten(0, grid) for grid, table in (((4, 6), own), ((8, 12), larger))}
    torch.testing.assert_close(of_token[8, 12][::2, ::2], of_token[4, 6])
    assert torch.equal(own[0, 0], torch.tensor([1.0] * 6 + [0.0] * 6)), "a register is not turned"
    x, t, labels, _ = inputs()
    assert model(torch.cat((x, x), 2), t, labels)[0].shape == (3, 3, 16, 12)


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2730), (1152, 3072), (1536, 4096), (1792, 4778)])
def test_swiglus_hidden_channels_are_lightningdits(width, hidden):
    assert Model(depth=1, width=width, heads=16, patch=1, mlp="swiglu").hidden == hidden


@pytest.mark.parametrize("width", [7, 48, 384, 1000])
def test_some_ratio_gives_every_number_of_hidden_channels(width):
    for hidden in range(1, 300):
        ratio = ratio_of(hidden, width, "swiglu")
        assert Model(depth=1, width=width, heads=1, patch=1, mlp="swiglu", mlp_ratio=ratio).hidden == hidden


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"position": "rope", "heads": 8}, "model.heads = 8"),
        ({"value_residual": True, "depth": 1}, "model.value_residual = true"),
        ({"registers": 2, "network": "mmdit", "text_width": 7, "text_length": 5}, "model.registers = 2.* allowed: 0$"),
        ({"value_residual": True, "network": "mmdit", "text_width": 7, "text_length": 5}, "= true.* allowed: false$"),
    ],
)
def test_what_no_network_has_is_refused_in_one_line(options, words):
    with pytest.raises(RecipeError, match=words) as error:
        check_shapes(replace(BASE, **options))
    assert "\n" not in str(error.value) and "allowed" in str(error.value)


def test_older_spellings_and_names_mean_the_same_network():
    assert resolve_model(replace(BASE, qk_norm="layer")).architecture() == resolve_model(BASE).architecture()
    assert resolve_model(replace(BASE, qk_norm="off")).architecture()["qk_norm"] is False
    modern = resolve_model(replace(BASE, **ALL))
    assert set(ALL) <= set(modern.architecture()) and not set(ALL) & set(BASE.architecture()) - {"qk_norm"}
    assert sorted(difference.split()[0] for difference in modern.differences(BASE.architecture())) == sorted(ALL)
