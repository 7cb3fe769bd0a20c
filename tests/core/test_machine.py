"""The machine's limits: CPU quotas of every kind, and the threads that follow before torch is loaded."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from st_fast.core import machine
from tests import tiny


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V1 = "9:cpu,cpuacct:/job\n4:cpuset:/other\n0::/"
QUOTAS = {
    "none": ({"proc/self/cgroup": "0::/job"}, math.inf),
    "no cgroups": ({}, math.inf),
    "nonsense": ({"proc/self/cgroup": "nonsense\n0::/a\0b\n0::/job", "sys/fs/cgroup/job/cpu.max": "x" * 9}, math.inf),
    "a quota beyond all numbers": (
        {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": f"{10**400} 1"}, math.inf,
    ),
    "v2": ({"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "150000 100000"}, 1.5),
    "v2, unlimited": ({"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "max 100000"}, math.inf),
    "v2, of a parent": (
        {
            "proc/self/cgroup": "0::/user/job/step",
            "sys/fs/cgroup/user/job/step/cpu.max": "max 100000",
            "sys/fs/cgroup/user/job/cpu.max": "70000 20000",
            "sys/fs/cgroup/user/cpu.max": "900000 100000",
        },
        3.5,
    ),
    "v2, the host's path in a container": (
        {"proc/self/cgroup": "0::/kubepods/pod1/c2", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5,
    ),
    "v1": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "240000",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "80000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        3.0,
    ),
    "v1, another group's": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/other/cpu.cfs_quota_us": "10000",
            "sys/fs/cgroup/cpu/other/cpu.cfs_period_us": "100000",
        },
        math.inf,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUOTAS)
def test_the_quota_is_the_least_of_the_groups_that_hold_the_process(case: str, tmp_path: Path):
    files, quota = QUOTAS[case]
    assert machine.cpu_quota(write(tmp_path, files)) == quota


def limited(root: Path, quota: float, cores: int = 8, hardware_threads: int = 1) -> Path:
    """A machine with so many cores and a quota."""
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{round(quota * 1e5)} 100000"}
    for cpu in range(cores * hardware_threads):
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % cores},{cpu % cores + cores}"
    return write(root, files)


@pytest.mark.parametrize(
    ("quota", "ranks", "hardware_threads", "threads"),
    [(3, 1, 1, "3"), (2.5, 1, 1, "3"), (0.3, 1, 1, "1"), (6, 2, 1, "3"), (8, 1, 1, None), (12, 1, 2, None),
     (12, 4, 2, "2"), (8, 16, 1, "1")],
)  # fmt: skip
def test_threads_follow_quota_cores_and_ranks(
    quota: float, ranks: int, hardware_threads: int, threads: str | None, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(machine, "affinity", lambda: set(range(8 * hardware_threads)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delitem(sys.modules, "torch")
    environ: dict[str, str] = {}
    machine.choose_threads(environ, limited(tmp_path, quota, hardware_threads=hardware_threads))
    assert environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("own", [{"OMP_NUM_THREADS": "7"}, {"MKL_NUM_THREADS": "7"}])
def test_the_users_number_stays(own: dict[str, str], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(machine, "affinity", lambda: set(range(8)))
    monkeypatch.delitem(sys.modules, "torch")
    environ = dict(own)
    machine.choose_threads(environ, limited(tmp_path, 2))
    assert environ == own


def test_nothing_is_set_once_torch_is_loaded(tmp_path: Path, monkeypatch):
    import torch

    monkeypatch.setattr(machine, "affinity", lambda: set(range(8)))
    environ: dict[str, str] = {}
    machine.choose_threads(environ, limited(tmp_path, 2))
    assert environ == {} and torch.get_num_threads()


def test_importing_st_fast_first_sets_torchs_threads():
    """A rank for each core, not torchrun's: one thread each, which torch takes when it loads, or the user's number."""
    cores = machine.physical_cores()
    code = "import sys, st_fast; assert 'torch' not in sys.modules; import torch; print(torch.get_num_threads())"
    clean = {key: value for key, value in os.environ.items() if key not in machine.THREADS}
    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True, timeout=120,
                env=clean | {"PYTHONPATH": str(tiny.ROOT), "LOCAL_WORLD_SIZE": str(ranks)} | own,
            ).stdout
        )
        for ranks, own in ((cores, {}), (cores, {"OMP_NUM_THREADS": str(cores)}))
    ]  # fmt: skip
    assert found == [1, cores]


@pytest.mark.parametrize("text", ["", "abc", "0", "-2", "²"])
def test_what_is_no_number_of_ranks_counts_as_one(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    assert machine.local_count() == 1


def test_a_stage_hides_the_heap_from_the_garbage_collector_and_shows_it_again(thawed):
    machine.freeze_heap()
    assert gc.get_freeze_count() > 1000
    machine.thaw_heap()
    assert gc.get_freeze_count() == 0


def test_what_the_program_around_has_frozen_stays_so(thawed):
    """Told by an object of this test's own: others may end at any time, and how many are frozen changes with them."""
    mine = [object()]
    seen = lambda: any(found is mine for found in gc.get_objects())  # noqa: E731  # frozen ones are not among them
    assert seen()
    gc.freeze()
    machine.freeze_heap()
    machine.thaw_heap()
    assert not seen()
    gc.unfreeze()
    assert seen()
