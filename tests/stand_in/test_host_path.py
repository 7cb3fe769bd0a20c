"""The host's part of CUDA training, on a device that does nothing: what is called, how often, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from bench.suite import BROKEN
from tests import tiny
from tests.bench.test_bench_report import MACHINE
from tests.stand_in import driver


@pytest.mark.parametrize("stage", ["plain", "stage 1", "stage 2"])
def test_a_step_waits_for_nothing_and_launches_the_same_each_time(check, stage):
    found = check("steps", stage)
    for name, variant in found.items():
        if name == "stderr":
            continue
        for step in variant["steps"]:
            assert step["syncs"] == step["pageable_copies"] == step["allocations"] == 0, (name, step)
        launches = [step["launches"] for step in variant["steps"]]
        assert len(set(launches)) == 1 and launches[0] > 0, (name, launches)
        assert not [text for text in variant["said"] if "going on without" in text], variant["said"]
    assert found["cuda"]["steps"] == found["cuda:0"]["steps"]  # whichever way the device is named
    eager, compiled, graphs = (found[name]["steps"][-1] for name in ("cuda:0", "compiled", "graphs"))
    assert compiled["launches"] < eager["launches"]
    # The noise is drawn before the graph, which replays the rest of the pass.
    assert graphs["graph_launches"] == 1 and graphs["launches"] < 0.7 * compiled["launches"]
    assert eager["graph_launches"] == compiled["graph_launches"] == 0


@pytest.mark.parametrize(("event_ms", "graphs"), [(0.01, 1), (1e6, 0)])
def test_a_measured_step_makes_the_trials_of_training_and_does_what_they_say(check, event_ms, graphs):
    found = check("tried", event_ms=event_ms)
    kernels, passes = found["decided"]
    assert kernels.startswith("kernels: gelu_mlp ") and passes.startswith("transcend: CUDA graphs ")
    assert (found["graphs"], found["padded"]) == (graphs, graphs == 1) and found["said"] == []


def test_csrc_is_loaded_and_its_optimiser_takes_no_wait(check):
    found = check("csrc")
    assert found["loaded"] == ["cpu", "cuda"], found["stderr"]
    assert found["step"]["launches"] > 0 and found["step"]["syncs"] == found["step"]["pageable_copies"] == 0


def test_rows_leave_no_memory_behind_whether_they_end_or_fail(check):
    found = check("rows")
    assert len(set(found["left"][1:])) == 1 and found["left"][1] < 100e6, found["left"]


@pytest.fixture
def recipe(tmp_path):
    data = tiny.write_data(tmp_path / "data", count=1100)
    return tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")


def test_a_run_trains_and_saves(on_stand_in, recipe):
    done = on_stand_in("st_fast.train", str(recipe), "--run.device=cuda", gates=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert tiny.records(recipe.parent / "out", "train")[-1]["step"] == 10
    assert "is not there" not in done.stderr


def test_out_of_memory_is_one_line(on_stand_in, recipe):
    large = ("--model.mlp_ratio=512", "--optim.batch_size=1024")
    done = on_stand_in("st_fast.train", str(recipe), "--run.device=cuda", *large, gates=True, gib=1.2)
    lines = [line for line in done.stderr.splitlines() if "out of memory" in line]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "out of memory on cuda:0 at align step 1 with 1024 images a pass in 0." in lines[0]


def test_a_part_of_the_day_stops_at_a_broken_device_and_keeps_its_rows(on_stand_in, tmp_path):
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps(asdict(MACHINE)))
    command = ("bench.suite", "truth", "--small", "--results", str(tmp_path), "--seconds", "100")
    command += ("--machine", str(machine))
    done = on_stand_in(*command, gates=True, fail_after=400)
    assert done.returncode == BROKEN, done.stdout + done.stderr[-3000:]
    (file,) = (path for path in tmp_path.glob("*.json") if path != machine)
    rows = json.loads(file.read_text())["correctness"]["rows"]
    *before, last = rows.values()
    assert before and all(row["ok"] for row in before) and "illegal memory access" in last["error"], rows


REHEARSED = """
import subprocess, sys, torch
from bench import measure as gate
device = torch.cuda.get_device_properties(0)
print(device.name, device.total_memory / 2**30, gate.worst_difference([[1.0]], [[2.0]]), flush=True)
if sys.argv[1:] == ["parent"]:
    sys.exit(7 + subprocess.run([sys.executable, "-m", "rehearsed"]).returncode)
"""


def test_a_rehearsal_is_of_all_processes_and_ends_with_the_commands_exit_code(found, tmp_path):
    (tmp_path / "rehearsed.py").write_text(REHEARSED)
    command = [sys.executable, "-m", "tests.stand_in.rehearse", "--gib", "40", "rehearsed", "parent"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=driver.ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines() == ["NVIDIA H100 80GB HBM3 40.0 0.0"] * 2 and done.returncode == 7, done.stderr


def test_a_batchs_noise_is_one_launch_of_one_kernel_whatever_the_seed(check):
    found = check("draws")
    for call in found["ours"]:
        assert call["launches"] == 1 and call["syncs"] == call["pageable_copies"] == 0, found["ours"]
    assert found["forms"] == 1 and found["definition"][0]["launches"] > 200


def test_launches_are_counted(check):
    found = check("launches", "cfg_extrapolate")
    assert found["forward"][:2] == [1, 0] and found["backward"][:2] == [2, 0]
    assert 0 < found["forward"][2] < 10_000


def test_a_kernel_is_launched_by_its_plan_only_where_all_it_was_compiled_for_is_the_same(check):
    found = check("launcher")
    through_triton = "first", "misaligned", "other dtype", "other constant", "other warps"
    through_triton += "with a hook", "with a hook of its own"
    assert {name: found[name] for name in through_triton} == dict.fromkeys(through_triton, "Triton")
    by_plan = "again", "other memory", "misaligned again", "aligned again", "without it"
    assert {name: found[name] for name in by_plan} == dict.fromkeys(by_plan, "plan")
    assert found["launched"] == 1 and found["given"] == [0, 0, 0] and found["captured"] == ["plan", 1]
    assert found["on the CPU"] == found["on the CPU again"] == "ValueError" and found["seen by it"] == 1


def test_a_dispatch_mode_sees_every_op(check):
    assert check("modes")["ops"] == ["st_fast::norm_modulate"] * 2 + ["st_fast::norm_modulate_backward"]


def test_a_capture_that_fails_leaves_training_memory_and_generators_as_they_were(check):
    found = check("capture_fails")
    (said,) = found["said"]
    assert said.startswith("CUDA graphs: a step can't be recorded, going on without: ")
    assert found["own stream"] and len(set(found["used"][-12:])) == 1, found["used"]


def trial(done) -> list[str]:
    """What a run said of graphs."""
    return [line for line in done.stdout.splitlines() if "CUDA graphs" in line]


def test_a_stage_whose_host_is_slow_trains_by_graphs_and_goes_on_so(on_stand_in, recipe):
    command = ("st_fast.train", str(recipe), "--run.device=cuda", "--stage.transcend.steps=6")
    slow = on_stand_in(*command, "--stage.align.steps=6", gates=True, event_ms=0.01)
    assert slow.returncode == 0, slow.stderr[-3000:]
    assert [line.partition(": to queue")[0] for line in trial(slow)] == [
        "align: CUDA graphs taken", "transcend: CUDA graphs taken"
    ]  # fmt: skip
    again = on_stand_in(*command, "--stage.align.steps=8", gates=True, event_ms=1e6)
    assert again.returncode == 0, again.stderr[-3000:]
    assert trial(again)[0] == "align: CUDA graphs taken, as before"


def test_a_stage_whose_host_is_fast_has_none(on_stand_in, recipe):
    command = ("st_fast.train", str(recipe), "--run.device=cuda", "--stage.align.steps=2", "--stage.transcend.steps=2")
    done = on_stand_in(*command, gates=True, event_ms=1e6)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.partition(": to queue")[0] for line in trial(done)] == [
        "align: CUDA graphs left out", "transcend: CUDA graphs left out"
    ]  # fmt: skip
    assert "the device 2000000.0 ms" in trial(done)[0]


def test_qk_norm_is_one_launch_and_its_backward_two(check):
    found = check("launches", "qk_norm")
    assert found["forward"][:2] == [1, 0] and found["backward"][:2] == [2, 0]


def test_a_compiled_attention_copies_nothing_and_the_next_start_has_it_in_the_cache(check, tmp_path):
    first, second = (check("attention", "fused", str(tmp_path)) for _ in range(2))
    attention = "aten._scaled_dot_product_efficient_attention"
    ops = ["st_fast.qk_norm", attention, f"{attention}_backward", "st_fast.qk_norm_backward"]
    assert first["ops"] == second["ops"] == ops
    # No kernel but the sum of proj's bias gradient, which nothing after this layer takes over.
    assert [name for name in first["kernels"] if "sum" not in name] == [], first["kernels"]
    assert first["cache"] == {"miss": 1, "hit": 0, "bypass": 0}
    assert second["cache"] == {"miss": 0, "hit": 1, "bypass": 0}


def test_contiguous_heads_cost_a_copy_of_v_and_of_the_output(check, tmp_path):
    found = check("attention", "heads", str(tmp_path))
    assert [name for name in found["kernels"] if "clone" in name], found["kernels"]


def test_a_full_step_launches_little_and_costs_the_host_little(check):
    found = check("full_step")
    # With torch 2.11: 542 launches (566 without compilation), and 6.4 to 9 units, on a loaded machine too.
    assert found["launches"] <= 560 and found["units"] < 11.5, found


def test_a_learning_rate_that_warms_up_costs_two_launches(check):
    (plain, waits), (warming, warming_waits) = (check("warm_up")[steps] for steps in ("0", "9"))
    assert warming - plain == 2 and waits == warming_waits == 0
