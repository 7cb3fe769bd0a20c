"""What is printed and written: figures with their machine, goals with their verdicts, and what was not measured."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import machine as results
from bench import report
from bench.goals import GOALS

MACHINE = results.Machine(
    device="CPU Test, 2 threads", kind="cpu", threads=2, load=0.1, copy_rate=2e10, matmul_rate=1.7e11,
    matmul_dtype="float32", versions={"torch": "2.13.0"}, isa="avx512", commit="abc1234", code="c0de",
    date="2026-01-01",
)  # fmt: skip


def op_row(op: str, eager: float) -> results.Row:
    figures = {
        "ms": {"fused": 1.0, "eager": eager}, "speedup": {"eager": eager}, "gb_per_s": 10.0, "of_copy_rate": 0.5,
        "of_floor": 0.4, "noise": 0.02,
    }  # fmt: skip
    return {"op": op, "size": "S/2, batch 8", "dtype": "float32", "forward": figures, "both": figures}


def test_without_figures_every_goal_is_listed_as_not_measured(tmp_path):
    text = report.all_goals(tmp_path)
    assert text.count("not measured") == len(GOALS)
    assert "No GPU has been measured yet" in text and "No CPU has been measured yet" in text
    assert "reached" not in text and "missed" not in text and "computed without a GPU" not in text


def test_a_goal_is_judged_by_its_worst_row(tmp_path):
    store = results.Store(tmp_path, MACHINE)
    store.put("kernels", "a", op_row("guided_feature_loss", 3.5))
    assert _verdict(report.all_goals(tmp_path), "guided_feature_loss") == ("3.50×", "reached")
    store.put("kernels", "b", op_row("guided_feature_loss", 2.5))
    assert _verdict(report.all_goals(tmp_path), "guided_feature_loss") == ("2.50×", "**missed**")


def loader_row(kind: str, rate: int) -> results.Row:
    figures = {"samples/s": rate, "noise": 0.03, "times per file": rate / 500, "waited": 0.004}
    return {"shape": "8×32×32", "cache": "warm", "loader": kind, **figures}


def test_loaders_stand_in_a_table_of_their_own_and_only_the_offered_ones_are_judged(tmp_path):
    store = results.Store(tmp_path, MACHINE)
    for kind, rate in (("resident", 90_000), ("dali", 40_000), ("per file", 500)):
        store.put("loader", kind, loader_row(kind, rate))
    text = report.all_goals(tmp_path)
    assert _verdict(text, "DALI and resident loader, 8×32×32, cached") == ("40000 samples/s", "reached")
    assert _verdict(text, "DALI and resident loader against the published") == ("80.00×", "reached")
    text = report.all_tables(tmp_path, brief=True)
    (line,) = [line for line in text.splitlines() if "8×32×32, warm" in line and " resident " in line]
    assert [cell.strip() for cell in line.strip("|").split("|")][2:] == ["90,000", "180.0×", "0.4 %", "± 3 %"]


def _verdict(text: str, goal: str) -> tuple[str, str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {goal}") and "≥" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells[2], cells[3]


def test_figures_come_with_device_versions_rates_and_date_and_a_busy_machine_is_named(tmp_path):
    results.Store(tmp_path, MACHINE).put("kernels", "a", op_row("align", 4.0))
    text = report.all_tables(tmp_path, brief=False)
    for fact in ("CPU Test, 2 threads", "torch 2.13.0", "20.0 GB/s", "170 GFLOP/s", "abc1234", "2026-01-01", "4.00×"):
        assert fact in text
    assert "busy" not in text
    busy = dataclasses.replace(MACHINE, load=1.5)
    results.Store(tmp_path, busy).put("kernels", "a", op_row("align", 4.0))
    results.Store(tmp_path, busy).put("demo", "a", {"speedup": {"reference": 1.2}})
    text = report.all_tables(tmp_path, brief=False)
    assert "The machine was busy (load 1.5 a core): not results." in text
    assert _verdict(report.all_goals(tmp_path), "`make demo`, its step") == (
        "1.20×",
        "reached on a busy machine: no result",
    )


def test_rows_are_kept_by_key_and_other_files_in_the_folder_are_left_alone(tmp_path):
    store = results.Store(tmp_path, MACHINE)
    store.put("kernels", "a", {"x": 1})
    store.put("something else", "b", {"y": 2})
    store.put("kernels", "a", {"x": 3})
    assert store.rows("kernels") == {"a": {"x": 3}} and store.rows("something else") == {"b": {"y": 2}}
    (tmp_path / "demo.json").write_text(json.dumps({"stages": [1, 2]}))
    store.put("kernels", "a", op_row("align", 4.0))
    assert "stages" not in report.all_tables(tmp_path, brief=False)


def test_a_failed_row_is_said_and_does_not_hide_the_others(tmp_path):
    store = results.Store(tmp_path, MACHINE)
    store.put("kernels", "a", op_row("align", 4.0))
    store.put("kernels", "bad", {"ok": False, "error": "OutOfMemoryError: tried"})
    text = report.all_tables(tmp_path, brief=False)
    assert "- bad: failed: OutOfMemoryError: tried" in text and "4.00×" in text


def test_both_pages_are_rewritten_between_their_markers_only(tmp_path, monkeypatch, capsys):
    pages = {name: tmp_path / f"{name}.md" for name in ("README", "BENCH_README")}
    for name, page in pages.items():
        page.write_text("above\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbelow\n")
        monkeypatch.setattr(report, name, page)
    results.Store(tmp_path, MACHINE).put("kernels", "a", op_row("align", 4.0))
    assert report.main(["--readme", "--results", str(tmp_path)]) == 0
    readme, bench = (page.read_text() for page in pages.values())
    for text in (readme, bench):
        assert text.startswith("above\n<!-- bench:begin -->\n") and text.endswith("<!-- bench:end -->\nbelow\n")
        assert "old" not in text and "### CPU Test, 2 threads" in text
    assert "No GPU has been measured yet" in readme and "| goal" in readme and "4.00×" not in readme
    assert "**The ops.**" in bench and "| goal" not in bench and "4.00×" in bench
    assert report.main(["--readme", "--results", str(tmp_path)]) == 0
    assert (readme, bench) == tuple(page.read_text() for page in pages.values())

    pages["README"].write_text("no markers\n")
    assert report.main(["--readme", "--results", str(tmp_path)]) == 1
    assert "0 blocks <!-- bench:begin -->" in capsys.readouterr().err
    assert pages["README"].read_text() == "no markers\n"


def test_tables_are_aligned_markdown():
    lines = report.table(["a", "b"], [["x", "10"], ["long", "1"]]).splitlines()
    assert lines == ["| a    |  b |", "| ---- | -: |", "| x    | 10 |", "| long |  1 |"]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.text)
def test_every_goal_can_be_reached_and_missed(goal):
    bound = goal.least if goal.least is not None else goal.most
    better, worse = (bound * 1.01, bound * 0.99) if goal.least is not None else (bound * 0.99, bound * 1.01)
    assert goal.met(better) and not goal.met(worse)


def test_the_demo_as_measured_last_waited_for_data_less_than_a_hundredth_of_its_time():
    stages = json.loads((Path(report.__file__).parent / "results" / "demo.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["align", "transcend"]
    assert all(0 <= stage["waited"] < 0.01 for stage in stages)


def test_a_row_that_was_measured_with_something_given_up_says_so(tmp_path):
    row = op_row("align", 4.0) | {"ok": False, "notices": ["torch.compile of the reference failed: no ptxas"]}
    results.Store(tmp_path, MACHINE).put("kernels", "align | S/2", row)
    text = report.all_tables(tmp_path, brief=True)
    assert "4.00×" in text
    assert "- align | S/2: no result: torch.compile of the reference failed: no ptxas" in text


def test_such_a_row_reaches_no_goal(tmp_path):
    row = op_row("guided_feature_loss", 3.5)
    store = results.Store(tmp_path, MACHINE)
    store.put("kernels", "a", row | {"ok": False, "notices": ["something was given up"]})
    assert _verdict(report.all_goals(tmp_path), "guided_feature_loss") == ("–", "not measured")
    store.put("kernels", "a", row)
    assert _verdict(report.all_goals(tmp_path), "guided_feature_loss") == ("3.50×", "reached")


def test_load_is_what_others_do_now():
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.1)
        load = results.others_load(0.5)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert results.BUSY < load <= 1.0


def test_what_ended_before_is_no_load(monkeypatch):
    times = iter([(9_000, 10_000), (9_003, 10_100)])  # 90 % were in use until now, 3 % are
    monkeypatch.setattr(results, "_processor_time", lambda: next(times))
    assert results.others_load(0.0) == 0.03


@pytest.mark.parametrize("stat", [None, "", "cpu  1 2\n", "cpu  0 0 0 0 0 0 0 0 0 0\n"])
def test_without_proc_last_minutes_average_is_taken(monkeypatch, stat):
    def read(path: Path) -> str:
        if stat is None:
            raise FileNotFoundError
        return stat

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    assert results.others_load(0.0) == 1.5 / os.cpu_count()
