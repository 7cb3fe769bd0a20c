"""The loss of the velocity's direction: its formula, its gradient, and its place in the log beside the others."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast import kernels
from st_fast.core.ranks import Ranks
from st_fast.model import build, flow
from st_fast.recipe import load
from st_fast.train import supervision
from st_fast.train.optim import Optimizer
from st_fast.train.run import run
from st_fast.train.step import Step
from st_fast.train.supervision import Parts
from tests import tiny
from tests.train.test_contrast import batches_of

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
WEIGHT = 0.7


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "latents")


def test_it_is_one_minus_the_cosine_over_channels_at_each_place():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 5, 2, 7, generator=generator).bfloat16() for _ in range(2))
    x, y = (value.double().numpy() for value in (a, b))
    cosine = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    np.testing.assert_allclose(flow.direction_loss(a, b).numpy(), (1 - cosine).mean((1, 2)), rtol=1e-6)
    assert flow.direction_loss(a, 3 * a).abs().max() < 1e-6, "length does not matter"


def test_a_network_that_begins_with_no_velocity_has_a_gradient_of_a_usual_size():
    generator = torch.Generator().manual_seed(0)
    velocity, usual = (torch.randn(3, 5, 2, 7, generator=generator) for _ in range(2))
    lengths = []
    for prediction in (torch.zeros_like(usual), usual):
        prediction.requires_grad_()
        flow.direction_loss(prediction, velocity).sum().backward()
        assert prediction.grad is not None
        lengths.append(prediction.grad.norm().item())
    assert lengths[0] == pytest.approx(100 * math.sqrt(3 / 14), rel=1e-5)  # 1/LEAST_LENGTH at each place, of 14 a mean
    assert lengths[0] < 400 * lengths[1]


def test_it_is_added_to_the_loss_and_its_gradient_by_its_weight_and_kept_apart(data, tmp_path):
    recipe = load(tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out"))
    ((((batch,), *_),), *_) = (batches_of(recipe, range(3, 5)),)
    table = kernels.select({}, CPU)
    found = {}
    for weight in (0.0, WEIGHT):
        model = build(recipe.model, table, 3)
        for number, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        method = supervision.create(recipe.stages[0], Parts(recipe.model, table, None), 1)
        optimizer = Optimizer(model, method.heads, recipe.optim, torch.float32, kernels.adamw_ema_, kernels.grad_norm)
        step = Step(model, method, optimizer, recipe, Ranks(0, 1, CPU), print, weight)
        losses = step.forward(3, batch)
        losses.backward()
        found[weight] = model, losses, [gradient.clone() for gradient in optimizer.gradients()]
    (_, plain, before), (model, losses, after) = found.values()
    assert plain.direction is None and (plain.denoise, plain.aux) == (losses.denoise, losses.aux)
    model.zero_grad()
    prediction = model(batch.x_t, batch.t, batch.student_condition)[0]
    cosine = torch.nn.functional.normalize(prediction, dim=1) * torch.nn.functional.normalize(batch.velocity, dim=1)
    expected = WEIGHT * (1 - cosine.sum(1)).mean()
    assert losses.direction is not None and losses.direction.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for parameter, one, other in zip(optimizer.model.parameters, before, after, strict=False):
        torch.testing.assert_close(other - one, parameter.grad, rtol=1e-3, atol=2e-6)


def test_a_run_logs_it_apart_whatever_the_passes_and_none_where_there_is_none(data, tmp_path, capsys):
    records = {}
    for name, options in {"plain": [], "one": ["--stage.align.direction=0.7"],
                          "two": ["--stage.align.direction=0.7", "--optim.accumulation=2"]}.items():  # fmt: skip
        path = tiny.write_recipe(tmp_path / f"{name}.toml", data, tmp_path / name)
        run(load(path, [*options, "--stage.align.steps=3", "--stage.transcend.steps=2", "--run.log_every=2"]))
        records[name] = tiny.records(tmp_path / name, "train")
    for record in records["one"]:
        assert ("direction" in record) == (record["stage"] == "align")
        assert record["loss"] == pytest.approx(record["denoise"] + record["aux"] + record.get("direction", 0), rel=1e-9)
    assert not any("direction" in record for record in records["plain"])
    assert records["one"][0]["denoise"] != records["plain"][0]["denoise"]  # it changed the first of two steps
    assert 0 < records["one"][0]["direction"] < 2 * WEIGHT and math.isfinite(records["one"][1]["direction"])
    for one, two in zip(records["one"], records["two"], strict=True):
        for key in {"denoise", "aux", "direction", "grad_norm"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-4)
    assert " + direction " in capsys.readouterr().out
