"""Guidance by path drop: its velocity written out, what it costs, and what it is refused for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from st_fast import kernels
from st_fast.core.errors import UserError
from st_fast.model import SiT
from st_fast.recipe import RecipeError, cost, load
from st_fast.recipe.schema import Model, Sample
from st_fast.recipe.token_cost import skipped_macs
from st_fast.sample.__main__ import main
from st_fast.sample.contrast import Correction
from st_fast.sample.guided import guided_velocity
from tests import tiny
from tests.sample.tiny_run import make_run

MODEL = Model(
    "custom", depth=5, width=48, heads=3, patch=2, channels=3, latent_size=(8, 4), num_classes=5,
    fusion_first=1, fusion_last=4,
)  # fmt: skip
TABLE = kernels.select({}, torch.device("cpu"))
SETTINGS = Sample(guidance="path_drop", cfg_scale=2.5, cfg_range=(0.1, 0.8))


@pytest.fixture(scope="module")
def model() -> SiT:
    generator = torch.Generator().manual_seed(1)
    made = SiT(MODEL, TABLE)
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return made.double().eval().requires_grad_(False)


def inputs():
    x = torch.randn(3, 3, 8, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x, torch.tensor([1, 4, 2])


def only_outer_blocks(model: SiT, x, t: float, labels):
    """Blocks 1 and 5 of five, with W·[f, mask token] + b between them, from the modules themselves."""
    times = torch.full((3,), t)
    c = torch.nn.functional.silu(model.t_embedder(times) + model.y_embedder(labels))
    weights = {name: module for name, module in model.named_modules()}

    def normed(values, shift, scale):
        return torch.nn.functional.layer_norm(values, (48,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def block(number: int, stream):
        shift1, scale1, gate1, shift2, scale2, gate2 = weights[f"blocks.{number}.adaLN_modulation.1"](c).chunk(6, dim=1)
        stream = stream + gate1[:, None] * weights[f"blocks.{number}.attn"](normed(stream, shift1, scale1))
        return stream + gate2[:, None] * weights[f"blocks.{number}.mlp"](normed(stream, shift2, scale2))

    f = block(0, model.embed_tokens(x))
    fused = model.fusion_proj(torch.cat((f, model.mask_token.expand_as(f)), dim=2))
    shift, scale = weights["final_layer.adaLN_modulation.1"](c).chunk(2, dim=1)
    patches = model.final_layer.linear(normed(block(4, fused), shift, scale))
    image = patches.view(3, 4, 2, 2, 2, 3).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(3, 3, 8, 4)


def test_the_guided_velocity_is_led_away_from_the_outer_blocks_with_the_null_label(model):
    x, labels = inputs()
    velocity = guided_velocity(model, labels, SETTINGS)
    conditional = model(x, torch.full((3,), 0.3), labels)[0]
    unconditional = only_outer_blocks(model, x, 0.3, torch.full((3,), 5))
    torch.testing.assert_close(model.without_path(x, torch.full((3,), 0.3), torch.full((3,), 5)), unconditional)
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(velocity(x, 0.3), expected.float(), rtol=1e-5, atol=1e-5)
    assert (conditional - unconditional).abs().max() > 0.01
    for t in (0.05, 0.9):  # outside the range
        torch.testing.assert_close(velocity(x, t), model(x, torch.full((3,), t), labels)[0].float())
    cfg = guided_velocity(model, labels, replace(SETTINGS, guidance="cfg"))(x, 0.3)
    assert (cfg - velocity(x, 0.3)).abs().max() > 0.01


@pytest.mark.parametrize("null", [True, False])
def test_a_contrasts_bias_is_taken_out_of_the_null_branch_where_it_has_one(null, model):
    x, labels = inputs()
    made = Correction(0.2, null, "unbiased", torch.ones(3, 8, 4, dtype=torch.float64), "linear")
    conditional = made(model(x, torch.full((3,), 0.3), labels)[0], 0.3)
    unconditional = only_outer_blocks(model, x, 0.3, torch.full((3,), 5))
    unconditional = made(unconditional, 0.3) if null else unconditional
    expected = unconditional + 2.5 * (conditional - unconditional)
    found = guided_velocity(model, labels, SETTINGS, correction=made)(x, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_skipped_blocks_are_not_run_and_drawing_is_counted_as_it_is(model):
    single = SiT(MODEL, TABLE).eval().requires_grad_(False)
    x, labels = torch.zeros(3, 3, 8, 4), inputs()[1]
    times = torch.full((3,), 0.3)
    seen = []
    for run in (lambda: single(x, times, labels), lambda: single.without_path(x, times, labels)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
        seen.append(counter.get_total_flops())
    one = replace(SETTINGS, sampler="euler", steps=1, cfg_range=(0.0, 1.0))
    # The modulations of the blocks that are skipped are projected with the others.
    assert sum(seen) == pytest.approx(3 * 2 * cost.drawing_macs(MODEL, one), rel=0.02)
    # What is left of the fusion is the half for the stream before it, and one product for the mask token.
    assert abs(seen[0] - seen[1] - 3 * 2 * skipped_macs(MODEL)) <= 2 * 48 * 48
    assert seen[1] < 0.55 * seen[0]
    assert cost.drawing_macs(MODEL, replace(one, guidance="cfg")) == 2 * cost.trunk_macs(MODEL)
    assert cost.drawing_macs(MODEL, replace(one, cfg_scale=1.0)) == cost.trunk_macs(MODEL)


def test_a_network_without_a_fusion_has_no_path_to_drop(tmp_path):
    plain = SiT(replace(MODEL, fusion_first=0, fusion_last=0), TABLE)
    with pytest.raises(ValueError, match="no fusion"):
        plain.without_path(torch.zeros(1, 3, 8, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    run = make_run(tmp_path)
    told = r'^--guidance path_drop: \S+/plain has no fusion; route = "sprint" trains one$'
    with pytest.raises(UserError, match=told):
        main([str(run), "--guidance", "path_drop"])
    recipe = tiny.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"stage.align has no fusion around blocks that could be skipped"):
        load(recipe, ["--sample.guidance=path_drop"])
