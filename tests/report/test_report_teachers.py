"""Which model taught a stage or was its start, by step and hash; and that another one in its place is noticed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from st_fast.core import checkpoint
from st_fast.core.checkpoint import store
from st_fast.model.vae import tensors_hash
from st_fast.report import teachers
from st_fast.report.arms import Arm, make_arms
from st_fast.report.collect import Taken, read_runs
from st_fast.report.html import render
from tests.report.conftest import Runs

Tensors = dict[str, torch.Tensor]


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Names whose order in a file isn't the alphabet's, shapes of every kind, one larger than a piece."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (3, 5), "a.bias": (7,), "scale": (), "none": (0, 4), "large": (1100, 1000)}
    return {name: (3 * torch.randn(shape, generator=draw)).to(dtype) for name, shape in shapes.items()}


def saved(run: Path, step: int, raw: Tensors, ema: Tensors | None = None) -> Path:
    """A checkpoint of the stage align."""
    return store.save(
        run / "align" / "checkpoints", step, {"model": raw, "ema": ema or tensors(99)}, {"stage": "align"}
    )


def taught(runs: Runs, name: str, **said: Any) -> Path:
    """A finished run of both stages whose second one's start says this of its teacher."""
    run = runs.two_stages(name)
    return runs.change(
        run, lambda r: r | {"teacher": said} if r["kind"] == "start" and r["stage"] == "transcend" else r
    )


def student(runs: Runs, name: str, teacher: Path | str, **said: Any) -> Path:
    """A run of one stage with a teacher from outside."""
    recipe = f'[[stage]]\nname = "s"\nsteps = 9\nteacher = {json.dumps(str(teacher))}\n'
    start = {"kind": "start", "stage": "s", "step": 0} | ({"teacher": said} if said else {})
    return runs.custom(recipe, [start, {"kind": "end", "stage": "s", "step": 9}], name)


def arms(*runs: Path) -> list[Arm]:
    return make_arms(read_runs(runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_hash_of_a_checkpoints_files_is_that_which_training_records_of_its_tensors(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = tensors(dtype=dtype)
    path = saved(tmp_path, 30, weights)
    beats: list[int] = []
    manifest = json.loads((path / "manifest.json").read_text())
    found = teachers.weights_hash(path, manifest, "model", lambda: beats.append(1))
    assert found == tensors_hash(weights) == tensors_hash(checkpoint.load(path).groups["model"])
    assert len(beats) > 1, "a large file is read with signs of life"
    assert teachers.weights_hash(path, manifest, "ema") == tensors_hash(tensors(99)) != found


def test_the_page_names_the_teachers_step_weights_and_hash_and_study_can_ask_for_them(runs) -> None:
    run = taught(runs, "r", path="x", step=600, weights="raw", sha256="3fa9c2d1b04e" + 52 * "0")
    stage = read_runs([run])[0].stages[1]
    assert stage.teacher == Taken("x", 600, "raw", "3fa9c2d1b04e" + 52 * "0")
    assert "align at step 600, raw weights, SHA-256 3fa9c2d1b04e<" in render(read_runs([run]))
    assert read_runs([run])[0].stages[0].teacher is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (None, "align"), ({}, "align"), ("600", "align"), ({"step": "600"}, "align"), ({"step": -1}, "align"),
        ({"step": True}, "align"), ({"step": 600}, "align at step 600"),
        ({"step": 600, "weights": "<b>", "sha256": 7}, "align at step 600, <b>, SHA-256 7"),
    ],
)  # fmt: skip
def test_older_logs_and_strange_ones_say_of_a_teacher_what_they_know(runs, said: object, told: str) -> None:
    run = runs.change(runs.two_stages("r"), lambda r: r | {"teacher": said} if r["kind"] == "start" else r)
    assert teachers.described(arms(run)[1], "teacher") == told
    assert "<b>," not in render(read_runs([run]))


def test_a_teacher_that_is_still_what_it_was_is_no_warning_and_another_one_is(runs) -> None:
    weights = tensors(1)
    run = taught(runs, "r", path="", step=600, weights="raw", sha256=tensors_hash(weights))
    assert teachers.warnings(arms(run)) == [], "its checkpoints were deleted: nobody can tell"
    path = saved(run, 600, weights)
    assert teachers.warnings(arms(run)) == []
    moved = run.rename(run.with_name("moved"))
    assert teachers.warnings(arms(moved)) == [], "a run's own stages are found where it lies now"

    store.shutil.rmtree(moved / "align" / "checkpoints" / path.name)
    changed = {**weights, "scale": weights["scale"] + 1e-6}
    saved(moved, 600, changed)
    (told,) = teachers.warnings(arms(moved))
    assert told == (
        f"“transcend” was taught by align at step 600, raw weights, SHA-256 {tensors_hash(weights)[:12]}; "
        f"its folder now holds {tensors_hash(changed)[:12]} at that step."
    )
    assert told in render(read_runs([moved])).replace("&#39;", "'")
    saved(moved, 800, weights)
    assert teachers.warnings(arms(moved))[0].endswith("; its folder now holds step 800.")


def test_averaged_weights_are_compared_with_the_average(runs) -> None:
    run = taught(runs, "r", path="", step=600, weights="ema", sha256=tensors_hash(tensors(2)))
    saved(run, 600, tensors(1), tensors(2))
    assert teachers.warnings(arms(run)) == []
    said = {"path": "", "step": 600, "weights": "ema", "sha256": tensors_hash(tensors(1))}
    runs.change(run, lambda r: r | {"teacher": said} if r["kind"] == "start" and r["stage"] == "transcend" else r)
    assert "now holds" in teachers.warnings(arms(run))[0]


def test_arms_that_name_one_teacher_but_had_different_ones_are_told(runs, tmp_path: Path) -> None:
    same = {"path": "", "weights": "raw", "sha256": "ab" * 32}
    teacher = tmp_path / "gone" / "align"
    first = student(runs, "a", teacher, step=400, **same)
    assert teachers.warnings(arms(first, student(runs, "b", f"{teacher}/", step=400, **same))) == []
    assert teachers.warnings(arms(first, student(runs, "b", teacher, step=400, **same | {"weights": "ema"}))) == []
    assert teachers.warnings(arms(first, student(runs, "b", teacher))) == [], "an older log doesn't say"
    for other in ({"step": 800, **same}, {"step": 400, **same, "sha256": "cd" * 32}):
        (told,) = teachers.warnings(arms(first, student(runs, "b", teacher, **other)))
        assert told.startswith("These stages name the same teacher, ") and "learnt from different ones" in told
        assert f"“a” at step 400, raw weights, SHA-256 {'ab' * 6}; “b” at step {other['step']}, " in told
    own = [taught(runs, name, step=step, **same) for name, step in (("x", 400), ("y", 800))]
    assert teachers.warnings(arms(*own)) == [], "each run's own stage of that name"


def test_an_outside_teacher_is_looked_for_where_it_was_named_from(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    other = runs.two_stages("other")
    saved(other, 400, tensors(1))
    run = student(runs, "s", "other/align", step=400, weights="raw", sha256="ab" * 32)
    assert "now holds" in teachers.warnings(arms(run))[0], "beside the run"
    monkeypatch.chdir(runs.folder)
    assert "now holds" in teachers.warnings(arms(run))[0], "in the working directory"
    saved(other, 800, tensors(1))
    said = {"step": 400, "weights": "raw", "sha256": tensors_hash(tensors(1))}
    one = student(runs, "one", "other/align/checkpoints/00000400", **said)
    assert teachers.warnings(arms(one)) == [], "a single checkpoint stays what it is"


def test_what_lies_there_may_be_anything(runs, tmp_path: Path) -> None:
    said = {"path": "", "step": 600, "weights": "raw", "sha256": "ab" * 32}
    run = taught(runs, "r", **said)
    folder = run / "align" / "checkpoints" / "00000600"
    folder.mkdir(parents=True)
    unreadable = "its folder can't be read now"
    for text, told in (
        ("no json", unreadable), ("{}", ""), ('{"step": 600, "groups": []}', ""),
        ('{"step": 600, "groups": {"model": {"file": "../../../recipe.toml"}}}', unreadable),
        ('{"step": 600, "groups": {"model": {"file": "manifest.json"}}}', unreadable),
        ('{"step": 600, "groups": {"model": {"tensors": {}, "parts": []}}}', ""),
    ):  # fmt: skip
        (folder / "manifest.json").write_text(text)
        found = teachers.warnings(arms(run))
        assert [told in line for line in found] == [True] * bool(told), text
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert teachers.warnings(arms(run)) == []
    for name in ("x" * 5000, "a\0b", ""):
        teachers.warnings(arms(student(runs, "s", name, **said)))


def test_what_a_fine_tune_began_from_stands_under_the_title(runs) -> None:
    recipe = '[[stage]]\nname = "ft"\nsupervision = "none"\nsteps = 9\ninit = "models/SiT-XL-2-256x256.pt"\n'
    start = {"kind": "start", "stage": "ft", "step": 0}
    init = {"path": "models/SiT-XL-2-256x256.pt", "step": 0, "weights": "ema", "sha256": "3fa9c2d1b04e" + 52 * "0"}
    log = [start | {"init": init}, {"kind": "end", "stage": "ft", "step": 9}]
    page = render(read_runs([runs.custom(recipe, log)]))
    told = "“ft” began from models/SiT-XL-2-256x256.pt, ema weights, SHA-256 3fa9c2d1b04e."
    assert page.index("<h1") < page.index(told) < page.index('class="verdict"')
    log[0]["init"] = init | {"step": 40_000}
    assert "SiT-XL-2-256x256.pt at step 40,000, ema" in render(read_runs([runs.custom(recipe, log)]))
    assert "“ft” began from models/SiT-XL-2-256x256.pt." in render(read_runs([runs.custom(recipe, [start, log[1]])]))
    assert 'class="origin"' not in render(read_runs([runs.plain()]))
