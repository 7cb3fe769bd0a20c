"""`python -m st_fast.convert`: every form is read back as what it was, cards tell the log's numbers, nothing leaks."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from st_fast import kernels
from st_fast.convert import hub
from st_fast.convert.__main__ import main
from st_fast.core import checkpoint
from st_fast.core.errors import RunFailed, UserError
from st_fast.data.manifest import read_manifest, write_manifest
from st_fast.model import SiT, build, stored
from st_fast.model.formats import import_file
from st_fast.model.stored import read_model
from st_fast.recipe import load
from st_fast.recipe.document import as_document, parse_toml
from st_fast.recipe.load import parse, resolve
from st_fast.report import words
from st_fast.report.arms import make_arms
from st_fast.report.collect import read_run
from tests import foreign, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A finished run of both stages."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("st_fast.train.log.matmul_rate", lambda device, dtype: 1e11)
        return tiny.run_whole(folder, tiny.write_data(folder / "data"))


def test_a_file_is_described_and_a_dry_run_writes_nothing(tmp_path, capsys):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    convert(tmp_path / "last.pt")
    text = capsys.readouterr().out
    assert "repa layout" in text and "depth 3, width 32, heads 2" in text and "5 classes and a null class" in text
    assert "AdamW's state after 3 updates" in text and "training heads: projectors" in text
    for form in ("stage", "huggingface", "diffusers"):
        convert(tmp_path / "last.pt", tmp_path / "out", "--to", form, "--dry-run")
        assert f"would be written as {form}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("config", [foreign.TINY, foreign.TINY_TEXT], ids=["classes", "text"])
def test_a_repa_checkpoint_goes_through_a_stage_of_ours_and_back_bit_by_bit(config, tmp_path, capsys):
    content = foreign.repa_checkpoint(tmp_path / "last.pt", config)
    convert(tmp_path / "last.pt", tmp_path / "models" / "repa")
    assert "--model.depth=3" in capsys.readouterr().out
    convert(tmp_path / "models" / "repa", tmp_path / "again.pt", "--to", "repa")
    with torch.serialization.safe_globals([argparse.Namespace]):
        again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert list(again["model"]) == list(content["model"])  # an order that numbers the optimiser's state
    assert list(again["opt"]["state"]) == list(content["opt"]["state"])
    before, after = (import_file(tmp_path / name) for name in ("last.pt", "again.pt"))
    assert same(before.model, content["model"]) and same(after.model, before.model)
    keys = [key for key in before.ema if not key.startswith("projectors")]  # an average of ours has no heads
    assert all(torch.equal(after.ema[key], before.ema[key]) for key in keys)
    assert same(after.exp_avg, before.exp_avg) and same(after.exp_avg_sq, before.exp_avg_sq)
    assert (after.updates, after.step) == (before.updates, before.step) == (3, 3)


def test_prefixed_keys_of_a_bare_state_dict_are_read(tmp_path):
    weights = foreign.repa_weights(foreign.TINY, 4)
    save_file({f"module.{key}": tensor for key, tensor in weights.items()}, tmp_path / "light.safetensors")
    convert(tmp_path / "light.safetensors", tmp_path / "stage", "--num-classes", 5)
    found = checkpoint.latest(tmp_path / "stage" / "checkpoints", pytest.fail)
    assert same(dict(found.groups["model"]) | dict(found.groups["heads"]), weights) and "optim" not in found.groups


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_stage_that_was_written_and_the_file_itself_are_teachers(weights, tmp_path):
    content = foreign.repa_checkpoint(tmp_path / "last.pt")
    convert(tmp_path / "last.pt", tmp_path / "repa")
    table, expected = kernels.select({}, CPU), content["model" if weights == "raw" else "ema"]
    for root in (tmp_path / "repa" / "checkpoints", tmp_path / "last.pt"):
        model = stored.load_frozen(root, foreign.TINY, weights, table, CPU, torch.float32)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match=r"another architecture: depth 3 \(this recipe: 4\)"):
        other = replace(foreign.TINY, depth=4)
        stored.load_frozen(tmp_path / "last.pt", other, "raw", table, CPU, torch.float32)
    for root in (tmp_path / "repa" / "checkpoints", tmp_path / "last.pt"):
        with pytest.raises(UserError, match=r"trained on the linear path, flow.path = 'cosine'"):
            stored.load_frozen(root, foreign.TINY, "raw", table, CPU, torch.float32, flow="cosine")


def test_a_teacher_of_text_takes_the_empty_captions_states_from_the_data(tmp_path):
    content = foreign.repa_checkpoint(tmp_path / "last.pt", foreign.TINY_TEXT)
    convert(tmp_path / "last.pt", tmp_path / "repa")
    table, null = kernels.select({}, CPU), torch.randn(77, 6).half()
    for root in (tmp_path / "repa" / "checkpoints", tmp_path / "last.pt"):
        model = stored.load_frozen(root, foreign.TINY_TEXT, "ema", table, CPU, torch.float32, null=null)
        found = model.state_dict()
        assert torch.equal(found.pop("null_context")[0], null.float())
        assert all(torch.equal(tensor, content["ema"][key]) for key, tensor in found.items())
        with pytest.raises(UserError, match="1 missing: 'null_context'"):
            stored.load_frozen(root, foreign.TINY_TEXT, "ema", table, CPU, torch.float32)
    other = replace(foreign.TINY_TEXT, text_length=9)  # data of other captions
    model = stored.load_frozen(tmp_path / "last.pt", other, "ema", table, CPU, torch.float32, null=null[:9])
    assert model.null_condition(2).shape == (2, 9, 6)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("layout", ["sit", "repa", "self-transcendence", "sra"])
def test_a_run_goes_out_in_every_layout_and_comes_back(layout, suffix, run_folder, tmp_path):
    out = tmp_path / f"model.{suffix}"
    convert(run_folder, out, "--stage", "align", "--to", layout)
    found = checkpoint.latest(run_folder / "align" / "checkpoints", pytest.fail)
    tells = layout == "self-transcendence"  # by its heads; the others lost theirs, and a bare table says nothing
    layout_told = None if tells else layout.replace("sra", "repa")
    again = read_model(out, pytest.fail, layout=layout_told, num_classes=5 if suffix != "pt" else None).loaded
    averaged = {key: tensor for key, tensor in again.ema.items() if not key.startswith("projectors")}
    expected = dict(found.groups["ema"])
    assert averaged.keys() == expected.keys()
    close = dict(rtol=0, atol=1e-6 if layout == "sit" else 0)
    assert all(torch.allclose(averaged[key], expected[key], **close) for key in expected)
    if layout == "self-transcendence":
        assert again.layout == layout and "projectors_final.linear.weight" in again.model


def test_a_run_a_stage_and_a_checkpoint_are_the_same_model(run_folder):
    newest = checkpoint.latest(run_folder / "transcend" / "checkpoints", pytest.fail)
    found = [read_model(path, pytest.fail) for path in (run_folder, run_folder / "transcend", newest.path)]
    for origin in found:
        assert origin.run == run_folder and origin.stage == "transcend" and origin.path == newest.path
        assert same(origin.loaded.ema, newest.groups["ema"])
        assert origin.loaded.updates == 10 and origin.loaded.head_updates == 10
    with pytest.raises(UserError, match="--stage nowhere: the run has align, transcend"):
        read_model(run_folder, pytest.fail, stage="nowhere")


def test_a_hugging_face_folder_is_loaded_with_from_pretrained(run_folder, tmp_path):
    convert(run_folder, tmp_path / "hf", "--to", "huggingface")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    expected = dict(checkpoint.latest(run_folder / "transcend" / "checkpoints", pytest.fail).groups["ema"])
    model = SiT.from_pretrained(tmp_path / "hf")
    assert not model.training and same(dict(model.state_dict()), expected)
    assert same(dict(load_file(tmp_path / "hf" / "model.safetensors")), expected)  # as anybody else reads it
    origin = read_model(tmp_path / "hf", pytest.fail)
    assert same(dict(origin.loaded.model), expected) and origin.loaded.step == 10


def test_the_card_tells_the_logs_numbers(run_folder, tmp_path):
    convert(run_folder, tmp_path / "hf", "--to", "huggingface")
    text = (tmp_path / "hf" / "README.md").read_text()
    arm = next(arm for arm in make_arms([read_run(run_folder)]) if arm.stage.name == "transcend")
    ends = {r["stage"]: r["flops"] for r in tiny.records(run_folder, "end")}
    assert arm.total.flops == pytest.approx(ends["align"] + ends["transcend"])
    assert words.flops(ends["transcend"]) in text and words.flops(ends["align"] + ends["transcend"]) in text
    assert "supervision `self_transcendence`, step 10 of 10, global batch 8" in text and "Teacher: `align`" in text
    assert "None were taken." in text and "random, 30 records of 5 classes" in text
    recipe = re.search(r"```toml\n(.*?)```", text, re.S)
    read = resolve(parse(as_document(parse_toml(recipe[1], "card"))), Path("card"))
    ours = load(run_folder / "recipe.toml")
    assert str(run_folder.parent) not in text  # where things lie on this machine is nobody's business
    assert read == replace(ours, data=replace(ours.data, path="./data"), run=replace(ours.run, out="./out"))


def test_the_card_names_the_classes_by_number(run_folder, tmp_path):
    data = run_folder.parent / "data"
    before, unnamed = (data / "manifest.json").read_bytes(), read_manifest(data)
    try:
        write_manifest(data, replace(unnamed, class_names=("boot", "a|b", "<b>c</b>", "d\n# Mine", "ü")))
        convert(run_folder, tmp_path / "named", "--to", "huggingface")
    finally:
        (data / "manifest.json").write_bytes(before)
    convert(run_folder, tmp_path / "unnamed", "--to", "huggingface")
    text = (tmp_path / "named" / "README.md").read_text()
    rows = ("0 | boot", "1 | a\\|b", "2 | \\<b\\>c\\</b\\>", r"3 | d\\n\# Mine", "4 | ü")
    assert "## Classes\n\n| number | class |\n|---|---|\n" + "".join(f"| {row} |\n" for row in rows) in text
    assert "## Classes" not in (tmp_path / "unnamed" / "README.md").read_text()


def test_the_cards_scores_come_with_their_protocol(run_folder, tmp_path):
    folder = run_folder / "transcend" / "samples" / "50000-sde250-cfg1.9"
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": "metrics", "stage": "transcend", "step": 10, "metrics": {"fid": 12.3456789, "kid": 0.01},
        "protocol": {"num": 50_000, "reference": "VIRTUAL", "features": "Inception"},
        "samples": {"sampler": "sde", "steps": 250, "cfg_scale": 1.9},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(record))
    convert(run_folder, tmp_path / "hf", "--to", "huggingface")
    text = (tmp_path / "hf" / "README.md").read_text()
    how = "Step 10; num 50000, reference VIRTUAL, features Inception, sampler sde, steps 250, cfg_scale 1.9:"
    assert f"{how}\n\n| score | samples |\n|---|---|\n| fid | 12.346 |\n| kid | 0.01 |\n" in text


@pytest.mark.parametrize("old", [False, True])
def test_the_cards_scores_of_real_images_stand_beside_those_of_samples_and_counts_nowhere(run_folder, tmp_path, old):
    """Also of metrics.json as earlier versions wrote it."""
    folder = run_folder / "transcend" / "samples" / f"500-heun50-cfg{int(old)}"
    folder.mkdir(parents=True)
    real = {"accuracy": 0.99, "frechet": 0.15}
    frechet = "judge_frechet" if old else "classifier_frechet"
    metrics = {"accuracy": 0.9, frechet: 3.5, "accuracy_per_class": [0.8, 1.0]}
    if old:
        metrics |= {"num": 500, "judge_accuracy": 0.99, "floor_frechet": 0.15, "floor_num": 2000, "judge_digest": "ab"}
    record = {"kind": "metrics", "step": 10, "metrics": metrics, "protocol": {"num": 500}}
    (folder / "metrics.json").write_text(json.dumps(record | ({} if old else {"real_images": real})))
    try:
        convert(run_folder, tmp_path / "hf", "--to", "huggingface")
    finally:
        shutil.rmtree(folder)
    text = (tmp_path / "hf" / "README.md").read_text()
    table = "| score | samples | held-out real images |\n|---|---|---|\n| accuracy | 0.9 | 0.99 |\n"
    assert f"Step 10; num 500:\n\n{table}| classifier_frechet | 3.5 | 0.15 |\n\n" in text


def test_a_foreign_models_card_says_what_is_not_known(tmp_path):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    convert(tmp_path / "last.pt", tmp_path / "hf", "--to", "huggingface", "--weights", "raw")
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "its data, cost and scores are unknown" in text and '"enc_type": "dinov2-vit-b"' in text
    assert "Weights: raw" in text


def test_the_cards_scores_taken_in_training_are_told_apart_by_their_features(run_folder, tmp_path):
    metrics = {
        "num": 50_000, "sampler": "heun", "steps": 20, "cfg_scale": 2.0, "accuracy": 0.9, "precision": 0.7,
        "classifier_digest": "a" * 64, "classifier_accuracy": 0.99, "fid": 3.25, "inception_precision": 0.6,
        "reference": "/home/somebody/imagenet/VIRTUAL.npz", "inception_sha256": "b" * 64,
    }  # fmt: skip
    run = shutil.copytree(run_folder, tmp_path / "run")
    line = {"kind": "eval", "stage": "transcend", "step": 10, "metrics": metrics, "flops": 1.0, "seconds": 1.0}
    last = tiny.records(run, "end")[-1]
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({key: last[key] for key in last if key not in line} | line) + "\n")
    convert(run, tmp_path / "hf", "--to", "huggingface")
    text = (tmp_path / "hf" / "README.md").read_text()
    how = "Step 10; num 50000, sampler heun, steps 20, cfg_scale 2.0; features of"
    classifier = f"{how} a small classifier aaaaaaaaaaaa, not FID:\n\n| score | samples | held-out real images |\n"
    inception = f"{how} InceptionV3 bbbbbbbbbbbb, reference ./VIRTUAL.npz:\n\n| score | samples |\n"
    assert f"{classifier}|---|---|---|\n| accuracy | 0.9 | 0.99 |\n| precision | 0.7 |  |\n" in text
    assert f"{inception}|---|---|\n| fid | 3.25 |\n| inception_precision | 0.6 |\n" in text
    assert "classifier_accuracy" not in text and "somebody" not in text


def broken(folder: Path, name: str, change) -> str:
    """The one line with which a spoilt folder is refused."""
    content = load_file(folder / name) if name.endswith("safetensors") else json.loads((folder / name).read_text())
    change(content)
    if name.endswith("safetensors"):
        save_file(content, folder / name)
    else:
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        SiT.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_from_pretrained_is_strict(tmp_path):
    model = build(foreign.TINY, kernels.select({}, CPU), 4)
    for number, (name, change, words_) in enumerate((
        ("model.safetensors", lambda c: c.pop("final_layer.linear.bias"), "1 missing: 'final_layer.linear.bias'"),
        ("model.safetensors", lambda c: c.update(stranger=torch.zeros(1)), "1 unexpected: 'stranger'"),
        ("config.json", lambda c: c.update(depth=2), "unexpected"),
        ("config.json", lambda c: c.update(depth="many"), "config.json.depth"),
        ("config.json", lambda c: c.update(colour="red"), "unknown 'colour'"),
        ("config.json", lambda c: c.update(version=9), "version = 9"),
        ("config.json", lambda c: c.update(format="other"), "no config of a model of ours"),
        ("config.json", lambda c: c.update(depth=4), "missing: 'blocks.3."),
    )):  # fmt: skip
        model.save_pretrained(tmp_path / str(number))
        assert words_ in broken(tmp_path / str(number), name, change)
        with pytest.raises(UserError):
            convert(tmp_path / str(number), tmp_path / "stage")
        assert not (tmp_path / "stage").exists()
    with pytest.raises(UserError, match="exists"):
        model.save_pretrained(tmp_path / "0")
    (tmp_path / "0" / "config.json").write_text((tmp_path / "1" / "config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "0" / "model.safetensors")
    with pytest.raises(UserError, match="never opened"):
        SiT.from_pretrained(tmp_path / "0")


def test_a_name_on_the_hub_is_loaded_from_its_cache_and_else_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, root = build(foreign.TINY, kernels.select({}, CPU), 4), tmp_path / "models--me--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    model.save_pretrained(root / "snapshots" / ("0" * 40), flow="cosine", latent_scale=0.5)
    assert same(dict(SiT.from_pretrained("me/tiny").state_dict()), dict(model.state_dict()))
    assert read_model(root / "snapshots" / ("0" * 40), pytest.fail).loaded.path == "cosine"
    with pytest.raises(UserError, match="neither a folder nor a name on the hub in reach") as caught:
        SiT.from_pretrained("nobody/nothing-of-the-kind")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words_"),
    [
        (["last.pt", "last.pt"], "exists"),
        (["last.pt", "out", "--to", "repa"], "writes a .pt or .safetensors"),
        (["last.pt", "out.pt", "--to", "stage"], "writes a folder"),
        (["last.pt", "out", "--vae", "x"], "only --to huggingface and --to diffusers"),
        (["last.pt", "out", "--push", "a/b"], "only --to huggingface"),
        (["last.pt", "out", "--to", "huggingface", "--push", "../x"], "OWNER/NAME"),
        (["last.pt", "--heads", "0"], "at least 1"),
        (["nowhere"], "there is nothing"),
        (["."], "no sound checkpoint"),
        (["junk.pt"], "refused, nothing executed"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(arguments, words_, tmp_path, monkeypatch):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    (tmp_path / "junk.pt").write_bytes(b"PK\x03\x04 not a zip")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(words_)) as caught:
        convert(*arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_run_as_a_teacher_is_told_the_names_of_its_stages(run_folder):
    recipe = load(run_folder / "recipe.toml")
    with pytest.raises(UserError, match=re.escape(f"name one of its stages: {run_folder / 'align'}, ")):
        stored.checkpoint_root(recipe, str(run_folder))


@pytest.mark.parametrize("target", ["last.pt/out", "last.pt/out.pt"])
def test_a_place_that_cannot_be_written_is_told_in_one_line(target, tmp_path):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    with pytest.raises(RunFailed, match="can't be written") as caught:
        convert(tmp_path / "last.pt", tmp_path / target)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_of_two_that_write_one_file_the_first_wins_whole(tmp_path, monkeypatch):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    target, save = tmp_path / "out.pt", torch.save
    (tmp_path / "out.pt.partial").write_text("somebody's")

    def meanwhile(content, file):
        save(content, file)
        target.write_text("another's")

    monkeypatch.setattr(torch, "save", meanwhile)
    with pytest.raises(UserError, match="exists"):
        convert(tmp_path / "last.pt", target, "--to", "repa")
    assert target.read_text() == "another's" and (tmp_path / "out.pt.partial").read_text() == "somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "out.pt", "out.pt.partial"]


class FakeHub:
    """Remembers what would be uploaded, or fails as the network does."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple] = []
        self.error = error

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))


def test_push_uploads_the_folder_only_when_asked(tmp_path, monkeypatch, capsys):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    fake = FakeHub()
    monkeypatch.setattr(hub, "hub", lambda: fake)
    convert(tmp_path / "last.pt", tmp_path / "hf", "--to", "huggingface")
    convert(tmp_path / "last.pt", tmp_path / "hf2", "--to", "huggingface", "--push", "me/x", "--dry-run")
    assert fake.calls == []
    convert(tmp_path / "last.pt", tmp_path / "hf2", "--to", "huggingface", "--push", "me/x", "--private")
    files = ["README.md", "config.json", "model.safetensors"]
    assert fake.calls == [("create", "me/x", True, True), ("upload", "me/x", files)]
    assert "https://huggingface.co/me/x" in capsys.readouterr().out
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text('{"password": "secret"}')
    with pytest.raises(UserError, match="no config of a model of ours"):
        convert(tmp_path / "last.pt", tmp_path / "project", "--to", "huggingface", "--push", "me/x")
    assert len(fake.calls) == 2  # a folder that is not ours goes nowhere


def test_without_network_push_ends_in_one_line_without_a_token_and_can_be_repeated(tmp_path, monkeypatch, capsys):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    arguments = (tmp_path / "last.pt", tmp_path / "hf", "--to", "huggingface", "--push", "me/x")
    failing = FakeHub(ConnectionError("no route to host\nAuthorization: Bearer hf_verysecret0123456789"))
    for error in (failing, FakeHub(OSError("401 for hf_verysecret0123456789, bearer hf_other"))):
        monkeypatch.setattr(hub, "hub", lambda error=error: error)
        with pytest.raises(RunFailed, match="not uploaded") as caught:
            convert(*arguments)
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value) + capsys.readouterr().out
    fake = FakeHub()
    monkeypatch.setattr(hub, "hub", lambda: fake)
    convert(*arguments)
    assert [call[0] for call in fake.calls] == ["create", "upload"]


def test_the_real_hub_client_out_of_reach_is_told_in_one_line(tmp_path):
    from huggingface_hub import HfApi

    (tmp_path / "x").mkdir()
    api = HfApi(endpoint="http://127.0.0.1:9", token="hf_verysecret0123456789")
    with pytest.raises(RunFailed, match="not uploaded") as caught:
        hub.push(tmp_path / "x", "me/x", False, api)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("form", ["huggingface", "diffusers"])
def test_foreign_text_stays_text_in_a_card_and_in_its_example(form, tmp_path):
    content = foreign.repa_checkpoint(tmp_path / "last.pt")
    vars(content["args"])["note"] = "\n```\n\n# Mine\n\x1b[2J<script>"
    torch.save(content, tmp_path / "`odd` <b>.pt")
    names = ['a"); import os; print("', "b\n```\n# Mine\n", "[c](evil) <script> | $x$ www.evil", "d\x1b[2J'\\"]
    statements = set()
    for name in names:
        convert(tmp_path / "`odd` <b>.pt", tmp_path / name, "--to", form)
        text = (tmp_path / name / "README.md").read_text()
        assert "\x1b" not in text and "\n# Mine" not in text
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        assert not re.search(r"(?<!\\)<(script|b>)", re.sub(r"`` .*? ``", "", prose))
        assert "[c](evil)" not in prose and "www.evil" not in prose and len(re.findall("^```", text, re.M)) == 6
        tree = ast.parse(re.search(r"^```python\n(.*?)^```$", text, re.S | re.M)[1])
        statements.add(tuple(type(node).__name__ for node in ast.walk(tree)))
        assert name in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert len(statements) == 1  # whatever the name, the example does the same


def test_an_option_that_would_do_nothing_is_refused(run_folder, tmp_path):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    foreign.repa_checkpoint(tmp_path / "text.pt", foreign.TINY_TEXT)
    for arguments, told in (
        ([tmp_path / "last.pt", "--to", "repa"], "--to: without a target"),
        ([tmp_path / "last.pt", "--weights", "raw"], "--weights: without a target"),
        ([tmp_path / "last.pt", "--dry-run"], "--dry-run: without a target"),
        ([tmp_path / "last.pt", tmp_path / "x", "--weights", "raw"], "will hold both"),
        ([tmp_path / "last.pt", tmp_path / "x", "--to", "huggingface", "--private"], "--private: only --push"),
        ([tmp_path / "last.pt", "--stage", "align"], "is no run"),
        ([run_folder, "--heads", 2], "--heads 2: .* tells it itself"),
        ([run_folder, "--num-classes", 5], "--num-classes 5: .* tells it itself"),
        ([tmp_path / "last.pt", "--empty-context", "x"], "--empty-context: without a target"),
        ([tmp_path / "last.pt", tmp_path / "x", "--empty-context", tmp_path / "last.pt"], "draws classes, not text"),
        ([tmp_path / "text.pt", "--num-classes", 5], "--num-classes 5: .* draws from text"),
        ([tmp_path / "last.pt", "--num-classes", 0], "--num-classes 0: at least 1"),
        ([tmp_path / "last.pt", "--num-classes", 9], "num_classes = 9, but y_embedder has 6 rows"),
    ):
        with pytest.raises(UserError, match=told):
            convert(*arguments)
