"""The paper estimate: its sums by hand, and what must hold of any such estimate."""

from __future__ import annotations

import json

import pytest

from st_fast.core.errors import UserError
from st_fast.recipe import load, to_toml
from st_fast.train import plan
from tests import tiny

MACHINE = plan.Machine(per_node=8, within=400e9, between=25e9, memory=4e12)
WORK = plan.Work(compute=0.4, images=256, parameters=500_000_000, weight_bytes=2)


def test_ddp_by_hand():
    update = 500e6 * 42 / 4e12
    assert plan.ddp(WORK, MACHINE, 1).step == pytest.approx(0.4 + update)
    eight = plan.ddp(WORK, MACHINE, 8)  # 1 GB over 400 GB/s hides in the backward but for the last 32 MiB bucket
    assert eight.exposed == pytest.approx(32 * 2**20 * 2 * 7 / 8 / 400e9)
    assert eight.step == pytest.approx(0.05 + eight.exposed + update)
    many = plan.ddp(WORK, MACHINE, 64)  # 8 cards of 25 GB/s: 200 GB/s; 9.8 ms of traffic, 4.2 ms of backward
    assert many.exposed == pytest.approx(1e9 * 2 * 63 / 64 / 200e9 - 0.4 / 64 * 2 / 3)


def test_fsdp_by_hand():
    eight = plan.fsdp(WORK, MACHINE, 8)
    assert eight.exposed == 0 and eight.step == pytest.approx(0.05 + 500e6 * 42 / 4e12 / 8)
    assert eight.memory_gib == pytest.approx(500e6 * 20 / 8 / 2**30)
    many = plan.fsdp(WORK, MACHINE, 64)
    one_pass = 1e9 * 63 / 64 / 200e9
    assert many.exposed == pytest.approx((one_pass - 0.4 / 64 / 3) + (2 * one_pass - 0.4 / 64 * 2 / 3))


@pytest.mark.parametrize("estimate", [plan.ddp, plan.fsdp])
def test_more_gpus_are_never_slower_within_a_node_nor_better_than_perfect(estimate):
    steps = [estimate(WORK, MACHINE, count).step for count in (1, 2, 4, 8)]
    assert steps == sorted(steps, reverse=True)
    assert all(steps[0] / step <= count * (1 + 1e-9) for step, count in zip(steps, (1, 2, 4, 8), strict=True))


def test_a_recipe_for_several_ranks_is_planned_as_it_is(tmp_path, capsys):
    graphs = ["--optim.micro_batch=32", "--run.cuda_graphs=true", "--run.supervised_rows=padded"]
    recipe = load(tiny.ROOT / "recipes" / "sit_xl.toml", [*graphs, f"--run.out={tmp_path}"], ranks=8)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    plan.main([str(tmp_path / "recipe.toml")])
    assert "transcend" in capsys.readouterr().out


def test_the_command_prints_each_stage_and_says_what_is_assumed(capsys):
    plan.main([str(tiny.ROOT / "recipes" / "sit_xl.toml")])
    text = capsys.readouterr().out
    assert text.count("ASSUMED") == 2 and text.count("| 64 | 4 |") == 2
    plan.main([str(tiny.ROOT / "recipes" / "sit_xl.toml"), "--images-per-s", "512"])
    assert "one GPU 512 images/s (as given)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--network -1"):
        plan.main([str(tiny.ROOT / "recipes" / "sit_xl.toml"), "--network", "-1"])


def test_a_runs_log_gives_the_rate_of_one_gpu(tmp_path):
    lines = [{"kind": "start", "stage": "align", "step": 0, "ranks": 4}]
    lines += [{"kind": "train", "stage": "align", "step": 1, "images_per_s": rate} for rate in (100.0, 400.0, 420.0)]
    (tmp_path / "log.jsonl").write_text("half a line\n" + "\n".join(map(json.dumps, lines)))
    assert plan.measured_rate(tmp_path, "align") == 100.0
    with pytest.raises(UserError, match="no training step of stage other"):
        plan.measured_rate(tmp_path, "other")
