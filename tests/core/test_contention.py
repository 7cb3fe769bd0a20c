"""Under contention libgomp's threads sleep soon; without, they wait as they always do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from st_fast.core import contention
from tests import tiny


def run(code: str, **own: str) -> list[float]:
    """What a fresh process of two threads prints, as JSON."""
    clean = {key: value for key, value in os.environ.items() if key not in contention.OWN}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True, timeout=120,
        env=clean | {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "2"} | own,
    )  # fmt: skip
    return json.loads(done.stdout)


SLEEPS = """
import os, resource, time, json, torch
from st_fast.core import contention
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # after libgomp has counted the processors

x = torch.ones(1 << 20)
def sleeps():
    x.add_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(40):
        x.add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before

libraries = contention.loaded_libgomps()
assert libraries, "torch's wheel for Linux has libgomp"
found = [sleeps()]
held = contention.SleepingThreads(libraries, os.cpu_count())
time.sleep(0.2)
found.append(sleeps())
held.end()
found.append(sleeps())
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp's own ways")
def test_threads_sleep_while_more_are_there_and_wait_awake_again_afterwards():
    """On one processor: a thread that waits awake is taken off it, one that sleeps soon gives it up by itself.

    It looks without an end here: beside other work even 300,000 looks may be over before its turn comes. Other work may
    make it sleep all the same, so one process of three has to show it.
    """
    found = list[list[float]]()

    def shown() -> bool:
        found.append(run(SLEEPS, GOMP_SPINCOUNT="INFINITE"))
        before, during, after = found[-1]
        return during > 40 and during > 2 * max(before, after)

    assert any(shown() for _ in range(3)), found


class Clock:
    """Says how long threads were kept waiting, a look at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.waited = 0.0
        monkeypatch.setattr(contention, "kept_waiting", lambda: self.waited)
        monkeypatch.setattr(contention.time, "monotonic", lambda: self.now)

    def look(self, watch: contention.Watch, share: float, times: int = 1) -> bool:
        for _ in range(times):
            self.now += 0.25
            self.waited += 0.25 * share
            watch.look()
        return watch.asleep is not None


def test_sleeping_begins_at_once_and_is_given_up_for_a_look_ever_more_rarely(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    watch = contention.Watch([], count=2)
    assert not clock.look(watch, 0.2, 20)
    assert clock.look(watch, 0.7) and clock.look(watch, 0.4, 7), "for two seconds"
    assert not clock.look(watch, 0.4) and clock.look(watch, 0.7, 1), "still contended"
    assert clock.look(watch, 0.0, 15) and not clock.look(watch, 0.4), "for four, whatever is seen meanwhile"
    assert not clock.look(watch, 0.1, 9)
    assert clock.look(watch, 0.7, 8) and not clock.look(watch, 0.7), "for two again"
    asleep = [clock.look(watch, 0.7) for _ in range(1000)]
    assert asleep[-500:].count(False) in (3, 4), "every 32 seconds at last"
    watch.end()
    assert watch.asleep is None


def test_waiting_is_summed_over_threads_in_seconds(tmp_path: Path):
    for name, text in {"1": "5000000 2500000000 3", "2": "1 500000000 9", "3": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "4").mkdir()  # has ended meanwhile
    assert contention.kept_waiting(tmp_path) == 3.0


def test_every_copy_of_libgomp_is_found_once(tmp_path: Path):
    maps = Path("/proc/self/maps")
    if not maps.is_file() or not (copies := contention.loaded_libgomps(maps)):
        pytest.skip("no libgomp here")
    line = f"7f00-7f01 r-xp 0 0:0 1    {copies[0]._name}\n"
    (tmp_path / "maps").write_text(
        "7f00-7f01 rw-p 0 0:0 0  [heap]\n" + 3 * line + "7f-80 r-xp 0 0:0 1  /lib/libgo.so\n"
    )
    assert [copy._name for copy in contention.loaded_libgomps(tmp_path / "maps")] == [copies[0]._name]
    assert contention.loaded_libgomps(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("threads", "own", "watching"),
    [
        (2, {}, True),
        (4, {}, True),
        (5, {}, False),  # more threads than processors: libgomp's sleep soon as it is
        (9, {}, False),
        (1, {}, False),
        (2, {"GOMP_SPINCOUNT": "300000"}, False),
        (2, {"OMP_WAIT_POLICY": "active"}, False),
    ],
)
def test_the_users_own_setting_and_a_single_thread_are_left_alone(
    threads: int, own: dict[str, str], watching: bool, monkeypatch: pytest.MonkeyPatch
):
    for key in contention.OWN:
        monkeypatch.delenv(key, raising=False)
    for key, value in own.items():
        monkeypatch.setenv(key, value)
    library = SimpleNamespace(GOMP_parallel=lambda *_: None, omp_get_num_procs=lambda: 4)
    monkeypatch.setattr(contention, "loaded_libgomps", lambda: [library])

    def running() -> bool:
        return "st_fast-contention" in {thread.name for thread in threading.enumerate()}

    with contention.watched(threads):
        assert running() == watching
    assert not running()
