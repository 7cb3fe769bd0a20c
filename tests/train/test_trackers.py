"""Trackers get what log.jsonl gets, at its steps, and nothing that they do reaches the run."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError, how_to_install
from st_fast.core.ranks import Ranks
from st_fast.recipe import Recipe, load
from st_fast.recipe.error import RecipeError
from st_fast.train import trackers
from st_fast.train.log import Log
from st_fast.train.run import run
from tests import tiny

QUICK = ("--stage.align.steps=4", "--stage.transcend.steps=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny.write_data(tmp_path_factory.mktemp("data") / "latents")


def recipe_with(data: Path, folder: Path, *names: str, options: tuple[str, ...] = QUICK) -> Recipe:
    folder.mkdir(exist_ok=True)
    path = tiny.write_recipe(folder / "tiny.toml", data, folder / "out")
    return load(path, [*options, f"--run.trackers={json.dumps(names)}"])


def event_scalars(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """tag → (step, value, time), by TensorBoard's own reader."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reading.EventAccumulator(str(folder), size_guidance={reading.SCALARS: 0})
    found.Reload()
    return {
        tag: [(event.step, event.value, event.wall_time) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_shows_the_logs_numbers_at_the_logs_steps(data: Path, tmp_path: Path) -> None:
    run(recipe_with(data, tmp_path, "tensorboard"))
    for stage in ("align", "transcend"):
        logged = [r for r in tiny.records(tmp_path / "out", "train") if r["stage"] == stage]
        shown = event_scalars(tmp_path / "out" / "tensorboard" / stage)
        assert set(shown) == set(logged[0]) - {"kind", "stage", "step", "time"} >= {"loss", "lr", "grad_norm", "mfu"}
        for tag, events in shown.items():
            assert events == [(r["step"], float(np.float32(r[tag])), r["time"]) for r in logged]


def test_a_resumed_run_goes_on_where_its_checkpoint_stood(data: Path, tmp_path: Path) -> None:
    """What a killed process wrote beyond its last checkpoint is shown once, as the resumed one wrote it."""
    recipe = recipe_with(data, tmp_path, "tensorboard")
    (tmp_path / "out").mkdir()
    for first, last, offset in ((0, 7, 0.0), (4, 9, 0.5)):
        with trackers.tracking(recipe, tmp_path / "out", print) as track:
            track({"kind": "start", "stage": "align", "step": first, "time": time.time()})
            for step in range(first + 1, last + 1):
                track({"kind": "train", "stage": "align", "step": step, "time": 1.0, "loss": step + offset})
    shown = event_scalars(tmp_path / "out" / "tensorboard" / "align")["loss"]
    assert [event[:2] for event in shown] == [(s, s + 0.0) for s in range(1, 5)] + [(s, s + 0.5) for s in range(5, 10)]


class Service:
    """A stand-in for wandb and trackio: keeps what it is told."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.axes: list[tuple[str, str | None]] = []
        self.threads: set[int] = set()
        self.finished = 0

    def init(self, **options: Any) -> Service:
        self.runs.append(options)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.threads.add(threading.get_ident())
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> dict[str, Service]:
    found = {}
    for name in ("wandb", "trackio"):
        service, module = Service(), types.ModuleType(name)
        module.init = service.init  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        found[name] = service
    return found


def test_wandb_and_trackio_get_one_run_with_the_logs_numbers(
    data: Path, tmp_path: Path, services: dict[str, Service]
) -> None:
    run(recipe_with(data, tmp_path, "wandb", "trackio"))
    records = tiny.records(tmp_path / "out", "train")
    wandb, trackio = services["wandb"], services["trackio"]
    assert [values["align/step"] for values, _ in wandb.logged[:4]] == [1, 2, 3, 4]
    assert [values["transcend/step"] for values, _ in wandb.logged[4:]] == [1, 2, 3]
    assert [step for _, step in trackio.logged] == [1, 2, 3, 4, 5, 6, 7]
    assert all(step is None for _, step in wandb.logged)
    assert ("align/*", "align/step") in wandb.axes and ("transcend/*", "transcend/step") in wandb.axes
    for service in (wandb, trackio):
        for record, (values, _) in zip(records, service.logged, strict=True):
            for key in ("loss", "aux", "grad_norm", "images_per_s", "flops"):
                assert values[f"{record['stage']}/{key}"] == record[key]
        assert len(service.runs) == service.finished == 1
        assert service.runs[0]["config"]["optim"]["batch_size"] == 8
        assert threading.get_ident() not in service.threads


def test_a_continued_run_is_the_same_run_to_a_service_and_another_one_is_not(
    data: Path, tmp_path: Path, services: dict[str, Service]
) -> None:
    run(recipe_with(data, tmp_path / "a", "wandb", options=("--stage.align.steps=2", "--stage.transcend.steps=1")))
    run(recipe_with(data, tmp_path / "a", "wandb", options=("--stage.align.steps=2", "--stage.transcend.steps=2")))
    run(recipe_with(data, tmp_path / "b", "wandb", options=("--stage.align.steps=1", "--stage.transcend.steps=1")))
    first, again, other = services["wandb"].runs
    assert first["id"] == again["id"] != other["id"] and first["resume"] == again["resume"] == "allow"
    logged = [values for values, _ in services["wandb"].logged]
    assert [values["transcend/step"] for values in logged if "transcend/step" in values] == [1, 2, 1]


def test_evaluations_are_curves_too() -> None:
    record = {"kind": "eval", "stage": "a", "step": 3, "time": 1.0, "metrics": {"frechet": 0.5, "sampler": "sde"}}
    assert trackers.numbers(record) == {"eval/frechet": 0.5}
    assert trackers.numbers({"kind": "save", "stage": "a", "step": 3, "time": 1.0, "seconds": 2.0}) == {}


@pytest.mark.parametrize("trouble", ["init", "log", "finish", "exit"])
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    trouble: str, data: Path, tmp_path: Path, services: dict[str, Service], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("SOME_TOKEN", "short")

    def fail(*arguments: object, **options: object) -> None:
        if trouble == "exit":
            sys.exit(3)
        raise ConnectionError(f"401 for https://x/?key={key}&t=short&other=hf_{'q' * 34}\nand a second line")

    if trouble == "init":
        monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    else:
        monkeypatch.setattr(services["wandb"], "log" if trouble == "exit" else trouble, fail)
    run(recipe_with(data, tmp_path, "wandb", "trackio"))
    assert [r["step"] for r in tiny.records(tmp_path / "out", "end")] == [4, 3]
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("tracker ")]
    assert len(lines) == 1 and lines[0].startswith("tracker wandb is off, the run goes on: ")
    assert ("SystemExit" if trouble == "exit" else "ConnectionError: 401 for https://x/?key=***&t=***") in lines[0]
    assert key not in said and "short" not in lines[0] and "qqqq" not in said
    assert len(services["trackio"].logged) == 7  # the other one is not touched by it
    assert key not in (tmp_path / "out" / "log.jsonl").read_text() + (tmp_path / "out" / "tracker.json").read_text()


def test_a_tracker_that_hangs_holds_nobody_up(
    data: Path, tmp_path: Path, services: dict[str, Service], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    release = threading.Event()
    monkeypatch.setattr(services["wandb"], "log", lambda *arguments, **options: release.wait(60))
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT", 0.2)
    monkeypatch.setattr(trackers, "QUEUE_ROOM", 3)
    start = time.monotonic()
    run(recipe_with(data, tmp_path, "wandb"))
    assert time.monotonic() - start < 30
    release.set()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tracker ")]
    assert lines == ["tracker wandb is off, the run goes on: 3 records behind"]
    assert [r["step"] for r in tiny.records(tmp_path / "out", "end")] == [4, 3]


def test_one_that_never_finishes_is_left_behind(
    tmp_path: Path, data: Path, services: dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    release, said = threading.Event(), list[str]()
    monkeypatch.setattr(services["wandb"], "finish", lambda: release.wait(60))
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT", 0.2)
    with trackers.tracking(recipe_with(data, tmp_path, "wandb"), tmp_path, said.append) as track:
        track({"kind": "start", "stage": "vae", "step": 0, "time": 0.0})
    release.set()
    assert said == ["tracker wandb is off, the run goes on: not finished within 0.2 s"]


@pytest.mark.parametrize("missing", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_not_there_is_told_before_training(
    missing: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib, "import_module", _raiser(ModuleNotFoundError("no", name=missing)))
    with pytest.raises(
        UserError, match=f'"{missing}".*is not installed; {re.escape(how_to_install("track"))}'
    ) as caught:
        run(recipe_with(data, tmp_path, missing))
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "log.jsonl").exists()


def _raiser(error: Exception) -> Any:
    def fail(name: str) -> None:
        raise error

    return fail


def test_a_package_that_breaks_on_import_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib, "import_module", _raiser(TypeError("protobuf is too new")))
    with pytest.raises(UserError, match=r"can't be used .TypeError: protobuf is too new.; pip install"):
        trackers.check_installed(["wandb"])


def test_no_tracker_is_started_unless_asked_for(data: Path, tmp_path: Path, services: dict[str, Service]) -> None:
    before = set(threading.enumerate())  # some of earlier tests may be ending
    with trackers.tracking(recipe_with(data, tmp_path), tmp_path / "out", print):
        assert not set(threading.enumerate()) - before
    assert not (tmp_path / "out").exists() and not services["wandb"].runs


@pytest.mark.parametrize("value", ['"wandb"', '["wandbb"]', "[1]"])
def test_unknown_trackers_are_refused_with_the_known_ones(value: str, data: Path, tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    with pytest.raises(RecipeError, match='allowed: a list, each one of "tensorboard", "wandb", "trackio"'):
        load(path, [f"--run.trackers={value}"])


@pytest.mark.parametrize(("rank", "heard"), [(0, 1), (1, 0)])
def test_only_the_first_rank_is_heard(rank: int, heard: int, tmp_path: Path) -> None:
    records: list[object] = []
    log = Log(tmp_path / "log.jsonl", Ranks(rank, 2, torch.device("cpu")), records.append)
    log.write("train", "align", 1, loss=0.5)
    assert len(records) == heard
