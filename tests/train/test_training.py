"""The loop: it learns, resumes bit-exactly wherever it was stopped, and refuses what would spoil a run."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from st_fast.core import checkpoint
from st_fast.core.checkpoint.store import candidates
from st_fast.core.errors import Interrupted, RunFailed, UserError
from st_fast.core.lock import run_lock
from st_fast.core.ranks import Heartbeat
from st_fast.core.signals import StopRequest
from st_fast.recipe import load
from st_fast.train import run as runs
from st_fast.train import trainer
from st_fast.train.run import run
from tests import tiny

STAGES = ("align", "transcend")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "latents")


def final_states(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of both stages' newest checkpoints."""
    found = {name: checkpoint.latest(out / name / "checkpoints", print) for name in STAGES}
    return {f"{s}/{g}/{k}": t for s, c in found.items() for g, ts in c.groups.items() for k, t in ts.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    return tiny.run_whole(tmp_path_factory.mktemp("whole"), data)


def stop_at(monkeypatch, step: int) -> None:
    """A signal arrives during the `step`-th step that this process makes, whichever stage that falls in."""
    count, call = {"steps": 0}, trainer.Step.__call__

    def stepping(self, *arguments):
        count["steps"] += 1
        if count["steps"] == step:
            STOP.name = "SIGTERM"
        return call(self, *arguments)

    monkeypatch.setattr(trainer.Step, "__call__", stepping)


STOP = StopRequest()


@pytest.fixture
def signals(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("st_fast.train.run.stop_on_signals", lambda: nullcontext(STOP))
    STOP.name = None
    yield
    STOP.name = None


def test_interrupting_and_resuming_at_every_step_of_both_stages_is_bit_exact(
    data, uninterrupted, tmp_path, monkeypatch, signals
):
    recipe = load(tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out"))
    stops = 0
    with monkeypatch.context() as patch:
        stop_at(patch, 1)  # every process stops at its first step: 20 interruptions, also at both stages' ends
        while True:
            try:
                run(recipe)
                break
            except Interrupted:
                stops += 1
                STOP.name = None
                stop_at(patch, 1)
    assert stops == 20
    assert same(final_states(tmp_path / "out"), final_states(uninterrupted))


@pytest.mark.parametrize("step", [3, 7, 10, 14])
def test_one_interruption_and_one_resume_is_bit_exact(step, data, uninterrupted, tmp_path, monkeypatch, signals):
    recipe = load(tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out"))
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted, match="the same command continues"):
            run(recipe)
    STOP.name = None
    run(recipe)
    assert same(final_states(tmp_path / "out"), final_states(uninterrupted))
    assert [r["step"] for r in tiny.records(tmp_path / "out", "end")] == [10, 10]


def test_losses_fall_and_both_stages_are_supervised(uninterrupted):
    for name in STAGES:
        losses = [r for r in tiny.records(uninterrupted, "train") if r["stage"] == name]
        assert len(losses) == 10
        assert losses[-1]["denoise"] < losses[0]["denoise"]
        assert any(r["aux"] > 0 for r in losses)
        assert losses[-1]["flops"] > losses[0]["flops"] > 0


def test_a_finished_run_does_nothing_when_started_again(data, uninterrupted):
    before = final_states(uninterrupted)
    lines = (uninterrupted / "log.jsonl").read_text().count('"kind": "train"')
    run(load(uninterrupted / "recipe.toml"))
    assert same(final_states(uninterrupted), before)
    assert (uninterrupted / "log.jsonl").read_text().count('"kind": "train"') == lines


def test_accumulating_gradients_gives_the_large_batchs_losses(data, uninterrupted, tmp_path):
    run(load(tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out"), ["--optim.accumulation=4"]))
    for ours, theirs in zip(tiny.records(tmp_path / "out", "train"), tiny.records(uninterrupted, "train"), strict=True):
        # Adam turns rounding of the smallest gradients into whole steps, so the weights agree less than the losses.
        for key in ("denoise", "aux", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3)


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_the_run_stops_after_the_allowed_number(
    data, tmp_path, monkeypatch
):
    recipe = load(tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out"), ["--run.max_bad_steps=3"])
    states: list[dict[str, torch.Tensor]] = []
    call = trainer.Step.__call__

    def poisoned(self, step, batches):
        if step >= 2:
            states.append({k: t.clone() for ts in self.optimizer.state().values() for k, t in ts.items()})
            batches[0].x_t.fill_(float("nan"))
        return call(self, step, batches)

    monkeypatch.setattr(trainer.Step, "__call__", poisoned)
    with pytest.raises(RunFailed, match="3 steps up to 5 were not finite"):
        run(recipe)
    assert len(states) == 3 and all(same(state, states[0]) for state in states)


@pytest.mark.parametrize("every", [1, 3])
def test_the_log_has_the_rate_of_the_last_update_and_skipped_steps_are_none(every, data, tmp_path, monkeypatch):
    applied: list[float] = []
    call = trainer.Step.__call__

    def stepping(self, step, batches):
        if step in (1, 5):
            batches[0].x_t.fill_(float("nan"))
        results = call(self, step, batches)
        if step not in (1, 5):
            applied.append(float(self.optimizer._lr))
        return results

    monkeypatch.setattr(trainer.Step, "__call__", stepping)
    options = ["--optim.lr=3e-3", "--optim.warmup_steps=5", f"--run.log_every={every}"]
    run(load(tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out"), options))
    records = tiny.records(tmp_path / "out", "train")
    made = [1, 1, 2, 3, 4, 4, 5, 6, 7, 8]  # updates of a stage by each of its steps
    expected = [3e-3 * min(made[record["step"] - 1] / 5, 1.0) for record in records]
    assert [record["lr"] for record in records] == expected and len(expected) == (20 if every == 1 else 8)
    stages = [applied[:8], applied[8:]]
    seen = [stages[STAGES.index(record["stage"])][made[record["step"] - 1] - 1] for record in records]
    assert seen == pytest.approx(expected, rel=1e-6)


def test_resuming_with_changed_mathematics_is_refused_with_the_difference(data, uninterrupted, tmp_path):
    done = tiny.train(uninterrupted / "recipe.toml", "--optim.lr=0.5")
    assert done.returncode == 2
    assert "optim.lr" in done.stderr and "0.01" in done.stderr and "0.5" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_editing_a_shard_between_runs_is_refused(tmp_path, monkeypatch, signals):
    folder = tiny.write_data(tmp_path / "latents")
    recipe = load(tiny.write_recipe(tmp_path / "t.toml", folder, tmp_path / "out"))
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Interrupted):
            run(recipe)
    STOP.name = None
    for file in folder.iterdir():
        file.unlink()
    tiny.write_data(folder, count=31)
    with pytest.raises(UserError, match="digest"):
        run(recipe)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.latent_size=8", ("latent_size = 8", "(4, 4, 4)", "(4, 8, 8)", "patch")),
        ("--model.num_classes=3", ("num_classes = 3", "5 classes")),
        ("--optim.batch_size=64", ("30", "64")),
    ],
)
def test_data_that_does_not_fit_the_recipe_is_refused_with_both_sides(option, words, data, tmp_path):
    recipe = load(tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out"), [option])
    with pytest.raises(UserError) as refusal:
        run(recipe)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_two_writers_never_share_a_run_folder(data, tmp_path):
    recipe = load(tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out"))
    with run_lock(tmp_path / "out", print), pytest.raises(UserError, match=str(os.getpid())):
        run(recipe)


def test_a_run_whose_lock_was_removed_and_taken_saves_nothing_more(data, tmp_path, monkeypatch):
    out, second, save = tmp_path / "out", ExitStack(), trainer.StageTrainer.save

    def disturbed(self, step, clock) -> None:
        if step == 8:
            self.saver.wait()  # what was begun under the lock is whole
            (out / "run.lock").unlink()
            second.enter_context(run_lock(out, print))
        save(self, step, clock)

    monkeypatch.setattr(trainer.StageTrainer, "save", disturbed)
    with second, pytest.raises(RunFailed, match="another run is writing here now"):
        run(load(tiny.write_recipe(tmp_path / "t.toml", data, out)))
    saved = [record["step"] for record in tiny.records(out, "save")]
    assert saved == [4] == [one.step for one in candidates(out / STAGES[0] / "checkpoints")]


def test_a_hang_while_the_report_is_made_counts_from_its_beginning(data, tmp_path, monkeypatch):
    phases, beat = [], Heartbeat.beat
    monkeypatch.setattr(Heartbeat, "beat", lambda self, phase: phases.append(phase) or beat(self, phase))
    run(
        load(
            tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out"),
            ["--stage.align.steps=1", "--stage.transcend.steps=1"],
        )
    )
    assert phases[-1] == "report"


@pytest.mark.parametrize(
    "options", [("--model.num_classes=3",), ("--optim.batch_size=64", '--run.trackers=["tensorboard"]')]
)
def test_a_refused_run_leaves_nothing_behind(options, data, tmp_path, monkeypatch):
    recipe = load(tiny.write_recipe(tmp_path / "t.toml", data, out := tmp_path / "runs" / "out"), options)
    check = runs.check_fits

    def imported(*given):  # as by diffusers: PyTorch makes the folder in which it may compile
        (out / "compiled" / "triton").mkdir(parents=True)
        check(*given)

    monkeypatch.setattr(runs, "check_fits", imported)
    with pytest.raises(UserError):
        run(recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["t.toml"]


def test_what_saves_cost_is_logged_with_its_share_of_the_training(uninterrupted):
    saves, ends = tiny.records(uninterrupted, "save"), tiny.records(uninterrupted, "end")
    assert [(record["stage"], record["step"]) for record in saves] == [(s, n) for s in STAGES for n in (4, 8, 10)]
    for end in ends:
        stalls = [record["stall"] for record in saves if record["stage"] == end["stage"]]
        assert min(stalls) > 0 and end["save_stall"] == pytest.approx(sum(stalls), abs=1e-5)
        assert end["save_stall_share"] == pytest.approx(end["save_stall"] / end["seconds"], rel=0.02)


def test_a_run_killed_between_a_stage_s_last_checkpoint_and_its_end_says_the_end_when_it_goes_on(tmp_path):
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out")
    run(load(recipe))
    log = tmp_path / "out" / "log.jsonl"
    lines = log.read_text().splitlines()
    (lost,) = [line for line in lines if (r := json.loads(line))["kind"] == "end" and r["stage"] == "align"]
    log.write_text("".join(f"{line}\n" for line in lines if line != lost))
    run(load(recipe))
    ends = tiny.records(tmp_path / "out", "end")
    assert sorted(end["stage"] for end in ends) == ["align", "transcend"]
    (found,) = [end for end in ends if end["stage"] == "align"]
    assert found["flops"] == json.loads(lost)["flops"] and found["step"] == 10
    assert found["seconds"] == pytest.approx(json.loads(lost)["seconds"], abs=0.01)


def test_a_run_whose_folder_was_deleted_meanwhile_ends_with_one_that_commands_take(tmp_path, monkeypatch):
    import importlib

    from st_fast.recipe import load_run

    run_module = importlib.import_module("st_fast.train.run")

    real = run_module.run_stage

    def deleted_first(context, stage):
        if stage.name == "transcend":
            (tmp_path / "out" / "recipe.toml").unlink()
        return real(context, stage)

    monkeypatch.setattr(run_module, "run_stage", deleted_first)
    out = tiny.run_whole(tmp_path, tiny.write_data(tmp_path / "data"))
    assert load_run(out).run.seed == 3 and (out / "report.html").exists()
