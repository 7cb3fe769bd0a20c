"""A GPU day: every row once, nothing lost to a broken device, a killed process or the end of the time; bad input."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_day, part
from bench import machine as results
from bench.day import Day
from bench.machine import ROOT
from bench.part import BROKEN, PARTS, STOPPED, UNFINISHED, OutOfTime
from st_fast.core.lock import run_lock
from tests.bench.test_bench_report import MACHINE

CPU = torch.device("cpu")
OK = {"ok": True}


def day(folder: Path, seconds: float = 60.0, **options) -> Day:
    """A small one that has so many seconds left."""
    until = time.monotonic() + seconds
    return dataclasses.replace(Day(CPU, True, results.Store(folder, MACHINE), until, folder), **options)


@pytest.fixture
def tasks(monkeypatch):
    """Puts rows into a part of their own, "fake"."""

    def put(**rows):
        monkeypatch.setitem(PARTS, "fake", (lambda day: iter(rows.items()), "fake"))

    return put


def counted(found: list[str], key: str):
    return lambda: found.append(key) or dict(OK)


def test_it_goes_on_where_it_stopped_and_measures_nothing_twice(tmp_path, tasks, capsys):
    found: list[str] = []
    tasks(one=counted(found, "one"), two=counted(found, "two"))
    assert part.run(day(tmp_path, seconds=1.0), "fake") == STOPPED
    assert found == [] and "run the same command again" in capsys.readouterr().out
    assert part.run(day(tmp_path), "fake") == part.run(day(tmp_path), "fake") == 0
    assert found == ["one", "two"]


def test_other_sources_measure_again_unless_their_rows_are_to_be_kept(tmp_path, tasks):
    found: list[str] = []
    tasks(one=counted(found, "one"))
    part.run(day(tmp_path), "fake")
    newer = results.Store(tmp_path, dataclasses.replace(MACHINE, code="other"))
    part.run(day(tmp_path, store=newer, keep=True), "fake")
    assert found == ["one"]
    part.run(day(tmp_path, store=newer), "fake")
    assert found == ["one", "one"]


def test_only_rows_of_that_name_are_measured(tmp_path, tasks):
    found: list[str] = []
    tasks(**{"XL/2, plain": counted(found, "a"), "XL/2, stage 2": counted(found, "b")})
    part.run(day(tmp_path, only="stage 2"), "fake")
    assert found == ["b"]


def test_the_error_of_a_broken_row_is_kept_and_the_next_row_measured_and_the_first_again_on_request(tmp_path, tasks):
    def broken():
        raise RuntimeError("no such kernel\nmore")

    tasks(a=broken, b=lambda: dict(OK))
    assert part.run(day(tmp_path), "fake") == 1
    rows = day(tmp_path).store.rows("fake")
    assert rows["a"]["error"] == "RuntimeError: no such kernel" and rows["b"]["ok"]
    tasks(a=lambda: dict(OK), b=lambda: dict(OK))
    assert part.run(day(tmp_path), "fake") == 1
    assert part.run(day(tmp_path, again=True), "fake") == 0


def test_the_end_of_the_time_is_no_failure_of_a_compiler(tmp_path, tasks):
    """As `CompiledBlocks` has it: whatever the compiler raises is told, and the step goes on without it."""

    def compiles():
        try:
            time.sleep(30)
        except Exception:
            return {"ok": True, "eager": True}

    start = time.monotonic()
    row = part.attempt(compiles, seconds=1.0)
    assert time.monotonic() - start < 10 and row["error"] == "OutOfTime: took more than 1 s"
    assert not issubclass(OutOfTime, Exception)


@pytest.mark.parametrize("longest", [0.0, 1e6], ids=["longer than any row may take", "by the end of the budget"])
def test_a_row_that_is_cut_short_by_the_end_of_the_budget_is_measured_by_the_next_call(
    longest, tmp_path, tasks, monkeypatch
):
    """Also one that began late; but one that had as long as any row may take keeps its error."""
    monkeypatch.setattr(part, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(part, "LONGEST_ROW", longest)
    monkeypatch.setattr(part, "tidy_up", lambda device: None)  # which may take longer than this budget
    found: list[str] = []
    tasks(a=lambda: dict(OK), b=lambda: time.sleep(60) or dict(OK))
    assert part.run(day(tmp_path, seconds=3.0), "fake") == STOPPED
    kept = longest == 0.0
    error = day(tmp_path).store.rows("fake")["b"]["error"]
    assert error.startswith("OutOfTime: took more than ") if kept else error == UNFINISHED
    tasks(a=counted(found, "a"), b=counted(found, "b"))
    part.run(day(tmp_path), "fake")
    assert found == ([] if kept else ["b"])


def test_after_an_error_that_breaks_the_device_the_part_asks_for_a_new_process(tmp_path, tasks, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    tasks(a=broken, b=lambda: dict(OK))
    monkeypatch.setattr(part, "broken", lambda device: True)
    assert part.run(day(tmp_path), "fake") == BROKEN
    rows = day(tmp_path).store.rows("fake")
    assert "illegal memory access" in rows["a"]["error"] and "b" not in rows
    assert part.run(day(tmp_path), "fake") == 1, "a is not tried again, b is measured"
    assert day(tmp_path).store.rows("fake")["b"]["ok"]


def test_each_row_begins_with_the_memory_and_the_compiled_forms_of_the_last_given_back(tmp_path, tasks, monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(part, "tidy_up", lambda device: order.append("tidied"))
    tasks(a=counted(order, "a"), b=counted(order, "b"))
    part.run(day(tmp_path), "fake")
    assert order == ["tidied", "a", "tidied", "b"]


def call(folder: Path, seconds: float = 60.0) -> gpu_day.Call:
    machine = folder / "machine.json"
    part.the_machine(machine, CPU)
    return gpu_day.Call(("--small", "--only", ""), folder, machine, time.monotonic() + seconds)


@pytest.fixture
def children(monkeypatch):
    """What the processes of a part do, in order, in place of `bench.part`."""

    def run(*scripts: str):
        left, popen = list(scripts), subprocess.Popen

        def start(command, **options):
            return popen([sys.executable, "-c", left.pop(0)], **options)

        monkeypatch.setattr(gpu_day.subprocess, "Popen", start)

    return run


def test_a_part_whose_process_dies_goes_on_in_a_new_one_and_the_row_it_was_at_says_so(tmp_path, children, monkeypatch):
    monkeypatch.setattr(part.results, "measure_machine", lambda device: MACHINE)
    today = call(tmp_path)
    store = results.Store(tmp_path, MACHINE)
    store.put("csrc", "a", {"ok": False, "error": UNFINISHED, "unfinished": True})
    children("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "raise SystemExit(4)", "pass")
    assert gpu_day.run_part("build", today) == 0
    row = store.rows("csrc")["a"]
    assert row["error"] == "the process died of signal 11" and not row.get("unfinished")


def test_a_part_that_never_gets_further_is_given_up(tmp_path, children, monkeypatch, capsys):
    monkeypatch.setattr(part.results, "measure_machine", lambda device: MACHINE)
    children(*["raise SystemExit(4)"] * gpu_day.MOST_STARTS)
    assert gpu_day.run_part("build", call(tmp_path)) == 1
    assert f"build: given up after {gpu_day.MOST_STARTS} starts" in capsys.readouterr().out


@pytest.mark.parametrize("had", [500.0, 2.0], ids=["had its time", "began late"])
def test_a_process_that_outstays_its_time_is_killed_and_a_row_that_began_late_is_measured_again(
    had, tmp_path, children, monkeypatch
):
    monkeypatch.setattr(part.results, "measure_machine", lambda device: MACHINE)
    monkeypatch.setattr(gpu_day, "GRACE", 0.5)
    monkeypatch.setattr(gpu_day, "LEAST_SECONDS", 0.0)
    today, store = call(tmp_path, seconds=2.0), results.Store(tmp_path, MACHINE)
    store.put("csrc", "a", {"ok": False, "error": UNFINISHED, "unfinished": True, "had": had})
    children("import time; time.sleep(60)")
    assert gpu_day.run_part("build", today) == STOPPED
    row = store.rows("csrc")["a"]
    assert row["error"] == ("it did not stop in time and was killed" if had > 200 else UNFINISHED)
    assert bool(row.get("unfinished")) == (had < 200)


def test_what_a_part_has_started_ends_with_it():
    """A study would train on beside the next call."""
    script = "from bench import day_works; day_works._command('http.server', '0', '--bind', '127.0.0.1')"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=os.environ | ONE_THREAD)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline = time.monotonic() + 60
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    (child,) = found
    time.sleep(0.5)
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_a_killed_call_ends_its_parts_keeps_its_rows_and_is_taken_up_again(tmp_path):
    """For real: `kill -9` of the command while a row is measured; the part's process must not live on."""
    command = [sys.executable, "-m", "bench.gpu_day", "--small", "--parts", "attention", "--results", str(tmp_path)]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD)
    assert "ok" in started.stdout.readline()
    started.send_signal(signal.SIGKILL)
    started.wait()
    started.stdout.read()  # ends when the last process that could write to it has ended
    (file,) = tmp_path.glob("*.json")
    kept = {key for key, row in results.load(file)["attention backends"]["rows"].items() if row["ok"]}
    assert kept
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | ONE_THREAD)
    assert again.returncode == 0, again.stderr
    assert all(row["ok"] for row in results.load(file)["attention backends"]["rows"].values())


def test_a_second_call_on_the_same_folder_is_refused_while_the_first_lives(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day, "run_part", lambda *_: 0)
    with run_lock(tmp_path, print):
        assert gpu_day.main(["--small", "--results", str(tmp_path)]) == 2
    assert f"{tmp_path}: another run is writing here (" in capsys.readouterr().err
    assert gpu_day.main(["--small", "--results", str(tmp_path)]) == 0


ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", ["build", "attention", "truth"])
def test_the_checks_run_on_a_cpu_at_small_sizes(tmp_path, name):
    assert part.run(day(tmp_path), name) == 0
    assert day(tmp_path).store.rows(PARTS[name][1])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--parts", "nonsense"], "--parts nonsense: one of build"),
        (["--budget", "0"], "--budget 0: 5 to 86400 seconds"),
        (["--budget", "nan"], "--budget nan: 5 to 86400 seconds"),
        (["--budget", "inf"], "--budget inf: 5 to 86400 seconds"),
        (["--jobs", "2"], "--jobs 2: parts beside one another disturb each other's figures; only with --small"),
        (["--jobs", "0"], "--jobs 0: at least 1"),
        (["--results", "{file}/rows"], "--results {file}/rows: can't be written: "),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(tmp_path, arguments, line, capsys, monkeypatch):
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setattr(gpu_day, "run_part", lambda *_: pytest.fail("started"))
    assert gpu_day.main([argument.format(file=file) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(line.format(file=file)) and len(said.err.splitlines()) == 1 and not said.out


def test_a_name_that_no_row_has_is_said(tmp_path, tasks, capsys):
    tasks(a=lambda: dict(OK))
    assert part.run(day(tmp_path, only="nothing"), "fake") == 2
    assert capsys.readouterr().err == "--only nothing: no row of fake has that in its name\n"


@pytest.mark.parametrize("content", ['{"step": {"mach', "[]", '{"csrc": 3}', "null"])
def test_a_damaged_results_file_is_one_line_and_stays_as_it_is(content, tmp_path, monkeypatch, capsys):
    store = results.Store(tmp_path, MACHINE)
    store.path.write_text(content)
    monkeypatch.setattr(part, "end_with_the_one_who_started_this", lambda: None)
    monkeypatch.setattr(part, "the_machine", lambda file, device: MACHINE)
    arguments = ["build", "--small", "--machine", "unused", "--results", str(tmp_path), "--budget", "60"]
    assert part.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{store.path}: ") and "move it away" in said and len(said.splitlines()) == 1
    assert store.path.read_text() == content


def test_a_full_disk_is_one_line_that_leaves_the_rows_as_they_were(tmp_path, monkeypatch, capsys):
    store = results.Store(tmp_path, MACHINE)
    store.put("csrc", "cuda", OK)

    def full(path, *_, **__):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(part, "end_with_the_one_who_started_this", lambda: None)
    monkeypatch.setattr(part, "the_machine", lambda file, device: MACHINE)
    monkeypatch.setattr(Path, "write_text", full)
    arguments = ["build", "--small", "--machine", "unused", "--results", str(tmp_path), "--budget", "60"]
    assert part.main(arguments) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and len(said.splitlines()) == 1
    assert store.rows("csrc") == {"cuda": OK} and [path.name for path in tmp_path.iterdir()] == [store.path.name]


@pytest.fixture
def calls(tmp_path):
    """Runs bench/day.sh in a checkout of nothing else, with a Python that notes its arguments and ends as told."""
    (tmp_path / "bench").mkdir()
    shutil.copy(ROOT / "bench" / "day.sh", tmp_path / "bench")
    python, noted = tmp_path / "python", tmp_path / "noted"

    def run(number, **codes):
        cases = "".join(f'*"{what}"*) exit {code};; ' for what, code in codes.items())
        python.write_text(f'#!/bin/sh\necho "$*" >>{noted}\ncase "$*" in {cases} esac\n')
        python.chmod(0o755)
        environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
        done = subprocess.run(["bash", "bench/day.sh", number], cwd=tmp_path, env=environment, capture_output=True)
        return done.returncode, noted.read_text()

    return run


def test_a_call_without_latents_measures_the_rest_and_ends_with_its_worst_code(calls):
    code, asked = calls("3", convergence=1, sweep=3)
    assert code == 3 and "tarfile" not in asked
    assert "--parts convergence" in asked and "--parts step,first,truth,choice,schedule,compiled,sweep" in asked


@pytest.mark.parametrize(
    ("codes", "worst"), [({"-m pytest": 1}, 1), ({"truth": 3, "XL": 1}, 3), ({"small": 2, "XL": 3}, 2)]
)
def test_a_calls_code_is_that_of_the_worst_of_its_parts_the_tests_too(calls, codes, worst):
    code, asked = calls("1", **codes)
    assert code == worst and asked.count("bench.gpu_day") == 4


def test_a_rehearsal_leaves_the_committed_rows_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    asked = list[Path]()
    monkeypatch.setattr(gpu_day, "run_part", lambda part, call: asked.append(call.results) or 0)
    for options in (["--small"], []):
        assert gpu_day.main([*options, "--parts", "build"]) == 0
    assert asked == [tmp_path / "rehearsal", tmp_path]
