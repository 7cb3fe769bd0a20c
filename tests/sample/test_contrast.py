"""Drawing takes out the bias that a contrast trains in: on each branch, at the times asked for, without the data."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.convert import __main__ as convert
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.model import stored
from st_fast.recipe import load_run, to_toml
from st_fast.recipe.schema import Contrast, Sample
from st_fast.sample import __main__ as sample
from st_fast.sample.contrast import Correction, correction
from st_fast.sample.guided import euler, guided_velocity, sample_from, starting_noise
from st_fast.sample.model import sampling
from st_fast.sample.set import read_settings
from st_fast.train.examiner import Examiner
from tests.sample.tiny_run import make_run

MEAN = torch.arange(8.0).reshape(2, 2, 2) / 4 - 1


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("weight", [0.05, 0.4])
def test_what_a_contrast_learns_on_gaussian_data_becomes_the_plain_regression_again(path, weight):
    """The best affine v̂(x_t) of the loss itself by NumPy's least squares, where every sample is once each one's ṽ."""
    rng, count, t = np.random.default_rng(0), 500, 0.37
    x = 1.5 + 1.7 * rng.standard_normal(count)
    noise = rng.standard_normal(count)
    noise -= noise.mean()
    if path == "linear":
        a, s, da, ds = 1 - t, t, -1.0, 1.0
    else:
        half = np.pi / 2
        a, s, da, ds = np.cos(half * t), np.sin(half * t), -half * np.sin(half * t), half * np.cos(half * t)
    v, inputs = da * x + ds * noise, np.stack([a * x + s * noise, np.ones(count)], axis=1)
    gram = inputs.T @ inputs

    def loss(w: np.ndarray) -> float:
        apart = ((inputs @ w)[:, None] - v[None, :]) ** 2
        return float(((inputs @ w - v) ** 2).mean() - weight * apart.mean())

    biased = np.linalg.solve((1 - weight) * gram, inputs.T @ (v - weight * v.mean()))
    for change in (np.array([1e-2, 0]), np.array([0, 1e-2]), np.array([-1e-2, 1e-2])):
        assert loss(biased) < min(loss(biased + change), loss(biased - change))
    plain = inputs @ np.linalg.solve(gram, inputs.T @ v)
    assert np.abs(inputs @ biased - plain).max() > weight / 2, "there is a bias to take out"
    made = Correction(weight, True, "unbiased", torch.full((1, 1, 1), float(x.mean()), dtype=torch.float64), path)
    found = made(torch.from_numpy(inputs @ biased).view(-1, 1, 1, 1), t)
    np.testing.assert_allclose(found.flatten().numpy(), plain, rtol=0, atol=1e-12)


class Labelled:
    """v̂ = label everywhere; null label 10."""

    def null_condition(self, count: int) -> torch.Tensor:
        return torch.full((count,), 10)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ones_like(x) * labels.view(-1, 1, 1, 1), None


def drawn(t: float, scale: float, how: str = "unbiased", null: bool = True, negative: int | None = None):
    settings = Sample(cfg_scale=scale, cfg_range=(0.2, 0.5))
    other = None if negative is None else torch.tensor([negative] * 3)
    made = Correction(0.3, null, how, MEAN, "linear")  # type: ignore[arg-type]
    return guided_velocity(Labelled(), torch.tensor([4] * 3), settings, other, made)(torch.zeros(3, 2, 2, 2), t)


def unbiased(v: float) -> torch.Tensor:
    return 0.7 * v - 0.3 * MEAN


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"t": 0.8, "scale": 3.0}, unbiased(4)),
        ({"t": 0.3, "scale": 1.0}, unbiased(4)),
        ({"t": 0.3, "scale": 3.0}, unbiased(10) + 3 * (unbiased(4) - unbiased(10))),
        ({"t": 0.3, "scale": 3.0}, 0.7 * (10 + 3 * (4 - 10)) - 0.3 * MEAN),  # the same: of the combination
        ({"t": 0.3, "scale": 3.0, "null": False}, 10 + 3 * (unbiased(4) - 10)),
        ({"t": 0.3, "scale": 3.0, "null": False, "negative": 6}, unbiased(6) + 3 * (unbiased(4) - unbiased(6))),
        ({"t": 0.3, "scale": 3.0, "how": "released"}, unbiased(10) + 3 * (unbiased(4) - unbiased(10))),
        ({"t": 0.3, "scale": 1.0, "how": "released"}, unbiased(4)),
        ({"t": 0.8, "scale": 3.0, "how": "released"}, torch.full((2, 2, 2), 4.0)),
    ],
)
def test_each_branch_that_has_the_bias_is_corrected_at_the_times_asked_for(options, expected):
    torch.testing.assert_close(drawn(**options), expected.expand(3, 2, 2, 2))


def test_the_adaptive_solver_knows_where_a_correction_as_released_jumps(monkeypatch):
    told = []
    monkeypatch.setattr("st_fast.sample.guided.dopri5", lambda velocity, x, steps, jumps, watch: told.append(jumps))
    draw = type("Draw", (), {"condition": torch.tensor([4]), "negative": None})
    for scale, how in ((1.0, "unbiased"), (1.0, "released"), (2.0, "unbiased")):
        settings = Sample(sampler="dopri5", cfg_scale=scale, cfg_range=(0.2, 0.5))
        made = Correction(0.3, True, how, MEAN, "linear")  # type: ignore[arg-type]
        sample_from(Labelled(), torch.zeros(1, 2, 2, 2), draw, settings, "linear", correction=made)
    assert told == [(), (0.2, 0.5), (0.2, 0.5)]


def test_nothing_is_corrected_without_a_contrast_or_where_that_is_asked_for():
    means = {"2x2x2": MEAN}
    assert correction(Contrast(0.0), Sample(), "linear", means, (2, 2, 2), "here") is None
    assert correction(Contrast(0.3), Sample(contrast="none"), "linear", {}, (2, 2, 2), "here") is None
    found = correction(Contrast(0.3, False), Sample(contrast="released"), "cosine", means, (2, 2, 2), "here")
    assert found is not None and torch.equal(found.mean, MEAN)
    assert (found.weight, found.null, found.how, found.path) == (0.3, False, "released", "cosine")
    for there in ({"2x4x2": MEAN.reshape(2, 2, 2)}, {}):
        with pytest.raises(UserError, match=r"^here: trained with contrast = 0.3.*none of 2x2x2.*--contrast none"):
            correction(Contrast(0.3), Sample(), "linear", there, (2, 2, 2), "here")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run without a contrast, the same weights with one, and these without the mean latent."""
    found = {}
    for name in ("plain", "contrast", "bare"):
        out = make_run(tmp_path_factory.mktemp(name))
        recipe, root = load_run(out), out / "plain" / "checkpoints"
        if name != "plain":
            stage = replace(recipe.stages[0], contrastive=Contrast(0.25))
            (out / "recipe.toml").write_text(to_toml(replace(recipe, stages=(stage,))))
        if name == "contrast":
            groups = dict(checkpoint.load(root / "00000010").groups)
            groups[stored.MEAN_LATENTS] = {"3x8x8": mean()}
            text = (out / "recipe.toml").read_text()
            meta = {"stage": "plain", "architecture": recipe.model.architecture()}
            checkpoint.save(root, 10, groups, meta | {"recipe": text.replace(recipe.data.path, "gone")})
        found[name] = out
    return found


def mean() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * 8 * 8).reshape(3, 8, 8)


def latents(*arguments: object) -> tuple[torch.Tensor, torch.Tensor, object]:
    """What the command draws, and what Euler's method makes of the model's velocity by hand with λ = 0.25."""
    request = sample.parse([*map(str, arguments), "--sampler", "euler", "--steps", "3", "--cfg-scale", "1"]).samples
    with sampling(request) as (_, sampler, _):
        draw = sampler.draw_of(0, 4)
        noise = starting_noise(draw, sampler.model.config)
        found = sampler.latents(noise, draw)

        def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
            return 0.75 * sampler.model(x, torch.full((4,), t), draw.condition)[0] - 0.25 * mean()

        with torch.no_grad():
            return found, euler(velocity, noise, 3), sampler


def test_a_run_draws_the_unbiased_field_with_the_mean_latent_of_its_checkpoint(runs):
    found, expected, _ = latents(runs["contrast"])
    torch.testing.assert_close(found, expected)
    biased, _, _ = latents(runs["contrast"], "--contrast", "none")
    plain, _, _ = latents(runs["plain"])
    assert torch.equal(biased, plain) and not torch.allclose(found, plain, atol=1e-2)
    part, _, _ = latents(runs["contrast"], "--contrast", "released", "--cfg-range", "0", "0.5")
    assert not torch.allclose(part, plain, atol=1e-2) and not torch.allclose(part, found, atol=1e-2)


def test_a_checkpoint_by_itself_needs_neither_its_run_nor_its_data(runs, tmp_path):
    shutil.copytree(runs["contrast"] / "plain" / "checkpoints" / "00000010", tmp_path / "00000010")
    found, expected, _ = latents(tmp_path / "00000010", "--vae", "pixels")
    torch.testing.assert_close(found, expected)


def test_a_set_says_how_its_samples_were_corrected_and_one_without_a_contrast_is_as_ever(runs, tmp_path):
    for name, how in (("contrast", "unbiased"), ("contrast", "released"), ("plain", None)):
        options = ["--num", "3", "--npz", "--out", str(tmp_path / f"{name}{how}"), "--steps", "1"]
        sample.main([str(runs[name]), *options, *(["--contrast", how] if how else [])])
        said = read_settings(tmp_path / f"{name}{how}")
        assert said.get("contrast") == how and ("mean_latent_sha256" in said) == (how is not None)
    with pytest.raises(UserError, match="contrast"):
        sample.main(
            [str(runs["contrast"]), "--num", "3", "--npz", "--out", str(tmp_path / "contrastreleased"), "--steps", "1"]
        )


def test_a_checkpoint_that_lacks_it_and_a_model_without_a_contrast_say_so_in_a_line(runs):
    with pytest.raises(UserError, match="it holds none of 3x8x8, only of nothing"):
        latents(runs["bare"])
    assert latents(runs["bare"], "--contrast", "none")[0].shape == (4, 3, 8, 8)
    with pytest.raises(UserError, match=r"--contrast released: .* was trained without contrast"):
        latents(runs["plain"], "--contrast", "released")
    assert latents(runs["plain"], "--contrast", "none")[0].shape == (4, 3, 8, 8)


def test_a_folder_for_others_and_its_card_say_that_its_samples_keep_the_bias(runs, tmp_path, capsys):
    for name in ("contrast", "plain"):
        convert.main([str(runs[name]), str(tmp_path / name), "--to", "huggingface"])
        told = capsys.readouterr().out, (tmp_path / name / "README.md").read_text()
        assert ["bias" in text for text in told] == 2 * [name == "contrast"]


@pytest.mark.parametrize(
    ("mean", "words"),
    [
        (torch.full((3, 8, 8), float("nan")), r"cp: mean_latents: 3x8x8 \(3, 8, 8\) has 192 values that are NaN"),
        (torch.zeros(3, 8, 4), r"cp: mean_latents: 3x8x8 has the shape \(3, 8, 4\)"),
    ],
)
def test_a_checkpoints_mean_latent_that_is_damaged_is_refused(mean, words):
    with pytest.raises(UserError, match=words):
        correction(Contrast(0.1), Sample(), "linear", {"3x8x8": mean}, (3, 8, 8), "cp")


def test_pictures_and_scores_of_a_run_in_training_are_corrected_as_well(runs, monkeypatch):
    recipe = load_run(runs["contrast"])
    examiner, seen = object.__new__(Examiner), []
    examiner.recipe = recipe
    monkeypatch.setattr("st_fast.train.examiner.sample_batches", lambda *given: seen.append(given[-1]) or iter([]))
    made = Correction(0.25, True, "unbiased", mean(), "linear")
    with pytest.raises((RuntimeError, ValueError)):  # of no image at all
        examiner.images(None, 4, None, made)
    assert seen == [made]


def test_a_stage_that_lacks_what_was_asked_for_names_one_that_has_it(runs, tmp_path):
    shutil.copytree(runs["plain"], run := tmp_path / "run")
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(
        f'{text}\n[[stage]]\nname = "b"\nsupervision = "none"\nsteps = 1\ncontrast = 0.1\n'
    )
    with pytest.raises(UserError, match=r"run/plain was trained without contrast, there is no bias; try --stage b$"):
        latents(run, "--stage", "plain", "--contrast", "released")
