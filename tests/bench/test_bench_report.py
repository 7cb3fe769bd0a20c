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
from bench.goals import GOALS, Goal
from bench.tables import SAMPLER, filled, table
from tests.report.conftest import two_stages

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


def goals_of(folder: Path) -> dict[str, list[str]]:
    """The cells after the goal's text, by that."""
    text = report.all_goals(folder) + report.all_tables(folder, brief=False)
    rows = (cells_of(line) for line in text.splitlines() if line[:1] == "|")
    return {goal: cells for goal, *cells in rows}


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


GUIDED = "guided_feature_loss at S/2, forward + backward, against eager"


def test_a_goal_is_judged_by_its_worst_row(tmp_path):
    store = results.Store(tmp_path, MACHINE)
    store.put("kernels", "a", op_row("guided_feature_loss", 3.5))
    assert goals_of(tmp_path)[GUIDED] == ["≥ 3.00×", "3.50×", "reached"]
    store.put("kernels", "b", op_row("guided_feature_loss", 2.5))
    assert goals_of(tmp_path)[GUIDED] == ["≥ 3.00×", "2.50×", "**missed**"]
    ops = sum(goal.part == "kernels" and goal.kind == "cpu" for goal in GOALS)
    told = f"Of {ops} goals of single ops: 1 **missed**, {ops - 1} not measured ([each](bench/README.md#speed))."
    assert told in report.all_goals(tmp_path) and GUIDED not in report.all_goals(tmp_path)
    store.put("kernels", "b", op_row("guided_feature_loss", 2.5) | {"size": "B/2, batch 8"})
    assert goals_of(tmp_path)[GUIDED][1:] == ["3.50×", "reached"]


LEAST = Goal("cpu", "fast", "a part", {}, ("x",), least=2.0)
MOST = Goal("cpu", "short", "a part", {}, ("x",), most=4.0)


@pytest.mark.parametrize(
    ("goal", "rows", "verdict"),
    [
        (LEAST, [(2.5, 0.24, 0.25)], "reached"),  # a quarter from the goal
        (LEAST, [(2.5, 0.25, 0.25)], "reached"),  # as near as its noise, on a machine that is just quiet
        (LEAST, [(2.5, 0.26, 0.0)], "not judged"),
        (LEAST, [(1.5, 0.26, 0.0)], "not judged"),
        (LEAST, [(1.5, 0.25, 0.0)], "**missed**"),
        (LEAST, [(2.0, 0.0, 0.0)], "reached"),
        (LEAST, [(2.0, 1e-9, 0.0)], "not judged"),
        (LEAST, [(9.0, 0.0, 0.26)], "not judged"),
        (LEAST, [(0.1, 0.0, 0.26)], "not judged"),
        (LEAST, [(2.5, 0.0, 0.0), (2.5, 0.3, 0.0)], "not judged"),
        (LEAST, [(1.0, 0.0, 0.0), (0.5, 0.0, 0.9)], "**missed**"),
        (MOST, [(3.0, 0.25, 0.0)], "reached"),
        (MOST, [(3.0, 0.26, 0.0)], "not judged"),
        (MOST, [(5.0, 0.25, 0.0)], "**missed**"),
        (MOST, [(5.0, 0.26, 0.0)], "not judged"),
        (MOST, [(5.0, None, 0.0)], "**missed**"),
        (MOST, [(3.0, 0.0, 0.9)], "not judged"),
        (MOST, [], "not measured"),
    ],
)
def test_a_busy_machine_or_noise_beyond_the_distance_is_not_judged(goal, rows, verdict):
    """rows: (value, noise, load)."""
    kept = {str(n): {"x": x, "load": load} | ({} if noise is None else {"noise": noise})
            for n, (x, noise, load) in enumerate(rows)}  # fmt: skip
    content = {"a part": {"machine": {"load": 0.0}, "rows": kept}}
    assert goal.verdict(goal.figures(content)) == verdict


def test_an_ops_noise_is_that_of_the_pass_that_the_goal_is_about(tmp_path):
    row = op_row("guided_feature_loss", 2.4)
    results.Store(tmp_path, MACHINE).put("kernels", "a", row | {"both": row["both"] | {"noise": 0.21}})
    assert goals_of(tmp_path)[GUIDED][1:] == ["2.40×", "not judged"]
    results.Store(tmp_path, MACHINE).put("kernels", "a", row | {"forward": row["forward"] | {"noise": 0.21}})
    assert goals_of(tmp_path)[GUIDED][1:] == ["2.40×", "**missed**"]


@pytest.mark.parametrize(("of", "verdict"), [("eager", "not judged"), ("of_floor", "**missed**")])
def test_a_ratios_noise_is_its_own_where_it_was_measured(of, verdict, tmp_path):
    """Not that of the time: a machine that slows both down changes no ratio."""
    row = op_row("guided_feature_loss", 2.4)
    both = row["both"] | {"noise": 0.21, "noise_of": {"eager": 0.02, "of_floor": 0.02} | {of: 0.22}}
    results.Store(tmp_path, MACHINE).put("kernels", "a", row | {"both": both})
    assert goals_of(tmp_path)[GUIDED][1:] == ["2.40×", verdict]


def test_a_row_keeps_its_load_when_its_part_is_measured_on_and_older_rows_have_their_machines(tmp_path):
    busy = results.Store(tmp_path, dataclasses.replace(MACHINE, load=0.9))
    busy.put("demo", "a", {"speedup": {"reference": 1.2}})
    quiet = results.Store(tmp_path, MACHINE)
    quiet.put("demo", "b", {"speedup": {"reference": 1.3}})
    name = '`make demo`, its step, against all ops set to "reference"'
    assert goals_of(tmp_path)[name][1:] == ["1.20×", "not judged"]
    text = report.all_tables(tmp_path, brief=False)
    assert "- a: not judged: other work took 90 % of the machine" in text and "- b:" not in text
    quiet.put("demo", "a", {"speedup": {"reference": 1.2}})
    assert goals_of(tmp_path)[name][1:] == ["1.20×", "reached"]

    content = json.loads(quiet.path.read_text())
    for row in content["demo"]["rows"].values():
        del row["load"]
    content["demo"]["machine"]["load"] = 0.9
    quiet.path.write_text(json.dumps(content))
    assert goals_of(tmp_path)[name][1:] == ["1.20×", "not judged"]
    text = report.all_tables(tmp_path, brief=False)
    assert "- all rows: not judged: other work took 90 % of the machine" in text and "- b:" not in text
    assert "reached" not in report.all_goals(tmp_path) and "missed" not in report.all_goals(tmp_path)


def test_a_step_is_held_to_its_own_floor_and_the_bound_on_the_published_loop_is_told(tmp_path):
    row = {"size": "S/2", "tokens": 256, "batch": 8, "depth": 12, "noise": 0.01, "speedup": {"plain": 1.25},
           "images_per_s": {"ours": 4.0}, "mfu": {"ours": 0.8}, "ms": {"ours": 2000.0}}  # fmt: skip
    floor = {"families": {}, "floor": {"products": 1.4, "attention": 0.2}}
    store = results.Store(tmp_path, MACHINE)
    store.put("step", "a", row | {"stage": "plain", "parts": floor | {"times_the_floor": 1.04}})
    store.put("step", "b", row | {"stage": "stage 2", "parts": floor | {"times_the_floor": 1.2}})
    found = goals_of(tmp_path)
    assert found["SiT-S/2, plain, its time over that of its own floor"] == ["≤ 1.08×", "1.04×", "reached"]
    assert found["SiT-S/2, stage 2, its time over that of its own floor"] == ["≤ 1.08×", "1.20×", "**missed**"]
    assert "S/2, plain: 1.25× of at most 1.30×; S/2, stage 2: 1.25× of at most 1.50×." in report.all_goals(tmp_path)


def loader_row(kind: str, rate: int) -> results.Row:
    figures = {"samples/s": rate, "noise": 0.03, "times per file": rate / 500, "waited": 0.004}
    return {"shape": "8×32×32", "cache": "warm", "loader": kind, **figures}


def test_loaders_stand_in_a_table_of_their_own_and_only_the_offered_ones_are_judged(tmp_path):
    store = results.Store(tmp_path, MACHINE)
    for kind, rate in (("resident", 90_000), ("dali", 40_000), ("per file", 500)):
        store.put("loader", kind, loader_row(kind, rate))
    found = goals_of(tmp_path)
    assert found["DALI and resident loader, 8×32×32, cached"][1:] == ["40000 samples/s", "reached"]
    assert found["DALI and resident loader against the published per-file loader, cached"][1:] == ["80.00×", "reached"]
    text = report.all_tables(tmp_path, brief=True)
    (line,) = [line for line in text.splitlines() if "8×32×32, warm" in line and " resident " in line]
    assert cells_of(line)[2:] == ["90,000", "180.0×", "0.4 %", "± 3 %"]


def test_figures_come_with_device_versions_rates_and_date(tmp_path):
    results.Store(tmp_path, MACHINE).put("kernels", "a", op_row("align", 4.0))
    text = report.all_tables(tmp_path, brief=False)
    for fact in ("CPU Test, 2 threads", "torch 2.13.0", "20.0 GB/s", "170 GFLOP/s", "abc1234", "2026-01-01", "4.00×"):
        assert fact in text
    assert "not judged" not in text
    results.Store(tmp_path, MACHINE).put("kernels", "b", op_row("qk_norm", 3.0) | {"taken": {"commit": "def5678"}})
    text = report.all_tables(tmp_path, brief=False)
    assert "Revision abc1234, def5678, 2026-01-01, rates and date of the last." in text


def test_rows_are_kept_by_key_and_other_files_in_the_folder_are_left_alone(tmp_path):
    store = results.Store(tmp_path, MACHINE)
    store.put("kernels", "a", {"x": 1})
    store.put("something else", "b", {"y": 2})
    store.put("kernels", "a", {"x": 3})
    load = {"load": MACHINE.load}
    assert store.rows("kernels") == {"a": {"x": 3} | load} and store.rows("something else") == {"b": {"y": 2} | load}
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
    assert "**The ops.**" in bench and bench.count("| goal ") == 1 and "4.00×" in bench
    assert report.main(["--readme", "--results", str(tmp_path)]) == 0
    assert (readme, bench) == tuple(page.read_text() for page in pages.values())

    pages["README"].write_text("no markers\n")
    assert report.main(["--readme", "--results", str(tmp_path)]) == 1
    assert "0 blocks <!-- bench:begin -->" in capsys.readouterr().err
    assert pages["README"].read_text() == "no markers\n"


def test_every_cell_of_a_row_without_its_figures_is_a_dash():
    row = {"size": "S/2", "sampler": "heun", "steps": 5, "batch": 2}
    cells = filled(SAMPLER, [row]).splitlines()[-1].split("|")[2:-2]
    assert len(cells) == len(SAMPLER) - 2 and {cell.strip() for cell in cells} == {"–"}


def test_tables_are_aligned_markdown():
    lines = table(["a", "b"], [["x", "10"], ["long", "1"]]).splitlines()
    assert lines == ["| a    |  b |", "| ---- | -: |", "| x    | 10 |", "| long |  1 |"]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.text)
def test_every_goal_can_be_reached_and_missed(goal):
    better, worse = (1.01, 0.99) if goal.least is not None else (0.99, 1.01)
    assert goal.met(goal.bound * better) and not goal.met(goal.bound * worse)


def test_the_demo_as_measured_last_waited_for_data_less_than_a_hundredth_of_its_time():
    stages = json.loads((Path(report.__file__).parent / "results" / "demo.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["align", "transcend"]
    assert all(0 <= stage["waited"] < 0.01 for stage in stages)


def test_a_demos_figures_and_picture_are_those_of_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DOCS", tmp_path)
    run, sheet = two_stages(tmp_path / "run"), "00001000-nearest.png"
    folder = run / "transcend" / "samples"
    (folder / sheet).write_bytes(b"of emoji")
    report.take_demo(run, tmp_path)
    found = json.loads((tmp_path / report.DEMO).read_text())
    assert "of 1000 guided samples (ω = 1.9)" in report.demo_sentence(found) and "TFLOP" in report.demo_table(found)
    assert (tmp_path / "digits.png").read_bytes() == (folder / "00001000.png").read_bytes()
    assert not (tmp_path / report.EMOJI).exists()

    of_emoji = {"held_out": 0.91, "seen": 0.92, "retrieved": 0.93, "real_held_out": 1.0, "num": 400, "cfg_scale": 3.0}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [record | {"metrics": of_emoji} if record["kind"] == "eval" else record for record in log]
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    report.take_demo(run, tmp_path)
    text = report.emoji_table(json.loads((tmp_path / report.EMOJI).read_text()))
    for fact in ("| transcend |", "91.0", "92.0", "93.0", "3.0 minutes", "400 samples (ω = 3)", "reads 100.0 %"):
        assert fact in text, fact
    assert (tmp_path / "emoji.png").read_bytes() == b"of emoji"


def test_a_row_that_was_measured_with_something_given_up_says_so(tmp_path):
    row = op_row("align", 4.0) | {"ok": False, "notices": ["torch.compile of the reference failed: no ptxas"]}
    results.Store(tmp_path, MACHINE).put("kernels", "align | S/2", row)
    text = report.all_tables(tmp_path, brief=True)
    assert "4.00×" in text
    assert "- align | S/2: no result: torch.compile of the reference failed: no ptxas" in text


def test_such_a_row_reaches_no_goal(tmp_path):
    row = op_row("guided_feature_loss", 3.5) | {"ok": False, "notices": ["something was given up"]}
    results.Store(tmp_path, MACHINE).put("kernels", "a", row)
    assert goals_of(tmp_path)[GUIDED][1:] == ["–", "not measured"]


def test_load_is_what_others_do_now():
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.1)
        others_load = results.OthersLoad()
        time.sleep(0.5)
        load = others_load.read()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert results.BUSY < load <= 1.0


@pytest.mark.parametrize("stat", [None, "", "cpu  1 2\n", "cpu  0 0 0 0 0 0 0 0 0 0\n"])
def test_without_proc_last_minutes_average_is_taken(monkeypatch, stat):
    def read(path: Path) -> str:
        if stat is None:
            raise FileNotFoundError
        return stat

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    assert results.OthersLoad().read() == 1.5 / os.cpu_count()


def test_contention_is_judged_by_its_worst_condition_and_by_its_cost_on_a_quiet_machine(tmp_path):
    rates = {"quiet": {"as it comes": 900.0, "st_fast": 891.0}, "1 hog": {"as it comes": 50.0, "st_fast": 480.0},
             "quota 1": {"as it comes": 60.0, "st_fast": 342.0}}  # fmt: skip
    fair = {"quiet": 1.0, "1 hog": 2 / 3, "quota 1": 0.5}
    share = {name: {key: rate / fair[name] / 900 for key, rate in rates[name].items()} for name in ("1 hog", "quota 1")}
    row = {"images_per_s": rates, "fair": fair, "share": share, "quiet": {"as it comes": 1.0, "st_fast": 0.99},
           "noise": 0.004, "skipped": {"quota 1.5": "no cgroup"}}  # fmt: skip
    store = results.Store(tmp_path, MACHINE)
    store.put("contention", "digits", row)
    beside, quiet = (goal for goal in goals_of(tmp_path) if "beside other work" in goal or "quiet machine" in goal)
    assert goals_of(tmp_path)[beside] == ["≥ 70 %", "76 %", "reached"]
    assert goals_of(tmp_path)[quiet] == ["≥ 98 %", "99 %", "reached"]
    store.put("contention", "digits", row | {"noise_of": {"share": 0.2, "quiet": 0.002}})
    assert [goals_of(tmp_path)[goal][-1] for goal in (beside, quiet)] == ["not judged", "reached"]
    text = report.all_tables(tmp_path, brief=True)
    lines = {cells[0]: cells[1:] for line in text.splitlines() if line[:1] == "|" and (cells := cells_of(line))}
    assert lines["quiet"] == ["100 %", "891", "–", "900", "–"]
    assert lines["1 hog"] == [
        "67 %",
        "480",
        "80 %",
        "50",
        "8 %",
    ]
    assert "quota 1.5 was skipped: no cgroup." in text
    store.put("contention", "digits", row | {"noise": 0.02})
    assert goals_of(tmp_path)[beside][1:] == ["76 %", "reached"]
    assert goals_of(tmp_path)[quiet][1:] == ["99 %", "not judged"]


def test_the_cost_of_a_call_is_shown_beside_layer_norms(tmp_path):
    us = {"eager": {"forward": 4.0, "both": 31.26}, "opaque": {"forward": 3.0, "both": 24.0}}
    row = {"op": "qk_norm", "us": us | {"compiled": {"forward": 1.0, "both": 9.0}}, "noise": 0.03}
    store = results.Store(tmp_path, MACHINE)
    store.put("launch overhead", "qk_norm", row)
    expected = ["qk_norm", "31.3", "24.0", "9.0", "–", "± 3 %"]
    assert expected in map(cells_of, report.all_tables(tmp_path, brief=True).splitlines())
    usual = {"eager": {"both": 10.0}, "opaque": {"both": 16.0}, "compiled": {"both": 1.0}}
    store.put("launch overhead", "layer_norm", {"op": "layer_norm", "us": usual, "noise": 0.01})
    expected[4] = "1.5×"
    assert expected in map(cells_of, report.all_tables(tmp_path, brief=True).splitlines())


def test_what_a_kind_of_device_should_have_and_has_not_is_named(tmp_path):
    results.Store(tmp_path, MACHINE).put("kernels", "a", op_row("align", 4.0))
    (line,) = [line for line in report.all_tables(tmp_path, brief=True).splitlines() if "Not measured here" in line]
    assert "“The cost of a call”" in line and "“The demo's step beside other work”" in line
    assert "The ops" not in line and "Every schedule" not in line
