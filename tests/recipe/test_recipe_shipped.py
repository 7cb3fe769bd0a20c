"""The recipes of this repository hold the numbers that the papers publish."""

from __future__ import annotations

from pathlib import Path

import pytest

from st_fast.recipe import load
from st_fast.recipe.methods import (
    Dispersive,
    DualTime,
    InternalGuidance,
    LayerSync,
    Plain,
    Repa,
    SelfFlow,
    SelfRepresentation,
    SelfTranscendence,
    Sra2,
    VelocityHead,
)
from st_fast.sample.presets import PRESETS

RECIPES = Path(__file__).parents[2] / "recipes"

# depth, width, heads | align depth, student depth, teacher depth | steps of both stages
PUBLISHED = {
    "sit_b": ((12, 768, 12), (2, 6, 8), (200_000, 400_000)),
    "sit_xl": ((28, 1152, 16), (2, 8, 16), (200_000, 2_000_000)),
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load(path).run.out == f"runs/{path.stem}"


@pytest.mark.parametrize("name", ["sit_s", "sit_b", "sit_l", "sit_xl"])
def test_the_published_settings_hold_in_both_stages(name: str) -> None:
    recipe = load(RECIPES / f"{name}.toml", ranks=8)
    model, optim, sample = recipe.model, recipe.optim, recipe.sample
    assert (model.patch, model.channels, model.latent_size, model.num_classes) == (2, 4, 32, 1000)
    assert (model.class_dropout, model.qk_norm, model.mlp_ratio) == (0.1, True, 4.0)
    assert (optim.batch_size, optim.lr, optim.betas, optim.eps) == (256, 1e-4, (0.9, 0.999), 1e-8)
    assert (optim.weight_decay, optim.grad_clip, optim.ema_decay, optim.warmup_steps) == (0.0, 1.0, 0.9999, 0)
    assert (sample.sampler, sample.steps, sample.cfg_scale, sample.cfg_range) == ("sde", 250, 1.9, (0.0, 0.65))
    align, transcend = (stage.method for stage in recipe.stages)
    assert isinstance(align, VelocityHead) and isinstance(transcend, SelfTranscendence)
    assert (align.weight, align.t_range, align.hidden) == (0.5, (0.4, 0.7), 2048)
    assert (transcend.weight, transcend.t_range, transcend.hidden) == (0.5, (0.4, 0.7), 2048)
    assert (transcend.teacher, transcend.cfg_scale, transcend.loss) == ("align", 30.0, "mse")
    assert align.depth < transcend.student_depth < transcend.teacher_depth < model.depth


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_depths_and_lengths(name: str) -> None:
    recipe = load(RECIPES / f"{name}.toml")
    align, transcend = (stage.method for stage in recipe.stages)
    assert isinstance(align, VelocityHead) and isinstance(transcend, SelfTranscendence)
    size, depths, steps = PUBLISHED[name]
    assert (recipe.model.depth, recipe.model.width, recipe.model.heads) == size
    assert (align.depth, transcend.student_depth, transcend.teacher_depth) == depths
    assert tuple(stage.steps for stage in recipe.stages) == steps


@pytest.mark.parametrize(("name", "size", "depth"), [("sit_b_repa", "SiT-B/2", 4), ("sit_xl_repa", "SiT-XL/2", 8)])
def test_repas_published_settings(name: str, size: str, depth: int) -> None:
    recipe = load(RECIPES / f"{name}.toml", ranks=8)
    (stage,) = recipe.stages
    assert recipe.model.name == size and not recipe.model.qk_norm
    assert stage.method == Repa(("facebook/dinov2-base",), depth, weight=0.5, hidden=2048)
    sample = recipe.sample
    assert (sample.sampler, sample.steps, sample.cfg_scale, sample.cfg_range) == ("sde", 250, 1.8, (0.0, 0.7))


def test_irepas_published_settings() -> None:
    (stage,) = load(RECIPES / "sit_xl_irepa.toml", ranks=8).stages
    assert stage.method == Repa(("facebook/dinov2-base",), 8, weight=1.0, projector="conv", target_norm=0.6)


def test_the_published_settings_of_text_to_image_hold() -> None:
    recipe = load(RECIPES / "mmdit_coco.toml", ranks=8)
    model, optim, (align, transcend) = recipe.model, recipe.optim, (stage.method for stage in recipe.stages)
    assert (model.network, model.depth, model.width, model.heads, model.patch) == ("mmdit", 24, 768, 24, 2)
    assert (model.text_width, model.text_length, model.class_dropout) == (768, 77, 0.1)
    assert (optim.batch_size, optim.lr, optim.betas, optim.weight_decay) == (256, 2e-4, (0.9, 0.9), 0.03)
    assert (optim.warmup_steps, optim.grad_clip, optim.ema_decay) == (5_000, 1.0, 0.9999)
    assert isinstance(align, VelocityHead) and isinstance(transcend, SelfTranscendence)
    assert (align.depth, align.target, align.weight, align.t_range) == (4, "velocity", 0.5, (0.0, 1.0))
    depths = transcend.student_depth, transcend.teacher_depth
    assert (*depths, transcend.cfg_scale, transcend.stop_step) == (12, 16, 5.0, 50_000)
    assert (transcend.teacher_weights, transcend.loss, transcend.t_range) == ("ema", "mse", (0.0, 1.0))
    other = load(RECIPES / "mmdit_coco_repa.toml", ranks=8)
    assert other.stages[0].method == Repa(("facebook/dinov2-base",), depth=8, weight=0.5, hidden=2048)
    assert (other.optim.lr, other.optim.betas, other.optim.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert (other.model.qk_norm, other.model.zero_init, other.stages[0].steps) == (False, False, 150_000)


def test_sras_published_settings_decay_over_the_published_epochs() -> None:
    method = load(RECIPES / "sit_xl_sra.toml", ranks=8).stages[0].method
    assert isinstance(method, SelfRepresentation)
    assert (method.student_depth, method.teacher_depth, method.time_offset) == (8, 20, 0.2)
    assert (method.loss, method.weight) == ("smooth_l1", 0.2)
    steps_an_epoch = 1_281_167 // 256
    assert method.decay_start == 150 * steps_an_epoch and method.decay_steps == 1_000 * steps_an_epoch


def test_layer_syncs_published_settings() -> None:
    method = load(RECIPES / "sit_xl_layersync.toml", ranks=8).stages[0].method
    assert method == LayerSync(student_depth=8, teacher_depth=16, weight=0.2)


def test_the_published_settings_of_contrastive_flow_matching() -> None:
    recipe = load(RECIPES / "sit_xl_contrastive.toml", ranks=8)
    (stage,), sample = recipe.stages, recipe.sample
    assert stage.method == Plain() and (stage.contrastive.contrast, stage.contrastive.contrast_null) == (0.05, True)
    assert (sample.sampler, sample.steps, sample.cfg_scale, sample.cfg_range) == ("sde", 50, 1.85, (0.0, 0.65))
    assert (sample.contrast, recipe.model.depth, recipe.optim.batch_size, stage.steps) == ("unbiased", 28, 256, 400_000)


def test_dispersive_losss_published_settings() -> None:
    recipe = load(RECIPES / "sit_xl_dispersive.toml", ranks=8)
    (stage,) = recipe.stages
    assert stage.method == Dispersive(depth=recipe.model.depth, weight=0.5, temperature=0.5)
    assert (recipe.optim.batch_size, recipe.optim.accumulation, recipe.sample.cfg_scale) == (256, 1, 1.0)


def test_sra_2s_published_settings() -> None:
    (stage,) = load(RECIPES / "sit_xl_sra2.toml", ranks=8).stages
    assert isinstance(stage.method, Sra2) and stage.steps == 4_000_000
    assert (stage.method.depth, stage.method.weight, stage.method.hidden) == (8, 1.0, 2 * 1152)


def test_the_published_settings_of_methods_with_several_times_in_an_image() -> None:
    recipe = load(RECIPES / "sit_xl_selfflow.toml", ranks=8)
    method, model = recipe.stages[0].method, recipe.model
    assert method == SelfFlow(mask_ratio=0.25, student_depth=8, teacher_depth=20, weight=0.8)
    assert (model.depth, model.width, model.qk_norm, recipe.optim.ema_decay) == (28, 1152, False, 0.9999)
    assert (round(0.3 * model.depth), round(0.7 * model.depth)) == (method.student_depth, method.teacher_depth)
    recipe = load(RECIPES / "sit_b_sra_dual.toml", ranks=8)
    method, optim = recipe.stages[0].method, recipe.optim
    assert isinstance(method, DualTime)
    assert (method.student_depth, method.teacher_depth, method.groups, method.separated) == (3, 8, (0.25, 0.75), True)
    assert (method.teacher_time, method.time_offset, method.weight) == ("sra", 0.2, 0.5)
    assert (optim.lr, optim.batch_size, optim.betas, optim.weight_decay) == (1e-4, 256, (0.9, 0.999), 0.0)
    assert (recipe.model.depth, recipe.stages[0].steps, recipe.flow.time) == (12, 800_000, "uniform")


def test_internal_guidances_published_settings() -> None:
    recipe = load(RECIPES / "sit_xl_ig.toml", ranks=8)
    model, optim, sample = recipe.model, recipe.optim, recipe.sample
    assert recipe.stages[0].method == InternalGuidance(depth=8, weight=0.5, target_guidance=0.0)
    assert (model.name, model.qk_norm, model.class_dropout, model.internal_head) == ("SiT-XL/2", False, 0.1, 0)
    assert (optim.batch_size, optim.lr, optim.betas, optim.weight_decay) == (256, 1e-4, (0.9, 0.999), 0.0)
    assert (optim.grad_clip, optim.ema_decay, recipe.stages[0].steps) == (1.0, 0.9999, 4_000_000)
    assert {key: getattr(sample, key) for key in PRESETS["internal-guidance"]} == PRESETS["internal-guidance"]
    assert recipe.for_stage(recipe.stages[0]).model.parameters == 677_786_144  # as the published file has


def test_the_digits_comparison_has_every_method_with_the_same_steps() -> None:
    recipe = load(RECIPES / "digits_methods.toml")
    first = ["plain", "layer_sync", "sra", "contrastive", "dispersive", "sra2", "sra_dual", "self_flow", "repa"]
    names = [*first, "irepa", "haste", "align", "transcend", "internal_guidance", "tread", "sprint"]
    assert [stage.name for stage in recipe.stages] == names
    assert len({stage.steps for stage in recipe.stages}) == 1


@pytest.mark.parametrize(
    ("name", "shape", "patch", "betas", "steps"),
    [
        ("sit_xl_512", (4, 64, 64), 2, (0.9, 0.999), 3_000_000),
        ("sit_xl_1024", (32, 32, 32), 1, (0.99, 0.99), 2_000_000),
    ],
)
def test_larger_pictures_have_as_many_tokens_and_the_published_rates(
    name: str, shape: tuple[int, ...], patch: int, betas: tuple[float, float], steps: int
) -> None:
    recipe = load(RECIPES / f"{name}.toml", ranks=8)
    model, optim, (stage,) = recipe.model, recipe.optim, recipe.stages
    assert (model.depth, model.width, model.heads, model.patch) == (28, 1152, 16, patch)
    assert (model.latent_shape, model.grid, model.tokens, model.class_dropout) == (shape, (32, 32), 1024, 0.1)
    assert (optim.batch_size, optim.lr, optim.betas, optim.weight_decay) == (256, 1e-4, betas, 0.0)
    assert (optim.ema_decay, stage.steps, recipe.sample.cfg_scale) == (0.9999, steps, 1.5)


def test_the_modern_recipe_is_speedrundits_but_for_its_encoder() -> None:
    recipe = load(RECIPES / "sit_modern_b.toml", ranks=8)
    model, optim, (stage,) = recipe.model, recipe.optim, recipe.stages
    assert (model.depth, model.width, model.heads, model.tokens, model.channels) == (12, 768, 12, 256, 32)
    assert (model.norm, model.position, model.qk_norm, model.value_residual) == ("rms", "both", "rms", True)
    assert (model.mlp, model.qkv_bias, model.class_dropout) == ("gelu", True, 0.1)
    assert (optim.batch_size, optim.lr, optim.betas, optim.ema_decay) == (256, 1e-4, (0.9, 0.999), 0.9999)
    assert (optim.name, optim.muon_lr, optim.muon_adjust, optim.muon_weight_decay) == ("muon", 1e-3, "original", 0.0)
    assert (recipe.flow.time, recipe.flow.shift, recipe.sample.shift, recipe.sample.cfg_scale) == (
        "uniform", "auto", "auto", 1.0,
    )  # fmt: skip
    route = stage.routing
    assert (route.route, route.rate, route.route_first, route.route_last) == ("sprint", 0.75, 2, 10)
    assert (route.path_drop, route.route_select, stage.contrastive.contrast) == (0.05, "random", 0.05)
    assert isinstance(stage.method, InternalGuidance) and stage.method.depth == 2 and stage.steps == 400_000
