"""The FLOPs of a whole training step by formula, against torch.utils.flop_counter watching that step.

Attention runs as two matrix products each way (`attention = "math"`): a flash backward computes the scores once more,
which counters charge and the method as defined does not. What else differs is stated below, to the last FLOP.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import workload
from bench.workload import STAGES, Setup, ours
from st_fast.recipe import Recipe, architecture, cost, load
from st_fast.recipe.schema import Model
from st_fast.train import memory
from st_fast.train.__main__ import main, summary
from st_fast.train.run import run
from tests import tiny

BATCH = 10


def no_input_gradient(model: Model) -> int:
    """FLOPs an image of three times a forward that are never run: the gradients of latents, times and text states."""
    text = model.text_length * model.text_width
    return 2 * (model.tokens * model.patch**2 * model.channels + architecture.TIME_FREQUENCIES + text) * model.width


def shared_embedding(model: Model) -> int:
    """FLOPs a supervised image: both branches of the teacher share one patch embedding; defined are two."""
    return 2 * model.tokens * model.patch**2 * model.channels * model.width


def next_modulation(model: Model) -> int:
    """FLOPs a supervised image: each branch of the teacher also projects the modulation of the block after its last.

    Of a text's stream, which ends in that block with two vectors, it projects all six.
    """
    return 2 * 2 * (6 if model.network == "sit" else 6 + 4) * model.width**2


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by matrix products, and a teacher that stops before its last block."""
    shipped = workload.make_recipe

    def make(setup: Setup, folder: Path) -> Recipe:
        recipe = shipped(setup, folder)
        align, transcend = recipe.stages
        transcend = replace(transcend, method=replace(transcend.method, student_depth=1, teacher_depth=2))
        return replace(recipe, model=replace(recipe.model, attention="math"), stages=(align, transcend))

    monkeypatch.setattr(workload, "make_recipe", make)


@pytest.mark.parametrize(("size", "in_range"), [("S/2", 0.3), ("MMDiT-6/2", 1.0)])
@pytest.mark.parametrize("stage", STAGES)
def test_the_formula_is_what_torchs_counter_sees_of_a_step_but_for_what_is_stated(stage, size, in_range, small):
    setup = Setup(size, stage, BATCH, torch.device("cpu"), tokens=16, depth=3, compile="off")
    with ours(setup) as loop:
        loop()
        before = loop.supervised
        with FlopCounterMode(display=False) as counter:
            loop()
        supervised, model = loop.supervised - before, loop.recipe.model
        each = cost.stage_cost(loop.recipe, loop.stage)
        assert (supervised > 0) == (stage != "plain")
        share = supervised / BATCH / in_range  # of the supervised samples that the formula expects
        formula = BATCH * (each.student + (each.heads + each.teacher) * share)
        stated = -BATCH * no_input_gradient(model)
        if stage == "stage 2":
            stated += supervised * (next_modulation(model) - shared_embedding(model))
        assert counter.get_total_flops() == pytest.approx(formula + stated, abs=1)
        assert abs(stated) < 0.04 * formula, "small even at this size"


@pytest.mark.parametrize(("name", "most"), [("sit_xl", 2e-3), ("mmdit_coco", 1e-3)])
def test_at_the_published_sizes_what_is_stated_is_below_a_fifth_of_a_per_cent_and_of_text_a_tenth(name, most):
    recipe = load(workload.ROOT / "recipes" / f"{name}.toml", ["--data.path=x"])
    stage, model = recipe.stage("transcend"), recipe.model
    rows = cost.supervised_share(recipe, stage.method)
    off = no_input_gradient(model) + rows * max(next_modulation(model), shared_embedding(model))
    assert 0 < off / cost.stage_cost(recipe, stage).total < most


def test_a_runs_mfu_is_its_flops_over_time_and_measured_rate_and_its_peak_memory_is_the_processs(tmp_path):
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out")
    run(load(recipe, ["--run.log_every=5"]))
    starts = {record["stage"]: record for record in tiny.records(tmp_path / "out", "start")}
    found = tiny.records(tmp_path / "out", "train")
    for record in found:
        start = starts[record["stage"]]
        expected = record["images_per_s"] * start["flops_per_image"] / start["matmul_flops_per_s"]
        assert record["mfu"] == pytest.approx(expected, rel=1e-6)
        assert 0 < record["peak_gib"] <= memory.peak_bytes(torch.device("cpu")) / 2**30 + 1e-3
    assert [r["stage"] for r in found] == ["align", "align", "transcend", "transcend"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own account of it is needed")
def test_peak_memory_of_the_host_is_what_the_kernel_says():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert memory.peak_bytes(torch.device("cpu")) == pytest.approx(int(lines["VmHWM"].split()[0]) * 1024, rel=0.01)


def test_an_average_that_is_still_its_first_weights_is_told_with_a_decay_that_suits(tmp_path):
    path = tiny.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path / "out")
    assert cost.untrained_averages(load(path)) == []
    short = load(path, ["--optim.ema_decay=0.9999", "--stage.align.steps=200", "--stage.transcend.steps=7000"])
    (line,) = cost.untrained_averages(short)  # 0.9999^7000 is 0.497
    assert line.startswith("align: after 200 steps the average of optim.ema_decay = 0.9999 is still 98 % of its first")
    assert pytest.approx(0.01, rel=0.02) == 0.9772**200 and "; 0.9772 would leave 1 %" in line
    assert f"# {line}" in summary(short, 1)
    assert cost.untrained_averages(load(path, ["--optim.ema_warmup=true", "--stage.align.steps=1"])) == []
    started = load(path, ["--optim.ema_decay=0.9999", "--stage.transcend.init=align"])
    assert [line.split(":")[0] for line in cost.untrained_averages(started)] == ["align"]


def test_each_further_average_takes_four_bytes_a_parameter_on_the_device_and_in_a_checkpoint(tmp_path):
    path = tiny.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path / "out")
    one, three = load(path), load(path, ["--optim.ema_decays=[0.5, 0.999]"])
    assert cost.memory_bytes(three, 1, True)[0] - cost.memory_bytes(one, 1, True)[0] == 8 * one.model.parameters
    assert cost.saved_bytes(three, 1) - cost.saved_bytes(one, 1) == 8 * one.model.parameters
    sharded = [replace(recipe, run=replace(recipe.run, sharding="fsdp2")) for recipe in (one, three)]
    assert cost.saved_bytes(sharded[1], 2) - cost.saved_bytes(sharded[0], 2) == 4 * one.model.parameters


def test_a_stage_that_ends_within_the_warm_up_is_told(tmp_path):
    path = tiny.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path / "out")
    assert cost.unfinished_warmups(load(path, ["--optim.warmup_steps=7", "--stage.align.steps=7"])) == []
    options = ["--optim.warmup_steps=8", "--stage.align.steps=7", "--stage.transcend.steps=8"]
    short = load(path, options)
    (line,) = cost.unfinished_warmups(short)
    assert line == "align: the stage's 7 steps end within the warm-up of 8 steps (optim.warmup_steps)"
    assert f"# {line}" in summary(short, 1)
    going_on = ["--stage.align.init=./x", "--stage.align.init_weights=state"]
    assert cost.unfinished_warmups(load(path, [*options, *going_on])) == []


def test_a_dry_run_tells_of_a_start_that_is_missing(tmp_path):
    path = tiny.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path / "out")
    here, own = tmp_path / "repa", ["--stage.transcend.init=align"]
    line = f"# align: starts from {here} (ema), which is missing"
    assert line in summary(load(path, [f"--stage.align.init={here}", *own]), 1).splitlines()
    here.mkdir()
    told = summary(load(path, [f"--stage.align.init={here}", *own]), 1).splitlines()
    assert line.removesuffix(", which is missing") in told and "# transcend: starts from align (ema)" in told


def test_a_dry_run_tells_of_missing_data_and_teachers_and_of_the_ranks_it_is_for(tmp_path):
    path = tiny.write_recipe(tmp_path / "t.toml", tmp_path / "data", tmp_path / "out")
    teacher = f"# transcend: its teacher is {tmp_path / 't'} (raw)"
    told = summary(load(path, [f"--stage.transcend.teacher={tmp_path / 't'}"]), 1).splitlines()
    assert f"# data: {tmp_path / 'data'}, which is missing" in told and f"{teacher}, which is missing" in told
    assert any(line.startswith("# memory of one rank (under torchrun:") for line in told)
    (tmp_path / "data").mkdir()
    (tmp_path / "t").mkdir()
    told = summary(load(path, [f"--stage.transcend.teacher={tmp_path / 't'}"]), 2).splitlines()
    assert teacher in told and not any("missing" in line for line in told)
    assert any(line.startswith("# memory of each of 2 ranks, estimated") for line in told)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dry_run_of_several_ranks_is_printed_once(rank, tmp_path, monkeypatch, capsys):
    path = tiny.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path / "out")
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    main([str(path), "--dry-run"])
    assert ("# memory of each of 2 ranks" in capsys.readouterr().out) == (rank == 0)


def test_a_dry_runs_cost_of_a_step_times_its_steps_is_its_total(tmp_path):
    path = tiny.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path / "out")
    recipe = load(path, ["--stage.transcend.stop_step=3", "--stage.transcend.steps=10", "--optim.batch_size=65536"])
    line = next(line for line in summary(recipe, 1).splitlines() if line.startswith("# transcend: "))
    supervised, after, whole = map(float, re.findall(r"([\d.]+)(?: TFLOP a step| after step 3| PFLOP)", line))
    assert supervised > after
    assert 3 * supervised + 7 * after == pytest.approx(1e3 * whole, abs=10 * 5e-4)  # printed with three digits


def test_a_dry_run_tells_when_a_route_ends_and_what_a_stage_adds_to_the_network(tmp_path):
    path = tiny.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path / "out")
    given = [f"--stage.align.{key}" for key in ("route=sprint", "route_first=1", "route_last=2", "dense_after=3")]
    recipe = load(path, [*given, "--stage.align.depth=1", "--stage.align.steps=10", "--optim.batch_size=65536"])
    line = next(line for line in summary(recipe, 1).splitlines() if line.startswith("# align: "))
    more, routed, dense, whole = map(
        float, re.findall(r"([\d.]+)(?: M parameters| TFLOP a step| after step 3| PFLOP)", line)
    )
    assert more == pytest.approx(recipe.for_stage(recipe.stages[0]).model.parameters / 1e6, abs=0.05)
    assert dense > routed
    assert 3 * routed + 7 * dense == pytest.approx(1e3 * whole, abs=10 * 5e-4)


def test_a_teacher_costs_its_own_network_whatever_its_student_adds():
    """A student with a fusion and a teacher without one, and the other way round, each beside students of its kind."""
    sprint = "--stage.transcend.route=sprint", "--stage.transcend.route_first=1", "--stage.transcend.route_last=5"
    taught = [f"--stage.align.{one.removeprefix('--stage.transcend.')}" for one in sprint]
    path = Path(__file__).parents[2] / "recipes" / "digits.toml"

    def teacher(*options: str) -> float:
        recipe = load(path, options)
        return cost.stage_cost(recipe, recipe.stage("transcend")).teacher

    assert teacher(*sprint) == teacher()
    fused = load(path, [*taught, "--stage.transcend.teacher_depth=6"])
    whole, plain = (cost.trunk_macs(model, 6) for model in (fused.for_stage(fused.stage("align")).model, fused.model))
    assert whole > plain
    share = teacher(*taught, "--stage.transcend.teacher_depth=6") / teacher("--stage.transcend.teacher_depth=6")
    assert share == pytest.approx(whole / plain)
