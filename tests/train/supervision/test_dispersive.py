"""Dispersive loss against NumPy float64, and that any number of ranks learns from the whole batch's pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from st_fast.core import checkpoint
from st_fast.core.errors import Interrupted
from st_fast.core.ranks import Heartbeat, Ranks
from st_fast.recipe import load
from st_fast.recipe.cost import stage_cost
from st_fast.recipe.error import RecipeError
from st_fast.recipe.methods import Dispersive, Plain
from st_fast.recipe.schema import Stage
from st_fast.train.graphs import refusal
from st_fast.train.run import run
from st_fast.train.supervision import Parts, Rows, create
from st_fast.train.supervision.dispersive import dispersion
from tests import tiny
from tests.train.supervision.test_losses import BATCH, MODEL, TABLE, hidden, noisy
from tests.train.test_training import STOP, signals, stop_at  # noqa: F401

STAGE = """
[[stage]]
name = "spread"
supervision = "dispersive"
steps = 8
depth = 2
weight = 0.7
temperature = 0.3
"""
CPU = torch.device("cpu")


def by_numpy(z: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    """log mean exp(−‖z_i − z_j‖²/(dτ)) pair by pair, and its gradient (B, d) by the definition."""
    count, d = z.shape
    near = np.array([[np.exp(-((a - b) ** 2).sum() / (d * temperature)) for b in z] for a in z])
    gradient = np.zeros_like(z)
    for i in range(count):
        for j in range(count):
            slope = -2 * near[i, j] * (z[i] - z[j]) / (d * temperature) / near.sum()
            gradient[i] += slope
            gradient[j] -= slope
    return np.log(near.mean()), gradient


def test_the_loss_and_its_gradient_are_the_formula_in_numpy():
    method = Dispersive(depth=2, weight=0.7, temperature=0.3)
    supervision, batch, z = (
        create(Stage("s", method, 10), Parts(MODEL, TABLE, None), 1),
        noisy(method.selection),
        hidden(),
    )
    assert supervision.tap == 2 and supervision.active(0) and not list(supervision.heads.parameters())
    loss = supervision.loss(z, supervision.target(batch), batch)
    loss.backward()
    value, gradient = by_numpy(z.detach().numpy().reshape(BATCH, -1), 0.3)
    assert loss.item() == pytest.approx(0.7 * value, rel=1e-6) and value < -0.5
    np.testing.assert_allclose(z.grad.numpy().reshape(BATCH, -1), 0.7 * gradient, rtol=1e-6, atol=1e-9)


class Rank(Ranks):
    """One rank of several in one process: it is given what the others would send."""

    def __init__(self, rank: int, parts: list[Tensor], total: float) -> None:
        super().__init__(rank, len(parts), CPU, Heartbeat())
        object.__setattr__(self, "given", (parts, total))

    def gather(self, mine: Tensor) -> Tensor:
        parts, _ = self.given  # type: ignore[attr-defined]
        assert torch.equal(mine, parts[self.rank]) and not mine.requires_grad
        return torch.cat(parts)

    def sum(self, values: Tensor) -> Tensor:
        assert not values.requires_grad
        return torch.full_like(values, self.given[1])  # type: ignore[attr-defined]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_ranks_parts_add_up_and_each_has_the_whole_gradient_of_its_samples(count, dtype, close):
    values = (hidden().detach().reshape(BATCH, -1) + 3).to(dtype)
    expected, gradient = by_numpy(values.double().numpy(), 0.4)
    total = BATCH**2 * np.exp(expected)
    parts, found, slopes = list(values.chunk(count)), 0.0, []
    for rank in range(count):
        mine = parts[rank].clone().requires_grad_()
        part = dispersion(mine, Rank(rank, parts, total), 0.4)
        assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        part.backward()
        found += part.item()
        slopes.append(mine.grad.double().numpy())
    assert found == pytest.approx(expected, rel=min(close, 1e-5))
    np.testing.assert_allclose(np.concatenate(slopes), gradient, rtol=0, atol=close * np.abs(gradient).max())


def test_the_ranks_losses_add_up_to_the_weight_times_the_whole_batchs():
    method, z, found = Dispersive(depth=2, weight=0.7, temperature=0.3), hidden().detach(), 0.0
    expected, _ = by_numpy(z.numpy().reshape(BATCH, -1), 0.3)
    parts = list(z.flatten(1).chunk(3))
    for rank, mine in enumerate(z.chunk(3)):
        ranks = Rank(rank, parts, BATCH**2 * np.exp(expected))
        supervision = create(Stage("s", method, 10), Parts(MODEL, TABLE, None, ranks=ranks), 1)
        batch = noisy(method.selection)
        part = slice(rank * 4, rank * 4 + 4)
        rows = Rows(torch.arange(4), batch.rows.weight[part])
        found += supervision.loss(mine, (), replace(batch, rows=rows)).item()
    assert found == pytest.approx(0.7 * expected, rel=1e-6)


def test_it_costs_the_student_alone_for_pairs_are_a_thousandth_of_it():
    recipe = load(Path(__file__).parents[3] / "recipes" / "sit_xl_dispersive.toml")
    (stage,) = recipe.stages
    assert stage_cost(recipe, stage) == stage_cost(recipe, Stage("s", Plain(), 10))
    numbers = recipe.model.tokens * recipe.model.width
    pairs = 2 * 2 * recipe.optim.batch_size * numbers  # an image's row of products, forward and backward
    assert pairs < 1e-3 * stage_cost(recipe, stage).total


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "latents")


def written(folder: Path, data: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = tiny.write_recipe(folder / "t.toml", data, folder / "out")
    path.write_text(path.read_text().split("[[stage]]")[0] + STAGE)
    return path


@pytest.mark.usefixtures("one_thread", "signals")
def test_a_run_spreads_the_features_and_resumes_bit_exactly(data, tmp_path, monkeypatch):
    run(load(written(tmp_path / "whole", data)))
    recipe = load(written(tmp_path / "again", data))
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            run(recipe)
    STOP.name = None
    run(recipe)
    ours, theirs = (
        checkpoint.latest(tmp_path / name / "out" / "spread" / "checkpoints", pytest.fail)
        for name in ("again", "whole")
    )
    assert ours and theirs and ours.groups.keys() == theirs.groups.keys()
    for group, tensors in theirs.groups.items():
        assert all(torch.equal(ours.groups[group][key], tensor) for key, tensor in tensors.items())
    lines = tiny.records(tmp_path / "whole" / "out", "train")
    assert lines[-1]["aux"] < lines[0]["aux"] < 0


@pytest.mark.parametrize(
    ("options", "ranks", "said"),
    [
        (["--optim.accumulation=2"], 1, "optim.accumulation = 2: stage.spread (dispersive) compares all samples"),
        (["--optim.micro_batch=2"], 2, "optim.micro_batch = 2: stage.spread (dispersive) compares all samples"),
        (["--optim.batch_size=1"], 1, "optim.batch_size = 1: stage.spread (dispersive) compares all samples"),
        (
            ["--run.cuda_graphs=true", "--run.device=auto"],
            2,
            'stage.spread.supervision = "dispersive": run.cuda_graphs',
        ),
        (["--stage.spread.temperature=0"], 1, "stage.spread.temperature = 0"),
        (["--stage.spread.depth=4"], 1, "stage.spread.depth = 4"),
    ],
)
def test_what_could_not_be_the_whole_batchs_loss_is_refused_in_a_line(options, ranks, said, data, tmp_path):
    with pytest.raises(RecipeError) as caught:
        load(written(tmp_path, data), options, ranks)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_share_in_one_pass_and_graphs_of_a_single_rank_are_allowed(data, tmp_path):
    path = written(tmp_path, data)
    for options, ranks in ((["--optim.micro_batch=4"], 2), (['--optim.micro_batch="auto"'], 2), ([], 4)):
        load(path, options, ranks)
    recipe = load(path, ["--run.cuda_graphs=true", "--run.device=auto"])
    plain = Stage("plain", Plain(), 10)
    cuda = SimpleNamespace(device=SimpleNamespace(type="cuda"), count=2)
    assert "dispersive" in refusal(recipe, recipe.stages[0], cuda, 1)
    assert refusal(recipe, plain, cuda, 1) == "", "another stage of the run keeps its graphs"
