"""Freed memory stays with the process."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from st_fast.kernels import heap
from tests import warm

CHILD = """
import ctypes, resource, sys
import torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would hide 511 faults of 512
from st_fast.kernels.heap import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
if sys.argv[1] == "leave":  # glibc's own threshold, held: it grows with what is freed, and then luck decides
    ctypes.CDLL(None).mallopt(-3, 128 << 10)
def step():
    a = torch.ones(1_600_000)
    return a * 2, a + 1, a - 1
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = warm.run("-c", CHILD, mode)
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_steps_of_one_shape_stop_faulting_pages_in() -> None:
    kept, usual = faults("keep"), faults("leave")
    assert usual > 1_000, "the machine faults nothing in, so this test could not fail"
    assert kept < usual / 4  # 20 steps touch 125,000 pages of 4 KiB


GROWING = """
import sys
from st_fast.kernels import heap
if not heap.keep_freed_memory() or not heap.own_bytes():
    sys.exit(77)
given, real = [], heap.give_back_freed_memory
heap.give_back_freed_memory = lambda: (given.append(heap.own_bytes()), real(), given.append(heap.own_bytes()))
def blocks(count):
    return [b"x" * 1_000_000 for _ in range(count)]
limit = heap.GrowthLimit()
given.clear()
limit()
"""
HOLES = """
held = blocks(500)
del held[::2]
limit()
assert len(held) == 250
"""
AGAIN = """
for _ in range(5):
    blocks(320)
    limit()
"""


def given_back(then: str) -> list[int]:
    """Bytes before and after each time that memory was given back."""
    done = warm.run("-c", f"{GROWING}{then}print(*given)")
    if done.returncode == 77:
        pytest.skip("no glibc or no /proc")
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


def test_what_is_freed_between_blocks_in_use_goes_back_once_the_process_has_grown() -> None:
    before, after = given_back(HOLES)
    assert 200_000_000 < before - after < 300_000_000


def test_a_steps_own_tensors_are_no_growth() -> None:
    """Steps that hold more than GROWTH for a while: given back once, when nothing was known of them, and kept then."""
    assert len(given_back(AGAIN)) == 2


def test_nothing_is_given_back_without_glibc_or_proc(monkeypatch, tmp_path) -> None:
    calls = list[object]()
    with monkeypatch.context() as patch:
        patch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace())
        heap.GrowthLimit()
        assert not heap.keep_freed_memory()
    with monkeypatch.context() as patch:
        patch.setattr(heap, "STATM", tmp_path / "none")
        patch.setattr(heap, "give_back_freed_memory", lambda: calls.append(0))
        limit = heap.GrowthLimit()
        for _ in range(3):
            limit()
    assert len(calls) == 1, "only where a stage begins"


def test_own_memory_is_what_is_in_ram_without_files_and_what_is_shared(monkeypatch, tmp_path) -> None:
    statm = tmp_path / "statm"
    statm.write_text("90000 500 200 1 0 1 0\n")
    monkeypatch.setattr(heap, "STATM", statm)
    assert heap.own_bytes() == 300 * os.sysconf("SC_PAGE_SIZE")
