"""A study runs its list once, whatever happens in between, and says the same from the same seeds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast import kernels
from st_fast.core import checkpoint
from st_fast.core.errors import EXIT_INTERRUPTED, RunFailed, UserError
from st_fast.core.lock import Locked, turn
from st_fast.data.shards import open_data
from st_fast.model import stored
from st_fast.recipe import cost, to_toml
from st_fast.report.collect import read_run
from st_fast.study.__main__ import listing, main
from st_fast.study.carry_out import _take_one, carry_out, random_model, write_random_teacher, write_shuffled
from st_fast.study.page import placed
from st_fast.study.plan import jobs, read_study
from st_fast.study.seeds import done
from tests import pixels, warm
from tests.faults.ranks import wait_for
from tests.tiny import ROOT, records

RUNS = 10
PATIENCE = 600
"""Seconds, for a machine that many share."""


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    return pixels.write_study(folder / "recipes", pixels.write_data(folder / "data"))


def start(study: Path, out: Path, *options: str) -> warm.Process:
    return warm.start("-m", "st_fast.study", study, "--out", out, *options, merged=True)


def finished(out: Path) -> dict[Path, bytes]:
    """The logs of the runs that have ended."""
    logs = {path: path.read_bytes() for path in out.glob("seed*/*/log.jsonl")}
    return {path: log for path, log in logs.items() if b'"kind": "end"' in log}


def seed_file(out: Path, seed: int) -> dict:
    return json.loads((out / f"tiny-seed{seed}.json").read_text())


def timeless(told: dict) -> dict:
    """A seed's file without what differs between two days."""
    for arm in told["arms"]:
        arm.pop("run")
        arm["recipe"]["run"].pop("out"), arm["stage"].pop("teacher", None)
        arm["start"].pop("teacher", None)
        for part in (*arm["evals"], arm["own"], arm["teacher"]):
            part.pop("seconds")
    return told


@pytest.fixture(scope="module")
def killed_and_resumed(study, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("killed") / "out"
    first = start(study, out)
    deadline = time.monotonic() + PATIENCE
    while len(finished(out)) < 3 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    before = finished(out)
    assert 3 <= len(before) < RUNS
    page = out.parent / "docs" / "study.md"
    again = start(study, out, "--write", str(page))
    text, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, text
    assert f"{RUNS} runs, {len(before)} done" in text
    assert {path: path.read_bytes() for path in before} == before, "finished runs are not touched"
    return out


def test_each_seeds_arms_share_one_trained_teacher_whose_cost_counts(killed_and_resumed) -> None:
    names = Counter(path.parent.name for path in killed_and_resumed.glob("seed*/*/log.jsonl"))
    assert names == dict.fromkeys(("teacher-stage1", "teacher-random", "plain", "omega5", "random"), 2)
    for seed in (0, 1):
        arms = {arm["name"]: arm for arm in seed_file(killed_and_resumed, seed)["arms"]}
        teacher_end = records(killed_and_resumed / f"seed{seed}" / "teacher-stage1", "end")[-1]
        assert arms["omega5"]["teacher"]["flops"] == teacher_end["flops"] > 0
        assert arms["omega5"]["evals"][-1]["flops"] == arms["omega5"]["own"]["flops"]
        assert arms["random"]["teacher"]["flops"] == 0, "an untrained teacher is free, and known to be"


def test_the_page_has_table_pictures_and_its_own_place(killed_and_resumed) -> None:
    page = killed_and_resumed.parent / "docs" / "study.md"
    text = page.read_text()
    assert "| ω = 5 |" in text and "## Tiny" in text and "As small as it gets." in text
    last = {
        (name, seed): records(killed_and_resumed / f"seed{seed}" / name, "eval")[-1]["metrics"]["frechet"]
        for name in ("omega5", "random")
        for seed in (0, 1)
    }
    worse = sum(last["random", seed] > last["omega5", seed] for seed in (0, 1))
    found = re.search(r"\| random \| [^|]* \| [^|]* \| [^|]* (higher|lower) [^|]*, (\d) of 2 \|", text)
    assert found is not None and int(found[2]) == (worse if found[1] == "higher" else 2 - worse)
    for link in ("study/tiny-quality.png", "study/tiny-samples.png"):
        assert link in text and (page.parent / link).stat().st_size > 5_000
    for seed in (0, 1):
        assert f"study/tiny-seed{seed}.json" in text
        written = page.parent / "study" / f"tiny-seed{seed}.json"
        assert json.loads(written.read_text()) == seed_file(killed_and_resumed, seed)
    again = placed(placed(text, "other", "## Other\n"), "tiny", "## Tiny again\n")
    assert again.count("<!-- study") == text.count("<!-- study") + 2
    assert "## Other" in again and "| ω = 5 |" not in again


def test_a_seed_that_the_page_has_from_elsewhere_is_not_trained_in_vain(study, killed_and_resumed, tmp_path) -> None:
    page = killed_and_resumed.parent / "docs" / "study.md"
    text = page.read_text()
    with pytest.raises(UserError, match=r"seed 0 is there already, of runs that are not in .*none: without --write"):
        main([str(study), "--out", str(tmp_path / "none"), "--write", str(page)])
    assert page.read_text() == text and not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    process = start(study, out)
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, text
    return out


def test_after_kill_9_a_study_goes_on_and_its_table_is_that_of_one_never_stopped(killed_and_resumed, whole) -> None:
    for seed in (0, 1):
        ours, theirs = (timeless(seed_file(out, seed)) for out in (killed_and_resumed, whole))
        assert ours == theirs
        assert [arm["name"] for arm in ours["arms"]] == ["plain", "omega5", "random"]


def test_the_time_limit_stops_and_says_how_to_go_on(study, tmp_path) -> None:
    process = start(study, tmp_path / "out", "--minutes", "0.0001")
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_INTERRUPTED
    ended = r"0\.0001 minutes are over|SIGTERM: (saved align at step \d+|nothing that was saved is lost)"
    told = rf"st_fast: ({ended}); the same command continues \(0 of {RUNS} runs are done\)"
    assert re.fullmatch(told, text.splitlines()[-1]), text


def test_a_signal_within_a_run_saves_it_and_says_how_to_go_on(study, tmp_path) -> None:
    process = start(study, tmp_path / "out")
    wait_for(lambda: f"run 1 of {RUNS}" in process.text, PATIENCE)  # from here on the study listens to signals
    os.kill(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_INTERRUPTED
    found = (
        "st_fast: SIGTERM: saved align at step ",
        "st_fast: SIGTERM: nothing that was saved is lost",
    )  # before a first step
    assert any(line.startswith(found) and "the same command" in line for line in text.splitlines()), text


def test_several_processes_are_refused(study, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes: a study runs in one"):
        main([str(study)])


def test_a_run_of_another_recipe_in_the_way_is_named_not_taken(study, killed_and_resumed) -> None:
    job = next(j for j in jobs(read_study(study), killed_and_resumed) if j.folder.name == "plain")
    assert done(job)
    kept = job.folder / "recipe.toml"
    text = kept.read_text()
    kept.write_text(text.replace("keep_every = 0", "keep_every = 2").replace("log_every = 4", "log_every = 1"))
    assert kept.read_text() != text and done(job), "what it keeps of itself changes nothing that is compared"
    kept.write_text(text.replace("lr = 0.002", "lr = 0.003"))
    hashes = [hashlib.sha256(one.encode()).hexdigest()[:12] for one in (kept.read_text(), to_toml(job.recipe))]
    with pytest.raises(UserError, match=rf"{hashes[0]}, .* {hashes[1]} \(lr = 0\.003, the study has lr = 0\.002"):
        done(job)
    kept.write_text(text)


def test_shuffled_labels_keep_pixels_and_counts_and_follow_from_the_seed(study, tmp_path) -> None:
    source = Path(study.parent.parent / "data")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_shuffled(source, tmp_path / name, seed)
    true, *shuffled = (open_data(path) for path in (source, *(tmp_path / n for n in "abc")))
    a, b, c = (s.labels for s in shuffled)
    rows = np.arange(len(true))
    assert torch.equal(true.gather(rows)[0], shuffled[0].gather(rows)[0])
    assert np.array_equal(np.bincount(a), np.bincount(true.labels))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert (a == true.labels).mean() < 0.3
    before = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns
    write_shuffled(source, tmp_path / "a", 1)
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == before


def test_a_random_teacher_hears_label_and_time_and_costs_nothing(study, tmp_path) -> None:
    recipe = next(job.recipe for job in jobs(read_study(study), tmp_path) if job.folder.name == "teacher-random")
    write_random_teacher(tmp_path / "run", recipe)
    table = kernels.select({}, torch.device("cpu"))
    root = tmp_path / "run" / "align" / "checkpoints"
    model = stored.load_frozen(root, recipe.model, "ema", table, torch.device("cpu"), torch.float32)
    expected = random_model(recipe.model, recipe.run.seed).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    x, t = torch.zeros(2, 1, 8, 8), torch.tensor([0.5, 0.5])
    conditional, null = model.guided_features(x, t, torch.tensor([1, 2]), 2)
    assert 0.002 < float((conditional - null).norm() / null.norm()) < 0.5
    later, _ = model.guided_features(x, t + 0.4, torch.tensor([1, 2]), 2)
    assert float((conditional - later).norm() / null.norm()) > 0.005
    assert checkpoint.latest(root, print).step == 0
    assert read_run(tmp_path / "run").stages[0].last("flops") == 0


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds = [0, 1]", "seeds = []", "seeds = []"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "each can be used once"),
        ('baseline = "plain"', 'baseline = "plein"', "baseline = 'plein'"),
        ('reference = "omega5"', 'reference = "omega"', "reference = 'omega'"),
        ('teacher = "random"', 'teacher = "randon"', "the study has stage1, random"),
        ("cfg_scale = 5.0", "cfg_scail = 5.0", "arm omega5: stage.*cfg_scail"),
        ('supervision = "none"', 'stage = "plain"', "the base recipe has align, transcend"),
        ('name = "omega5"', 'name = "plain"', "two [[arm]] are called 'plain'"),
        ('title = "ω = 5"', 'title = "plain SiT"', "title = 'plain SiT'; two arms have it"),
        ('name = "omega5"', 'name = "a/b"', "can name a folder"),
        ('title = "Tiny"', 'title = "Ti|ny"', "one line without | is needed"),
        ('title = "Tiny"', 'title = "Ti\\nny"', "one line without | is needed"),
        ('name = "omega5"', 'name = "teacher-stage1"', "called as a teacher's folder is"),
        ('name = "omega5"', 'name = "omega5"\nmodel = 5', "arm 'omega5': model = 5; a table of keys of [model]"),
        ('name = "omega5"', 'name = "omega5"\nmodel = { mlp = "relu2" }', "none beside teacher = "),
        ('name = "omega5"', 'name = "omega5"\nflow = { path = "cosine" }', "flow.path = 'cosine'; teacher = "),
        ('name = "omega5"', 'name = "omega5"\noptim = { lrr = 1 }', "arm omega5: optim.lrr"),
        ("student_steps = 8", "flops = 1e300", "at most 10^12"),
        ("student_steps = 8", f"flops = 1{'0' * 400}", "a number above 0 is needed"),
        ("[common.evaluate]", "[common.stage]\nalign = 5\n[common.evaluate]", "tables named align, transcend"),
        (
            "[common.evaluate]",
            "[common.validate]\nevery = 2\nshare = 0.1\npatience = 1\n[common.evaluate]",
            "validate.patience = 1: every run of a study makes the steps",
        ),
        ("[common.evaluate]", "[common.nosuch]\na = 1\n[common.evaluate]", "tiny.toml, common: nosuch is unknown"),
        ("student_steps = 8", "student_steps = 8.5", "student_steps = 8.5"),
        ("student_steps = 8", "student_steps = 8\nseeds = 1", "tiny.toml:"),
        ('recipe = "base.toml"', 'recipe = "none.toml"', "no such file"),
        ("student_steps = 8", "", "student_steps is missing; a whole number from 1"),
        ('title = "Tiny"', "budget = 3", "unknown key 'budget'"),
        ("student_steps = 8", "student_steps = 8\nflops = 1e9", "flops = 1000000000.0; student_steps follow"),
        ("student_steps = 8", "flops = -1.0", "flops = -1.0; a number above 0"),
        ("student_steps = 8", "flops = nan", "flops = nan"),
        ("student_steps = 8", "flops = true", "flops = True"),
        ("student_steps = 8", "flops = 1e7", "arm plain: flops = 10000000.0; not one step fits"),
        ("student_steps = 8", "flops = 1e9\nhorizons = [2e9]", "horizons = [2000000000.0]"),
        ("student_steps = 8", "student_steps = 8\nhorizons = [1e6]", "horizons = [1000000.0]"),
    ],
)
def test_mistakes_in_a_study_are_told_in_one_line_before_anything_runs(study, tmp_path, old, new, words) -> None:
    (tmp_path / "base.toml").write_text((study.parent / "base.toml").read_text())
    path = tmp_path / "tiny.toml"
    path.write_text(pixels.STUDY.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        read_study(path)
    if ".*" in words:
        assert all(part in str(error.value) for part in words.split(".*")), error.value
    else:
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_with_a_budget_every_arm_takes_as_many_steps_as_its_teacher_leaves(study, tmp_path) -> None:
    (tmp_path / "base.toml").write_text((study.parent / "base.toml").read_text())
    path, flops = tmp_path / "tiny.toml", 1.5e9
    path.write_text(pixels.STUDY.replace("student_steps = 8", f"flops = {flops}"))
    found = list(jobs(read_study(path), tmp_path))
    spent = {job.folder: cost.stage_flops(job.recipe, job.recipe.stages[0], 0, job.steps) for job in found}
    one = {job.folder: cost.stage_flops(job.recipe, job.recipe.stages[0], 0, 1) for job in found}
    steps = set()
    for job in (job for job in found if job.arm is not None):
        teacher = job.arm.teacher
        before = spent[job.folder.with_name(f"teacher-{teacher.name}")] if teacher else 0.0
        assert flops - one[job.folder] < before + spent[job.folder] <= flops
        steps.add(job.steps)
    assert len(steps) == 3, "a teacher costs steps, and so do its forward passes"


def test_an_arm_may_have_a_network_and_a_training_of_its_own(study, tmp_path) -> None:
    (tmp_path / "base.toml").write_text((study.parent / "base.toml").read_text())
    path, own = tmp_path / "tiny.toml", 'model = { mlp = "swiglu", mlp_ratio = 8.0 }\noptim = { lr = 0.5 }'
    text = pixels.STUDY.replace("student_steps = 8", "flops = 1.5e9")
    path.write_text(text.replace('supervision = "none"', f'supervision = "none"\n{own}'))
    changed, usual = (list(jobs(read_study(file), tmp_path)) for file in (path, study))
    plain, others = ([job for job in changed if (job.folder.name == "plain") == wanted] for wanted in (True, False))
    assert {(job.recipe.model.mlp, job.recipe.optim.lr) for job in plain} == {("swiglu", 0.5)}
    kept = usual[0].recipe.optim.lr
    assert {(job.recipe.model.mlp, job.recipe.optim.lr) for job in others} == {("gelu", kept)}
    path.write_text(text)
    (without,) = {job.steps for job in jobs(read_study(path), tmp_path) if job.folder.name == "plain"}
    assert {job.steps for job in plain} < set(range(1, without)), "a larger network makes fewer steps of a budget"


def test_two_processes_share_the_runs_and_both_end_with_all_of_them(study, killed_and_resumed, tmp_path) -> None:
    out = tmp_path / "out"
    both = [start(study, out) for _ in range(2)]
    texts = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    taken = [Counter(re.findall(r"run \d+ of \d+: (\S+)", text)) for text in texts]
    together = taken[0] + taken[1]
    assert len(together) == RUNS and set(together.values()) == {1}, texts
    assert all(len(one) >= 1 for one in taken), texts
    for seed in (0, 1):
        assert timeless(seed_file(out, seed)) == timeless(seed_file(killed_and_resumed, seed))
    assert not list(out.rglob("*.taken")), "nothing is left of what said who runs what"


def test_the_first_run_that_nobody_has_is_taken_and_where_all_are_taken_their_holder_is_named(
    study, tmp_path, monkeypatch
) -> None:
    whole = read_study(study)
    todo, began = list(jobs(whole, tmp_path)), []
    monkeypatch.setattr("st_fast.study.carry_out._run", lambda _, job: began.append(job))
    monkeypatch.setattr("st_fast.study.carry_out.done", lambda job: job in began)
    with turn(tmp_path / "seed0" / "teacher-stage1", print):
        _take_one(whole, tmp_path, todo, "1 of 10")
        assert [job.folder.name for job in began] == ["teacher-random"]
        left = [job for job in todo if job.seed == 0 and job not in began]
        _take_one(whole, tmp_path, left, "2 of 10")
        assert [job.folder.name for job in began[1:]] == ["plain"], "omega5 waits for its teacher"
        _take_one(whole, tmp_path, [job for job in left if job not in began], "3 of 10")
        assert [job.folder.name for job in began[2:]] == ["random"]
        with pytest.raises(Locked, match=rf"seed0/teacher-stage1: another run is writing here \(process {os.getpid()}"):
            _take_one(whole, tmp_path, [job for job in left if job not in began], "4 of 10")


def test_a_run_that_ends_without_saying_so_is_not_made_again_for_ever(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("st_fast.study.carry_out._run", lambda *_: None)
    with pytest.raises(RunFailed, match=r"teacher-stage1: its log doesn't say that it ended; remove the folder"):
        carry_out(read_study(study), tmp_path, math.inf)
    assert not list(tmp_path.rglob("*.taken"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "study").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_studies_hold_what_was_promised_at_about_equal_cost(path: Path) -> None:
    study = read_study(path)
    todo = [job for job in jobs(study, Path("out")) if job.seed == study.seeds[0]]
    taught = [job.recipe.stages[0].method for job in todo if job.arm is not None and job.arm.teacher is not None]
    if study.name == "digits_frontier":
        methods = {job.recipe.stages[0].method.implementation for job in todo if job.arm is not None}
        assert len(methods) >= 10 and len(study.seeds) == 3
        assert len(study.horizons) == 2 and study.horizons[1] == 4 * study.horizons[0]
    elif study.name == "digits_modern":
        own = [vars(job.recipe.model) | {f"optim.{k}": v for k, v in vars(job.recipe.optim).items()} for job in todo]
        changes = [{key for key in now if now[key] != before[key]} for before, now in pairwise(own[:7])]
        assert len(study.seeds) == 3 and [len(keys) for keys in changes] == [1] * 6, "one change a step"
        assert {key.split("_")[0] for key in own[7] if own[7][key] != own[6][key]} == {"optim.name", "optim.muon"}
    elif study.horizons:
        assert len({teacher.stage["steps"] for teacher in study.teachers}) >= 3 <= len(study.horizons)
        assert len({m.cfg_scale for m in taught}) == 1
    else:
        assert {m.cfg_scale for m in taught} >= {5.0, 30.0}
        kinds = {(teacher.trained, teacher.labels) for teacher in study.teachers}
        assert {(True, "true"), (False, "true")} <= kinds
    spent = {job.folder.name: cost.stage_flops(job.recipe, job.recipe.stages[0], 0, job.steps) for job in todo}
    for arm in (job.arm for job in todo if job.arm is not None):
        teacher = spent[f"teacher-{arm.teacher.name}"] * arm.teacher.trained if arm.teacher is not None else 0.0
        total = spent[arm.name] + teacher
        assert arm.teacher is None or 0.7 < total / spent[study.baseline] < 1.5
        assert study.name != "digits_frontier" or 0.99 * study.horizons[-1] < total <= study.horizons[-1], arm.name
        assert study.name != "digits_modern" or 0.99 < total / spent[study.baseline] <= 1.001, arm.name
    assert f"{len(todo) * len(study.seeds)} runs" in listing(study, Path("out"))


def test_the_digits_study_varies_mask_loss_and_teacher() -> None:
    study = read_study(ROOT / "recipes" / "study" / "digits.toml")
    todo = [job for job in jobs(study, Path("out")) if job.seed == study.seeds[0]]
    taught = [job.recipe.stages[0].method for job in todo if job.arm is not None and job.arm.teacher is not None]
    assert {m.mask for m in taught} == {"sample", "sample_mean", "released"}
    assert {m.loss for m in taught} == {"mse", "cosine", "normalized_mse"}
    assert {m.teacher_weights for m in taught} == {"raw", "ema"}
    steps = {job.folder.name: job.recipe.stages[0].steps for job in todo}
    assert steps["plain"] == steps["stage1"] == steps["teacher-stage1"] + steps["omega5"]
