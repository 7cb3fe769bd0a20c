"""Tasks, their data, and what a recipe may do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from st_fast.core.errors import UserError
from st_fast.core.files import sha256_file
from st_fast.recipe.schema import Sample
from st_fast.sample.draw import balanced
from st_fast.sample.guided import sample
from st_fast.study.speedrun import rules
from st_fast.study.speedrun.__main__ import main
from st_fast.study.speedrun.prepare import images_digest, read_images, task_data
from st_fast.study.speedrun.task import interval, p_value, read_task, task_names
from tests.study.speedrun.made import (
    RECIPE_TEXT,
    silent,
    task_of,
)


def test_other_data_or_images_than_the_tasks_are_refused(made: Path, tmp_path: Path) -> None:
    task = replace(task_of(made), images_sha256="0" * 64)
    with pytest.raises(UserError, match="holds other data than those of the task tiny"):
        task_data(task, made / "data" / "speedrun-tiny", None, silent)
    with pytest.raises(UserError, match=r"digits: the training images and their labels have SHA-256 .*other images"):
        task_data(task, tmp_path / "new", None, silent)
    with pytest.raises(UserError, match="--images FOLDER, with its training split, is needed"):
        task_data(replace(task, images="Fashion-MNIST"), tmp_path / "new", None, silent)
    own = Path(shutil.copytree(made / "tiny", tmp_path / "tiny"))
    (own / "vae" / "config.json").write_text((own / "vae" / "config.json").read_text().replace("1", "2"))
    with pytest.raises(UserError, match=r"vae/config\.json: SHA-256 .*not the task's file"):
        task_data(read_task(str(own)), tmp_path / "new", None, silent)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--data.path=data/digits", 'data.path = "data/digits": the task brings its training images'),
        ("--data.source=digits", 'data.source = "digits"'),
        ("--data.images=x", "data.images"),
        ("--evaluate.classifier=true", "evaluate.classifier = true: scoring in training reads the test images"),
        ("--evaluate.reference=x", "evaluate.reference = "),
        ("--stage.first.init=other/run", 'stage.first.init = "other/run": weights from outside'),
        ("--stage.second.teacher=other/run", 'stage.second.teacher = "other/run": a teacher from outside'),
        ("--sample.steps=33", "sample.steps = 33: 33 passes of the network a sample; 32 at most"),
        ("--sample.sampler=dopri5", 'sample.sampler = "dopri5"'),
        ("--sample.vae=x", "sample.vae"),
        ("--optim.micro_batch=auto", 'optim.micro_batch = "auto": the free memory would decide'),
        ("--run.device=cuda", 'run.device = "cuda": the task is one of cpu'),
    ],
)
def test_a_recipe_that_breaks_a_rule_is_refused_with_its_key(made: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as refusal:
        rules.read(made / "mine.toml", task_of(made), [override])
    assert says in str(refusal.value) and str(made / "mine.toml") in str(refusal.value)


def test_an_image_encoder_is_refused(made: Path, tmp_path: Path) -> None:
    text = RECIPE_TEXT.partition("[[stage]]")[0]
    (tmp_path / "repa.toml").write_text(
        f'{text}[[stage]]\nname = "a"\nsupervision = "repa"\nsteps = 2\ndepth = 1\nencoders = ["digits-encoder"]\n'
    )
    with pytest.raises(UserError, match=r"stage\.a\.encoders = \"digits-encoder\": an image encoder's training"):
        rules.read(tmp_path / "repa.toml", task_of(made))


@pytest.mark.parametrize(
    "settings",
    [
        Sample(sampler="euler", steps=7, cfg_scale=1.0), Sample(sampler="heun", steps=5, cfg_scale=1.0),
        Sample(sampler="sde", steps=6, cfg_scale=1.0),
        Sample(sampler="heun", steps=6, cfg_scale=2.0, cfg_range=(0.2, 0.7)),
        Sample(sampler="euler", steps=9, cfg_scale=2.0, cfg_range=(0.3, 0.9), shift=0.4),
        Sample(sampler="sde", steps=5, cfg_scale=3.0, cfg_range=(0.0, 1.0)),
    ],
)  # fmt: skip
def test_passes_of_the_network_are_counted_as_sampling_makes_them(settings: Sample) -> None:
    from st_fast import kernels
    from st_fast.model import build
    from st_fast.recipe.architecture import Model, resolve_model

    config = resolve_model(Model(depth=1, width=32, heads=1, patch=2, channels=3, latent_size=4, num_classes=3))
    model = build(config, kernels.select({}, torch.device("cpu")), 0).eval()
    rows = 0

    def count(module: object, inputs: tuple) -> None:
        nonlocal rows
        rows += len(inputs[0])

    model.register_forward_pre_hook(count)
    sample(model, balanced(0, 0, 3, 3, torch.device("cpu")), settings, "linear")
    assert rules.evaluations(settings, config.latent_shape) == rows / 3


def test_p_values_are_students_and_intervals_hold_what_they_say() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.normal(1.0, 0.3, 5).tolist()
        expected = stats.ttest_1samp(scores, 1.2, alternative="less").pvalue
        assert p_value(scores, 1.2) == pytest.approx(expected, rel=1e-9)
    assert p_value([1.0, 1.0, 1.0], 1.2) == 0.0 and p_value([1.2, 1.2], 1.2) == 1.0
    half = 5.8409 * np.std([1, 2, 3, 4], ddof=1) * np.sqrt(5 / 4)  # of tables of Student's t: 99.5 %, 3 degrees
    assert interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-4)
    draws = rng.normal(2.0, 0.5, (4_000, 6))
    inside = [low <= last <= high for *some, last in draws.tolist() for low, high in [interval(some)]]
    assert 0.985 < np.mean(inside) < 0.995


def test_other_classes_than_the_tasks_are_refused_before_training(made: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(made)
    with pytest.raises(UserError, match=r"model\.num_classes = 12: the task tiny has 10"):
        main(["try", "tiny", "mine.toml", "--seed", "1", "--model.num_classes=12", "--out", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", task_names())
def test_the_tasks_files_are_those_of_their_hashes(name: str) -> None:
    task = read_task(name)
    for file in task.files:
        assert sha256_file(task.path(file)) == task.files[file]
    assert 0 < task.floor < task.target and 0.4 < task.accuracy < 1
    if task.images == "digits":
        assert images_digest(*read_images("digits", task.side, "train", None)) == task.images_sha256


def test_no_task_and_a_wrong_one_are_one_line(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no task\.toml; it says what the task is"):
        main(["make", str(tmp_path)])
    with pytest.raises(UserError, match=r"'digit' is no task \(did you mean digits\?\)"):
        read_task("digit")
    other = Path(shutil.copytree(made / "tiny", tmp_path / "other"))
    text = (other / "task.toml").read_text()
    for old, new, says in (
        (text[text.index("# made by") :], "", "not made yet: python -m st_fast speedrun make"),
        ("seeds = [3, 5, 8]", "seeds = [3, 5]", "3 seeds or more"),
        ("seeds = [3, 5, 8]", "seeds = [3, 3, 5]", "each once"),
        ("target = 90.0", "target = 0.0", "a target above 0"),
        ('"tiny"', '"../tiny"', "small letters, digits"), ("threads = 2", "", "threads is missing"),
        ("[files]", "[fails]", "fails"), ("samples = 100", "samples = 64", "samples = 64: at least 65"),
    ):  # fmt: skip
        (other / "task.toml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=says):
            read_task(str(other))
