"""The runner: every row once, nothing lost to a broken device, a killed process or the end of the time; bad input."""

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

from bench import __main__ as command
from bench import machine, suite
from bench.machine import ROOT, Store, Suite
from bench.suite import BROKEN, PARTS, STOPPED, UNFINISHED, OutOfTime, Part, named_file
from st_fast.core.lock import run_lock
from tests.bench.test_bench_report import MACHINE

CPU = torch.device("cpu")
OK = {"ok": True}


def call_of(folder: Path, seconds: float = 60.0, **options) -> Suite:
    """A small one that has so many seconds left."""
    until = time.monotonic() + seconds
    return dataclasses.replace(Suite(CPU, Store(folder, MACHINE), True, until=until, runs=folder), **options)


@pytest.fixture
def tasks(monkeypatch):
    """Puts rows into a part of their own, "fake"."""

    def put(**rows):
        monkeypatch.setattr(Part, "tasks", lambda part, suite: (t for t in rows.items() if suite.names(t[0])))
        monkeypatch.setitem(PARTS, "fake", Part("fake", "fake:fake", "", "of this test"))

    return put


def counted(found: list[str], key: str):
    return lambda: found.append(key) or dict(OK)


def test_it_goes_on_where_it_stopped_and_measures_nothing_twice(tmp_path, tasks, capsys):
    found: list[str] = []
    tasks(one=counted(found, "one"), two=counted(found, "two"))
    assert suite.run(call_of(tmp_path, seconds=1.0), "fake") == STOPPED
    assert found == [] and "run the same command again" in capsys.readouterr().out
    assert suite.run(call_of(tmp_path), "fake") == suite.run(call_of(tmp_path), "fake") == 0
    assert found == ["one", "two"]


def test_other_sources_measure_again_unless_their_rows_are_to_be_kept(tmp_path, tasks):
    found: list[str] = []
    tasks(one=counted(found, "one"))
    suite.run(call_of(tmp_path), "fake")
    newer = Store(tmp_path, dataclasses.replace(MACHINE, code="other"))
    suite.run(call_of(tmp_path, store=newer, keep=True), "fake")
    assert found == ["one"]
    suite.run(call_of(tmp_path, store=newer), "fake")
    assert found == ["one", "one"]


def test_only_rows_of_that_name_are_measured(tmp_path, tasks):
    found: list[str] = []
    tasks(**{"XL/2, plain": counted(found, "a"), "XL/2, stage 2": counted(found, "b")})
    call = call_of(tmp_path, only=("stage 2", "stage 3"))
    suite.run(call, "fake")
    assert found == ["b"] and call.found == {"stage 2"}


def test_the_error_of_a_broken_row_is_kept_and_the_next_row_measured_and_the_first_again_on_request(tmp_path, tasks):
    def broken():
        raise RuntimeError("no such kernel\nmore")

    tasks(a=broken, b=lambda: dict(OK))
    assert suite.run(call_of(tmp_path), "fake") == 1
    rows = call_of(tmp_path).store.rows("fake")
    assert rows["a"]["error"] == "RuntimeError: no such kernel" and rows["b"]["ok"]
    tasks(a=lambda: dict(OK), b=lambda: dict(OK))
    assert suite.run(call_of(tmp_path), "fake") == 1
    assert suite.run(call_of(tmp_path, again=True), "fake") == 0


def test_the_end_of_the_time_is_no_failure_of_a_compiler(tmp_path, tasks):
    """As `CompiledBlocks` has it: whatever the compiler raises is told, and the step goes on without it."""

    def compiles():
        try:
            time.sleep(30)
        except Exception:
            return {"ok": True, "eager": True}

    start = time.monotonic()
    row = suite.attempt(compiles, seconds=1.0)
    assert time.monotonic() - start < 10 and row["error"] == "OutOfTime: took more than 1 s"
    assert not issubclass(OutOfTime, Exception)


@pytest.mark.parametrize("longest", [0.0, 1e6], ids=["longer than any row may take", "by the end of the budget"])
def test_a_row_that_is_cut_short_by_the_end_of_the_budget_is_measured_by_the_next_call(
    longest, tmp_path, tasks, monkeypatch
):
    """Also one that began late; but one that had as long as any row may take keeps its error."""
    monkeypatch.setattr(suite, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(suite, "LONGEST_ROW", longest)
    monkeypatch.setattr(suite, "tidy_up", lambda device: None)  # which may take longer than this budget
    found: list[str] = []
    tasks(a=lambda: dict(OK), b=lambda: time.sleep(60) or dict(OK))
    assert suite.run(call_of(tmp_path, seconds=3.0), "fake") == STOPPED
    kept = longest == 0.0
    error = call_of(tmp_path).store.rows("fake")["b"]["error"]
    assert error.startswith("OutOfTime: took more than ") if kept else error == UNFINISHED
    tasks(a=counted(found, "a"), b=counted(found, "b"))
    suite.run(call_of(tmp_path), "fake")
    assert found == ([] if kept else ["b"])


def test_after_an_error_that_breaks_the_device_the_part_asks_for_a_new_process(tmp_path, tasks, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    tasks(a=broken, b=lambda: dict(OK))
    monkeypatch.setattr(suite, "broken", lambda device: True)
    assert suite.run(call_of(tmp_path), "fake") == BROKEN
    rows = call_of(tmp_path).store.rows("fake")
    assert "illegal memory access" in rows["a"]["error"] and "b" not in rows
    assert suite.run(call_of(tmp_path), "fake") == 1, "a is not tried again, b is measured"
    assert call_of(tmp_path).store.rows("fake")["b"]["ok"]


def test_each_row_begins_with_the_memory_and_the_compiled_forms_of_the_last_given_back(tmp_path, tasks, monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(suite, "tidy_up", lambda device: order.append("tidied"))
    tasks(a=counted(order, "a"), b=counted(order, "b"))
    suite.run(call_of(tmp_path), "fake")
    assert order == ["tidied", "a", "tidied", "b"]


def begun(folder: Path, seconds: float = 60.0) -> command.Call:
    file = folder / "machine.json"
    suite.the_machine(file, CPU, small=True)
    return command.Call(("--small",), folder, file, time.monotonic() + seconds)


@pytest.fixture
def children(monkeypatch):
    """What the processes of a part do, in order, in place of `bench.part`."""

    def run(*scripts: str):
        left, popen = list(scripts), subprocess.Popen

        def start(command, **options):
            return popen([sys.executable, "-c", left.pop(0)], **options)

        monkeypatch.setattr(command.subprocess, "Popen", start)

    return run


def test_a_part_whose_process_dies_goes_on_in_a_new_one_and_the_row_it_was_at_says_so(tmp_path, children, monkeypatch):
    monkeypatch.setattr(machine, "measure_machine", lambda device, small=False: MACHINE)
    today = begun(tmp_path)
    store = Store(tmp_path, MACHINE)
    store.put("csrc", "a", {"ok": False, "error": UNFINISHED, "unfinished": True})
    children("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "raise SystemExit(4)", "pass")
    assert command.run_part("build", today) == 0
    row = store.rows("csrc")["a"]
    assert row["error"] == "the process died of signal 11" and not row.get("unfinished")


def test_a_part_that_never_gets_further_is_given_up(tmp_path, children, monkeypatch, capsys):
    monkeypatch.setattr(machine, "measure_machine", lambda device, small=False: MACHINE)
    children(*["raise SystemExit(4)"] * command.MOST_STARTS)
    assert command.run_part("build", begun(tmp_path)) == 1
    assert f"build: given up after {command.MOST_STARTS} starts" in capsys.readouterr().out


@pytest.mark.parametrize("had", [500.0, 2.0], ids=["had its time", "began late"])
def test_a_process_that_outstays_its_time_is_killed_and_a_row_that_began_late_is_measured_again(
    had, tmp_path, children, monkeypatch
):
    monkeypatch.setattr(machine, "measure_machine", lambda device, small=False: MACHINE)
    monkeypatch.setattr(command, "GRACE", 0.5)
    monkeypatch.setattr(command, "LEAST_SECONDS", 0.0)
    today, store = begun(tmp_path, seconds=2.0), Store(tmp_path, MACHINE)
    store.put("csrc", "a", {"ok": False, "error": UNFINISHED, "unfinished": True, "had": had})
    children("import time; time.sleep(60)")
    assert command.run_part("build", today) == STOPPED
    row = store.rows("csrc")["a"]
    assert row["error"] == ("it did not stop in time and was killed" if had > 200 else UNFINISHED)
    assert bool(row.get("unfinished")) == (had < 200)


def test_what_a_part_has_started_ends_with_it():
    """A study would train on beside the next call."""
    script = "from bench import checks; checks._command('http.server', '0', '--bind', '127.0.0.1')"
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
    command = [sys.executable, "-m", "bench", "--small", "attention", "--results", str(tmp_path)]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD)
    assert "ok" in started.stdout.readline()
    started.send_signal(signal.SIGKILL)
    started.wait()
    started.stdout.read()  # ends when the last process that could write to it has ended
    (file,) = tmp_path.glob("*.json")
    kept = {key for key, row in machine.load(file)["attention backends"]["rows"].items() if row["ok"]}
    assert kept
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | ONE_THREAD)
    assert again.returncode == 0, again.stderr
    assert all(row["ok"] for row in machine.load(file)["attention backends"]["rows"].values())


def test_a_second_call_on_the_same_folder_is_refused_while_the_first_lives(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_part", lambda *_: 0)
    with run_lock(tmp_path, print):
        assert command.main(["--small", "--results", str(tmp_path)]) == 2
    assert f"{tmp_path}: another run is writing here (" in capsys.readouterr().err
    assert command.main(["--small", "--results", str(tmp_path)]) == 0


ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", ["build", "attention", "truth"])
def test_the_checks_run_on_a_cpu_at_small_sizes(tmp_path, name):
    assert suite.run(call_of(tmp_path), name) == 0
    assert call_of(tmp_path).store.rows(PARTS[name].section)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nonsense"], "nonsense: no such part; one of build"),
        (["--seconds", "0"], "--seconds 0: 5 to 86400"),
        (["--seconds", "nan"], "--seconds nan: 5 to 86400"),
        (["--seconds", "inf"], "--seconds inf: 5 to 86400"),
        (["--jobs", "2"], "--jobs 2: parts beside one another disturb each other's figures; only with --small"),
        (["--jobs", "0"], "--jobs 0: at least 1"),
        (["--small", "--full"], "--small --full: one of them"),
        (["step", "--base", "main"], "--base: compares the ops at their default sizes"),
        (["--results", "{file}/rows"], "--results {file}/rows: can't be written: "),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(tmp_path, arguments, line, capsys, monkeypatch):
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setattr(command, "run_part", lambda *_: pytest.fail("started"))
    assert command.main([argument.format(file=file) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(line.format(file=file)) and len(said.err.splitlines()) == 1 and not said.out


def test_a_row_that_waits_for_one_that_has_failed_is_no_reason_to_call_again(tmp_path, tasks):
    late = {"ok": True, "left_out": "its run is not done", "unfinished": True}
    tasks(b=lambda: dict(late))
    assert suite.run(call_of(tmp_path, small=False), "fake") == STOPPED
    tasks(a=lambda: {"ok": False, "error": "no data"}, b=lambda: dict(late))
    assert suite.run(call_of(tmp_path, small=False), "fake") == 1


@pytest.mark.parametrize("content", ['{"step": {"mach', "[]", '{"csrc": 3}', "null"])
def test_a_damaged_results_file_is_one_line_and_stays_as_it_is(content, tmp_path, monkeypatch, capsys):
    store = Store(tmp_path, MACHINE)
    store.path.write_text(content)
    monkeypatch.setattr(machine, "end_with_the_parent", lambda: None)
    monkeypatch.setattr(suite, "the_machine", lambda file, device, small: MACHINE)
    arguments = ["build", "--small", "--machine", "unused", "--results", str(tmp_path), "--seconds", "60"]
    assert suite.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{store.path}: ") and "move it away" in said and len(said.splitlines()) == 1
    assert store.path.read_text() == content


def test_a_full_disk_is_one_line_that_leaves_the_rows_as_they_were(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path, MACHINE)
    store.put("csrc", "cuda", OK)

    def full(path, *_, **__):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(machine, "end_with_the_parent", lambda: None)
    monkeypatch.setattr(suite, "the_machine", lambda file, device, small: MACHINE)
    monkeypatch.setattr(Path, "write_text", full)
    arguments = ["build", "--small", "--machine", "unused", "--results", str(tmp_path), "--seconds", "60"]
    assert suite.main(arguments) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and len(said.splitlines()) == 1
    assert store.rows("csrc")["cuda"]["ok"] and [path.name for path in tmp_path.iterdir()] == [store.path.name]


def test_a_row_of_a_busy_machine_is_measured_again_on_request_and_says_who_else_worked(tmp_path, tasks, monkeypatch):
    found: list[str] = []
    tasks(a=counted(found, "a"))
    for load, again, times in ((0.9, False, 1), (0.9, False, 1), (0.0, True, 2), (0.0, True, 2)):
        monkeypatch.setattr(suite.OthersLoad, "read", lambda self, otherwise, load=load: load)
        assert suite.run(call_of(tmp_path, again=again), "fake") == 0
        assert found == ["a"] * times
    row = call_of(tmp_path).store.rows("fake")["a"]
    assert row["load"] == 0.0 and row["taken"] == {"commit": MACHINE.commit, "date": MACHINE.date}


def test_what_this_process_works_itself_is_not_others_load(monkeypatch):
    now = iter([(100.0, 400.0, 10.0), (107.0, 420.0, 15.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
    monkeypatch.setattr(machine.OthersLoad, "_now", staticmethod(lambda: next(now)))
    assert machine.OthersLoad().read() == pytest.approx((7 - 5) / 20)
    assert machine.OthersLoad().read(otherwise=0.25) == 0.25, "a system that does not count"


def test_unasked_a_cpu_measures_the_tables_and_a_rehearsal_all_of_a_gpus_day():
    cpu = suite.defaults("cpu", small=False, full=False)
    assert {"ops", "optimiser", "step", "loading"} <= {*cpu} and not {"choices", "convergence", "sweep"} & {*cpu}
    assert "sweep" in suite.defaults("cpu", small=False, full=True)
    assert {*suite.defaults("cpu", small=True, full=False)} == {*PARTS}
    assert {"choices", "convergence", "sweep", "step"} <= {*suite.defaults("cuda", small=False, full=False)}


def test_every_part_names_its_rows_before_anything_is_measured(tmp_path):
    unmeasured = Suite(CPU, None, small=True)
    for name, found in PARTS.items():
        keys = [key for key, _ in found.tasks(unmeasured)]
        assert keys and len(keys) >= len({*keys}), name


def test_a_name_that_only_some_parts_have_is_no_mistake_and_one_that_none_has_is_told(tmp_path, monkeypatch, capsys):
    def run_part(part, call, only):
        with named_file(call.machine).open("a") as file:
            file.write({"ops": "", "step": "x\n", "demo": "y\n", "sweep": ""}[part])
        return STOPPED if part == "sweep" else 0

    monkeypatch.setattr(command, "run_part", run_part)
    where = ["--results", str(tmp_path)]
    assert command.main(["ops", "step", "demo", "--only", "x", "--only", "y", *where]) == 0
    assert command.main(["ops", "step", "--only", "x", "--only", "y", *where]) == 2
    assert capsys.readouterr().err == "--only y: no row of ops, step has that in its name\n"
    assert command.main(["ops", "sweep", "--only", "x", *where]) == STOPPED, "it has not seen all its rows"


def test_pytest_is_a_door_to_the_same_rows(tmp_path):
    words = ["bench/", "--small", "--results", str(tmp_path), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "-k", "build or (optimiser and adamw)"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    found = machine.load(file)
    assert {part: len(section["rows"]) for part, section in found.items()} == {"csrc": 1, "kernels": 1}
    assert command.main(["build", "--small", "--results", str(tmp_path)]) == 0
    assert machine.load(file)["csrc"]["rows"] == found["csrc"]["rows"], "measured again"


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
    assert "--keep convergence" in asked and "schedules compiled launch-overhead sweep" in asked


@pytest.mark.parametrize(
    ("codes", "worst"), [({"-m pytest": 1}, 1), ({"truth": 3, "XL": 1}, 3), ({"small": 2, "XL": 3}, 2)]
)
def test_a_calls_code_is_that_of_the_worst_of_its_parts_the_tests_too(calls, codes, worst):
    code, asked = calls("1", **codes)
    assert code == worst and asked.count("-m bench ") == 4


def test_a_rehearsal_leaves_the_committed_rows_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(machine, "FOLDER", tmp_path)
    asked = list[Path]()
    monkeypatch.setattr(command, "run_part", lambda part, call, only: asked.append(call.results) or 0)
    for options in (["--small"], []):
        assert command.main([*options, "build"]) == 0
    assert asked == [tmp_path / "rehearsal", tmp_path]


def test_the_command_itself_takes_none_of_the_devices_memory(monkeypatch, tmp_path):
    """Its parts need all of it: it only asks whether there is a device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("the device was initialised"))
    asked = []
    monkeypatch.setattr(command, "run_part", lambda part, call, only: asked.append(part) or 0)
    assert command.main(["--results", str(tmp_path)]) == 0
    assert asked == suite.defaults("cuda", small=False, full=False) and "contention" not in asked
