"""Models of text: published ones need the empty caption's states; folders say whose states are theirs, and draw."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from st_fast import kernels
from st_fast.convert.__main__ import main
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import open_data
from st_fast.data.text import captions_bytes, open_text
from st_fast.model import MMDiT, SiT, build
from st_fast.model.stored import read_model
from st_fast.prepare import __main__ as prepare
from st_fast.prepare.writing import write_shards
from st_fast.recipe import load, to_toml
from tests import foreign, tiny_text
from tests.sample.tiny_run import RECIPE

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """REPA's checkpoint of a model of text, and what is in it."""
    path = tmp_path_factory.mktemp("published") / "last.pt"
    return path, foreign.repa_checkpoint(path, foreign.TINY_TEXT)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a random text encoder, data whose captions it read, and a run with a random model of them."""
    folder = tmp_path_factory.mktemp("text")
    tiny_text.write_text_encoder(folder / "bert")
    moments = torch.zeros(tiny_text.IMAGES, 6, 8, 8).half()
    manifest = Manifest(0, (6, 8, 8), "float16", 2.0, VaeInfo("pixels"), "pictures, CC BY-SA 4.0", 1)
    write_shards(folder / "data", [(moments, torch.zeros(len(moments), dtype=torch.int64))], manifest)
    (folder / "data" / "captions.jsonl").write_bytes(captions_bytes(tiny_text.CAPTIONS))
    prepare.main(["--text", str(folder / "bert"), str(folder / "data"), "--text-length", "7"])
    sizes = 'network = "mmdit"\ntext_width = 16\ntext_length = 7'
    text = RECIPE.replace("num_classes = 5", sizes).format(data=folder / "data", out=folder / "run")
    (folder / "recipe.toml").write_text(text)
    recipe = load(folder / "recipe.toml")
    (folder / "run").mkdir()
    (folder / "run" / "recipe.toml").write_text(to_toml(recipe))
    network = build(recipe.model, kernels.select({}, CPU), 0)
    network.use_null(open_text(folder / "data", "", open_data(folder / "data")).null())
    generator = torch.Generator().manual_seed(0)
    state = {
        name: t if name == "null_context" else t + 0.1 * torch.randn(t.shape, generator=generator)
        for name, t in network.state_dict().items()
    }
    meta = {"architecture": recipe.model.architecture()}
    checkpoint.save(folder / "run" / "plain" / "checkpoints", 10, {"model": state, "ema": state}, meta)
    return folder


def test_a_published_model_becomes_a_folder_with_the_empty_captions_states(published, tmp_path):
    last, content = published
    for form in ("huggingface", "diffusers"):
        with pytest.raises(
            UserError, match=r"needs the empty caption's states, .* --empty-context FILE\.npy"
        ) as caught:
            convert(last, tmp_path / "hf", "--to", form)
        assert "\n" not in str(caught.value) and not (tmp_path / "hf").exists()
    null = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float16)
    np.save(tmp_path / "empty_context.npy", null)
    convert(last, tmp_path / "hf", "--to", "huggingface", "--empty-context", tmp_path / "empty_context.npy")
    model = MMDiT.from_pretrained(tmp_path / "hf")
    found = model.state_dict()
    assert torch.equal(found.pop("null_context"), torch.from_numpy(null)[None].float())
    assert all(torch.equal(tensor, content["ema"][key]) for key, tensor in found.items())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["text_length"], config["format"]) == ("mmdit", 9, "st_fast.sit")
    assert read_model(tmp_path / "hf", pytest.fail).loaded.config == model.config
    with pytest.raises(UserError, match="its network is 'mmdit', SiT reads 'sit'"):
        SiT.from_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back.safetensors", "--to", "repa")
    assert "null_context" not in read_model(tmp_path / "back.safetensors", pytest.fail).loaded.model


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((9, 5), np.float32), r"float32 \(9, 5\); floats \(tokens, 6\) are needed"),
        (np.zeros((1, 9, 6), np.float32), r"float32 \(1, 9, 6\); floats"),
        (np.zeros((9, 6), np.int64), "int64"),
        (np.full((9, 6), np.inf), "NaN or infinity"),
        (np.array({}), "refused"),
    ],
)
def test_states_that_cannot_be_the_empty_captions_are_refused_in_one_line(array, words, published, tmp_path):
    np.save(tmp_path / "null.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=words) as caught:
        convert(published[0], tmp_path / "out", "--empty-context", tmp_path / "null.npy")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_folder_says_whose_states_its_model_takes_and_its_example_draws(place, tmp_path, monkeypatch):
    convert(place / "run", tmp_path / "hf", "--to", "huggingface")
    with pytest.raises(UserError, match="has the empty caption's states"):
        convert(place / "run", tmp_path / "x", "--empty-context", place / "recipe.toml")
    convert(tmp_path / "hf", tmp_path / "again", "--to", "huggingface")  # of a folder alone, without the run
    for name in ("hf", "again"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["text_encoder"], config["text_mask"]) == ("bert", True) and len(
            config["text_encoder_sha256"]
        ) == 64
        text = (tmp_path / name / "README.md").read_text()
        assert "conditional on text (7 states of 16 channels of bert, padding masked, SHA-256 " in text
        assert "pipeline_tag: text-to-image" in text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").symlink_to(place / "bert")
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1]
    exec(snippet, names := {})  # as somebody would type it, where the folders lie
    assert names["latents"].shape == (8, 3, 8, 8) and names["latents"].isfinite().all()
    assert not torch.equal(names["latents"][0], names["latents"][2])
    config["text_mask"] = "no"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="text_mask = 'no': bool is needed"):
        MMDiT.from_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"text_mask": True, "model_type": "sit"}))
    with pytest.raises(UserError, match="model_type = 'sit', but network = 'mmdit'"):
        MMDiT.from_pretrained(tmp_path / "hf")
