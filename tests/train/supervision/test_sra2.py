"""SRA 2: its loss against NumPy float64, where gradients flow, its published cost, and runs that resume bit-exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.recipe import cost, load
from st_fast.recipe.methods import Sra2
from st_fast.recipe.schema import Stage
from st_fast.train.run import run
from st_fast.train.supervision import Parts, create
from st_fast.train.supervision.sra2 import Head
from tests import tiny
from tests.train.supervision.resuming import assert_it_resumes_bit_exactly_and_learns
from tests.train.supervision.test_losses import BATCH, MODEL, TABLE, fill, hidden, noisy, silu, weights_of
from tests.train.supervision.test_self_methods import smooth_l1
from tests.train.test_training import signals  # noqa: F401

STAGE = """
[[stage]]
name = "sra2"
supervision = "sra2"
steps = 8
depth = 2
hidden = 16
"""


def five_layers(weights: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    for number in range(5):
        z = z @ weights[f"projector.{2 * number}.weight"].T + weights[f"projector.{2 * number}.bias"]
        z = silu(z) if number < 4 else z
    return z


def made(**settings):
    method = Sra2(depth=1, hidden=24, **settings)
    supervision = create(Stage("s", method, 10), Parts(MODEL, TABLE, None), seed=1)
    fill(supervision.heads, 4)
    return supervision, noisy(method.selection)


def test_the_loss_equals_the_formula_in_numpy_at_every_time():
    (supervision, batch), h = made(weight=0.7), hidden()
    # Targets near the predictions, so that many differences lie below the bend of the loss.
    patches = five_layers(weights_of(supervision.heads), h.detach().numpy())
    image = patches.reshape(BATCH, 2, 2, 2, 2, 4).transpose(0, 5, 1, 3, 2, 4).reshape(BATCH, 4, 4, 4)
    batch = replace(batch, x=torch.from_numpy(image) + 0.06 * batch.x)
    difference = image - batch.x.numpy()
    assert 0.2 < (np.abs(difference) < 0.05).mean() < 0.8 and len(batch.rows.index) == BATCH
    expected = 0.7 * smooth_l1(difference, 0.05).mean()
    loss = supervision.loss(h, supervision.target(batch), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    rows = batch.x.numpy().reshape(BATCH, 4, 2, 2, 2, 2).transpose(0, 2, 4, 3, 5, 1).reshape(BATCH, 4, 16)
    assert np.array_equal(supervision.target(batch)[0].numpy(), rows)


def test_the_head_of_latents_that_are_no_square():
    config = replace(MODEL, patch=4, channels=3, width=10, latent_size=8)
    head = fill(Head(config, 24, TABLE), 2)
    tokens = torch.randn(5, 6, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    patches = five_layers(weights_of(head), tokens.numpy())
    np.testing.assert_allclose(head(tokens).detach().numpy(), patches, rtol=1e-9)


def test_gradients_reach_the_student_and_the_head():
    (supervision, batch), h = made(), hidden()
    supervision.loss(h, supervision.target(batch), batch).backward()
    assert h.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in supervision.heads.parameters())


def test_the_default_width_has_the_stated_parameters_and_flops():
    recipe = load(tiny.ROOT / "recipes" / "sit_xl_sra2.toml")
    method = recipe.stages[0].method
    assert 18e6 < cost.head_parameters(recipe.model, method) < 19e6
    each = cost.stage_cost(recipe, recipe.stages[0])
    assert each.teacher == 0 and each.heads / each.student == pytest.approx(0.04, abs=0.001)


def test_an_interrupted_run_resumes_bit_exactly_and_learns(tmp_path: Path, monkeypatch, signals, one_thread):  # noqa: F811
    recipe = tiny.write_recipe(tmp_path / "t.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out")
    recipe.write_text(recipe.read_text().split("[[stage]]")[0] + STAGE)
    assert_it_resumes_bit_exactly_and_learns(recipe, tmp_path, monkeypatch)


def test_accumulated_micro_batches_add_up_to_the_loss_of_the_whole_batch(tmp_path: Path, one_thread):
    data = tiny.write_data(tmp_path / "data")
    for name, options in (("out", []), ("parts", ["--optim.accumulation=4"])):
        recipe = tiny.write_recipe(tmp_path / f"{name}.toml", data, tmp_path / name)
        recipe.write_text(recipe.read_text().split("[[stage]]")[0] + STAGE)
        run(load(recipe, options))
    pairs = zip(tiny.records(tmp_path / "out", "train"), tiny.records(tmp_path / "parts", "train"), strict=True)
    for ours, theirs in pairs:
        assert ours["aux"] == pytest.approx(theirs["aux"], rel=1e-4)
