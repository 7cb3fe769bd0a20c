"""MMDiT against independent truths: its published size and keys, a plain rewriting of it, its FLOP count."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from st_fast import kernels
from st_fast.model import DiffusionTransformer, MMDiT, build, unfilled
from st_fast.model.compiling import CompiledBlocks, checkpoint_activations
from st_fast.model.layers import sincos_positions, unpatchify
from st_fast.recipe import cost
from st_fast.recipe.architecture import Model, resolve_model

CPU = torch.device("cpu")
TABLE = kernels.select(dict.fromkeys(kernels.TABLE, "reference"), CPU)
TINY = Model(
    "custom", depth=3, width=48, heads=4, patch=2, channels=3, latent_size=8, network="mmdit", text_width=20,
    text_length=5, mlp_ratio=3.5,
)  # fmt: skip
COCO = resolve_model(Model("MMDiT-24/2", text_width=768, text_length=77, qk_norm=False, zero_init=False))


def with_life(config: Model, table: kernels.KernelTable = TABLE, seed: int = 0) -> DiffusionTransformer:
    """A model whose zero-initialised parts are filled, so that every part matters; float64."""
    model = build(config, table, seed).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*model.parameters(),):
        if parameter is not model.pos_embed:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def inputs(config: Model, batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.channels, config.latent_size, config.latent_size, generator=generator, dtype=dtype)
    text = torch.randn(batch, config.text_length, config.text_width, generator=generator, dtype=dtype)
    return x, torch.linspace(0.15, 0.9, batch, dtype=dtype), text


def plainly(model: DiffusionTransformer, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The velocity and the image's stream after each block, written down from the papers."""
    w, config = model.state_dict(), model.config

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm(value) * (1 + scale[:, None]) + shift[:, None]

    def heads(name: str, value: Tensor) -> list[Tensor]:
        q, k, v = linear(f"{name}.attn.qkv", value).chunk(3, dim=-1)
        parts = [part.unflatten(-1, (config.heads, -1)).transpose(1, 2) for part in (q, k, v)]
        if config.qk_norm:
            for place, ln in enumerate(("ln_q", "ln_k")):
                weight, bias = w[f"{name}.attn.{ln}.weight"], w[f"{name}.attn.{ln}.bias"]
                parts[place] = norm(parts[place]) * weight + bias
        return parts

    p = config.patch
    patches = F.unfold(x, p, stride=p).transpose(1, 2)  # (B, N, C·p·p)
    x = linear("x_embedder.proj", patches) + sincos_positions(config.width, config.grid)
    angles = t[:, None] * torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(128) / 128)
    c = torch.cat((angles.cos(), angles.sin()), -1).double()
    c = F.silu(linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", c))))
    u, streams = linear("context_embedder", text), []
    for number in range(config.depth):
        image, words = f"joint_blocks.{number}.x_block", f"joint_blocks.{number}.context_block"
        mi, mt = (linear(f"{name}.adaLN_modulation.1", c) for name in (image, words))
        mi, mt = mi.chunk(6, dim=1), mt.chunk(mt.shape[1] // config.width, dim=1)
        both = zip(heads(words, modulated(u, *mt[:2])), heads(image, modulated(x, *mi[:2])), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in both)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        for name, m in ((image, mi), (words, mt)):
            if len(m) == 2:
                continue
            value, attended = (x, out[:, u.shape[1] :]) if name is image else (u, out[:, : u.shape[1]])
            value = value + m[2][:, None] * linear(f"{name}.attn.proj", attended)
            inner = F.gelu(linear(f"{name}.mlp.fc1", modulated(value, m[3], m[4])), approximate="tanh")
            value = value + m[5][:, None] * linear(f"{name}.mlp.fc2", inner)
            if name is image:
                after = value
            else:
                u = value
        x = after
        streams.append(x)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    return unpatchify(
        linear("final_layer.linear", modulated(x, shift, scale)), p, config.channels, config.grid
    ), streams


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("modulation", ["per_block", "one"])
def test_it_is_the_published_network(qk_norm, modulation):
    model = with_life(replace(TINY, qk_norm=qk_norm, modulation=modulation))
    x, t, text = inputs(TINY)
    velocity, streams = plainly(model, x, t, text)
    found, tapped = model(x, t, text, (1, 2, 3))
    torch.testing.assert_close(found, velocity, rtol=1e-5, atol=1e-5)  # sines of float32 angles
    for one, other in zip(tapped, streams, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for depth in (1, 2, 3):
        torch.testing.assert_close(model.features(x, t, text, depth), streams[depth - 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x, t, text)[1], model.embed_tokens(x), rtol=0, atol=0)
    null = model.null_context.expand_as(text)
    for branch, condition in zip(model.guided_features(x, t, text, 2), (text, null), strict=True):
        torch.testing.assert_close(branch, plainly(model, x, t, condition)[1][1], rtol=1e-5, atol=1e-5)


def test_every_trained_weight_gets_a_gradient_and_the_same_one_compiled_and_computed_again():
    torch._dynamo.reset()
    x, t, text = inputs(TINY, dtype=torch.float32)
    found = []
    for compiled, again in ((False, "none"), (False, "attention"), (False, "block"), (True, "none")):
        model = with_life(TINY, kernels.select({}, CPU)).float()
        if compiled:
            model.run_block = CompiledBlocks(pytest.fail, dynamic=False)
            model.run_block._run = torch.compile(model.run_block._plain, fullgraph=True, backend="aot_eager")
        checkpoint_activations(model, again)
        velocity, stream = model(x, t, text, 2)
        (velocity.square().sum() + stream.square().sum()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_biases_whose_gradients_are_left_to_the_next_op_get_the_same_ones(qk_norm):
    x, t, text = inputs(TINY, dtype=torch.float32)
    found = []
    for how in ("fused", "reference"):
        table = kernels.select({"bias_gradients": how}, CPU)
        model = with_life(replace(TINY, qk_norm=qk_norm), table).float()
        assert table.bias_gradients == (how == "fused")
        velocity, stream = model(x, t, text, 2)
        (velocity.square().mean() + stream.square().mean()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, truth in found[1].items():
        torch.testing.assert_close(found[0][name], truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()), msg=name)


def test_the_published_size_has_the_parameters_and_keys_of_the_released_model():
    with torch.device("meta"):
        model = MMDiT(COCO, TABLE)
    assert sum(p.numel() for p in model.parameters()) == COCO.parameters
    # Counted once from the released module without its projectors, whose keys these are.
    assert COCO.parameters - 77 * 768 == 505_267_216
    last = {key for key in model.state_dict() if key.startswith("joint_blocks.23.context_block")}
    assert last == {
        f"joint_blocks.23.context_block.{name}.{kind}"
        for name in ("attn.qkv", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("depth", [None, 2])
def test_the_flop_formula_agrees_with_torchs_counter(depth):
    config = replace(TINY, width=192, heads=6, channels=4, latent_size=16, text_length=16, text_width=96)
    model, (x, t, text) = build(config, TABLE, 0), inputs(config, 2, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x, t, text) if depth is None else model.features(x, t, text, depth)
    # `features` also projects a block's modulation too many, and of the text's last block all six vectors.
    slack = 0 if depth is None else 2 * 2 * (6 + 4) * config.width**2
    assert counter.get_total_flops() == pytest.approx(2 * 2 * cost.trunk_macs(config, depth) + slack, rel=1e-3)


def test_the_architectures_layers_are_the_networks():
    model = MMDiT(TINY, TABLE)
    found = model.state_dict()
    assert list(model.blocks) == list(model.joint_blocks)
    blocks = [(f"joint_blocks.{i}.{layer.name}", layer) for i in range(3) for layer in TINY.block_layers(ends=i == 2)]
    declared = dict(blocks) | {layer.name: layer for layer in (*TINY.embedders, *TINY.final_layers)}
    assert {f"{name}.weight" for name in declared} == {
        key for key in found if key.endswith("weight") and "ln_" not in key
    }
    assert sum(tensor.numel() for tensor in found.values()) == TINY.parameters
    for name, layer in declared.items():
        assert found[f"{name}.weight"].flatten(1).shape == (layer.outputs, layer.inputs)


def test_a_new_one_predicts_nothing_unless_it_is_initialised_as_published():
    x, t, text = inputs(TINY, dtype=torch.float32)
    model = build(TINY, TABLE, 0)
    velocity, streams = model(x, t, text, (0, 1, 2, 3))
    assert not velocity.any() and all(torch.equal(stream, streams[0]) for stream in streams)
    modulations = {key: w for key, w in model.state_dict().items() if "adaLN_modulation" in key}
    assert len(modulations) == 2 * (2 * TINY.depth + 1) and not any(w.any() for w in modulations.values())
    published = build(replace(TINY, zero_init=False), TABLE, 0)
    assert published(x, t, text)[0].std() > 0.1


def test_a_new_ones_weights_are_drawn_as_published_and_constants_are_not_trained():
    model = build(replace(TINY, zero_init=False), TABLE, 0)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            assert not weight.any(), name
        elif name.startswith("t_embedder"):
            assert weight.detach().std() == pytest.approx(0.02, rel=0.1), name
        elif "ln_" not in name and weight.requires_grad:
            bound = (6 / sum(weight.flatten(1).shape)) ** 0.5  # Xavier's
            assert all(0.97 * bound < side <= 1.001 * bound for side in (weight.max(), -weight.min())), name
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"pos_embed", "null_context"}
    assert {id(weight) for weight in model.constants} == {id(model.pos_embed), id(model.null_context)}


def test_an_unfilled_model_takes_all_weights_over():
    drawn, empty = with_life(TINY).bfloat16(), unfilled(TINY, TABLE, CPU, torch.bfloat16)
    empty.load_state_dict(drawn.state_dict())
    x, t, text = inputs(TINY, dtype=torch.bfloat16)
    assert torch.equal(empty(x, t, text)[0], drawn(x, t, text)[0])
    assert torch.equal(empty(x.float(), t.float(), text.float())[0], drawn(x, t, text)[0])
    assert not empty.null_context.requires_grad
