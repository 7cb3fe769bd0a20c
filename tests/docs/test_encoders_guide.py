"""The encoders' guide does what it says: its two additions work as they stand there."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch

from st_fast.model import encoders
from st_fast.model.encoders import ENCODERS, ImageEncoder, load_encoder
from st_fast.prepare import __main__ as prepare
from tests import tiny, warm
from tests.data.conftest import encoded, picture
from tests.model.test_vision import MLP, pixels_of, saved
from tests.train.supervision.encoders import images

GUIDE = (tiny.ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
LINE, FILE = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
CPU = torch.device("cpu")
HEAD = """
[model]
depth = 2
width = 32
heads = 2
patch = 16
channels = 3
latent_size = 32
num_classes = 2
[data]
path = "{root}/data"
images = "{root}/images"
[optim]
batch_size = 4
[run]
out = "{root}/out"
device = "cpu"
log_every = 1
[sample]
num = 0
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "patch_dct.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_the_example_trains_from_its_one_file_by_the_guides_stage(script: Path, tmp_path: Path) -> None:
    for number in range(6):
        folder = tmp_path / "images" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(picture(number, (40, 32))))
    arguments = [tmp_path / "images", tmp_path / "data", "--size", 32, "--vae", "pixels", "--device", "cpu"]
    prepare.main([str(argument) for argument in arguments])
    (stage,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.S)
    recipe = tmp_path / "t.toml"
    recipe.write_text(HEAD.format(root=tmp_path) + stage)
    options = ('--stage.repa.encoders=["patch-dct"]', "--stage.repa.steps=6", "--stage.repa.depth=1")
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    done = warm.run(script, recipe, *options, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [record["aux"] for record in tiny.records(tmp_path / "out", "train")]
    assert len(losses) == 6 and losses[-1] < losses[0] < 0.5
    (start,) = tiny.records(tmp_path / "out", "start")
    assert start["teacher_flops_per_image"] == 2 * 192 * 32**2


def test_the_examples_features_are_the_patches_low_frequencies(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("st_fast.model.encoders.ENCODERS", dict(ENCODERS))
    spec = importlib.util.spec_from_file_location("patch_dct", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.PatchDct(CPU, torch.float32)(images(1, 32))
    pixels = pixels_of(images(1, 32), 32, encoders.IMAGENET).numpy()
    for row, column in np.ndindex(2, 2):
        patch = pixels[0, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        expected = scipy.fft.dctn(patch, axes=(1, 2))[:, :8, :8] / 4  # SciPy's DCT-II is twice the sum, on each axis
        assert np.abs(found[0, row, column].numpy() - expected.reshape(-1)).max() < 1e-3


def test_the_guides_line_reads_a_plain_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def vit(**options: int) -> object:
        return transformers.ViTModel(transformers.ViTConfig(**MLP, **options), add_pooling_layer=False)

    model, folder = saved(tmp_path / "vit", vit, 8)
    monkeypatch.setattr(encoders, "FAMILIES", dict(encoders.FAMILIES))
    exec(LINE, {})
    found = load_encoder(str(folder), CPU, torch.float32)(images(2))
    tokens = model(pixel_values=pixels_of(images(2), 16, encoders.IMAGENET)).last_hidden_state[:, 1:]
    torch.testing.assert_close(found.flatten(1, 2), tokens, rtol=1e-4, atol=1e-4)


def test_the_guide_explains_every_member_of_the_protocol_and_every_family() -> None:
    members = {*ImageEncoder.__annotations__, "grid", "flops", "__call__"}
    explained = {name for line in re.findall(r"^- (.*?):", GUIDE, re.M) for name in re.findall(r"`(\w+)", line)}
    assert members == explained
    assert set(encoders.FAMILIES) == {
        "dinov2",
        "dinov2_with_registers",
        "clip",
        "clip_vision_model",
        "vit_mae",
        "ijepa",
    }
    assert all(name in GUIDE for name in ("DINOv2", "registers", "CLIP", "MAE", "I-JEPA"))
