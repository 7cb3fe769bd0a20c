"""Tokens in groups and on routes: what a network makes of them against plain loops and masks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from st_fast.kernels.table import select
from st_fast.model.attention import within_groups
from st_fast.model.layers import unpatchify
from st_fast.model.layout import Groups, Layout, Route
from st_fast.model.mmdit import MMDiT
from st_fast.model.sit import SiT
from st_fast.recipe.schema import Model

CONFIG = Model(
    depth=4, width=32, heads=2, patch=2, channels=3, latent_size=(8, 12), num_classes=5, zero_init=False
)  # 4 × 6 = 24 tokens  # fmt: skip
TOKENS = 24


def network(config=CONFIG):
    torch.manual_seed(0)
    cls = SiT if config.network == "sit" else MMDiT
    model = cls(config, select(dict.fromkeys(("norm_modulate", "gate_residual_norm_modulate"), "reference"),
                               torch.device("cpu"))).double()  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 8, 12, generator=generator, dtype=torch.float64)
    t = torch.rand(batch, generator=generator, dtype=torch.float64)
    order = torch.stack([torch.randperm(TOKENS, generator=generator) for _ in range(batch)])
    return x, t, torch.arange(batch) % 5, order


def test_an_order_of_the_tokens_changes_nothing_that_comes_out():
    model, (x, t, labels, order) = network(), inputs()
    plain, streams = model(x, t, labels, (0, 2, 4))
    moved, moved_streams = model(x, t, labels, (0, 2, 4), Layout(order, (TOKENS,)))
    torch.testing.assert_close(moved, plain, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(moved_streams, streams, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    features = model.features(x, t, labels, 2, Layout(order, (TOKENS,)))
    torch.testing.assert_close(features, streams[1], rtol=1e-5, atol=1e-6)


def routed_by_hand(model, x, t, labels, kept, route):
    """A network whose blocks first + 1 … last see the tokens at the places `kept` of each sample alone."""
    stream, c = model.embed_tokens(x), F.silu(model.t_embedder(t) + model.y_embedder(labels))
    modulations = [layer(c).chunk(6 if i < 4 else 2, dim=1) for i, layer in enumerate(model.modulation_layers(4))]
    streams = []
    for number, block in enumerate(model.blocks, start=1):
        inside = route.first < number <= route.last
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (v[:, None] for v in modulations[number - 1])
        rows = torch.arange(len(x))[:, None]
        h = stream[rows, kept] if inside else stream
        norm = (F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale)) + shift
        h = h + gate * block.attn(norm)
        norm = (F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale_mlp)) + shift_mlp
        h = h + gate_mlp * block.mlp(norm)
        streams.append(h)
        stream = stream.index_put((rows, kept), h) if inside else h
    shift, scale = (v[:, None] for v in modulations[4])
    y = F.layer_norm(stream, stream.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return unpatchify(model.final_layer(y), 2, 3, (4, 6)), streams


@pytest.mark.parametrize("route", [Route(1, 3, (10,)), Route(0, 4, (23,)), Route(2, 3, (1,))])
def test_a_route_leaves_tokens_out_and_puts_them_back_as_they_were(route):
    model, (x, t, labels, order) = network(), inputs()
    layout = Layout(order, (TOKENS,), route=route)
    assert torch.equal(layout.kept, order[:, : route.kept[0]])
    velocity, streams = model(x, t, labels, (1, 2, 3, 4), layout)
    expected, by_hand = routed_by_hand(model, x, t, labels, layout.kept, route)
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(streams, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weights = [p for p in model.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(v.square().sum(), weights) for v in (velocity, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_kept_tokens_of_several_groups_are_the_first_of_each():
    _, _, _, order = inputs()
    layout = Layout(order, (6, 18), route=Route(0, 1, (2, 9)))
    assert torch.equal(layout.kept, torch.cat((order[:, :2], order[:, 6:15]), dim=1))
    values = torch.randn(3, TOKENS, 2)
    kept, others = layout.split(layout.ordered(values))
    assert torch.equal(layout.take_kept(values), kept)
    assert torch.equal(layout.restored(layout.joined(kept, others)), values)


def test_attention_within_groups_is_attention_with_a_mask():
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 2, 4, TOKENS, 8, dtype=torch.float64).requires_grad_().unbind(0)
    groups = Groups((5, 12, 7), True, torch.tensor([False, True]))
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(groups.lengths))
    allowed = (number[:, None] == number) | groups.whole[:, None, None]  # (B, N, N)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
    ours = within_groups(F.scaled_dot_product_attention, q, k, v, groups)
    torch.testing.assert_close(ours, masked, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (ours, masked)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_separated_groups_know_nothing_of_one_another(qk_norm):
    model, (x, t, labels, order) = network(replace(CONFIG, qk_norm=qk_norm)), inputs()
    layout = Layout(order, (6, 18), separated=True, whole=torch.tensor([False, False, True]))
    times = t[:, None].expand(-1, 2)
    changed = x.clone()
    pixels = Layout(order, (6, 18)).pixel_times(torch.tensor([[0.0, 1.0]] * 3), (4, 6), 2).bool()
    changed = torch.where(pixels, x + 1.0, x)  # every token of the second group
    same = ~pixels.expand_as(x)
    model.kernels = spread_over_tokens(model)
    a, b = (model(latents, times, labels, 0, layout)[0] for latents in (x, changed))
    assert torch.equal(a[:2][same[:2]], b[:2][same[:2]])
    assert not torch.allclose(a[2][same[2]], b[2][same[2]])


def spread_over_tokens(model):
    """The model's ops where a group's vectors are written out for each of its tokens."""
    table = model.kernels

    def each(vector, lengths):
        return vector.repeat_interleave(torch.tensor(lengths), dim=1)

    def norm_modulate(x, shift, scale, eps=1e-6, lengths=None):
        shift, scale = (each(v, lengths) for v in (shift, scale))
        return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift

    def gated(x, a, gate, shift, scale, eps=1e-6, a_bias=None, lengths=None):
        x = x + each(gate, lengths) * a
        return x, norm_modulate(x, shift, scale, eps, lengths)

    table = replace(table, norm_modulate=norm_modulate, gate_residual_norm_modulate=gated)
    for block in model.blocks:
        block.kernels = table
    return table


def test_each_group_is_modulated_by_its_own_time():
    """Groups that do not see one another are as if the whole image had their time."""
    model, (x, t, labels, order) = network(), inputs()
    times = torch.stack((t, t.flip(0)), dim=1)
    layout = Layout(order, (6, 18), separated=True)
    model.kernels = spread_over_tokens(model)
    both = model(x, times, labels, 0, layout)[0]
    for group in range(2):
        one = model(x, times[:, group : group + 1].expand(-1, 2), labels, 0, layout)[0]
        mine = layout.pixel_times(torch.eye(2)[group].expand(3, 2), (4, 6), 2).bool().expand_as(x)
        torch.testing.assert_close(both[mine], one[mine], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(both[~mine], one[~mine])


def test_the_time_of_a_pixel_is_its_tokens_groups():
    order = torch.tensor([[2, 0, 1, 3], [3, 2, 1, 0]])
    layout = Layout(order, (1, 3))
    found = layout.pixel_times(torch.tensor([[0.1, 0.9], [0.3, 0.7]]), (2, 2), 2)
    expected = torch.tensor([[[0.9, 0.9], [0.1, 0.9]], [[0.7, 0.7], [0.7, 0.3]]])
    assert torch.equal(found, expected.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None])


def test_mmdit_routes_the_images_tokens_alone():
    config = replace(CONFIG, network="mmdit", text_width=7, text_length=3, num_classes=1000)
    model, (x, t, _, order) = network(config), inputs()
    text = torch.randn(3, 3, 7, dtype=torch.float64)
    plain = model(x, t, text, 2)[0]
    everything = Layout(order, (TOKENS,), route=Route(1, 3, (TOKENS,)))
    torch.testing.assert_close(model(x, t, text, 2, everything)[0], plain, rtol=1e-5, atol=1e-6)
    velocity, stream = model(x, t, text, 2, replace(everything, route=Route(1, 3, (9,))))
    assert stream.shape == (3, 9, 32)
    assert not torch.allclose(velocity, plain)
