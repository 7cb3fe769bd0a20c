"""The row on contention: what a process is due, and the shares that follow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import contention
from bench.contention import AS_IT_COMES, OURS, QUIET, Condition, Window, Worker


@pytest.mark.parametrize(
    ("condition", "threads", "cores", "fair"),
    [
        (Condition("quiet"), 2, 2, 1.0),
        (Condition("1 hog", hogs=1), 2, 2, 2 / 3),
        (Condition("1 hog", hogs=1), 1, 2, 1.0),  # a core is left for it
        (Condition("4 hogs", hogs=4), 8, 8, 2 / 3),
        (Condition("6 hogs", hogs=6), 2, 4, 0.5),
        (Condition("quota", quota=1.5), 2, 2, 0.75),
        (Condition("quota", quota=6.0), 4, 8, 1.0),
    ],
)
def test_a_process_is_due_its_threads_part_of_the_cores(condition: Condition, threads: int, cores: int, fair: float):
    assert condition.fair(threads, cores) == pytest.approx(fair)


def worker(**rates: float) -> Worker:
    """One whose three windows had these rates, in images/s, around them."""
    found = Worker(SimpleNamespace(), threads=2)  # type: ignore[arg-type]
    for condition, rate in rates.items():
        found.windows[condition.replace("_", " ")] = [Window(int(part * rate), 1.0, 2.0, 0.1) for part in (1, 0.9, 1.2)]
    return found


def test_shares_are_of_what_openmp_as_it_comes_has_alone():
    group = {AS_IT_COMES: worker(quiet=1000, one=100), OURS: worker(quiet=990, one=500)}
    row = contention._row({Condition(QUIET): group, Condition("one", hogs=1): group}, cores=2, rounds=3)
    assert row["images_per_s"]["one"] == {AS_IT_COMES: 100, OURS: 500} and row["fair"]["one"] == pytest.approx(2 / 3)
    assert row["share"]["one"] == pytest.approx({AS_IT_COMES: 0.15, OURS: 0.75}) and QUIET not in row["share"]
    assert row["quiet"] == pytest.approx({AS_IT_COMES: 1.0, OURS: 0.99}) and row["others"] == 0.1
    assert "(75 %)" in contention.table(row)
    assert row["noise_of"]["quiet"] < 0.01, "both were slowed down alike"
    group[AS_IT_COMES].windows["one"][0] = Window(900, 1.0, 2.0, 0.1)  # not the share that is judged
    again = contention._row({Condition(QUIET): group, Condition("one", hogs=1): group}, cores=2, rounds=3)
    assert again["noise_of"]["share"] == row["noise_of"]["share"] == pytest.approx(0.3)


def test_a_quota_holds_its_processes_and_the_group_goes(capfd):
    """With a real cgroup, where one may be made."""
    made = []
    try:
        with contention.quota_group(0.5) as group:
            made.append(group)
            code = "from st_fast.core.machine import cpu_quota; print(cpu_quota())"
            pid = os.posix_spawn(sys.executable, [sys.executable, "-c", f"import time; time.sleep(0.3); {code}"],
                                 os.environ)  # fmt: skip
            (group / "cgroup.procs").write_text(str(pid))
            os.waitpid(pid, 0)
    except OSError as error:
        pytest.skip(str(error))
    assert float(capfd.readouterr().out) == 0.5 and not made[0].exists()


def test_hogs_end_with_the_process_that_started_them_even_if_it_is_killed() -> None:
    program = """
import time
from bench.contention import hogs
with hogs(1):
    print("running", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=contention.ROOT)
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    (hog,) = (int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while Path(f"/proc/{hog}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{hog}").exists()
