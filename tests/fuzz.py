"""Fuzzing: how many inputs are tried, and what each may cost. `python -m tests.fuzz` tries all of them and counts.

The suite tries the beginning of each kind's inputs; ST_FAST_FUZZ=full all of them. Every input is read in this process
under `watched`: it is read or refused in one line, within `SECONDS` of CPU and the memory that `allowance` gives it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from st_fast.core.errors import UserError
from st_fast.core.files import allowance

SECONDS = 10


@dataclass
class Tally:
    """What the inputs of one kind came to."""

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    """Of CPU, the slowest input."""
    memory: int = 0
    """Bytes that the most demanding input made resident."""


TALLIES: dict[str, Tally] = {}


def blocks(short: int, full: int) -> range:
    """Numbers of the blocks to run, each with seeds of its own; the short cut is the beginning of the full run."""
    return range(full if os.environ.get("ST_FAST_FUZZ") == "full" else short)


@contextmanager
def watched(kind: str, size: int) -> Iterator[None]:
    """One input of `size` bytes is read inside: a UserError of one line is right, anything else it raises is not."""
    tally = TALLIES.setdefault(kind, Tally())
    before, start = _resident("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 5_000, str(error)
        tally.refused += 1
    seconds, memory = time.process_time() - start, _resident("VmHWM") - before
    tally.inputs += 1
    tally.seconds, tally.memory = max(tally.seconds, seconds), max(tally.memory, memory)
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert memory < allowance(size), f"{memory} bytes for a file of {size}"


def _resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def main() -> int:
    """Runs every file with a fuzz test in full and prints the tallies; returns how many tests failed."""
    import pytest

    from tests import fuzz  # this module runs as __main__, the tests know it by its name

    os.environ["ST_FAST_FUZZ"] = "full"
    found = Path(__file__).parent.rglob("test_*.py")
    files = sorted(str(path) for path in found if "from tests.fuzz import" in path.read_text(encoding="utf-8"))
    failed = pytest.main(["-q", "-p", "no:cacheprovider", *files, *sys.argv[1:]])
    print(f"{'kind':24}{'inputs':>8}{'refused':>9}{'slowest':>10}{'largest':>12}")
    for kind, tally in fuzz.TALLIES.items():
        print(f"{kind:24}{tally.inputs:8,}{tally.refused:9,}{tally.seconds:8.2f} s{tally.memory / 2**20:8.1f} MiB")
    print(f"{'in all':24}{sum(tally.inputs for tally in fuzz.TALLIES.values()):8,}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
