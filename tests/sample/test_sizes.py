"""Sampling at another size than the recipe's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from st_fast import kernels
from st_fast.core.errors import UserError
from st_fast.core.random import Purpose, normal
from st_fast.data.manifest import read_manifest
from st_fast.model import stored
from st_fast.recipe import load
from st_fast.sample.__main__ import main
from st_fast.sample.sizes import asked_shape

from .tiny_run import make_run

CPU = torch.device("cpu")
SAMPLES = ["-n", "5", "--batch-size", "3", "--sampler", "euler", "--steps", "2", "--cfg-scale", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return make_run(tmp_path_factory.mktemp("sizes"))


def draw(run: Path, *options: str) -> None:
    main([str(run), *SAMPLES, *options])


def truth(run: Path, height: int, width: int) -> np.ndarray:
    """uint8 (5, H, W, 3): Euler's two steps from the noise of these samples, in pixels."""
    recipe = load(run / "recipe.toml")
    root = run / "plain" / "checkpoints"
    model = stored.load_frozen(root, recipe.model, "ema", kernels.select({}, CPU), CPU, torch.float32)
    numbers = torch.arange(5)
    x = normal(3, Purpose.SAMPLE_NOISE, numbers, (3, height, width))
    with torch.no_grad():
        for t in (1.0, 0.5):
            x = x - 0.5 * model(x, torch.full((5,), t), numbers)[0]
    return ((x / 2.0 + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


@pytest.mark.parametrize("size", ["12x6", "4x14", "16"])
def test_a_set_of_another_size_is_what_the_network_makes_of_noise_of_that_shape(size, run, tmp_path):
    draw(run, "--size", size, "--npz", "--out", str(tmp_path / "set"))
    height, width = map(int, size.split("x")) if "x" in size else (int(size), int(size))
    images = np.load(tmp_path / "set" / "samples.npz")["arr_0"]
    assert images.shape == (5, height, width, 3)
    assert np.abs(images.astype(int) - truth(run, height, width)).max() <= 1  # a batch of 3 may round otherwise
    assert json.loads((tmp_path / "set" / "sample.json").read_text())["latent_shape"] == [3, height, width]
    with pytest.raises(UserError, match="latent_shape"):
        draw(run, "--npz", "--out", str(tmp_path / "set"))


def test_the_own_size_makes_the_same_set_as_none(run, tmp_path):
    draw(run, "--npz", "--out", str(tmp_path / "set"))
    before = (tmp_path / "set" / "samples.npz").read_bytes()
    draw(run, "--npz", "--out", str(tmp_path / "set"), "--size", "8x8")
    draw(run, "--npz", "--out", str(tmp_path / "again"), "--size", "8")
    assert (tmp_path / "again" / "samples.npz").read_bytes() == before
    assert "latent_shape" not in json.loads((tmp_path / "set" / "sample.json").read_text())


def test_pictures_of_all_kinds_have_the_size_and_are_named_after_it(run):
    draw(run, "--size", "12x6")
    draw(run, "--size", "12x6", "--interpolate", "1", "3")
    draw(run, "--size", "12x6", "--gif")
    folder, name = run / "plain" / "samples", "5-euler2-cfg1-12x6"
    for path, columns, rows in (
        (folder / f"{name}.png", 10, 1),
        (folder / "interpolate-1-3-euler2-cfg1-12x6.png", 10, 2),
        (folder / f"trajectory-{name}.gif", 10, 1),
    ):
        width, height = Image.open(path).size
        assert width * (rows * 14 + 2) == height * (columns * 8 + 2), path


@pytest.mark.parametrize(
    ("size", "words"),
    [("12x7", "--size 12x7: multiples of 2 are needed"), ("0", "at least 1"), ("12x", "or HEIGHTxWIDTH")],
)
def test_a_size_that_latents_do_not_have_is_one_line(size, words, run, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        draw(run, "--size", size, "--out", str(tmp_path / "picture.png"))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_factor_is_the_manifests_or_what_the_decoder_does(run):
    model, manifest = load(run / "recipe.toml").model, read_manifest(run.parent / "data")
    model = replace(model, latent_size=(8, 6))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        assert latents.shape == (1, 3, 8, 6)
        return latents.repeat_interleave(4, 2).repeat_interleave(4, 3)

    def never(latents: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    told = replace(manifest, vae=replace(manifest.vae, factor=16))
    assert asked_shape((96, 64), model, told, never, CPU) == (3, 6, 4)
    assert asked_shape((96, 64), model, manifest, decode, CPU) == (3, 24, 16)
    assert asked_shape((32, 24), model, manifest, decode, CPU) is None
    assert asked_shape(32, model, manifest, decode, CPU) == (3, 8, 8)
    words = r"--size 96x48: multiples of 32 are needed \(16 pixels a latent's x patch 2\)"
    with pytest.raises(UserError, match=words):
        asked_shape((96, 48), model, told, never, CPU)
