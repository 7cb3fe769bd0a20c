"""Models of text: published ones need the empty caption's states; folders say whose states are theirs, and draw."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from st_fast import kernels
from st_fast.convert import drawing
from st_fast.convert.__main__ import main
from st_fast.convert.text import text_of
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.core.options import ARCHITECTURE_MOST
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import open_data
from st_fast.data.text import captions_bytes, open_text
from st_fast.model import MMDiT, SiT, build
from st_fast.model.load import TextStates
from st_fast.model.stored import read_model
from st_fast.prepare import __main__ as prepare
from st_fast.prepare.writing import write_shards
from st_fast.recipe import load, to_toml
from st_fast.sample import __main__ as sample
from st_fast.sample import guided
from tests import foreign, tiny_text, warm
from tests.model import test_mmdit
from tests.sample.tiny_run import RECIPE

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
CPU, MOST = torch.device("cpu"), ARCHITECTURE_MOST["text_length"]
PIPELINES = ("bert", "clip")
"""Text encoders with an attention mask, and without."""


PROGRAM = """
import sys
import warnings
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    texts, found = ["a red fox", "number seven", "a picture more eight one two three four"], {}
    for sampler in ("heun", "sde"):
        settings = dict(sampler=sampler, num_inference_steps=4, guidance_scale=2.5, seed=11, output_type="pt")
        found[sampler] = pipe(texts, **settings).images
    found["negative"] = pipe(texts, negative_prompt="one fox", **settings).images
    each = pipe(texts, negative_prompt=["one fox", "one", "one fox"], **settings).images
    assert torch.equal(each[::2], found["negative"][::2]) and not torch.equal(each[1], found["negative"][1])
    assert torch.equal(pipe.states(["half \\udc80"]), pipe.states(["half ?"]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pipe.states(texts), pipe.states(texts[:2])
    assert [str(one.message) for one in told if "tokens" in str(one.message)] == [
        "1 of 3 texts have more than 7 tokens, cut"
    ]
    found["states"] = pipe(prompt_embeds=pipe.states(texts)[1:], first=1, **settings).images
    assert pipe("two").images[0].size == (8, 8)
    one, others = pipe("two", output_type="pt").images, ({"guidance_scale": 0.0}, {"latents": torch.zeros(1, 3, 8, 8)})
    assert one.shape == (1, 3, 8, 8) and torch.equal(pipe("two", output_type="pt", return_dict=False)[0], one)
    assert not any(torch.equal(pipe("two", output_type="pt", **other).images, one) for other in others)
    pipe.tokenizer.pad_token = None  # as some have it
    both, pipe.text_encoder = {"prompt": "two", "prompt_embeds": pipe.states(["two"])}, None
    needed, shaped = "is needed", "(B, 7, 16) are needed"
    for wrong, told in (({"prompt": "two"}, "no text encoder"), ({}, needed), (both, needed), ({"prompt": []}, needed),
                        ({"prompt_embeds": torch.zeros(2, 8, 16)}, shaped),
                        ({"prompt_embeds": torch.zeros(7, 16)}, shaped)):
        try:
            pipe(**wrong)
        except ValueError as error:
            assert told in str(error)
        else:
            raise AssertionError(told)
    save_file({name: (images * 255).round().to(torch.uint8) for name, images in found.items()}, folder + ".safetensors")
assert not any(name.partition(".")[0] == "st_fast" for name in sys.modules)
"""


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """REPA's checkpoint of a model of text, and what is in it."""
    path = tmp_path_factory.mktemp("published") / "last.pt"
    return path, foreign.repa_checkpoint(path, foreign.TINY_TEXT)


@pytest.fixture(scope="module")
def make_place(tmp_path_factory):
    """Makes a folder with a random text encoder, data whose captions it read, and a run with a random model of them."""

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tiny_text.write_text_encoder(folder / family, family)
        moments = torch.zeros(tiny_text.IMAGES, 6, 8, 8).half()
        manifest = Manifest(0, (6, 8, 8), "float16", 2.0, VaeInfo("pixels"), "pictures, CC BY-SA 4.0", 1)
        write_shards(folder / "data", [(moments, torch.zeros(len(moments), dtype=torch.int64))], manifest)
        (folder / "data" / "captions.jsonl").write_bytes(captions_bytes(tiny_text.CAPTIONS))
        prepare.main(["--text", str(folder / family), str(folder / "data"), "--text-length", "7"])
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

    return make


@pytest.fixture
def place(make_place) -> Path:
    """Such a folder, of a BERT-like encoder."""
    return make_place("bert")


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
        (np.zeros((MOST + 1, 6), np.float32), rf"\({MOST + 1}, 6\); floats"),
        (np.zeros((0, 6), np.float32), r"\(0, 6\)"),
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
    assert "load_text_encoder('bert', cpu, torch.float32, length=7, mask=True)  # its folder or hub name" in snippet
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


@pytest.fixture(scope="module")
def pipelines(make_place, tmp_path_factory) -> Path:
    """Pipelines by the family of their text encoders, and what they drew in a process of its own."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("pipelines")
    for family in PIPELINES:
        place = make_place(family)
        convert(place / "run", folder / family, "--to", "diffusers", "--text-encoder", place / family)
    (folder / "program.py").write_text(PROGRAM)
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = warm.run("program.py", *PIPELINES, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_without_st_fast_draws_what_our_sampler_draws(family, pipelines, make_place, tmp_path):
    place, pipe = make_place(family), pipelines / family
    theirs = load_file(pipelines / f"{family}.safetensors")
    (tmp_path / "prompts.txt").write_text("a red fox\nnumber seven\na picture more eight one two three four\n")
    for name, options in {"heun": (), "sde": (), "negative": ("--negative", "one fox")}.items():
        settings = ("--steps", "4", "--cfg-scale", "2.5", "--cfg-range", "0", "0.7", "--seed", "11", *options)
        encoder = ("--prompts", str(tmp_path / "prompts.txt"), "--text-encoder", str(place / family))
        sampler = ("--sampler", name.replace("negative", "sde"), "--npz", "-n", "3", "--out", str(tmp_path / name))
        sample.main([str(place / "run"), *settings, *encoder, *sampler])
        ours = torch.from_numpy(np.load(tmp_path / name / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
        assert (ours.int() - theirs[name].int()).abs().max() <= 1 and ours.float().std() > 1
    assert (theirs["states"].int() - theirs["sde"][1:].int()).abs().max() <= 1
    assert not torch.equal(theirs["negative"], theirs["sde"])
    files = [path for path in pipe.rglob("*") if path.suffix in (".json", ".md")]
    assert [path.name for path in files if str(place) in path.read_text()] == []
    assert read_model(pipe, pytest.fail).loaded.config.text_length == 7


@pytest.mark.parametrize("change", [{"qk_norm": False, "depth": 1}, {"mlp_ratio": 2.5}])
def test_the_module_that_a_pipeline_carries_is_the_network(change):
    pytest.importorskip("diffusers")
    from st_fast.convert.mmdit_transformer import MMDiTTransformer

    config = replace(test_mmdit.TINY, **change)
    model = test_mmdit.with_life(config)
    sizes = ("depth", "width", "heads", "patch", "channels", "latent_size", "text_width", "text_length")
    kept = {name: getattr(config, name) for name in (*sizes, "mlp_ratio", "qk_norm")}
    theirs = MMDiTTransformer(**kept).double()
    theirs.load_state_dict(model.state_dict())
    inputs = test_mmdit.inputs(config)
    torch.testing.assert_close(theirs(*inputs), model(*inputs)[0], rtol=1e-5, atol=1e-5)
    assert not theirs.null_context.requires_grad and not theirs.pos_embed.requires_grad


def test_a_pipeline_guides_from_one_end_of_its_range_to_the_other():
    def transformer(x: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return condition.view(-1, 1, 1, 1) * times.view(-1, 1, 1, 1) + 0 * x

    pipe = SimpleNamespace(transformer=transformer, config=SimpleNamespace(guidance_low=0.25, guidance_high=0.75))
    velocity = drawing.guided(pipe, torch.full((3,), 4.0), torch.full((3,), 2.0), 2.5)
    found = [velocity(torch.zeros(3, 1, 2, 2), t)[2, 0, 1, 1].item() / t for t in (0.125, 0.25, 0.5, 0.75, 0.875)]
    assert found == [4, 7, 7, 7, 4]


@pytest.mark.parametrize("flow", ["linear", "cosine"])
def test_a_pipelines_score_and_pixels_are_ours(flow):
    x, v = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (0.04, 0.3, 1.0):
        torch.testing.assert_close(drawing.score(v, x, t, flow), guided.score(v, x, t, flow))

    def decode(z: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (z.double() / 2,)

    vae = SimpleNamespace(config=SimpleNamespace(shift_factor=0.1), dtype=torch.float32, decode=decode)
    config = SimpleNamespace(latent_scale=0.4, latent_shift=None, latents_mean=(), latents_std=())
    pipe = SimpleNamespace(transformer=SimpleNamespace(config=config), vae=vae)
    expected = ((x / 0.4 + 0.1) / 2 * 127.5 + 127.5).round().clamp(0, 255) / 255
    torch.testing.assert_close(drawing.decoded(pipe, x, "pt"), expected, atol=1e-6, rtol=0)
    assert np.allclose(drawing.decoded(pipe, x, "np"), expected.permute(0, 2, 3, 1), atol=1e-6)
    assert drawing.decoded(pipe, x, "latent") is x
    for shift in (0.0, -0.3):  # of statistics that replaced the VAE's own, whose shift they do not have
        config.latent_shift = shift
        expected = ((x / 0.4 + shift) / 2 * 127.5 + 127.5).round().clamp(0, 255) / 255
        torch.testing.assert_close(drawing.decoded(pipe, x, "pt"), expected, atol=1e-6, rtol=0)


def test_another_text_encoder_is_refused_and_its_place_may_be_left_open(place, published, tmp_path, capsys):
    foreign.repa_checkpoint(published[0].with_name("sit.pt"))
    tiny_text.write_text_encoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"'other': other weights .* than those that encoded the training's captions"):
        convert(place / "run", tmp_path / "pipe", "--to", "diffusers", "--text-encoder", tmp_path / "other")
    assert not (tmp_path / "pipe").exists()
    convert(place / "run", tmp_path / "pipe", "--to", "diffusers")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    assert capsys.readouterr().out.splitlines()[-1].endswith("--text-encoder FOLDER puts one in")
    text = (tmp_path / "pipe" / "README.md").read_text()
    assert "No text encoder is in this folder" in text and "of CLIP `CLIPTextModel`" in text and "1 classes" not in text
    np.save(null := tmp_path / "null.npy", np.zeros((9, 6), np.float32))
    to_diffusers = ("--to", "diffusers")
    for arguments, told in (
        ((published[0].with_name("sit.pt"), tmp_path / "x", "--empty-context", null), "draws classes, not text"),
        (
            (published[0], tmp_path / "x", *to_diffusers, "--empty-context", null, "--text-encoder", place / "bert"),
            "16 channels, the model has 6",
        ),
        (
            (place / "run", tmp_path / "x", "--to", "huggingface", "--text-encoder", "y"),
            "only --to diffusers takes one",
        ),
        (
            (published[0].with_name("sit.pt"), tmp_path / "x", "--to", "diffusers", "--text-encoder", "y"),
            "draws classes",
        ),
    ):
        with pytest.raises(UserError, match=told):
            convert(*arguments)


def test_without_its_data_a_model_tells_its_encoder_and_mask_by_the_empty_captions_states(place, tmp_path):
    shutil.copytree(place / "run", run := tmp_path / "run")
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace(str(place / "data"), str(tmp_path / "gone")))
    convert(run, tmp_path / "pipe", "--to", "diffusers", "--text-encoder", place / "bert")
    config = json.loads((tmp_path / "pipe" / "transformer" / "config.json").read_text())
    assert (config["text_encoder"], config["text_mask"]) == ("bert", True) and len(config["text_encoder_sha256"]) == 64
    tiny_text.write_text_encoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="its states of the empty caption are not the model's"):
        convert(run, tmp_path / "x", "--to", "diffusers", "--text-encoder", tmp_path / "other")
    assert not (tmp_path / "x").exists()


def test_whose_states_a_model_takes_is_known_of_a_pipeline_a_run_and_published_sizes(place, published, tmp_path):
    def told(path: Path) -> TextStates:
        return text_of(read_model(path, pytest.fail))

    found = told(place / "run")
    assert (found.encoder, found.mask, len(found.hash)) == ("bert", True, 64)
    convert(place / "run", tmp_path / "pipe", "--to", "diffusers")
    assert told(tmp_path / "pipe") == found
    run, data = (Path(shutil.copytree(place / name, tmp_path / name)) for name in ("run", "data"))
    recipe = (run / "recipe.toml").read_text().replace(str(place / "data"), str(data))
    (run / "recipe.toml").write_text(recipe)
    tiny_text.write_states(data, "other/second")
    assert told(run) == TextStates(), "the recipe must say which"
    (run / "recipe.toml").write_text(recipe.replace('\ntext = ""\n', '\ntext = "other/second"\n'))
    assert told(run).encoder == "other/second"
    origin = read_model(published[0], pytest.fail)
    for length, width, encoder in ((77, 768, "openai/clip-vit-large-patch14"), (77, 6, ""), (9, 768, "")):
        config = replace(origin.loaded.config, text_length=length, text_width=width)
        found = text_of(replace(origin, loaded=replace(origin.loaded, config=config)))
        assert found == TextStates(encoder)
