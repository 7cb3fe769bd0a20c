"""Freed memory stays with the process."""

from __future__ import annotations

import pytest

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
