"""A GPU day's parts: switches that exist, refusals told, and a study that goes on until it is done."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import ablations, checks, suite, tables, workload
from bench.machine import ROOT, Store, Suite
from bench.measure import Effort
from bench.workload import Setup
from st_fast.core.errors import EXIT_INTERRUPTED, UserError
from st_fast.recipe import to_toml
from st_fast.study.plan import Job, jobs, read_study
from tests.bench.test_bench_report import MACHINE

CPU = torch.device("cpu")


def small(folder: Path) -> Suite:
    return Suite(CPU, Store(folder, MACHINE), True, until=time.monotonic() + 300, runs=folder / "runs")


@pytest.mark.parametrize("name", ablations.CHOICES)
def test_every_choice_is_one_that_a_recipe_has(name, tmp_path):
    setup = Setup("XL/2", "plain", 256, torch.device("cuda"), options=ablations.CHOICES[name])
    recipe = workload.make_recipe(setup, tmp_path)
    for option in ablations.CHOICES[name]:
        key, _, value = option.removeprefix("--").partition("=")
        section, key = key.split(".")
        assert str(getattr(getattr(recipe, section), key)).lower() == value


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_only_choices_that_are_not_the_default_are_measured_beside_it(kind):
    found = ablations.others(torch.device(kind))
    assert "attention math" in found and "checkpointing block" in found
    assert ("compile off" in found, "compile on" in found) == (kind == "cuda", kind == "cpu")
    assert ("attention cudnn" in found, "attention csrc" in found) == (kind == "cpu", kind == "cuda")
    assert "qk_norm reference" in found and "qk_norm fused" not in found
    assert "gelu_tanh reference" in found and "gelu_tanh fused" not in found
    assert ("CUDA graphs" in found, "gelu_mlp fused" in found, "gelu_mlp reference" in found) == (
        kind == "cuda",
        True,
        False,
    )
    assert ("noisy_latents fused" in found, "noisy_latents reference" in found) == (False, True)
    assert ("bias_gradients fused" in found, "bias_gradients reference" in found) == (kind == "cpu", kind == "cuda")


def test_choices_and_schedules_are_told_with_what_could_not_be_had():
    done = {"ok": True, "ms": {"default": 20.0, "b": 10.0}, "speedup": 2.0, "noise": 0.01}
    rows = {
        "a": done | {"peak_gib": {"default": 8.0, "b": 4.0}},
        "c": done,
        "d": {"ok": True, "left_out": "needs CUDA"},
    }
    lines = tables.choices([{"key": key, **row} for key, row in rows.items()], True).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "a",
        "2.00×",
        "20",
        "10",
        "8.0",
        "4.0",
        "± 1 %",
    ]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")][4:6] == ["–", "–"]
    assert lines[-1] == "- d: needs CUDA"


def test_a_choice_that_can_not_be_had_is_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(ablations, "ours", lambda setup: pytest.fail("built"))

    def missing(recipe, device):
        if recipe.run.fp8 != "off":
            raise UserError("run.fp8: torchao is not installed")

    monkeypatch.setattr(ablations, "check_fp8", missing)
    setup = Setup("XL/2", "plain", 64, torch.device("cuda", 0))
    row = ablations.measure_choice(setup, "fp8 tensorwise", Effort(), block=1)
    assert row == {"ok": True, "left_out": "run.fp8: torchao is not installed"}


def test_a_row_that_is_unfinished_is_asked_for_again_until_it_is_done(tmp_path, monkeypatch, capsys):
    left, after = [2, 1, 0], []

    def tasks(day):
        yield "study", lambda: {"ok": True, "unfinished": left.pop(0) > 0, "done": 3 - len(left), "runs": 3}
        yield "samples", lambda: after.append(1) or {"ok": True}

    monkeypatch.setattr(suite.Part, "tasks", lambda part, suite: tasks(suite))
    monkeypatch.setitem(suite.PARTS, "fake", suite.Part("fake", "", "", "of this test"))
    day = dataclasses.replace(small(tmp_path), small=False)
    assert [suite.run(day, "fake") for _ in range(4)] == [3, 3, 0, 0]
    said = capsys.readouterr().out
    assert "2 of 3 runs are done" in said and "fake is not finished; run the same command again" in said
    assert not left and after == [1]  # in the time that is left, in the first call


def test_the_studys_runs_are_told_one_by_one_and_brought_home_with_samples_but_without_weights(tmp_path, monkeypatch):
    study = checks.REHEARSAL
    out, asked = tmp_path / "rows" / "runs" / study.stem, list[tuple[str, ...]]()

    def command(module: str, *arguments: str, allowed: tuple[int, ...] = (0,), most: float | None = None) -> int:
        asked.append((module, *arguments))
        if module == "st_fast.sample":
            drawn = Path(arguments[0]) / "omega5" / "samples" / "100-heun"
            drawn.mkdir(parents=True)
            (drawn / "samples.npz").write_bytes(b"drawn")
            return 0
        for job in jobs(read_study(study), out):
            if job.folder.name != "plain":
                a_run(job)
        return EXIT_INTERRUPTED

    monkeypatch.setattr(checks, "_command", command)
    day = small(tmp_path / "rows")
    assert suite.run(day, "convergence") == 0
    trained, *drawn = asked
    assert trained[:4] == ("st_fast.study", str(study), "--out", str(out)) and 0 < float(trained[5]) <= 4.0
    assert drawn == [("st_fast.sample", str(out / "seed0" / "omega5"), "-n", str(checks.FEW), "--npz")]
    rows = day.store.rows("convergence")
    assert rows[study.stem] | {"done": 2, "runs": 3, "unfinished": True} == rows[study.stem]
    assert rows["seed0/omega5"]["loss"] == 2.5 and "seed0/plain" not in rows
    assert rows["samples of plain"]["left_out"] == "its run is not done"
    assert " 2.5 |" in tables.PARTS["convergence"].shown([{"key": key, **row} for key, row in rows.items()], True)
    with tarfile.open(tmp_path / "rows" / "runs.tar.gz") as tar:
        names = tar.getnames()
    assert f"{study.stem}/seed0/omega5/log.jsonl" in names and not any("checkpoints" in name for name in names)
    assert (tmp_path / "rows" / "samples-omega5.npz").read_bytes() == b"drawn"


def test_a_study_that_does_not_end_in_its_time_is_killed_and_asked_for_again(tmp_path, monkeypatch):
    real = checks._command
    forever = "timeit", "-n", "1", "-r", "1", "import time; time.sleep(600)"
    monkeypatch.setattr(checks, "_command", lambda *_, **how: real(*forever, **how))
    monkeypatch.setattr(checks, "READING", 299.0)
    (_, study), *_ = checks.convergence(small(tmp_path))
    started = time.monotonic()
    row = suite.attempt(study, 60.0)
    assert row == {"ok": True, "done": 0, "runs": 3, "unfinished": True} and time.monotonic() - started < 30


def a_run(job: Job) -> None:
    """A finished run's folder, with weights that are not to be brought home."""
    (job.folder / "checkpoints" / "10").mkdir(parents=True)
    (job.folder / "recipe.toml").write_text(to_toml(job.recipe))
    stage = job.recipe.stages[0]
    records = [
        {"kind": "start", "stage": stage.name, "step": 0, "time": 0.0, "trunk_params": 1, "flops_per_image": 1.0,
         "teacher_flops_per_image": 0.0, "steps": 9, "batch_size": 8, "ranks": 1, "device": "cpu"},
        {"kind": "train", "stage": stage.name, "step": 5, "time": 1.0, "loss": 2.5, "denoise": 2.0, "aux": 0.5,
         "grad_norm": 1.0, "images_per_s": 30.0, "mfu": 0.4, "data_wait": 0.0, "seconds": 9.0, "flops": 1e9},
        {"kind": "end", "stage": stage.name, "step": stage.steps, "time": 2.0, "seconds": 9.0, "flops": 1e9},
    ]  # fmt: skip
    (job.folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_without_the_latents_the_row_names_the_folder_and_what_makes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "DATA", tmp_path / "nowhere")
    day = dataclasses.replace(small(tmp_path), small=False)
    (_, study), *_ = checks.convergence(day)
    row = suite.attempt(study, 30.0)
    assert f"{tmp_path / 'nowhere'}: no latents; bench/pack.sh makes them" in row["error"]


STUDY = read_study(checks.STUDY)


def test_the_days_study_has_plain_training_both_stages_and_a_control_and_draws_no_scores():
    assert [arm.name for arm in STUDY.arms] == ["plain", "omega5", "stage1", "omega30", "random_teacher"]
    for job in jobs(STUDY, Path("runs")):
        assert job.recipe.run.cuda_graphs is True and job.recipe.data.loader == "resident"
        assert ROOT / job.recipe.data.path == checks.DATA
        assert not job.recipe.evaluate.classifier and not job.recipe.evaluate.inception and not job.recipe.sample.every


def test_the_page_scores_the_samples_of_every_arm_of_the_days_study():
    page = (ROOT / "bench" / "GPU-DAY.md").read_text()
    scored = re.search(r"for arm in (.*); do\n  python -m st_fast.evaluate runs/cifar10_gpu/seed0/\$arm ", page)
    assert scored and checks.STUDY.stem == "cifar10_gpu" and STUDY.seeds == (0,)
    assert sorted(scored[1].split()) == sorted(arm.name for arm in STUDY.arms)


def test_what_the_third_call_brings_home_is_as_large_as_the_page_says():
    rows_runs_and_lock, image = 3, 32 * 32 * 3
    assert len(STUDY.arms) + rows_runs_and_lock <= 8 and checks.SAMPLES * image < 16 * 2**20


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench" / name), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        ([], {}, "usage: bench/pack.sh CIFAR10.zip"),
        ([""], {}, "usage: bench/pack.sh CIFAR10.zip"),
        (["a.zip", "b.zip"], {}, "usage: bench/pack.sh CIFAR10.zip"),
        (["nowhere.zip"], {"PYTHON": sys.executable}, "nowhere.zip: no such file; a zip with train/ and test/"),
        (["nowhere.zip"], {"CUDA_PYTHON": "nowhere/python"}, "CUDA_PYTHON=nowhere/python: no such program"),
        ([__file__], {"PYTHON": "nowhere/python"}, "nowhere/python: no such program: make install, or name"),
    ],
)
def test_pack_sh_tells_a_mistake_in_one_line(arguments, environment, line):
    done = script("pack.sh", *arguments, **environment)
    assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout


def test_a_second_call_of_day_sh_is_refused_while_the_first_lives(tmp_path):
    with (tmp_path / "day.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = script("day.sh", "1", OUT=str(tmp_path), PYTHON="false")
    assert done.returncode == 2 and "another bench/day.sh is measuring here" in done.stderr
    assert "another" not in script("day.sh", "1", OUT=str(tmp_path), PYTHON="false").stderr


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv on this machine")
def test_what_day_sh_has_started_ends_with_it_also_after_kill_9(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\ncase "$*" in *"-m bench "*) echo $$ >{tmp_path}/pid; exec sleep 600 ;; esac\n')
    stub.chmod(0o755)
    command = ["bash", str(ROOT / "bench" / "day.sh"), "2"]
    call = subprocess.Popen(command, env=os.environ | {"OUT": str(tmp_path), "PYTHON": str(stub)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    call.kill()
    call.wait()
    with (tmp_path / "day.lock").open("w") as lock:  # free once the last who held it has ended
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)
    pytest.fail("what day.sh has started lives on")
