"""Internal Guidance: both losses against NumPy float64, where gradients flow, what a run keeps and resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from st_fast.core import checkpoint
from st_fast.core.errors import Interrupted
from st_fast.model import build
from st_fast.model.transformer import INTERNAL
from st_fast.recipe import cost, load
from st_fast.recipe.error import RecipeError
from st_fast.recipe.methods import InternalGuidance, Plain
from st_fast.recipe.schema import Model, Recipe, Stage
from st_fast.train.run import run
from st_fast.train.supervision import Parts, create
from tests import tiny
from tests.train.supervision.test_losses import BATCH, MODEL, TABLE, noisy
from tests.train.test_training import STOP, signals, stop_at  # noqa: F401

STAGE = """
[[stage]]
name = "internal"
supervision = "internal_guidance"
steps = 8
depth = 2
target_guidance = 0.4
"""


def outputs(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 4, 4, 4, generator=generator, dtype=torch.float64).float().requires_grad_()


def made(**settings):
    method = InternalGuidance(depth=2, **settings)
    return create(Stage("s", method, 10), Parts(method.network(MODEL), TABLE, None), seed=1), method


def test_the_heads_loss_equals_the_formula_in_numpy():
    supervision, method = made(weight=0.7)
    batch, internal = noisy(method.selection), outputs(5)
    loss = supervision.loss(internal, supervision.target(batch), batch)
    gap = internal.detach().double().numpy() - batch.velocity.numpy()
    assert loss.item() == pytest.approx(0.7 * (gap**2).mean((1, 2, 3)).mean(), rel=1e-6)
    loss.backward()
    assert internal.grad.abs().sum() > 0 and not list(supervision.heads.parameters())


def test_guided_targets_equal_the_formula_in_numpy_and_send_no_gradient():
    supervision, method = made(target_guidance=0.6)
    batch, final, internal = noisy(method.selection), outputs(5), outputs(6)
    goal = supervision.denoising_target(final, internal, batch)
    expected = batch.velocity.numpy() + 0.6 * (final.detach().double().numpy() - internal.detach().double().numpy())
    np.testing.assert_allclose(goal.numpy(), expected, rtol=0, atol=1e-6)
    assert not goal.requires_grad


def test_without_target_guidance_the_final_output_learns_the_velocity_itself():
    supervision, method = made()
    batch = noisy(method.selection)
    assert supervision.denoising_target(outputs(5), outputs(6), batch) is batch.velocity


def test_the_head_is_counted_in_flops_as_pytorch_counts_them_and_in_memory():
    config = Model("custom", depth=6, width=64, heads=2, patch=2, channels=4, latent_size=16, num_classes=5)
    headed, plain = (Stage("s", method, 10) for method in (InternalGuidance(depth=2), Plain()))
    recipe = Recipe(config, (headed,))
    model = build(recipe.for_stage(headed).model, TABLE, 0)
    x, t, y = torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long)

    def counted(tap: int) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(x, t, y, tap)
        return counter.get_total_flops()

    mine, usual = cost.stage_cost(recipe, headed), cost.stage_cost(recipe, plain)
    assert mine.student - usual.student == 3 * (counted(INTERNAL) - counted(0))
    assert mine.heads == mine.teacher == 0
    more = 64 * 16 + 16 + 64 * 128 + 128
    assert cost.weight_bytes(recipe.for_stage(headed).model, headed, True) - cost.weight_bytes(
        config, plain, True
    ) == more * (cost.STATE_BYTES + cost.SAMPLED_BYTES)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    data = tiny.write_data(tmp_path / "data")
    path = tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    path.write_text(path.read_text().split("[[stage]]")[0] + STAGE)
    return path


def newest(out: Path) -> checkpoint.Checkpoint:
    found = checkpoint.latest(out / "internal" / "checkpoints", print)
    assert found is not None
    return found


def test_a_run_trains_averages_and_keeps_the_head_and_its_recipe_stays_the_users(recipe, tmp_path):
    run(load(recipe))
    found = newest(tmp_path / "out")
    keys = {
        f"final_layer_xr.{layer}.{kind}" for layer in ("linear", "adaLN_modulation.1") for kind in ("weight", "bias")
    }
    for group in ("model", "ema"):
        assert keys <= set(found.groups[group]) and all(found.groups[group][key].any() for key in keys)
    assert {f"model.exp_avg.{key}" for key in keys} <= set(found.groups["optim"]) and "heads" not in found.groups
    raw, average = (found.groups[group]["final_layer_xr.linear.weight"] for group in ("model", "ema"))
    assert not torch.equal(raw, average)
    assert found.meta["architecture"]["internal_head"] == 2
    assert "internal_head = 0" in found.meta["recipe"]
    assert "internal_head = 0" in (tmp_path / "out" / "recipe.toml").read_text()
    start = tiny.records(tmp_path / "out", "start")[0]
    assert start["trunk_params"] == sum(tensor.numel() for tensor in found.groups["model"].values())
    assert all(record["aux"] > 0 for record in tiny.records(tmp_path / "out", "train"))


def test_guided_targets_change_what_is_learnt(recipe, tmp_path):
    run(load(recipe))
    run(load(recipe, [f"--run.out={tmp_path / 'plain'}", "--stage.internal.target_guidance=0"]))
    ours, theirs = (newest(tmp_path / name).groups["model"]["final_layer.linear.weight"] for name in ("out", "plain"))
    assert not torch.allclose(ours, theirs, rtol=1e-3)


def test_an_interrupted_run_resumes_bit_exactly(recipe, tmp_path, monkeypatch, signals):  # noqa: F811
    torch.set_num_threads(1)
    run(load(recipe))
    again = load(recipe, [f"--run.out={tmp_path / 'again'}"])
    STOP.name = None
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            run(again)
    STOP.name = None
    run(again)
    whole, resumed = newest(tmp_path / "out").groups, newest(tmp_path / "again").groups
    assert whole.keys() == resumed.keys()
    for group, tensors in whole.items():
        assert all(torch.equal(resumed[group][key], tensor) for key, tensor in tensors.items())


def test_a_start_from_a_model_without_the_head_names_what_draws_it(recipe, tmp_path):
    plain = '[[stage]]\nname = "plain"\nsupervision = "none"\nsteps = 4\n'
    stage = STAGE.replace("steps = 8", 'steps = 4\ninit = "plain"')
    text = recipe.read_text().split("[[stage]]")[0]
    recipe.write_text(text + plain + stage)
    with pytest.raises(Exception, match=r"init_fresh = \[.final_layer_xr\..\] draws"):
        run(load(recipe))
    recipe.write_text(f'{text}{plain}{stage}init_fresh = ["final_layer_xr."]\n')
    run(load(recipe, [f"--run.out={tmp_path / 'again'}"]))
    assert newest(tmp_path / "again").step == 4


def test_a_model_with_a_head_starts_a_stage_without_one_and_teaches(recipe, tmp_path):
    later = (
        '[[stage]]\nname = "later"\nsupervision = "none"\nsteps = 2\ninit = "internal"\n'
        '[[stage]]\nname = "taught"\nsupervision = "self_transcendence"\nsteps = 2\nteacher = "internal"\n'
        "student_depth = 1\nteacher_depth = 2\nhidden = 16\n"
    )
    recipe.write_text(recipe.read_text().replace("steps = 8", "steps = 2") + later)
    run(load(recipe))
    for name in ("later", "taught"):
        found = checkpoint.latest(tmp_path / "out" / name / "checkpoints", print)
        assert found is not None and not any(key.startswith("final_layer_xr.") for key in found.groups["model"])
        assert "internal_head" not in found.meta["architecture"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--stage.internal.depth=4", r"stage.internal.depth = 4.*1 to 3"),
        ("--stage.internal.target_guidance=-1", "stage.internal.target_guidance = -1"),
        ("--model.internal_head=1", r"model.internal_head = 1.*0: supervision = \"internal_guidance\" adds it"),
        ("--sample.internal_range=[0.7,0.3]", "sample.internal_range"),
        ("--sample.internal_range=[0,1.5]", "sample.internal_range"),
    ],
)
def test_bad_values_are_refused_in_one_line(recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        load(recipe, [override])


def test_a_recipe_guides_its_samples_only_where_every_stage_has_the_head(recipe):
    assert load(recipe, ["--sample.internal_guidance=1.4"]).sample.internal_guidance == 1.4
    recipe.write_text(recipe.read_text() + '[[stage]]\nname = "plain"\nsupervision = "none"\nsteps = 2\n')
    with pytest.raises(RecipeError, match=r"sample.internal_guidance = 1.4.*stage.plain \(none\) has no internal head"):
        load(recipe, ["--sample.internal_guidance=1.4"])
