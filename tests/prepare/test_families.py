"""Every kind of autoencoder: images are prepared with it, two stages learn, go on, draw and are reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from st_fast.data.manifest import read_manifest
from st_fast.data.shards import open_data
from st_fast.data.statistics import latent_statistics, sampled_warning
from st_fast.recipe import load
from st_fast.sample.model import decoder
from st_fast.train.run import run as train
from tests.autoencoders import COUNT, KINDS, SIDE, Kind, own_reconstruction, write_images

from .conftest import run

RECIPE = """
[model]
depth = 2
width = 32
heads = 2
patch = {patch}
channels = {channels}
latent_size = {side}
num_classes = 2
prediction = "{prediction}"
[data]
path = "{data}"
vae = "{vae}"
[optim]
batch_size = 8
[run]
out = "{out}"
device = "cpu"
save_every = 4
[sample]
num = 4
sampler = "euler"
steps = 2
[[stage]]
name = "align"
supervision = "velocity_head"
steps = 10
depth = 1
hidden = 16
[[stage]]
name = "transcend"
supervision = "self_transcendence"
steps = 10
teacher = "align"
student_depth = 1
teacher_depth = 1
cfg_scale = 3.0
hidden = 16
"""


def weights(out: Path, stage: str) -> dict[str, torch.Tensor]:
    newest = max((out / stage / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    return {f"{file.name}/{key}": t for file in newest.glob("*.safetensors") for key, t in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_images_become_latents_a_run_and_pictures(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    images = write_images(tmp_path / "images")
    place = kind.write(tmp_path / "vae", images)
    data, out = tmp_path / "data", tmp_path / "out"
    options = ["--vae", place, "--size", SIDE, "--device", "cpu", "--dtype", "float32", "--shard-size", 10]
    run(tmp_path / "images", data, *options, *kind.options(tmp_path / "vae"))

    made = read_manifest(data)
    side = SIDE // kind.factor
    records = kind.channels if kind.posterior == "mean" else 2 * kind.channels
    assert (made.shape, made.posterior, made.vae.factor) == ((records, side, side), kind.posterior, kind.factor)
    looks = latent_statistics(shards := open_data(data), np.arange(COUNT))
    std = looks.whole[1]
    assert abs(std - 1) <= 0.05 or kind.name == "pixels"  # whose scale is of natural images
    if kind.per_channel:
        assert np.abs(looks.mean).max() <= 0.05 and np.abs(looks.std - 1).max() <= 0.05
    assert sampled_warning(shards) == "" or kind.name in ("sd", "dc-ae", "pixels"), "a scale alone leaves the mean"

    moments = shards.gather(np.arange(4))[0][:, : kind.channels]
    seen = decoder(data, made, torch.device("cpu"))(moments * made.scale)
    with torch.no_grad():
        own = own_reconstruction(kind.name, place, images[:4])
    assert (seen.float() - (own + 1).mul(127.5).clamp(0, 255)).abs().max() <= 1

    def recipe(folder: Path) -> Path:
        path = tmp_path / f"{folder.name}.toml"
        given = {"patch": kind.patch, "channels": kind.channels, "side": side, "prediction": kind.prediction}
        path.write_text(RECIPE.format(**given, data=data, out=folder, vae=made.vae.hash[:12] or made.vae.name))
        return path

    train(load(recipe(out)))
    in_two = tmp_path / "in_two"
    train(load(recipe(in_two), ["--stage.transcend.steps=5"]))
    train(load(recipe(in_two)))
    whole, resumed = weights(out, "transcend"), weights(in_two, "transcend")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert any(key.startswith("optim") for key in whole)
    losses = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"eval", "samples"} & {record["kind"] for record in losses} or list(out.glob("*/samples/*.png"))
    pictures = list((out / "transcend" / "samples").glob("*.png"))
    assert pictures and "data:image/" in (out / "report.html").read_text()
