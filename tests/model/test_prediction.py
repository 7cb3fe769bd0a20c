"""A network that predicts the clean latent gives the velocity that follows from it, wherever its weights go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast import kernels
from st_fast.convert.__main__ import main as convert
from st_fast.convert.sit_transformer import SiTTransformer
from st_fast.core.errors import UserError
from st_fast.model import build, flow
from st_fast.model.stored import read_model
from st_fast.recipe import RecipeError, load
from st_fast.recipe.architecture import Model
from st_fast.train.run import run
from tests import tiny

PLAIN = Model(depth=2, width=16, heads=2, patch=2, channels=3, latent_size=(4, 6), num_classes=4, zero_init=False)
CPU = torch.device("cpu")


def test_the_velocity_is_that_of_the_path_where_the_prediction_is_right() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 5, 3, 4, 6, generator=generator)
    t = torch.tensor([0.05, 0.2, 0.45, 0.9, 1.0])
    noisy, velocity = flow.interpolate(x, noise, t, "linear")
    torch.testing.assert_close(flow.velocity_of_x(x, noisy, t), velocity, rtol=0, atol=2e-5)


def test_below_the_least_time_that_is_divided_by() -> None:
    predicted, x = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.0, 0.03, 0.06])
    expected = (x - predicted).double().numpy() / np.array([0.05, 0.05, 0.06]).reshape(3, 1, 1, 1)
    assert np.allclose(flow.velocity_of_x(predicted, x, t).numpy(), expected, rtol=1e-6)


def test_a_network_and_its_diffusers_copy_turn_their_output_into_the_velocity() -> None:
    table = kernels.select({}, CPU)
    plain, ours = build(PLAIN, table, 3), build(replace(PLAIN, prediction="x"), table, 3)
    x = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    t, labels = torch.tensor([0.02, 0.4, 0.8]), torch.tensor([0, 3, 4])
    with torch.no_grad():
        out, found = plain(x, t, labels)[0], ours(x, t, labels)[0]
        expected = (x - out).double().numpy() / np.array([0.05, 0.4, 0.8]).reshape(3, 1, 1, 1)
        assert np.abs(out.numpy()).max() > 0.1 and np.allclose(found.numpy(), expected, atol=1e-5)
        sizes = {"depth": 2, "width": 16, "heads": 2, "patch": 2, "channels": 3, "num_classes": 4}
        copy = SiTTransformer(**sizes, latent_size=[4, 6], prediction="x")
        copy.load_state_dict(ours.state_dict())
        assert torch.allclose(copy.eval()(x, t, labels), found, atol=1e-4)


def test_a_run_keeps_it_and_other_kinds_of_prediction_are_refused(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = tiny.write_recipe(tmp_path / "r.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out")
    short = ["--model.prediction=x", "--stage.align.steps=1", "--stage.transcend.steps=1"]
    run(load(recipe, short))
    align = tmp_path / "out" / "align"
    assert read_model(align, print).loaded.config.prediction == "x"
    other = tiny.write_recipe(tmp_path / "o.toml", tmp_path / "data", tmp_path / "other")
    other.write_text(other.read_text().replace('teacher = "align"', f'teacher = "{align}"'))
    with pytest.raises(UserError, match=r"another architecture: prediction x \(this recipe: velocity\)"):
        run(load(other))
    with pytest.raises(UserError, match=r'model\.prediction = "x": repa\'s own code has "velocity" only'):
        convert([str(align), str(tmp_path / "out.pt"), "--to", "repa"])
    with pytest.raises(RecipeError, match=r"model\.prediction.*linear path alone"):
        load(recipe, [*short, "--flow.path=cosine"])
