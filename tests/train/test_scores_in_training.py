"""FID and its like every n steps of training: the evaluate command's own numbers, and a report that ranks by them."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from st_fast import recipe
from st_fast.core.errors import UserError
from st_fast.core.ranks import Ranks
from st_fast.data.manifest import read_manifest
from st_fast.data.text import CAPTIONS, captions_bytes
from st_fast.evaluate import __main__ as evaluate
from st_fast.evaluate import inception, scores
from st_fast.evaluate.classifier import read_images
from st_fast.recipe import RecipeError, load
from st_fast.report import write_report
from st_fast.sample import prompts
from st_fast.sample.set import open_npz
from st_fast.train import examiner
from st_fast.train.log import Log
from st_fast.train.run import run
from tests import tiny, tiny_text
from tests.evaluate.test_evaluate_command import frechet_by_scipy, real_images, small_projection
from tests.sample.tiny_run import make_run

STEPS = ("--evaluate.every=4", "--evaluate.num=20", "--evaluate.inception=w.pth", "--run.compile=off")
SMALL = ("--optim.batch_size=8", "--optim.ema_decay=0.5", "--run.log_every=5", "--run.save_every=10")


def network():
    found = small_projection()
    found.model = nn.Identity()
    return found


def test_scores_by_another_network_do_not_join_those_of_a_log(folder, monkeypatch):
    out = trained(folder, *STEPS, "--stage.plain.steps=4")
    other = network()
    other = network()
    other.sha256 = "0" * 64
    monkeypatch.setattr(examiner, "load_inception", lambda path, device: other)
    with pytest.raises(UserError, match=r"evaluate: inception was \w{12} \(now 000000000000\)"):
        trained(folder, *STEPS)
    assert not any("accepted" in line for line in (out / "log.jsonl").read_text().splitlines())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Data with real images, and a stand-in for Inception with 8 features."""
    for name, value in (("FEATURES", 8), ("SPATIAL", 5), ("CLASSES", 4), ("KID_SUBSETS", 4)):
        monkeypatch.setattr(scores, name, value)
    monkeypatch.setattr(recipe.measures, "INCEPTION_FEATURES", 8)
    for module in (examiner, inception):
        monkeypatch.setattr(module, "load_inception", lambda path, device: network())
    make_run(tmp_path)
    real_images(tmp_path / "data")
    return tmp_path


def trained(folder, *options):
    out = folder / "trained"
    run(load(folder / "recipe.toml", [f"--run.out={out}", *SMALL, *options]))
    return out


def test_training_logs_what_the_evaluate_command_finds(folder, capsys):
    out = trained(folder, *STEPS)
    found = tiny.records(out, "eval")
    assert [record["step"] for record in found] == [4, 8, 10]
    assert "plain 10: FID " in capsys.readouterr().out
    evaluate.main([str(out), "--inception", "w.pth", "-n", "20"])
    (told,) = out.glob("plain/samples/20-*/metrics.json")
    numbers = json.loads(told.read_text())["metrics"]
    last = found[-1]["metrics"]
    for key in ("fid", "sfid", "kid", "inception_score"):
        assert last[key] == pytest.approx(numbers[key], rel=1e-6), key
    assert last["inception_precision"] == numbers["precision"]
    real = read_images(folder / "data").train.permute(0, 2, 3, 1).numpy()
    drawn = next(open_npz(told.with_name("samples.npz")).blocks())
    truth = frechet_by_scipy(network()(drawn).pooled, network()(real).pooled)
    assert last["fid"] == pytest.approx(truth, rel=1e-4)
    assert last["inception_sha256"] == "5" * 64 and last["reference"] == "data" and last["num"] == 20


def test_classifier_and_inception_look_at_the_same_samples_and_keep_their_own_names(folder):
    out = trained(folder, *STEPS, "--evaluate.classifier=true", "--evaluate.num=70", "--evaluate.every=0")
    (record,) = tiny.records(out, "eval")
    metrics = record["metrics"]
    assert {"accuracy", "frechet", "precision", "fid", "inception_precision"} <= metrics.keys()
    page = write_report([out], out=out / "r.html").read_text()
    assert ">FID ↓<" in page and "FID over total FLOPs" in page and "“plain” reaches FID " in page


def test_runs_with_fid_are_ranked_by_it_and_not_where_its_yardstick_differs(runs_with_fid):
    first, second, other = runs_with_fid
    page = write_report([first, second], out=first.parent / "r.html").read_text()
    assert "no arm beats “plain” (FID 6.25) at its cost" in page and "Final FID" in page
    page = write_report([first, other], out=first.parent / "r.html").read_text()
    assert "can&#39;t be ranked: their FID references differ" in page


@pytest.fixture
def runs_with_fid(tmp_path):
    from tests.report.conftest import plain, two_stages

    found = []
    for make, name, scale, sha in ((plain, "plain", 2.0, "a"), (two_stages, "better", 1.0, "a"), (plain, "x", 1, "b")):
        path = make(tmp_path / name)
        lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        for line in lines:
            if line["kind"] == "eval":
                line["metrics"] |= {"fid": scale * 5000 / line["step"], "reference_sha256": sha * 64}
        (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found.append(path)
    return found


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--evaluate.reference=nowhere.npz", "reference nowhere.npz: an ADM .npz"),
        ("--evaluate.classifier=true", "images.safetensors"),
        ("--evaluate.reference={folder}/large", "images of 9×9, the samples have 8×8"),
    ],
)
def test_what_scores_need_is_looked_for_before_the_first_step(option, words, folder):
    if "large" in option:
        (folder / "large").mkdir()
        tensors = {n: torch.zeros(9, 1, 9, 9, dtype=torch.uint8) for n in ("train", "test")}
        labels = {f"{n}_labels": torch.arange(9) % 5 for n in ("train", "test")}
        save_file(tensors | labels, folder / "large" / "images.safetensors")
    if "classifier" in option:
        (folder / "data" / "images.safetensors").unlink()
    with pytest.raises(UserError, match=words) as error:
        trained(folder, *STEPS, "--evaluate.num=70", option.format(folder=folder))
    assert "\n" not in str(error.value)
    assert not (folder / "trained" / "log.jsonl").exists()


def test_too_few_real_images_for_the_classifier_are_told_before_the_first_step(folder):
    path = folder / "data" / "images.safetensors"
    path.write_bytes(save({name: tensor[:64].clone() for name, tensor in load_file(path).items()}))
    with pytest.raises(
        UserError, match=r"64 images in 'train': .* at least 65 images; with more images, st-fast real-im"
    ):
        trained(folder, *STEPS, "--evaluate.num=70", "--evaluate.classifier=true")
    assert not (folder / "trained" / "log.jsonl").exists()


def test_samples_of_classes_that_the_classifier_can_not_know_are_told_before_the_first_step(folder):
    with pytest.raises(UserError, match=r"classes 0\.\.4, the model's samples of 0\.\.5 \(--model\.num_classes=5\)"):
        trained(folder, *STEPS, "--evaluate.num=70", "--evaluate.classifier=true", "--model.num_classes=6")
    assert not (folder / "trained" / "log.jsonl").exists()


def latents_open(data: Path) -> int:
    """How many files of latents this process has open."""
    found = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return sum(path.startswith(f"{data.resolve()}/latents-") for path in found)


@pytest.fixture
def other(folder):
    """A second folder of data with captions, after the first one and the recipe were made those of a model of text."""
    second = Path(shutil.copytree(folder / "data", folder / "other"))
    for place in (folder / "data", second):
        (place / CAPTIONS).write_bytes(captions_bytes([[f"{place.name} {number}"] for number in range(20)]))
        tiny_text.write_states(place)
    sizes = f'network = "mmdit"\ntext_width = {tiny_text.WIDTH}\ntext_length = {tiny_text.LENGTH}'
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text(recipe_file.read_text().replace("num_classes = 5", sizes))
    return second


def test_prompts_are_read_before_the_first_step_by_an_encoder_that_then_goes(folder, other, monkeypatch):
    texts, found = ("one", "two, and more"), []

    class Encoder:
        name, hash = tiny_text.ENCODER, "0" * 64

        def __call__(self, given):
            return tiny_text.states_of(given).float()

        def tokens(self, given):
            return [1] * len(given)

    def loading(*arguments):
        encoder = Encoder()
        found.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(prompts, "load_text_encoder", loading)
    recipe = load(folder / "recipe.toml")
    recipe = replace(recipe, sample=replace(recipe.sample, prompts=texts))
    ranks = Ranks(0, 1, torch.device("cpu"))
    log = Log(folder / "log.jsonl", ranks)
    looking = examiner.Examiner(recipe, read_manifest(folder / "data"), ranks, log)
    looking.check()
    gc.collect()
    assert [one() for one in found] == [None]
    assert torch.equal(looking._prompts.states(torch.tensor([1, 0])), tiny_text.states_of(texts[::-1]).float())


def test_captions_of_another_folder_are_looked_for_before_the_first_step_and_opened_once(folder, other, monkeypatch):
    opened, load_prompts, options = list[object](), examiner.load_prompts, (*STEPS, "--stage.plain.steps=8")

    def opening(*arguments):
        opened.append(load_prompts(*arguments))
        return opened[-1]

    monkeypatch.setattr(examiner, "load_prompts", opening)
    with pytest.raises(UserError, match="missing"):
        trained(folder, *options, "--sample.num=0", f"--evaluate.captions={folder}/missing")
    assert not (folder / "trained" / "log.jsonl").exists()
    before = latents_open(other)
    out = trained(folder, *options, "--sample.num=0", f"--evaluate.captions={other}")
    assert [record["step"] for record in tiny.records(out, "eval")] == [4, 8]
    (drawn,) = opened
    assert drawn.texts == tuple(f"other {number}" for number in range(20)) and latents_open(other) == before


def test_too_few_samples_and_a_reference_for_nobody_are_refused(tmp_path):
    make_run(tmp_path)
    with pytest.raises(RecipeError, match=r"evaluate\.num = 2_?048.*2048 features.*at least 2_?049"):
        load(tmp_path / "recipe.toml", ["--evaluate.inception=w.pth", "--evaluate.num=2048"])
    with pytest.raises(RecipeError, match=r"evaluate\.reference.*nothing is compared with it"):
        load(tmp_path / "recipe.toml", ["--evaluate.reference=x.npz"])


def test_missing_weights_are_told_before_the_first_step(tmp_path):
    make_run(tmp_path)
    real_images(tmp_path / "data")
    with pytest.raises(UserError, match=r"Inception weights w\.pth: no such file; pass weights-inception"):
        trained(tmp_path, "--evaluate.inception=w.pth", "--evaluate.num=2049")


def test_the_check_knows_how_many_features_inception_has():
    assert recipe.measures.INCEPTION_FEATURES == inception.FEATURES
