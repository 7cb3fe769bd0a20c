"""The network against independent truths: published sizes and keys, a plain rewriting of it, its FLOP count."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from st_fast import kernels
from st_fast.model import SiT, build, unfilled
from st_fast.model.layers import Mlp, sincos_positions, unpatchify
from st_fast.recipe import cost
from st_fast.recipe.architecture import Model
from st_fast.recipe.sizes import SIZES
from st_fast.study.carry_out import random_model
from tests import warm

CPU = torch.device("cpu")
TABLE = kernels.select(dict.fromkeys(("norm_modulate", "gate_residual_norm_modulate", "qk_norm"), "reference"), CPU)
TINY = Model("custom", depth=3, width=48, heads=4, patch=2, channels=4, latent_size=8, num_classes=10)


def named(size: str, patch: int) -> Model:
    depth, width, heads = SIZES[size]
    return Model(f"SiT-{size}/{patch}", depth, width, heads, patch)


def perturbed(config: Model, seed: int = 0) -> SiT:
    """A model whose zero-initialised layers are filled, so that every part matters; float64."""
    model = build(config, TABLE, seed).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize(("size", "millions"), [("S", 33.0), ("B", 130.5), ("L", 458.1), ("XL", 675.1)])
def test_parameter_counts_are_the_published_ones_and_the_formula_counts_them(size, millions):
    for patch in (2, 4, 8):
        with torch.device("meta"):
            count = sum(p.numel() for p in SiT(named(size, patch), TABLE).parameters())
        assert count == named(size, patch).parameters
        if patch == 2:
            assert count / 1e6 == pytest.approx(millions, rel=2e-3)


def test_the_architectures_layers_are_the_networks():
    config = replace(TINY, channels=3, mlp_ratio=3.5)
    blocks = [(f"blocks.{i}.{layer.name}", layer) for i in range(3) for layer in config.block_layers()]
    declared = dict(blocks) | {layer.name: layer for layer in (*config.embedders, *config.final_layers)}
    found = SiT(config, TABLE).state_dict()
    assert {f"{name}.weight" for name in declared} == {
        key for key in found if key.endswith("weight") and "_norm" not in key and "embedding_table" not in key
    }
    for name, layer in declared.items():
        assert found[f"{name}.weight"].flatten(1).shape == (layer.outputs, layer.inputs)
        assert len(found[f"{name}.bias"]) == layer.outputs


def test_xl_2_has_the_published_118_6_g_multiply_adds():
    assert cost.trunk_macs(named("XL", 2)) / 1e9 == pytest.approx(118.6, rel=0.01)


@pytest.mark.parametrize("depth", [None, 2])
def test_the_flop_formula_agrees_with_torchs_counter(depth):
    model = build(TINY, TABLE, 0)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x, t, y) if depth is None else model.guided_features(x[:1], t[:1], y[:1], depth)
    # guided_features also projects the modulation of the block after `depth`, which the method does not define.
    slack = 0 if depth is None else 2 * 2 * 6 * TINY.width**2
    expected = 2 * 2 * cost.trunk_macs(TINY, depth)
    assert expected * 0.97 <= counter.get_total_flops() <= expected + slack


def test_state_dict_keys_are_the_published_ones():
    keys = set(build(replace(TINY, depth=1), TABLE, 0).state_dict())
    block = ("attn.qkv", "attn.proj", "attn.q_norm", "attn.k_norm", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    linear = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    linear += ["final_layer.adaLN_modulation.1", *(f"blocks.0.{name}" for name in block)]
    assert keys == {"pos_embed", "y_embedder.embedding_table.weight"} | {
        f"{name}.{kind}" for name in linear for kind in ("weight", "bias")
    }


def test_without_qk_norm_the_keys_of_plain_sit_remain():
    keys = build(replace(TINY, qk_norm=False), TABLE, 0).state_dict()
    assert not [k for k in keys if "q_norm" in k or "k_norm" in k]


def plain_forward(model: SiT, x, t, y):
    """SiT written out the way its paper draws it, one sample's streams after every block."""
    w, config = model.state_dict(), model.config
    frequencies = torch.exp(torch.arange(128) * (-torch.log(torch.tensor(10_000.0)) / 128))
    angles = t.float()[:, None] * frequencies
    c = torch.cat((angles.cos(), angles.sin()), 1).double()
    c = F.linear(c, w["t_embedder.mlp.0.weight"], w["t_embedder.mlp.0.bias"])
    c = F.linear(F.silu(c), w["t_embedder.mlp.2.weight"], w["t_embedder.mlp.2.bias"])
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=config.patch)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    streams = []

    def modulated(h, shift, scale):
        return F.layer_norm(h, (config.width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    for i in range(config.depth):
        p = f"blocks.{i}."
        m = F.linear(c, w[p + "adaLN_modulation.1.weight"], w[p + "adaLN_modulation.1.bias"]).chunk(6, 1)
        qkv = F.linear(modulated(h, m[0], m[1]), w[p + "attn.qkv.weight"], w[p + "attn.qkv.bias"])
        q, k, v = (z.unflatten(-1, (config.heads, -1)).transpose(1, 2) for z in qkv.chunk(3, -1))
        if config.qk_norm:
            d = (config.width // config.heads,)
            q = F.layer_norm(q, d, w[p + "attn.q_norm.weight"], w[p + "attn.q_norm.bias"], 1e-6)
            k = F.layer_norm(k, d, w[p + "attn.k_norm.weight"], w[p + "attn.k_norm.bias"], 1e-6)
        a = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        a = F.linear(a.transpose(1, 2).flatten(2), w[p + "attn.proj.weight"], w[p + "attn.proj.bias"])
        h = h + m[2][:, None] * a
        z = F.gelu(
            F.linear(modulated(h, m[3], m[4]), w[p + "mlp.fc1.weight"], w[p + "mlp.fc1.bias"]), approximate="tanh"
        )
        h = h + m[5][:, None] * F.linear(z, w[p + "mlp.fc2.weight"], w[p + "mlp.fc2.bias"])
        streams.append(h)
    m = F.linear(c, w["final_layer.adaLN_modulation.1.weight"], w["final_layer.adaLN_modulation.1.bias"]).chunk(2, 1)
    out = F.linear(modulated(h, *m), w["final_layer.linear.weight"], w["final_layer.linear.bias"])
    side, p, channels = config.latent_size // config.patch, config.patch, config.channels
    image = torch.einsum("nhwpqc->nchpwq", out.view(-1, side, side, p, p, channels))
    return image.reshape(-1, channels, config.latent_size, config.latent_size), streams


@pytest.mark.parametrize("config", [TINY, replace(TINY, qk_norm=False, patch=4, channels=3, class_dropout=0.0)])
def test_the_forward_pass_equals_sit_written_out_plainly(config):
    model = perturbed(config)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.channels, 8, 8, generator=generator, dtype=torch.float64)
    t, y = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 9])
    expected, streams = plain_forward(model, x, t, y)
    for tap in range(1, config.depth + 1):
        velocity, tapped = model(x, t, y, tap)
        torch.testing.assert_close(velocity, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(tapped, streams[tap - 1], atol=1e-6, rtol=1e-6)


def test_epsilons_count_where_queries_and_keys_hardly_differ():
    model = perturbed(TINY)
    for block in model.blocks:
        block.attn.qkv.weight.data *= 1e-4
        block.attn.qkv.bias.data *= 1e-3
    generator = torch.Generator().manual_seed(1)
    x, t, y = (
        torch.randn(3, 4, 8, 8, generator=generator).double(),
        torch.tensor([0.1, 0.5, 0.9]),
        torch.tensor([0, 4, 9]),
    )
    torch.testing.assert_close(model(x, t, y, 1)[1], plain_forward(model, x, t, y)[1][0], atol=1e-7, rtol=1e-7)


def test_the_epsilon_of_published_qk_norm_changes_a_millionth():
    """timm's attention, which REPA's and Self-Transcendence's code takes, has LayerNorm's own; docs/convert.md."""
    model = random_model(replace(TINY, qk_norm=True), 1)
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4)
    with torch.no_grad():
        ours = model(x, t, y)[0]
        for block in model.blocks:
            block.attn.q_norm.eps = block.attn.k_norm.eps = torch.nn.LayerNorm(1).eps
        theirs = model(x, t, y)[0]
        low = model.bfloat16()(x.bfloat16(), t.bfloat16(), y)[0].float()
    apart = (ours - theirs).norm() / theirs.norm()
    assert 0 < apart < 1e-5 and (low - theirs).norm() / theirs.norm() > 100 * apart


def test_streams_by_features_by_a_tap_and_by_default():
    model = perturbed(TINY)
    x, t, y = torch.randn(2, 4, 8, 8).double(), torch.tensor([0.4, 0.6]), torch.tensor([3, 7])
    torch.testing.assert_close(model.features(x, t, y, 2), plain_forward(model, x, t, y)[1][1], atol=1e-6, rtol=1e-6)
    assert torch.equal(model(x, t, y)[1], model.embed_tokens(x))
    parts = [model.blocks[0], model.blocks[1], model.blocks[2], model.final_layer]
    for depth in (1, 2, 3):
        assert model.modulation_layers(depth) == [part.adaLN_modulation[1] for part in parts[: depth + 1]]


def test_an_unfilled_model_takes_all_weights_over():
    drawn, empty = build(TINY, TABLE, 3).bfloat16(), unfilled(TINY, TABLE, CPU, torch.bfloat16)
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16} and not empty.pos_embed.requires_grad
    empty.load_state_dict(drawn.state_dict())
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.4, 0.6]), torch.tensor([3, 7])
    assert torch.equal(empty(x, t, y, 2)[1], drawn(x, t, y, 2)[1])


def test_a_fresh_model_is_drawn_as_published():
    """Uniform after Xavier, a patch's weights as one matrix; embeddings of deviation 0.02; zeros where blocks begin."""
    model = build(replace(TINY, channels=3, class_dropout=0.0), TABLE, 0)
    assert model.y_embedder.embedding_table.weight.shape == (10, 48) and not model.pos_embed.requires_grad
    zero = {"final_layer.linear.weight"} | {n for n, _ in model.named_parameters() if "adaLN_modulation" in n}
    for name, parameter in model.named_parameters():
        if name in zero or (name.endswith("bias")):
            assert not parameter.any(), name
        elif name.startswith("t_embedder") or "embedding_table" in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif "norm" not in name and name != "pos_embed":
            bound = (6 / sum(parameter.flatten(1).shape)) ** 0.5
            assert 0.97 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_one_product_for_all_modulations_is_the_same_network_under_the_same_names():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    t, y = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 9])
    results = []
    for modulation in ("per_block", "one"):
        model = perturbed(replace(TINY, modulation=modulation))
        velocity, tapped = model(x, t, y, 2)
        (velocity.square().mean() + tapped.square().mean()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append(gradients | {"velocity": velocity, "tapped": tapped, "features": model.features(x, t, y, 1)})
    each, one = results
    assert each.keys() == one.keys() and "blocks.2.adaLN_modulation.1.weight" in one
    for name in each:
        torch.testing.assert_close(one[name], each[name], atol=1e-12, rtol=1e-10, msg=name)
    assert one["blocks.2.adaLN_modulation.1.weight"].abs().max() > 0


def test_one_product_is_one():
    model = build(replace(TINY, modulation="one"), TABLE, 0)
    calls: list[tuple[int, ...]] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.linear and args[0].dim() == 2 and args[0].shape[1] == TINY.width:
                calls.append(tuple(args[1].shape))
            return function(*args, **(kwargs or {}))

    with Counting():
        model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1]))
    width, rows = TINY.width, (6 * TINY.depth + 2) * TINY.width
    assert calls == [(width, width), (rows, width)]  # the time embedding's second layer, and all modulations


def test_guided_features_are_the_streams_with_and_without_the_label():
    model = perturbed(TINY)
    x, t, y = torch.randn(2, 4, 8, 8).double(), torch.tensor([0.4, 0.6]), torch.tensor([3, 7])
    conditional, null = model.guided_features(x, t, y, depth=2)
    torch.testing.assert_close(conditional, plain_forward(model, x, t, y)[1][1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(null, plain_forward(model, x, t, torch.full((2,), 10))[1][1], atol=1e-6, rtol=1e-6)


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity():
    model = build(TINY, TABLE, 0)
    x = torch.randn(2, 4, 8, 8)
    velocity, tapped = model(x, torch.rand(2), torch.tensor([0, 1]), 3)
    assert torch.equal(velocity, torch.zeros_like(x))
    assert torch.equal(tapped, model.embed_tokens(x))


def test_positions_are_the_sines_and_cosines_of_row_and_column():
    positions = sincos_positions(8, (3, 3))[0]
    row, column = 2, 1
    expected = [f(p / 10_000 ** (k / 2)) for p in (column, row) for f in (torch.sin, torch.cos) for k in (0, 1)
                for p in [torch.tensor(float(p))]]  # fmt: skip
    torch.testing.assert_close(positions[row * 3 + column], torch.stack(expected))
    positions = sincos_positions(12, (60, 60))[0].double()
    frequencies = 10_000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    expected = [f(p * frequencies) for p in (41, 59) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(positions[59 * 60 + 41], torch.cat(expected), rtol=0, atol=2e-7)


def test_unpatchify_puts_every_patch_where_it_was_cut():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(2, 4, 12)
    assert torch.equal(unpatchify(patches, 2, 3, (2, 2)), x)


def test_building_is_reproducible_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = (build(TINY, TABLE, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])


WHOLE = kernels.select({"gelu_mlp": "fused"}, CPU)


def loss_and_gradients(model):
    x, t, y = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)),
        torch.tensor([0.3, 0.8]),
        torch.tensor([1, 2]),
    )
    velocity, _ = model(x, t, y)
    loss = velocity.float().square().mean()
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_mlp_as_one_op_is_the_mlp_of_its_layers(compiled):
    parts = perturbed(TINY).float()
    whole = SiT(TINY, WHOLE)
    whole.load_state_dict(parts.state_dict())
    if compiled:
        for block in whole.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for one, other in zip(loss_and_gradients(whole), loss_and_gradients(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 + 1e-5 * float(other.abs().max()))


def test_the_mlp_is_one_op_where_the_table_says_so_and_its_layers_are_our_own():
    """A layer of another class, as fp8's, multiplies for itself."""
    calls, table = [], replace(WHOLE, gelu_mlp=lambda *args: calls.append(1) or kernels.gelu_mlp(*args))
    y = torch.randn(2, 5, 48)
    for kernel_table, other, count in ((table, False, 1), (TABLE, False, 0), (table, True, 0)):
        mlp = Mlp(48, 96, kernel_table)
        if other:
            mlp.fc1 = torch.nn.Linear(48, 96)
        calls.clear()
        assert mlp(y).shape == y.shape and len(calls) == count


IMPORTS = """
import sys, torch, st_fast.train.run
from st_fast import kernels
from st_fast.model import unfilled
from st_fast.recipe.architecture import Model
cpu = torch.device("cpu")
table = kernels.select(dict.fromkeys(("norm_modulate", "gate_residual_norm_modulate", "qk_norm"), "reference"), cpu)
config = Model("custom", depth=1, width=8, heads=2, patch=2, channels=4, latent_size=4, num_classes=3)
unfilled(config, table, cpu, torch.float32)
print(sorted({"torch._dynamo", "torch.distributed.tensor"} & set(sys.modules)))
"""


def test_a_model_and_its_training_import_no_compiler_and_no_shards_before_they_are_wanted():
    done = warm.run("-c", IMPORTS, check=True)
    assert done.stdout == "[]\n"
