"""Preparing ends with the classes, the command that trains, and a recipe that the trainer takes; sets of every kind."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.data.manifest import Manifest, VaeInfo, read_manifest
from st_fast.data.shards import open_data
from st_fast.data.text import TextManifest
from st_fast.prepare import ready
from st_fast.recipe import load
from st_fast.recipe.methods import SelfTranscendence
from st_fast.sample import __main__ as sample
from st_fast.train import __main__ as train
from st_fast.train.run import fit_data
from st_fast.train.run import run as train_run
from tests import tiny, tiny_shapes
from tests.tiny import ROOT

from . import sources
from .conftest import run
from .sources import picture

PIXELS = ["--size", "16", "--vae", "pixels", "--device", "cpu"]


def manifest(count: int = 30_000, channels: int = 4, side: int = 32, classes: int = 7, **more: object) -> Manifest:
    shape = (2 * channels, side, side)
    told = Manifest(0, shape, "float16", 0.5, VaeInfo("none"), "pictures, centre crop 256", classes)
    return replace(told, count=count, **more)  # type: ignore[arg-type]


def test_the_recipes_that_plans_follow_have_the_values_that_are_told_of_them() -> None:
    for _, plan in ready.PLANS:
        recipe = load(ROOT / plan.recipe)
        assert recipe.model.name == f"SiT-{plan.size}/2"
        for key, value in ready.THERE.items():
            section, name = key.rsplit(".", 1)
            table = recipe.stage("transcend").method if section.startswith("stage") else getattr(recipe, section)
            assert getattr(table, name) == value


def test_the_recipe_for_captions_has_the_values_that_are_told_of_it() -> None:
    recipe = load(ROOT / ready.TEXT_RECIPE)
    for key, value in ready.TEXT_THERE.items():
        section, name = key.split(".")
        assert getattr(getattr(recipe, section), name) == value


@pytest.mark.parametrize(("others", "side", "patch"), [(0, 32, 2), (1, 24, 2), (0, 64, 4)])
def test_the_command_for_captions_says_what_their_states_are(
    others: int, side: int, patch: int, tmp_path: Path
) -> None:
    told = manifest(40, 16, side, 1)
    text = TextManifest("me/t5 large", "", (1, 120, 1024), True, "", "", 41)
    for name in ("t5 large", "clip")[: 1 + others]:
        (tmp_path / "text" / name).mkdir(parents=True)
    words = shlex.split(ready.text_command(told, text, tmp_path))
    recipe = load(ROOT / words[3], words[4:])
    model = recipe.model
    assert (model.text_width, model.text_length, model.latent_shape) == (1024, 120, (16, side, side))
    assert (model.network, model.depth, model.patch) == ("mmdit", 24, patch) and recipe.optim.batch_size == 32
    assert recipe.data.text == ("me/t5 large" if others else "") and recipe.data.path == str(tmp_path)
    coco = TextManifest("clip", "", (1, 77, 768), False, "", "", 9)
    assert ready.text_command(manifest(82_783, 4, 32, 1), coco, Path("data/coco256")) == (
        "python -m st_fast.train recipes/mmdit_coco.toml --data.path=data/coco256"
    )


SETS = [
    manifest(),
    manifest(5, 3, 28, 1),
    manifest(3, 16, 64, 2, class_names=('a "quoted"\nname', "ü")),
    manifest(1_281_167, 4, 32, 1000),
    manifest(150_000, 8, 31, 3),
    manifest(1, 1, 1, 1),
    manifest(9_000, shape=(8, 24, 40)),
    manifest(400, 4, 9, 11, source="odd {braces}\n[section]\x1b"),
    manifest(70_000, 3, 256, 20, posterior="mean", shape=(3, 256, 256)),
]


@pytest.mark.parametrize("told", SETS, ids=str)
def test_recipe_and_command_are_taken_and_say_what_the_set_is(told: Manifest, tmp_path: Path) -> None:
    text = ready.ready_recipe(told, "data/it's ünusual")
    (tmp_path / "own.toml").write_text(text)
    words = shlex.split(ready.train_command(told, Path("data/it's ünusual")))
    assert words[:3] == ["python", "-m", "st_fast.train"]
    made, overridden = load(tmp_path / "own.toml"), load(ROOT / words[3], words[4:])
    for recipe in (made, overridden):
        model = recipe.model
        assert model.latent_shape == (told.channels, *told.shape[1:])
        assert model.num_classes == told.num_classes and recipe.data.path == "data/it's ünusual"
        assert recipe.optim.batch_size <= told.count
        assert (model.class_dropout == 0) == (told.num_classes == 1)
        assert told.num_classes > 1 or recipe.sample.cfg_scale == 1
        assert model.depth == 12 and model.width in (384, 768)
    assert made.model.patch == overridden.model.patch and made.data.vae == told.vae.name
    assert [stage.name for stage in made.stages] == ["align", "transcend"][: 1 + (told.num_classes > 1)]
    assert all(len(line) <= 200 and line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize(
    ("side", "patch"),
    [
        (1, 1), (4, 1), (8, 1), (9, 1), (14, 1), (15, 1), (16, 2), (22, 2), (24, 2), (28, 2), (31, 1), (32, 2),
        (33, 3), (64, 4), (68, 4), (124, 4), (136, 17), (256, 16),
    ],
)  # fmt: skip
def test_latents_have_64_to_256_tokens_where_a_patch_divides_them(side: int, patch: int) -> None:
    assert ready.patch_for(side, side) == patch


@pytest.mark.parametrize(
    ("count", "size", "steps"),
    [
        (1, "S", 10_000), (19_999, "S", 10_000), (20_000, "S", 20_000), (99_999, "S", 20_000),
        (100_000, "B", 50_000), (499_999, "B", 50_000), (500_000, "B", 200_000), (10**8, "B", 200_000),
    ],
)  # fmt: skip
def test_size_and_steps_go_by_the_number_of_images(count: int, size: str, steps: int, tmp_path: Path) -> None:
    plan = ready.plan_for(manifest(count))
    assert (plan.size, plan.steps) == (size, steps)
    (tmp_path / "own.toml").write_text(ready.ready_recipe(manifest(count), "data/x"))
    recipe = load(tmp_path / "own.toml")
    align, transcend = recipe.stage("align"), recipe.stage("transcend").method
    assert isinstance(transcend, SelfTranscendence)
    assert (recipe.model.width, recipe.model.heads) == {"S": (384, 6), "B": (768, 12)}[size]
    assert (align.steps, recipe.stage("transcend").steps, transcend.stop_step) == (steps, 2 * steps, steps)
    assert (transcend.student_depth, transcend.teacher_depth) == (6, 8)
    assert transcend.cfg_scale == (3.0 if size == "S" else 30.0)
    assert recipe.sample.num == 56 and recipe.sample.cfg_scale == (2.0 if size == "S" else 1.9)


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (2, 2), (3, 2), (255, 128), (256, 256), (10**6, 256)])
def test_a_batch_is_no_larger_than_the_set(count: int, batch: int) -> None:
    told = manifest(count)
    assert ready.values(told, ready.own_bounds(told))["optim.batch_size"] == batch


def test_a_captioned_set_is_told_how_its_captions_are_encoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(sources.captioned_folder(tmp_path / "in"), tmp_path / "my data", *PIXELS, "--captions", "auto")
    told = capsys.readouterr().out
    assert f"python -m st_fast.prepare --text ENCODER '{tmp_path}/my data'" in told and "train: " not in told


def test_the_command_says_only_what_differs() -> None:
    told = manifest(1_281_167, 4, 32, 1000)
    command = "python -m st_fast.train recipes/sit_b.toml --data.path=data/imagenet256"
    assert ready.train_command(told, Path("data/imagenet256")) == command
    assert ready.train_command(replace(told, num_classes=10), Path("data/imagenet256")) == (
        f"{command} --model.num_classes=10"
    )


@pytest.mark.parametrize(("gpus", "count", "start"), [(1, 900, "python"), (8, 900, "torchrun"), (8, 5, "python")])
def test_the_command_uses_the_gpus_that_share_a_batch(
    gpus: int, count: int, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    words = ready.train_command(manifest(count), Path("data/x")).split()
    assert words[0] == start and (start == "python" or words[1:3] == ["--nproc-per-node", "8"])


@pytest.mark.parametrize(("sides", "patch"), [((32, 48), 4), ((16, 64), 2), ((8, 32), 2), ((16, 9), 1), ((6, 40), 1)])
def test_a_patch_divides_both_sides(sides: tuple[int, int], patch: int) -> None:
    assert ready.patch_for(*sides) == patch


@pytest.mark.parametrize(
    ("make", "options", "count", "classes"),
    [
        (sources.flat_folder, ["--unlabelled"], 6, "all 6 of one class"),
        (sources.nested_folders, ["--unlabelled"], 5, "all 5 of one class"),
        (lambda path: sources.edm_folder(path, None), ["--unlabelled"], 4, "all 4 of one class"),
        (sources.class_folders, [], 9, "classes: cat 3, dog 3, emu 3"),
        (lambda path: sources.class_zip(path / "a.zip"), ["--subset", "train"], 6, "classes: cat 3, dog 3"),
        (sources.edm_folder, [], 4, "classes: 0 1, 1 1, 2 2"),
        (sources.webdataset_shards, [], 4, "classes: 0 1, 1 2, 2 1"),
        (
            lambda path: sources.img2dataset_shards(path, [{"kind": k} for k in "baab"]),
            ["--label-column", "kind"],
            4,
            "classes: a 2, b 2",
        ),
        (sources.imagenet_tars, [], 6, "classes: n01440764 2, n01443537 2, n02102040 2"),
        (lambda path: sources.imagenet_train_tar(path / "train.tar"), [], 6, "classes: n01440764 2, n01443537 2, n02"),
    ],
)
def test_every_set_is_prepared_told_and_trained_on_by_what_is_printed(
    make: Callable[[Path], Path], options: list[str], count: int, classes: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, own = tmp_path / "data", tmp_path / "own.toml"
    run(make(tmp_path / "in"), out, *PIXELS, *options)
    told = "".join(capsys.readouterr())
    assert f"{out}: {classes}" in told
    (command,) = re.findall(r"^train: (.*)$", told, re.MULTILINE)
    assert load(ROOT / shlex.split(command)[3], shlex.split(command)[4:]).model.num_classes == (
        read_manifest(out).num_classes
    )
    run(make(tmp_path / "again"), out, *PIXELS, *options, "--recipe", own)
    assert f"train: python -m st_fast.train {own}" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    train.main([str(own), "--dry-run"])
    assert f'path = "{out}"' in capsys.readouterr().out and len(open_data(out)) == count


def test_the_recipe_never_replaces_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out, own = sources.class_folders(tmp_path / "in"), tmp_path / "out", tmp_path / "own.toml"
    own.write_text("mine")
    for _ in range(2):
        with pytest.raises(UserError, match=r"--recipe .*own\.toml: it is there already"):
            run(images, out, *PIXELS, "--recipe", own)
        assert own.read_text() == "mine" and not (out / "manifest.json").exists()
    run(images, out, *PIXELS, "--recipe", tmp_path / "new" / "own.toml")
    text = (tmp_path / "new" / "own.toml").read_text()
    assert "in 3 classes: cat, dog, emu" in text
    run(images, out, *PIXELS, "--recipe", tmp_path / "new" / "own.toml")  # the same again
    with pytest.raises(UserError, match="it is there already, with other content"):
        run(images, out, *PIXELS, "--recipe", own)
    run("--stats", out, "--recipe", tmp_path / "third.toml")
    assert (tmp_path / "third.toml").read_text() == text
    with pytest.raises(UserError, match="--recipe: with --captions it follows the text encoder"):
        run(images, out, *PIXELS, "--captions", "auto", "--recipe", tmp_path / "fourth.toml")


def test_a_dry_run_tells_the_command_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(sources.class_folders(tmp_path / "in"), tmp_path / "out", *PIXELS, "--flip", "--dry-run", "--recipe", "x.toml")
    told = capsys.readouterr().out
    assert "classes: cat 3, dog 3, emu 3" in told and "--model.num_classes=3 --optim.batch_size=16" in told
    assert not (tmp_path / "out").exists() and not Path("x.toml").exists()


def test_rows_without_label_are_skipped_by_name_and_at_most_max_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"picture": {"bytes": picture(n)}, "kind": kind} for n, kind in enumerate(["x", None, "w", "x", None])]
    rows[3]["picture"] = None
    stand_in_dataset(tmp_path / "in", rows, monkeypatch)
    options = [*PIXELS, "--image-column", "picture", "--label-column", "kind"]
    with pytest.raises(UserError, match=r"2 images without a label, row 1 first; --max-bad allows 1, --unlabelled"):
        run(tmp_path / "in", tmp_path / "out", *options, "--max-bad", 1)
    run(tmp_path / "in", tmp_path / "out", *options, "--max-bad", 3)
    told = "".join(capsys.readouterr())
    assert "2 images without a label, row 1 first: skipped" in told and "3 images skipped" in told
    assert "classes: w 1, x 1" in told
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    null = "its label is null"
    assert skipped == {"row 1": null, "row 3": "no image in this row", "row 4": null}
    assert open_data(tmp_path / "out").labels.tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["webdataset", "img2dataset", "edm"])
def test_files_whose_label_is_null_are_skipped_by_name_with_their_captions(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [1, None, 0, None]
    if kind == "edm":
        images, options = sources.edm_folder(tmp_path / "in", labels), []
        nulls = ["00000/img00000001.png", "00000/img00000003.png"]
    elif kind == "webdataset":
        images, options = sources.webdataset_shards(tmp_path / "in", labels, "json"), []
        nulls = ["00001/000001.jpg", "00001/000003.jpg"]
    else:
        images = sources.img2dataset_shards(tmp_path / "in", [{"label": label} for label in labels])
        options, nulls = ["--captions", "auto"], ["00000/000000001.jpg", "00001/000010001.jpg"]
    refusal = rf"2 images without a label, {nulls[0]} first; --max-bad allows 1, --unlabelled takes"
    with pytest.raises(UserError, match=refusal):
        run(images, tmp_path / "out", *PIXELS, *options, "--max-bad", 1)
    assert not (tmp_path / "out").exists()
    run(images, tmp_path / "out", *PIXELS, *options, "--max-bad", 2)
    assert "classes: 0 1, 1 1" in capsys.readouterr().out
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert {name: why for name, why in skipped.items() if "not an image" not in why} == dict.fromkeys(
        nulls, "its label is null"
    )
    assert open_data(tmp_path / "out").labels.tolist() == [1, 0]
    if kind == "img2dataset":
        lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
        assert lines == [["picture 0 of shard 0"], ["picture 0 of shard 1"]]
    run(images, tmp_path / "out", *PIXELS, *options)
    assert "complete already" in capsys.readouterr().out


def stand_in_dataset(folder: Path, rows: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A `save_to_disk` folder of these rows, read by a stand-in of the package."""
    from tests.data.test_hub import Image, Table, Value, opened

    folder.mkdir()
    features = {name: Image() if name == "picture" else Value() for name in rows[0]}
    opened(folder, monkeypatch, Table(rows, **features), label_column="kind")


SMALL = [
    "--model.depth=2", "--model.width=16", "--model.heads=2", "--model.patch=8", "--optim.batch_size=2",
    "--optim.warmup_steps=0", "--optim.micro_batch=0", "--run.device=cpu", "--run.save_every=2", "--sample.every=0",
    "--sample.num=3", "--sample.steps=2", "--stage.align.steps=2", "--stage.align.hidden=8",
]  # fmt: skip
SECOND = [
    f"--stage.transcend.{key}"
    for key in ("steps=2", "stop_step=1", "student_depth=1", "teacher_depth=2", "hidden=8", "cfg_scale=2")
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("labelled", [False, True])
def test_a_ready_recipe_trains_and_its_model_draws_the_classes(
    labelled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sources.class_folders(tmp_path / "in")
    run(images, tmp_path / "data", *PIXELS, *["--unlabelled"] * (not labelled), "--recipe", tmp_path / "own.toml")
    out = tmp_path / "run"
    train_run(load(tmp_path / "own.toml", [*SMALL, *SECOND * labelled, f"--run.out={out}"]))
    drawn = [record for record in tiny.records(out, "sample") if record["stage"] == ("align", "transcend")[labelled]]
    assert drawn[-1].get("classes") == (["cat", "dog", "emu"] if labelled else None)
    capsys.readouterr()
    sample.main([str(out), "--num", "2", "--labels", "emu" if labelled else "0"])
    assert ("row by row: emu" in capsys.readouterr().out) == labelled
    if not labelled:
        with pytest.raises(UserError, match=r"--cfg-scale 2\.0: the model has no null class .*give --cfg-scale 1"):
            sample.main([str(out), "--num", "2", "--cfg-scale", "2"])


def test_a_recipe_for_several_shapes_fits_all_of_them(tmp_path: Path) -> None:
    records = open_data(tiny_shapes.write_data(tmp_path / "data"))
    ready.tell_ready(tmp_path / "data", tmp_path / "own.toml", print)
    recipe = load(tmp_path / "own.toml")
    assert (recipe.model.latent_size, recipe.model.patch) == (12, 1) and recipe.optim.batch_size == 8
    assert ready.bounds_of(records) == ready.Bounds(2, 10) and ready.typical(records).shape == (8, 12, 12)
    assert "# (the largest of 3 shapes: " in (tmp_path / "own.toml").read_text(encoding="utf-8")
    fit_data(recipe, records)
    said: list[str] = []
    ready.tell_ready(tmp_path / "data", None, said.append)
    assert "--optim.batch_size=8" in said[-1] and "--model.latent_size=12" in said[-1]
    assert ready.patch_for(32, 32) == 2 and ready.patch_for(64, 64, 2) == 2 and ready.patch_for(64, 64) == 4
