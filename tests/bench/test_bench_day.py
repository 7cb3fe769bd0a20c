"""A GPU day's parts: switches that exist, refusals told, and a study that goes on until it is done."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench import choices, day_works, gpu_day, tables, workload
from bench.day import Day
from bench.results import ROOT, Store
from bench.workload import Setup
from st_fast.errors import EXIT_INTERRUPTED
from st_fast.recipe import to_toml
from st_fast.study.plan import jobs, read_study
from tests.bench.test_bench_report import MACHINE

CPU = torch.device("cpu")


def small(folder: Path) -> Day:
    return Day(CPU, True, Store(folder, MACHINE), runs=folder / "runs")


@pytest.mark.parametrize("name", choices.CHOICES)
def test_every_choice_is_one_that_a_recipe_has(name, tmp_path):
    setup = Setup("XL/2", "plain", 256, torch.device("cuda"), options=choices.CHOICES[name])
    recipe = workload.make_recipe(setup, tmp_path)
    for option in choices.CHOICES[name]:
        key, _, value = option.removeprefix("--").partition("=")
        section, key = key.split(".")
        assert getattr(getattr(recipe, section), key) == value


def test_choices_and_schedules_are_told_with_what_could_not_be_had():
    done = {"ok": True, "ms": {"default": 20.0, "b": 10.0}, "speedup": 2.0, "noise": 0.01}
    rows = {
        "a": done | {"peak_gib": {"default": 8.0, "b": 4.0}},
        "c": done,
        "d": {"ok": True, "left_out": "needs CUDA"},
    }
    lines = tables.choices(rows).splitlines()
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


def test_a_row_that_is_unfinished_is_asked_for_again_until_it_is_done(tmp_path, monkeypatch, capsys):
    left = [2, 1, 0]

    def tasks(day):
        yield "study", lambda: {"ok": True, "unfinished": left.pop(0) > 0, "done": 3 - len(left), "runs": 3}

    monkeypatch.setitem(gpu_day.PARTS, "fake", (tasks, "fake"))
    day = dataclasses.replace(small(tmp_path), small=False)
    assert [gpu_day.run(day, ["fake"], budget=60.0, again=False) for _ in range(4)] == [3, 3, 0, 0]
    assert "2 of 3 runs are done; run the same command again" in capsys.readouterr().out and not left


def test_the_studys_runs_are_told_one_by_one_as_far_as_they_are(tmp_path, monkeypatch):
    study = ROOT / "recipes" / "study" / "digits.toml"
    asked: list[tuple[str, ...]] = []

    def command(module: str, *arguments: str, allowed: tuple[int, ...] = (0,)) -> int:
        asked.append((module, *arguments))
        job = next(iter(jobs(read_study(study), tmp_path / "runs" / "digits")))
        job.folder.mkdir(parents=True)
        (job.folder / "recipe.toml").write_text(to_toml(job.recipe))
        stage = job.recipe.stages[0].name
        records = [
            {"kind": "start", "stage": stage, "step": 0, "time": 0.0, "trunk_params": 1, "flops_per_image": 1.0,
             "teacher_flops_per_image": 0.0, "steps": 9, "batch_size": 8, "ranks": 1, "device": "cpu"},
            {"kind": "train", "stage": stage, "step": 50, "time": 1.0, "loss": 2.5, "denoise": 2.0, "aux": 0.5,
             "grad_norm": 1.0, "images_per_s": 30.0, "mfu": 0.4, "data_wait": 0.0, "seconds": 9.0, "flops": 1e9},
        ]  # fmt: skip
        (job.folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return EXIT_INTERRUPTED

    monkeypatch.setattr(day_works, "_command", command)
    day = small(tmp_path)
    assert gpu_day.run(day, ["convergence"], budget=60.0, again=False) == 0
    ((module, file, *rest),) = asked
    assert module == "st_fast.study" and file == str(study)
    assert rest[:2] == ["--out", str(tmp_path / "runs" / "digits")] and 0 < float(rest[3]) <= 0.34
    rows = day.store.rows("convergence")
    assert rows["digits"]["unfinished"] and rows["digits"]["done"] == 0 and rows["digits"]["runs"] > 1
    (run,) = [row for row in rows.values() if "stage" in row]
    assert run["step"] == 50 and run["loss"] == 2.5
    assert "| 2.5 " in tables.convergence(rows) or " 2.5 |" in tables.convergence(rows)


def test_without_the_data_the_row_names_the_file_that_is_missing(tmp_path):
    day = dataclasses.replace(small(tmp_path), small=False, cifar=tmp_path / "nowhere.zip")
    (name, prepare), *_ = day_works.convergence(day)
    row = gpu_day.attempt(prepare, 30.0)
    assert name == "data" and f"{tmp_path / 'nowhere.zip'}: CIFAR-10 as a zip, by --cifar" in row["error"]


def test_the_gpus_study_is_a_study():
    assert len(list(jobs(read_study(ROOT / "recipes" / "study" / "cifar10_gpu.toml"), Path("out")))) > 3
