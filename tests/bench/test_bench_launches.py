"""Launches and host time: the committed figures are whole, the table shows them, and a lack of a driver is one line."""

from __future__ import annotations

import json

import torch

from bench import launches
from bench import machine as results
from bench.workload import STAGES
from st_fast.kernels import TABLE
from tests.stand_in import driver

COST = {"launches": 3, "host_us": 41.6, "noise": 0.072, "syncs": 0, "graph_launches": None}
STEP = {
    "launches": 984,
    "host_ms": 29.74,
    "noise": 0.03,
    "syncs": None,
    "graph_launches": 1,
    "passes": 2,
    "peak_gib": 61.2,
    "reserved_gib": 64.0,
}
FOUND = {
    "torch": "2.11.0+cu130", "date": "2026-11-28", "commit": "0123abc", "cpu": "CPU X", "device": "a GPU", "gib": 79.1,
    "attention": "as chosen", "ops_size": "XL/2, batch 256", "ops": {"align": {"forward": COST, "backward": COST}},
    "steps": {"B/2, plain, batch 256": STEP},
}  # fmt: skip


def test_the_table_has_a_line_for_every_pass_of_an_op_and_every_step():
    about, *lines = launches.report(FOUND).splitlines()
    assert "2.11.0+cu130" in about and "0123abc" in about and "XL/2, batch 256" in about
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["align, forward", "3", "41.6", "0.072", "0", "–"] in cells
    assert ["align, backward", "3", "41.6", "0.072", "0", "–"] in cells
    assert cells[-1] == ["B/2, plain, batch 256", "984", "29.74", "0.03", "–", "1", "2", "61.2", "64"]


def test_the_committed_figures_cover_every_op_and_step_and_no_step_waits():
    found = json.loads(launches.FILE.read_text())
    assert {*TABLE, "adamw_ema"} - set(found["ops"]) == {"swiglu"}, "which is younger than the file"
    expected = {name for name, _ in launches.setups(torch.device("cuda", 0))}
    assert set(found["steps"]) == expected
    assert {f"{size}, {stage}, batch 256" for size in ("B/2", "XL/2") for stage in STAGES} <= expected
    for name, step in found["steps"].items():
        assert step["syncs"] == 0 and step["launches"] > 0 and step["host_ms"] > 0, name
        assert step["graph_launches"] == ("graphs" in name) * step["passes"], name


def test_it_is_no_results_file_of_a_device(tmp_path):
    (tmp_path / "launches.json").write_text(json.dumps(FOUND))
    assert results.files(tmp_path) == []


def test_without_a_gpu_and_a_stand_in_one_line_says_why(monkeypatch, capsys):
    def unavailable() -> driver.Installation:
        raise driver.Unavailable("no CUDA build of torch: here")

    monkeypatch.setattr(driver, "installation", unavailable)
    assert launches.main([]) == 2
    assert capsys.readouterr().err == "bench.launches: no GPU, and no stand-in: no CUDA build of torch: here\n"
