"""Contrastive flow matching: its loss, which samples push which, and the mean latent that checkpoints keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from st_fast import kernels
from st_fast.core import checkpoint, random
from st_fast.core.errors import Interrupted, UserError
from st_fast.core.random import Purpose
from st_fast.core.ranks import Ranks
from st_fast.data.loader import make_loader
from st_fast.data.shards import open_data
from st_fast.data.statistics import mean_latents
from st_fast.kernels.noise.definition import words
from st_fast.model import build
from st_fast.recipe import changed_maths, from_text, load, to_toml
from st_fast.recipe.error import RecipeError
from st_fast.recipe.schema import Contrast, Recipe
from st_fast.train import supervision
from st_fast.train.batches import BatchIterator
from st_fast.train.optim import Optimizer
from st_fast.train.run import run
from st_fast.train.step import Step
from st_fast.train.supervision import NoisyBatch, Parts
from tests import tiny, tiny_shapes
from tests.train.test_training import STOP, signals, stop_at  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
WEIGHT = 0.15
CONTRAST = f"--stage.align.contrast={WEIGHT}"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "latents")


def recipe_of(folder: Path, data: Path, *options: str, shapes: bool = False) -> Recipe:
    """The tiny recipe's first stage, with the contrast."""
    written = (tiny_shapes if shapes else tiny).write_recipe(folder / "tiny.toml", data, folder / "out")
    text = written.read_text()
    written.write_text(text[: text.rindex("[[stage]]")])
    return load(written, [CONTRAST, *options])


def batches_of(
    recipe: Recipe, steps: range, kind: str = "resident", count: int = 1
) -> list[list[tuple[NoisyBatch, ...]]]:
    """By rank, then by step: the micro-batches."""
    shards = open_data(Path(recipe.data.path), verify=False)
    found = []
    for rank in range(count):
        iterator = BatchIterator(
            recipe, recipe.stages[0], make_loader(kind, shards, CPU, print), shards, Ranks(rank, count, CPU)
        )
        found.append([tuple(one) for one in iterator.steps(steps.start, steps.stop)])
    return found


def test_another_sample_is_never_the_sample_itself_and_uniform_over_the_rest():
    for size in (2, 3, 7, 64):
        ordinals = np.arange(2**33 * size, (2**33 + 6_000 // size) * size)
        chosen = random.others(5, ordinals, size)
        assert chosen.dtype == np.int64 and (chosen // size == ordinals // size).all() and (chosen != ordinals).all()
        distance = (chosen - ordinals) % size
        assert size == 2 or chisquare(np.bincount(distance, minlength=size)[1:]).pvalue > 1e-3
    places = random.others(5, np.arange(70_000), 7) % 7
    assert chisquare(np.bincount(places)).pvalue > 1e-3
    with pytest.raises(ValueError, match="batch_size = 1"):
        random.others(5, np.arange(3), 1)


def test_another_sample_follows_from_the_ordinal_alone():
    whole = random.others(5, np.arange(400), 40)
    assert (random.others(5, np.arange(123, 131)[::-1].copy(), 40) == whole[123:131][::-1]).all()
    assert (random.others(6, np.arange(400), 40) != whole).any()
    assert random.others(5, np.arange(9_999_999), 9_999_999).max() < 9_999_999, "at the largest batch, too"


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("null", [True, False])
def test_the_loss_is_the_formula_in_numpy_with_negatives_at_the_samples_own_time(path, null, data, tmp_path):
    options = [f"--flow.path={path}", f"--stage.align.contrast_null={str(null).lower()}", "--model.class_dropout=0.4"]
    recipe = recipe_of(tmp_path, data, *options)
    ((((batch,), *_),), *_) = (batches_of(recipe, range(3, 5)),)
    model = build(recipe.model, kernels.select({}, CPU), 3)
    for number, parameter in enumerate(model.parameters()):
        parameter.data += 0.1 * random.normal(2, Purpose.NOISE, torch.tensor([number]), parameter.shape)[0]
    method = supervision.create(recipe.stages[0], Parts(recipe.model, kernels.select({}, CPU), None), 1)
    optimizer = Optimizer(model, method.heads, recipe.optim, torch.float32, kernels.adamw_ema_, kernels.grad_norm)
    step = Step(model, method, optimizer, recipe, Ranks(0, 1, CPU), print)

    prediction = model(batch.x_t, batch.t, batch.student_condition)[0].detach().double().numpy()
    x, noise, t = (value.double().numpy() for value in (batch.x, batch.noise, batch.t))
    half = math.pi / 2
    derivatives = {
        "linear": (-np.ones_like(t), np.ones_like(t)),
        "cosine": (-half * np.sin(half * t), half * np.cos(half * t)),
    }
    a, s = (c[:, None, None, None] for c in derivatives[path])
    word = words(3, Purpose.NEGATIVE, batch.ordinals, 1)[:, 0].tolist()
    other = [(place + 1 + w * 7 // 2**32) % 8 for place, w in enumerate(word)]
    denoise = ((prediction - a * x - s * noise) ** 2).mean()
    apart = ((prediction - a * x[other] - s * noise[other]) ** 2).mean((1, 2, 3))
    dropped = (batch.student_condition != batch.condition).numpy()
    assert 0 < dropped.sum() < 8
    pushed = WEIGHT * (apart if null else np.where(dropped, 0, apart)).mean()

    losses, plain = (step.forward(3, one) for one in (batch, replace(batch, negative=None)))
    assert losses.denoise.item() == pytest.approx(denoise, rel=1e-6)
    assert losses.denoise.item() == plain.denoise.item(), "what is logged as denoise is the plain loss"
    assert (losses.aux - plain.aux).item() == pytest.approx(-pushed, rel=1e-5)
    assert plain.aux.item() > 0, "the method's own loss is there beside it"


def seen(batch: NoisyBatch, place: int) -> tuple[bytes, ...]:
    assert batch.negative is not None
    fields = (batch.x, batch.noise, batch.x_t, batch.velocity, batch.t, batch.negative.velocity, batch.negative.weight)
    return tuple(field[place].numpy().tobytes() for field in fields)


def stream(found: Sequence[Sequence[Sequence[NoisyBatch]]]) -> dict[int, tuple[bytes, ...]]:
    """All that is drawn for a sample, by its ordinal."""
    batches = [batch for rank in found for step in rank for batch in step]
    pairs = [(ordinal, seen(batch, i)) for batch in batches for i, ordinal in enumerate(batch.ordinals.tolist())]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("shapes", [False, True])
def test_ranks_passes_and_loaders_change_no_bit_of_any_negative(shapes, data, tmp_path):
    data = tiny_shapes.write_data(tmp_path / "shapes") if shapes else data
    steps, recipe = range(2, 13), recipe_of(tmp_path, data, shapes=shapes)  # past the end of an epoch
    expected = stream(batches_of(recipe, steps))
    assert len(expected) == 11 * recipe.optim.batch_size
    for count, passes, kind in ((1, 2, "resident"), (2, 1, "torch"), (2, 2, "resident")):
        other = recipe_of(tmp_path, data, f"--optim.accumulation={passes}", shapes=shapes)
        assert stream(batches_of(other, steps, kind, count)) == expected
    without = load(tmp_path / "tiny.toml")
    plain = {key: value[:5] for key, value in expected.items()}
    for rank in batches_of(without, steps):
        for batch in (one for micro in rank for one in micro):
            assert batch.negative is None
            for place, ordinal in enumerate(batch.ordinals.tolist()):
                fields = (batch.x, batch.noise, batch.x_t, batch.velocity, batch.t)
                assert tuple(field[place].numpy().tobytes() for field in fields) == plain[ordinal]


def test_a_negative_is_the_velocity_of_another_sample_of_the_same_batch_and_shape(tmp_path):
    data = tiny_shapes.write_data(tmp_path / "shapes")
    recipe = recipe_of(tmp_path, data, shapes=True)
    (steps,) = batches_of(recipe, range(12))
    sizes = set()
    for (batch,) in steps:
        assert batch.negative is not None
        places = random.others(recipe.run.seed, batch.ordinals.numpy(), tiny_shapes.BATCH) % tiny_shapes.BATCH
        # On the linear path the velocity does not depend on the time.
        assert torch.equal(batch.negative.velocity, batch.velocity[places])
        assert not torch.equal(batch.negative.velocity[0], batch.velocity[0])
        sizes.add(batch.x.shape)
    assert len(sizes) == 3


def whole_mean(data: Path, scale: float) -> np.ndarray:
    """E[x] from the shards' own bytes."""
    from safetensors.numpy import load_file

    files = sorted(path for path in data.glob("*.safetensors"))
    moments = np.concatenate([load_file(path)["moments"] for path in files]).astype(np.float64)
    return scale * moments[:, : moments.shape[1] // 2].mean(0)


def test_the_mean_latent_of_each_shape_is_numpys(tmp_path, data):
    folder = tiny_shapes.write_data(tmp_path / "shapes")
    found = mean_latents(open_data(folder, verify=False))
    assert found.keys() == {"4x12x12", "4x10x14", "4x18x8"}
    for name, sides in tiny_shapes.SIDES.items():
        mean = found["x".join(map(str, (4, *sides)))]
        assert mean.dtype == torch.float32
        np.testing.assert_allclose(mean.numpy(), whole_mean(folder / name, 0.75), rtol=0, atol=1e-6)
    few = mean_latents(open_data(data, verify=False), most=7)["4x4x4"]
    assert not np.allclose(few.numpy(), whole_mean(data, 1.0), atol=1e-3)


def states(out: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(out / "align" / "checkpoints", pytest.fail)
    assert found is not None
    return {f"{group}/{key}": tensor for group, tensors in found.groups.items() for key, tensor in tensors.items()}


@pytest.mark.usefixtures("signals")
def test_a_run_with_a_contrast_resumes_bit_exactly_and_keeps_the_mean_latent(data, tmp_path, monkeypatch):
    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    whole, again = (recipe_of(tmp_path / name, data) for name in ("whole", "again"))
    run(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            run(again)
    STOP.name = None
    monkeypatch.setattr("st_fast.train.trainer.mean_latents", lambda *_: pytest.fail("the checkpoint has it"))
    run(again)
    ours, theirs = states(tmp_path / "again" / "out"), states(tmp_path / "whole" / "out")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    np.testing.assert_allclose(ours["mean_latents/4x4x4"].numpy(), whole_mean(data, 1.0), atol=1e-6)
    lines = tiny.records(tmp_path / "whole" / "out", "train")
    assert all(line["loss"] == pytest.approx(line["denoise"] + line["aux"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_without_a_contrast_no_mean_latent_is_computed_or_kept(data, tmp_path, monkeypatch):
    monkeypatch.setattr("st_fast.train.trainer.mean_latents", lambda *_: pytest.fail("nothing needs it"))
    run(replace(recipe_of(tmp_path, data, "--stage.align.contrast=0")))
    assert not any(key.startswith("mean_latents") for key in states(tmp_path / "out"))


def test_its_keys_are_written_read_and_compared(data, tmp_path):
    recipe = recipe_of(tmp_path, data, "--stage.align.contrast_null=false")
    assert recipe.stages[0].contrastive == Contrast(WEIGHT, False)
    assert from_text(to_toml(recipe), "here") == recipe
    plain = recipe_of(tmp_path, data, "--stage.align.contrast=0")
    assert changed_maths(plain, recipe) == [
        "stage.align.contrast: 0.0 → 0.15", "stage.align.contrast_null: true → false"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stage.align.contrast=1"], "stage.align.contrast = 1"),
        (["--stage.align.contrast=-0.1"], "stage.align.contrast = -0.1"),
        (["--optim.batch_size=1"], "no other sample to push away from"),
        (["--stage.align.contrast=0", "--stage.align.contrast_null=false"], "stage.align.contrast_null = false"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(options, said, data, tmp_path):
    with pytest.raises(RecipeError) as caught:
        recipe_of(tmp_path, data, *options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert issubclass(RecipeError, UserError)
