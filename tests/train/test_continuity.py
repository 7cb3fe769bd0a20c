"""What a run continues is what it was: its recipe, teacher and files are compared with what its checkpoints say."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core import checkpoint
from st_fast.core.checkpoint.store import digest_of, read_manifest, save
from st_fast.core.errors import EXIT_USAGE, RunFailed, Unreadable, UserError
from st_fast.data.layouts.repa import LATENTS
from st_fast.recipe import load, to_toml
from st_fast.train import __main__ as train
from st_fast.train.continuity import newest
from st_fast.train.run import run
from tests import tiny

HALF = "--stage.transcend.steps=4"
TEACHER = "stage.transcend: its teacher"


@pytest.fixture(scope="module", autouse=True)
def not_measured():
    """The machine's speed, which takes longer than such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("st_fast.train.run.matmul_rate", lambda device, dtype: 1e11)
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run whose second stage has four of its ten steps."""
    folder = tmp_path_factory.mktemp("begun")
    torch.set_num_threads(1)
    data = tiny.write_data(folder / "data")
    run(load(tiny.write_recipe(folder / "tiny.toml", data, folder / "out"), [HALF]))
    return folder


@pytest.fixture
def recipe(begun, tmp_path, one_thread) -> Path:
    """A recipe for a copy of that run."""
    shutil.copytree(begun / "out", tmp_path / "out")
    found = tiny.write_recipe(tmp_path / "tiny.toml", begun / "data", tmp_path / "out")
    (tmp_path / "out" / "recipe.toml").write_text(to_toml(load(found, [HALF])))
    return found


def refused(recipe: Path, *options: str) -> str:
    with pytest.raises(UserError) as caught:
        run(load(recipe, options))
    assert caught.value.exit_code == EXIT_USAGE and "\n" not in str(caught.value)
    return str(caught.value)


def accepted(recipe: Path) -> list[str]:
    return [change for record in tiny.records(recipe.parent / "out", "accepted") for change in record["changes"]]


def test_without_the_runs_copy_of_the_recipe_its_checkpoints_say_what_it_was(recipe):
    (recipe.parent / "out" / "recipe.toml").unlink()
    assert "optim.lr: 0.01 → 0.5; run.seed: 3 → 4" in refused(recipe, "--optim.lr=0.5", "--run.seed=4")


@pytest.mark.parametrize("text", ["", "[[[", "[model]\nof_another_version = 1\n"])
def test_without_any_recipe_to_compare_with_the_run_goes_on_only_if_that_is_accepted(text, recipe):
    out = recipe.parent / "out"
    newest = max((out / "transcend" / "checkpoints").iterdir())
    found = checkpoint.load(newest)
    shutil.rmtree(newest)
    save(newest.parent, found.step, found.groups, found.meta | {"recipe": text})
    run(load(recipe, ["--stage.transcend.steps=5"]))  # the run folder's copy says what it was
    shutil.rmtree(newest.parent)
    save(newest.parent, found.step, found.groups, found.meta | {"recipe": text})
    (out / "recipe.toml").unlink()
    assert f"{newest} can't be compared, and there is no {out / 'recipe.toml'}" in refused(recipe, "--optim.lr=0.5")
    run(load(recipe, ["--stage.transcend.steps=5"]), accept_changes=True)


def test_an_edited_copy_of_the_recipe_hides_nothing(recipe):
    other = load(recipe, ["--optim.lr=0.5"])
    (recipe.parent / "out" / "recipe.toml").write_text(to_toml(other))
    assert "optim.lr: 0.01 → 0.5" in refused(recipe, "--optim.lr=0.5")
    assert "optim.lr: 0.5 → 0.01" in refused(recipe)


def test_stages_of_another_run_or_place_are_told(recipe, begun):
    out = recipe.parent / "out"
    shutil.rmtree(out / "transcend")
    shutil.copytree(out / "align", out / "transcend")
    assert "is a checkpoint of stage 'align'" in refused(recipe)
    newest = max((out / "align" / "checkpoints").iterdir())
    found = checkpoint.load(newest)
    meta = found.meta | {"recipe": to_toml(load(recipe, ["--run.seed=9"]))}
    shutil.rmtree(newest)
    save(newest.parent, found.step, found.groups, meta)
    shutil.rmtree(out / "transcend")
    assert "run.seed: 9 → 3" in refused(recipe)


def test_storage_that_fails_at_the_newest_checkpoint_is_not_passed_over(recipe, monkeypatch):
    """What is kept from start to start (kernels, accumulation) and compared would be another checkpoint's."""
    folder = recipe.parent / "out" / "transcend" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["00000004"]
    shutil.copytree(folder / "00000004", folder / "00000008")
    real = os.open

    def refuse(path, *rest, **more):
        if str(path).endswith("00000008/manifest.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, *rest, **more)

    monkeypatch.setattr("st_fast.core.checkpoint.store.PAUSES", (0.0, 0.0))
    loaded = load(recipe, [HALF])
    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuse)
        with pytest.raises(Unreadable, match=r"00000008/manifest.json: cannot be opened \(Input/output error\)"):
            newest(loaded, loaded.stage("transcend"))
    assert newest(loaded, loaded.stage("transcend"))[0].name == "00000008"
    (folder / "00000008" / "manifest.json").write_text("{")
    assert newest(loaded, loaded.stage("transcend"))[0].name == "00000004"


@pytest.mark.parametrize("at", ["transcend", "transcend/checkpoints", "transcend/checkpoints/00000004"])
def test_a_stage_whose_checkpoints_lie_on_a_disk_that_is_gone_does_not_begin_anew(at, recipe):
    place = recipe.parent / "out" / at
    place.rename(recipe.parent / "away")
    place.symlink_to(recipe.parent / "mnt")
    assert f"{place}: a link to {recipe.parent / 'mnt'}, where nothing is" in refused(recipe)
    assert not (recipe.parent / "mnt").exists()
    (recipe.parent / "away").rename(recipe.parent / "mnt")
    assert tiny.records(recipe.parent / "out", "start")[-1]["stage"] == "transcend"
    run(load(recipe))
    assert tiny.records(recipe.parent / "out", "start")[-1]["step"] == 4, "it went on"


def test_a_teacher_that_was_trained_on_is_refused_unless_accepted_and_then_told_for_good(recipe):
    longer = "--stage.align.steps=12"
    assert f"{TEACHER} align was at step 10 (now 12)" in refused(recipe, longer)
    run(load(recipe, [longer, "--stage.transcend.steps=6"]), accept_changes=True)
    assert accepted(recipe) == [f"{TEACHER} align was at step 10 (now 12)"]
    run(load(recipe, [longer, "--stage.transcend.steps=8"]))  # is not asked again
    out = recipe.parent / "out"
    assert "with accepted changes: stage.transcend: its teacher align" in (out / "report.html").read_text()
    newest = max((out / "transcend" / "checkpoints").iterdir())
    teacher = read_manifest(newest).meta["teacher"]
    assert teacher["step"] == 12 and teacher["weights"] == "raw" and len(teacher["sha256"]) == 64
    assert tiny.records(out, "start")[-1]["teacher"] == teacher


def changed_teacher(out: Path, key: str, value: float) -> None:
    """The first stage's last checkpoint again, with one value of its weights another."""
    newest = max((out / "align" / "checkpoints").iterdir())
    found = checkpoint.load(newest)
    found.groups["model"][key].view(-1)[-1] = value
    shutil.rmtree(newest)
    save(newest.parent, found.step, found.groups, found.meta)


def test_a_teacher_of_the_same_step_with_other_weights_is_refused(recipe):
    changed_teacher(recipe.parent / "out", "final_layer.linear.weight", 0.25)
    assert f"{TEACHER} align was " in (text := refused(recipe)) and "at step 10" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_that_is_not_finite_is_refused_by_its_tensors_name(value, recipe):
    shutil.rmtree(recipe.parent / "out" / "transcend")
    changed_teacher(recipe.parent / "out", "blocks.1.attn.qkv.weight", value)
    assert "blocks.1.attn.qkv.weight (96, 32) has 1 values that are NaN or infinite" in refused(recipe)


def test_checkpoints_that_say_nothing_of_a_teacher_go_on(recipe):
    newest = max((recipe.parent / "out" / "transcend" / "checkpoints").iterdir())
    found = checkpoint.load(newest)
    meta = {key: value for key, value in found.meta.items() if key not in ("teacher", "files")}
    shutil.rmtree(newest)
    save(newest.parent, found.step, found.groups, meta)
    run(load(recipe, ["--stage.transcend.steps=5"]))
    assert tiny.records(recipe.parent / "out", "end")[-1]["step"] == 5


def forged(folder: Path, **values: object) -> None:
    """Other metadata in the manifests of all checkpoints of a folder, under digests that fit."""
    for file in folder.rglob("manifest.json"):
        content = json.loads(file.read_text())
        content["meta"] |= values
        file.write_text(json.dumps(content | {"digest": digest_of(content)}))


def test_metadata_that_no_training_has_written_are_damage(recipe, capsys):
    root = recipe.parent / "out" / "transcend" / "checkpoints"
    run(load(recipe, ["--stage.transcend.steps=8"]))
    capsys.readouterr()
    forged(root / "00000008", seconds=[12.5])
    run(load(recipe, ["--stage.transcend.steps=9"]))
    said = capsys.readouterr().out
    assert "checkpoint 00000008 is broken" in said and "meta: seconds = [12.5]: a number is needed" in said
    assert tiny.records(recipe.parent / "out", "start")[-1]["resumed_from"] == 4
    forged(root, guard=None)
    with pytest.raises(RunFailed, match=r"none of its \d checkpoints can be read: .*meta: guard = None"):
        run(load(recipe))


@pytest.fixture
def arrays(tmp_path, one_thread) -> Path:
    """A recipe for REPA's layout, begun."""
    folder, rng = tmp_path / "repa" / LATENTS, np.random.default_rng(0)
    folder.mkdir(parents=True)
    names = [f"img-mean-std-{number:08d}.npy" for number in range(16)]
    for name in names:
        moments = rng.standard_normal((8, 4, 4)).astype(np.float32)
        np.save(folder / name, np.concatenate((moments[:4], np.abs(moments[4:]))))
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, i % 5] for i, name in enumerate(names)]}))
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", tmp_path / "repa", tmp_path / "out")
    text = recipe.read_text()
    recipe.write_text(text[: text.rindex("[[stage]]")])
    return recipe


@pytest.mark.parametrize("verify", ["true", "false"])
def test_arrays_that_changed_between_starts_are_refused_and_copied_ones_are_not(verify, arrays):
    folder, options = arrays.parent / "repa" / LATENTS, (f"--data.verify={verify}", "--stage.align.steps=6")
    run(load(arrays, [f"--data.verify={verify}", "--stage.align.steps=4"]))
    for file in folder.glob("*.npy"):  # as a copy has them
        os.utime(file, ns=(10**18, 10**18))
    if verify == "true":
        run(load(arrays, [*options, "--stage.align.steps=5"]))
    else:
        assert "their content is not known" in refused(arrays, *options)
    changed = folder / "img-mean-std-00000003.npy"
    np.save(changed, np.load(changed) * np.float32(0.5))
    assert "data.path: its files were" in refused(arrays, *options)
    run(load(arrays, options), accept_changes=True)
    assert len(accepted(arrays)) == 1


def test_fewer_steps_than_are_done_are_refused_unless_accepted(recipe):
    line = refused(recipe, "--stage.align.steps=3")
    assert "stage.align.steps: 3, and 10 are done" in line and "--accept-changes" in line
    before = tiny.records(recipe.parent / "out", "end")
    run(load(recipe, ["--stage.align.steps=3", HALF]), accept_changes=True)
    assert len(tiny.records(recipe.parent / "out", "accepted")) == 1
    assert tiny.records(recipe.parent / "out", "end") == before


def test_a_stage_that_began_from_one_that_is_trained_on_since_is_refused(recipe):
    """The same stages, but the second begins with the first's weights instead of learning from it."""
    text, out = recipe.read_text().split("[[stage]]"), recipe.parent / "out"
    shutil.rmtree(out)
    recipe.write_text(
        "[[stage]]".join(text[:2]) + '[[stage]]\nname = "on"\nsupervision = "none"\ninit = "align"\nsteps = 4\n'
    )
    run(load(recipe))
    longer = ["--stage.align.steps=12", "--stage.on.steps=6"]
    assert "stage.on: it began from align at step 10 (now 12)" in refused(recipe, *longer)
    run(load(recipe, longer[:1]))  # it is complete, and stays as it is
    assert [record["step"] for record in tiny.records(out, "end")] == [10, 4, 12]
    run(load(recipe, longer), accept_changes=True)
    assert tiny.records(out, "end")[-1]["step"] == 6


DAMAGED = [
    b"",
    b"{}",
    b"null",
    b"[1]",
    b"\0" * 512,
    b'{"kind": "train", "stage": "al',
    b"[" * 9999,
    b"\xff\xfe",
    b'{"kind": 1}',
]


@pytest.mark.parametrize("place", ["first", "middle"])
def test_damaged_lines_of_the_log_stop_no_resume(place, recipe):
    log = recipe.parent / "out" / "log.jsonl"
    lines = log.read_bytes().splitlines()
    at = {"first": 0, "middle": len(lines) // 2}[place]
    log.write_bytes(b"\n".join([*lines[:at], *DAMAGED, *lines[at:], b""]))
    run(load(recipe))
    ends = [line for line in log.read_bytes().splitlines() if b'"kind": "end"' in line]
    assert [json.loads(line)["step"] for line in ends] == [10, 4, 10]


def test_a_log_that_is_no_log_stops_no_resume(recipe):
    log = recipe.parent / "out" / "log.jsonl"
    log.write_bytes(b"\xef\xbb\xbf" + os.urandom(4096))
    run(load(recipe))
    assert b'"kind": "end"' in log.read_bytes()


def test_a_recipe_at_the_place_of_the_runs_own_copy_is_kept_as_given(recipe, capsys):
    out = recipe.parent / "out"
    shutil.rmtree(out)
    out.mkdir()
    given = out / "recipe.toml"
    given.write_text("# mine\n" + recipe.read_text())
    text = given.read_text()
    train.main([str(given), "--stage.align.steps=2", HALF])
    assert (out / "recipe.given.toml").read_text() == text and "recipe.given.toml" in capsys.readouterr().out
    assert given.read_text() == to_toml(load(given))
    train.main([str(given), "--stage.align.steps=3"])  # the resolved copy is the run's own
    assert (out / "recipe.given.toml").read_text() == text
