"""The probe reads the very streams that the model computes, measures on held-out images, and shows what it found."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from st_fast import kernels
from st_fast.convert.__main__ import main as convert
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.data.manifest import read_manifest, write_manifest
from st_fast.evaluate.classifier import read_images
from st_fast.evaluate.probe.__main__ import main
from st_fast.evaluate.probe.drawing import _tiled
from st_fast.evaluate.probe.examine import chosen_blocks, features, read_blocks, velocity_loss
from st_fast.evaluate.probe.latents import Latents, in_turn, load_split
from st_fast.model import build
from st_fast.model.compiling import CompiledBlocks
from st_fast.model.flow import coefficients
from st_fast.model.vae import tensors_hash
from st_fast.recipe import load
from st_fast.report import write_report
from st_fast.study.carry_out import random_model
from st_fast.train.run import run
from tests import pixels

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = pixels.write_data(tmp_path_factory.mktemp("data") / "pixels")
    write_manifest(folder, replace(read_manifest(folder), class_names=NAMES))
    return folder


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "base.toml").write_text(pixels.RECIPE.format(data=data))
    return load(folder / "base.toml", [f"--run.out={folder / 'digits'}"])


@pytest.fixture(scope="module")
def probed(recipe) -> Path:
    run(recipe)
    out = Path(recipe.run.out)
    main([str(out), "--images", "160", "--times", "0.1", "0.5"])
    return out


@pytest.fixture(scope="module")
def model(recipe):
    return random_model(recipe.model, 1).eval()


def noisy(model, count: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = model.config
    x = torch.randn(count, config.channels, config.latent_size, config.latent_size, generator=generator)
    return x, torch.rand(count, generator=generator), torch.arange(count) % config.num_classes


@pytest.mark.parametrize("registers", [0, 3])
def test_every_block_read_at_once_is_the_stream_that_the_model_taps(recipe, registers) -> None:
    model = random_model(replace(recipe.model, registers=registers), 1).eval()
    x, t, labels = noisy(model)
    velocity, streams = read_blocks(model, x, t, labels, lambda stream: stream.clone())
    assert len(streams) == model.config.depth + 1
    with torch.no_grad():
        for block, stream in enumerate(streams):
            expected, tapped = model(x, t, labels, tap=block)
            assert torch.equal(stream, tapped), f"block {block}"
            assert torch.equal(velocity, expected)
    assert not torch.equal(streams[0], streams[1])


def test_reading_leaves_the_model_as_it_was_even_after_a_mistake(model) -> None:
    before = model.run_block
    with pytest.raises(ZeroDivisionError):
        read_blocks(model, *noisy(model), lambda stream: 1 / 0)
    with pytest.raises(RuntimeError):
        read_blocks(model, torch.zeros(2, 1, 8, 8), torch.zeros(3), torch.zeros(2).long(), lambda stream: None)
    assert model.run_block is before


def test_it_wraps_whatever_runs_the_blocks(recipe) -> None:
    model = build(recipe.model, kernels.select({}, torch.device("cpu")), 0)
    calls = []
    model.run_block = lambda block, *args: (calls.append(block), block(*args))[1]
    read_blocks(model, *noisy(model), lambda stream: None)
    assert len(calls) == model.config.depth
    assert callable(CompiledBlocks.__call__), "what runs the blocks of a compiled model is such a callable too"


def test_the_held_out_images_are_the_test_images_through_the_folders_own_encoder(data) -> None:
    split = load_split(data, 120)
    assert split.unseen and len(split.train.x) == 120 and len(split.held_out.x) == 60
    real = read_images(data)
    mine = (split.held_out.x / 2 + 1) * 127.5  # these latents are pixels in [−1, 1] times 2
    distance = (mine.flatten(1)[:, None] - real.test.flatten(1).float()[None]).abs().amax(2)
    found = distance.argmin(1)
    assert distance.amin(1).max() < 0.2 and len(found.unique()) == 60
    assert torch.equal(real.test_labels[found], split.held_out.labels)
    again = load_split(data, 120)
    assert torch.equal(again.train.x, split.train.x) and torch.equal(again.held_out.x, split.held_out.x)


@pytest.mark.parametrize("unseen", [True, False])
def test_the_pictured_images_are_one_of_each_class_also_in_a_set_that_is_sorted_by_class(tmp_path, unseen) -> None:
    folder = pixels.write_data(tmp_path / "pixels", train=120)
    tensors = load_file(folder / "images.safetensors")
    order = tensors["test_labels"].argsort(stable=True)
    sorted_ = {name: tensors[name][order].contiguous() for name in ("test", "test_labels")}
    save_file(tensors | sorted_, folder / "images.safetensors")
    if not unseen:
        (folder / "images.safetensors").unlink()
    split = load_split(folder, 80)
    labels = split.held_out.labels.tolist()
    classes = len(set(labels))
    assert len(split.pictures) == len(split.pictured) == classes >= 9
    assert split.pictured == tuple(map(str, labels[:classes]))
    assert len(set(labels[:classes])) == classes and sorted(labels[:classes]) == labels[:classes]
    learnt = split.train.labels.tolist()  # tokens are kept of the first ones
    assert len(set(learnt[:10])) == len(set(learnt)) == 10
    write_manifest(folder, replace(read_manifest(folder), class_names=NAMES))
    assert load_split(folder, 80).pictured == tuple(NAMES[label] for label in labels[:classes])


def test_classes_take_turns_each_in_its_own_order() -> None:
    labels = torch.tensor([5, 5, 2, 2, 2, 9])
    assert in_turn(labels).tolist() == [2, 0, 5, 3, 1, 4]


def test_without_test_images_other_records_are_held_out_and_that_is_said(tmp_path) -> None:
    folder = pixels.write_data(tmp_path / "pixels", train=60)
    (folder / "images.safetensors").unlink()
    split = load_split(folder, 500)
    assert not split.unseen
    assert (len(split.train.x), len(split.held_out.x)) == (40, 20)
    means = torch.cat((split.train.x, split.held_out.x)).flatten(1)
    assert torch.cdist(means, means).fill_diagonal_(9).min() > 0.5, "no record is in both"
    with pytest.raises(UserError, match="too few for a linear probe"):
        load_split(pixels.write_data(tmp_path / "few", train=19), 500)


def test_velocity_loss_by_bin_is_that_of_a_plain_loop(model, data) -> None:
    held_out = load_split(data, 40).held_out
    found = velocity_loss(model, held_out, 4, "cosine")
    for number, value in enumerate(found):
        t = held_out.times(number / 4, (number + 1) / 4)
        assert number / 4 <= t.min() and t.max() <= (number + 1) / 4
        noise = held_out.at(torch.ones(len(t)), "linear")[0]
        losses = []
        for one in range(len(t)):
            a, s, da, ds = (float(c) for c in coefficients(t[one].double(), "cosine"))
            x_t = a * held_out.x[one] + s * noise[one]
            with torch.no_grad():
                predicted = model(x_t[None], t[one : one + 1], held_out.labels[one : one + 1])[0][0].numpy()
            target = (da * held_out.x[one] + ds * noise[one]).numpy()
            losses.append(np.square(predicted.astype(np.float64) - target).mean())
        assert value == pytest.approx(np.mean(losses), rel=1e-4)


def test_features_are_blind_to_the_labels_and_pooled_over_tokens(model, data) -> None:
    held_out = load_split(data, 40).held_out
    other = Latents(held_out.x, (held_out.labels + 1) % 10, held_out.first)
    ours, tokens = features(model, held_out, 0.5, "linear", [0, 2])
    theirs, _ = features(model, other, 0.5, "linear", [0, 2])
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [part.shape for part in tokens] == [(20, 16, 32)] * 2
    np.testing.assert_allclose(tokens[1].mean(axis=1), ours[1], rtol=1e-5, atol=1e-6)
    t = torch.full((20,), 0.5)
    x_t = held_out.at(t, "linear")[0]
    null = model.null_condition(20)
    with torch.no_grad():
        np.testing.assert_allclose(tokens[1], model(x_t, t, null, tap=2)[1].numpy(), rtol=1e-4, atol=1e-5)


def test_a_deep_model_is_read_at_a_dozen_blocks_among_them_the_supervised_one() -> None:
    assert chosen_blocks(6, [2]) == [0, 1, 2, 3, 4, 5, 6]
    blocks = chosen_blocks(28, [9])
    assert len(blocks) <= 14 and {0, 9, 28} <= set(blocks)


def test_the_command_writes_numbers_and_figures_that_agree(probed) -> None:
    found = json.loads((probed / "probe" / "probe.json").read_text())
    assert [(m["label"], m["step"]) for m in found["models"]] == [("align", 8), ("transcend", 8)]
    captions = {figure["file"]: figure["caption"] for figure in found["figures"]}
    assert captions["patches.png"].endswith(f" classes, row by row: {', '.join(NAMES)}.")
    assert found["held_out_unseen"] and found["times"] == [0.1, 0.5]
    for model in found["models"]:
        assert np.shape(model["accuracy"]) == (2, 4) and len(model["velocity_loss"]) == 10
        assert np.min(model["accuracy"]) >= 0 and np.max(model["accuracy"]) <= 1
        assert np.allclose(np.diag(model["alignment"]["cka"]), 1)
        read = checkpoint.latest(probed / model["label"] / "checkpoints", pytest.fail)
        assert (model["step"], model["sha256"]) == (read.step, tensors_hash(read.groups["ema"]))
    assert np.mean(found["models"][0]["accuracy"][0]) > 0.15, "one in ten would be chance"
    assert found["models"][0]["alignment"]["with_teacher"] is None
    assert found["models"][1]["alignment"]["with_teacher"]["teacher"] == "align"
    names = {figure["file"] for figure in found["figures"]}
    assert {"knows.png", "patches.png", "alignment.png", "velocity_loss.png", "patches-1.png"} <= names
    assert all(min(Image.open(probed / "probe" / name).size) > 200 for name in names)


def test_the_same_probe_finds_the_same_numbers(probed) -> None:
    before = (probed / "probe" / "probe.json").read_text()
    main([str(probed), "--images", "160", "--times", "0.1", "0.5"])
    assert (probed / "probe" / "probe.json").read_text() == before


def test_a_model_without_its_run_is_probed_on_the_data_given(probed, data, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert([str(probed), "transcend.pt", "--to", "repa"])
    convert([str(probed), "published", "--to", "huggingface"])
    expected = json.loads((probed / "probe" / "probe.json").read_text())["models"][1]
    how = ["--data", str(data), "--images", "160", "--times", "0.1", "0.5"]
    for model, options in (("transcend.pt", ["--heads", "2"]), ("published", ["--out", "here"])):
        main([model, *how, *options])
        place = Path(options[1]) if "--out" in options else Path("probe") / "transcend"
        (found,) = json.loads((place / "probe.json").read_text())["models"]
        assert found["label"] == Path(model).stem and found["teacher"] is None and found["supervised_blocks"] == []
        for key in ("accuracy", "velocity_loss", "blocks", "sha256", "step"):
            assert found[key] == expected[key], key
    main([str(probed / "align"), "transcend.pt", "--heads", "2", "--out", "both", *how])
    found = json.loads(Path("both/probe.json").read_text())["models"]
    assert [one["label"] for one in found] == ["digits · align", "transcend"]
    with pytest.raises(UserError, match=r"--data FOLDER: needed, transcend.pt comes without latents"):
        main(["transcend.pt", "--heads", "2"])
    with pytest.raises(UserError, match=r"--data .*: .*digits tells it itself"):
        main([str(probed), *how])
    assert sorted(path.name for path in Path().iterdir()) == ["both", "here", "probe", "published", "transcend.pt"]


def test_the_report_shows_the_probe_and_leaves_out_what_is_broken(probed) -> None:
    page = write_report([probed], probed / "page.html").read_text()
    figures = json.loads((probed / "probe" / "probe.json").read_text())["figures"]
    assert all(figure["title"] in page for figure in figures)
    assert page.count('class="card probe"') == len(figures)
    picture = (probed / "probe" / "knows.png").read_bytes()
    (probed / "probe" / "knows.png").write_bytes(b"no picture")
    page = write_report([probed], probed / "page.html").read_text()
    (probed / "probe" / "knows.png").write_bytes(picture)
    assert page.count('class="card probe"') == len(figures) - 1
    assert "it is left out" in page
    assert page.count(f"Classes in turn, row by row: {', '.join(NAMES)}.") == 2, "a row of samples each stage"
    assert "Weights: ema, of align at step 8, transcend at step 8." in page
    whole = (probed / "probe" / "probe.json").read_text()
    assert "The run has gone on" not in page
    older = json.loads(whole)
    older["models"][1]["step"] = 5
    (probed / "probe" / "probe.json").write_text(json.dumps(older))
    page = write_report([probed], probed / "page.html").read_text()
    assert "transcend at step 5. The run has gone on since: transcend is at step 8." in page
    older["models"][1] |= {"stage": ["transcend"], "run": {}}
    (probed / "probe" / "probe.json").write_text(json.dumps(older))
    assert "The run has gone on" not in write_report([probed], probed / "page.html").read_text()
    (probed / "probe" / "probe.json").write_text("{")
    page = write_report([probed], probed / "page.html").read_text()
    (probed / "probe" / "probe.json").write_text(whole)
    assert "What the blocks know" not in page and "probe.json is damaged" in page


def test_figures_have_no_box_on_a_dark_page(probed) -> None:
    for name in ("knows.png", "patches.png", "patches-0.png", "alignment.png", "velocity_loss.png"):
        alpha = np.asarray(Image.open(probed / "probe" / name).convert("RGBA"))[..., 3]
        assert (alpha[0] == 0).all() and (alpha[:, -1] == 0).all() and (alpha == 255).any(), name
    uris = re.findall(r'<figure class="card probe">.*?src="data:image/(\w+);base64,([^"]+)"',
                      write_report([probed], probed / "page.html").read_text(), re.DOTALL)  # fmt: skip
    assert len(uris) >= 5
    for kind, data in uris:
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind in ("png", "webp") and image.convert("RGBA").getextrema()[3][0] == 0


def test_pictures_are_tiled_two_by_two_whatever_their_number() -> None:
    colours = np.stack([np.full((4, 6, 3), shade / 10) for shade in range(5)])
    sheet = _tiled(colours)
    assert sheet.shape == (3 * 32 + 2 * 2, 2 * 48 + 2, 4)
    assert [sheet[16 + 34 * row, 20 + 50 * column, 0] for row in range(3) for column in range(2)][:5] == [
        0, 26, 51, 76, 102,
    ]  # fmt: skip
    assert (sheet[32:34, :, 3] == 0).all() and (sheet[-20:, 60:, 3] == 0).all() and (sheet[:32, :48, 3] == 255).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no recipe.toml"),
        (["RUN", "--times", "1.5"], "--times 1.5"),
        (["RUN", "--images", "0"], "--images 0"),
        (["RUN", "RUN/other"], "RUN/other: no recipe.toml"),
        (["RUN", "RUN/."], "RUN: named twice"),
    ],
)
def test_mistakes_are_told_in_one_line(probed, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        main([a.replace("RUN", str(probed)) for a in arguments])
    assert words.replace("RUN", str(probed)) in str(error.value)
    assert "\n" not in str(error.value)
