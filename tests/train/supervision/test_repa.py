"""REPA: its loss against NumPy float64, where gradients flow, and runs that resume, stop early and refuse misfits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.core.ranks import Ranks
from st_fast.data.ahead import ReadAhead
from st_fast.data.features import open_features
from st_fast.data.loader import ResidentLoader
from st_fast.data.shards import open_data
from st_fast.recipe import cost, load
from st_fast.recipe.methods import Repa
from st_fast.recipe.schema import Stage
from st_fast.train.batches import BatchIterator
from st_fast.train.run import run
from st_fast.train.supervision import Parts, create
from st_fast.train.supervision.repa import Convolution, on_grid, spatially_normalised
from tests import tiny
from tests.train.supervision.encoders import write_encoder, write_set
from tests.train.supervision.resuming import assert_it_resumes_bit_exactly_and_learns, interrupt
from tests.train.supervision.test_losses import BATCH, MODEL, TABLE, fill, hidden, mlp, noisy, weights_of
from tests.train.supervision.test_self_methods import cosine_loss
from tests.train.test_training import signals  # noqa: F401

STAGE = """
[[stage]]
name = "repa"
supervision = "repa"
steps = 8
encoders = ["one", "two"]
depth = 1
hidden = 16
"""

CPU = torch.device("cpu")


def made(widths=(6, 10), **settings):
    method = Repa(encoders=tuple("ab"[: len(widths)]), depth=1, hidden=24, **settings)
    supervision = create(Stage("s", method, 10), Parts(MODEL, TABLE, None, feature_widths=widths), seed=1)
    fill(supervision.heads, 4)
    generator = torch.Generator().manual_seed(8)
    features = tuple(torch.randn(BATCH, 2, 2, width, generator=generator, dtype=torch.float64) for width in widths)
    return supervision, replace(noisy(method.selection), features=features)


def test_the_loss_of_two_encoders_equals_the_formula_in_numpy():
    (supervision, batch), h = made(weight=0.5), hidden()
    weights, expected = weights_of(supervision.heads), 0.0
    for number, features in enumerate(batch.features):
        head = {k.removeprefix(f"projectors.{number}."): w for k, w in weights.items() if f"projectors.{number}." in k}
        q = mlp({f"projectors.{k}": w for k, w in head.items()}, h.detach().numpy())
        expected += 0.5 / 2 * cosine_loss(q, features.numpy().reshape(BATCH, 4, -1)).mean()
    loss = supervision.loss(h, supervision.target(batch), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def normalised(features: np.ndarray, share: float) -> np.ndarray:
    """(B, N, D): iREPA's target, the deviation of N tokens divided by N − 1."""
    return (features - share * features.mean(1, keepdims=True)) / (features.std(1, ddof=1, keepdims=True) + 1e-6)


def convolved(weight: np.ndarray, bias: np.ndarray, tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(B, N, D) → (B, N, D_j): each token's 3 × 3 neighbours on the grid, zeros around it, one by one."""
    rows, columns = grid
    out = np.tile(bias, (*tokens.shape[:2], 1))
    for n in range(rows * columns):
        for y in range(3):
            for x in range(3):
                row, column = n // columns + y - 1, n % columns + x - 1
                if 0 <= row < rows and 0 <= column < columns:
                    out[:, n] += tokens[:, row * columns + column] @ weight[:, :, y, x].T
    return out


@pytest.mark.parametrize(("projector", "target_norm"), [("conv", 0.6), ("conv", 0.0), ("mlp", 0.3)])
def test_irepas_loss_equals_the_formula_in_numpy(projector, target_norm):
    (supervision, batch), h = made(weight=0.7, projector=projector, target_norm=target_norm), hidden()
    weights, expected = weights_of(supervision.heads), 0.0
    for number, features in enumerate(batch.features):
        own = {k.removeprefix(f"projectors.{number}."): w for k, w in weights.items() if f"projectors.{number}." in k}
        if projector == "conv":
            q = convolved(own["projection_layer.weight"], own["projection_layer.bias"], h.detach().numpy(), (2, 2))
        else:
            q = mlp({f"projectors.{k}": w for k, w in own.items()}, h.detach().numpy())
        g = features.numpy().reshape(BATCH, 4, -1) + 0.5
        expected += 0.7 / 2 * cosine_loss(q, normalised(g, target_norm) if target_norm else g).mean()
    batch = replace(batch, features=tuple(one + 0.5 for one in batch.features))
    loss = supervision.loss(h, supervision.target(batch), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_convolution_on_a_grid_that_is_no_square():
    head = fill(Convolution(6, 5, (2, 3)), 3)
    tokens = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = weights_of(head)
    expected = convolved(w["projection_layer.weight"], w["projection_layer.bias"], tokens.numpy(), (2, 3))
    found = head(tokens)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12)
    assert found.is_contiguous()


def test_features_are_normalised_over_the_tokens_of_each_image_and_channel_in_float32():
    features = 3 + 2 * torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = spatially_normalised(features, 0.6)
    np.testing.assert_allclose(found.numpy(), normalised(features.numpy(), 0.6), rtol=1e-12)
    torch.testing.assert_close(spatially_normalised(features, 1.0).mean(1), torch.zeros(3, 5).double())
    half = spatially_normalised(features.half(), 0.6)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), found, rtol=5e-3, atol=5e-3)
    constant = spatially_normalised(torch.full((1, 4, 2), 2.0), 0.6)
    torch.testing.assert_close(constant, torch.full((1, 4, 2), 0.8e6))


def test_images_of_one_token_can_not_be_normalised():
    with pytest.raises(UserError, match=r"target_norm = 0.6: 0 is needed"):
        create(
            Stage("s", Repa(("a",), 1, target_norm=0.6), 10),
            Parts(replace(MODEL, patch=4), TABLE, None, feature_widths=(6,)),
            seed=1,
        )


def test_gradients_reach_the_student_and_the_heads_but_not_the_features():
    (supervision, batch), h = made(), hidden()
    target = supervision.target(batch)
    supervision.loss(h, target, batch).backward()
    assert h.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in supervision.heads.parameters())
    assert not any(one.requires_grad for one in target)


def test_gradients_pass_a_convolution_and_target_norm_leaves_the_features_alone():
    (supervision, batch), h = made(projector="conv", target_norm=0.6), hidden()
    before = [one.clone() for one in batch.features]
    supervision.loss(h, supervision.target(batch), batch).backward()
    assert h.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in supervision.heads.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, batch.features, strict=True))


def test_heads_have_the_published_names():
    supervision, _ = made(projector="conv")
    names = {f"projectors.{j}.projection_layer.{kind}" for j in (0, 1) for kind in ("weight", "bias")}
    assert set(supervision.heads.state_dict()) == names
    supervision, _ = made()
    names = {f"projectors.{j}.{layer}.{kind}" for j in (0, 1) for layer in (0, 2, 4) for kind in ("weight", "bias")}
    assert set(supervision.heads.state_dict()) == names


def test_features_of_another_grid_are_resized_bilinearly_and_those_of_the_same_stay_as_they_are():
    ramp = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 4, 4, 1).contiguous()  # grows along w
    resized = on_grid(ramp, (2, 2)).view(2, 2)
    assert torch.allclose(resized, torch.tensor([[0.5, 2.5], [0.5, 2.5]]))
    same = on_grid(ramp, (4, 4))
    assert torch.equal(same, ramp.view(1, 16, 1)) and same.data_ptr() == ramp.data_ptr()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repa")
    one = write_encoder(folder / "one")
    return write_set(folder / "data", one, write_encoder(folder / "two", registers=3, width=16, seed=1))


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Path:
    path = tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    path.write_text(path.read_text().split("[[stage]]")[0] + STAGE)
    return path


@pytest.mark.parametrize("keys", ["", 'projector = "conv"\ntarget_norm = 0.6\n'], ids=["repa", "irepa"])
def test_an_interrupted_run_resumes_bit_exactly(keys, recipe, tmp_path, monkeypatch, signals):  # noqa: F811
    torch.set_num_threads(1)
    recipe.write_text(recipe.read_text() + keys)
    assert_it_resumes_bit_exactly_and_learns(recipe, tmp_path, monkeypatch)


def test_the_cost_counts_the_encoders_forwards_once_and_the_heads_until_the_stop(recipe, data, tmp_path):
    settings = load(recipe, ["--stage.repa.stop_step=5"])
    run(settings)
    records = open_data(data)
    spent = sum(open_features(data, name, records).manifest.flops for name in ("one", "two"))
    assert spent > 0
    logged = tiny.records(tmp_path / "out", "train")
    assert logged[-1]["flops"] == pytest.approx(spent + cost.stage_flops(settings, settings.stages[0], 0, 8))
    assert [record["aux"] != 0 for record in logged] == [True] * 5 + [False] * 3
    each = cost.stage_cost(settings, settings.stages[0])
    macs = 4 * sum(32 * 16 + 16 * 16 + 16 * width for width in (32, 32))  # names that tell no width: the model's
    assert each.heads == 6 * macs and each.teacher == 0


def seen(recipe, count: int) -> dict[int, list[torch.Tensor]]:
    """The features that each record got, as all of `count` ranks see them."""
    shards = open_data(Path(recipe.data.path), verify=False)
    found = {}
    for rank in range(count):
        ranks = Ranks(rank, count, torch.device("cpu"))
        sets = [open_features(Path(recipe.data.path), name, shards) for name in ("one", "two")]
        loaders = [ReadAhead(one) for one in sets]
        iterator = BatchIterator(recipe, recipe.stages[0], ResidentLoader(shards, ranks.device), shards, ranks, loaders)
        for batches in iterator.steps(0, 8):
            for batch in batches:
                for place, ordinal in enumerate(batch.ordinals.tolist()):
                    found[ordinal] = [one[place] for one in batch.features]
        for loader in loaders:
            loader.close()
    return found


def test_two_ranks_and_accumulation_see_the_features_of_their_own_records(recipe, data):
    settings = load(recipe, ["--optim.accumulation=2"])
    one, two = seen(load(recipe), 1), seen(settings, 2)
    assert one.keys() == two.keys() == set(range(64))
    shards = open_data(data)
    sets = [open_features(data, name, shards) for name in ("one", "two")]
    ordinals = np.arange(64)
    iterator = BatchIterator(
        settings,
        settings.stages[0],
        ResidentLoader(shards, torch.device("cpu")),
        shards,
        Ranks(0, 1, torch.device("cpu")),
    )
    order = iterator.order(ordinals)
    for ordinal, record in zip(ordinals.tolist(), order.tolist(), strict=True):
        for number, features in enumerate(sets):
            row = np.empty((1, *features.manifest.shape), np.float16)
            features.read_into(np.array([record]), row)
            assert torch.equal(one[ordinal][number], torch.from_numpy(row[0]))
            assert torch.equal(one[ordinal][number], two[ordinal][number])


def refusal(recipe: Path, *options: str) -> str:
    with pytest.raises(UserError) as refused:
        run(load(recipe, options))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_features_that_were_never_written_are_asked_for_with_the_command(recipe):
    text = refusal(recipe, '--stage.repa.encoders=["facebook/dinov2-large"]')
    assert "python -m st_fast.prepare --features facebook/dinov2-large IMAGES" in text


def test_a_grid_that_does_not_match_is_refused_with_both_grids_and_taken_with_interpolate(recipe, tmp_path):
    folder = write_set(tmp_path / "other", write_encoder(tmp_path / "fine", patch=2))
    options = [f"--data.path={folder}", '--stage.repa.encoders=["fine"]', "--stage.repa.steps=2"]
    text = refusal(recipe, *options)
    assert "8 x 8 patches" in text and "2 x 2 tokens" in text and "interpolate = true" in text
    run(load(recipe, [*options, "--stage.repa.interpolate=true"]))
    assert all(record["aux"] != 0 for record in tiny.records(tmp_path / "out", "train"))


def test_features_changed_between_two_starts_are_refused(recipe, data, tmp_path, monkeypatch, signals):  # noqa: F811
    folder = shutil.copytree(data, tmp_path / "copy")
    settings = load(recipe, [f"--data.path={folder}"])
    interrupt(settings, monkeypatch)
    path = folder / "features" / "one" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hash": "another"}))
    with pytest.raises(UserError, match="features changed"):
        run(settings)
