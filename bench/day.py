"""What all parts of a GPU day share: the device, the sizes, where rows go, and until when."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import step as step_times
from bench.cases import Size
from bench.machine import ROOT, Row, Store
from bench.measure import Effort
from bench.workload import Setup

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def end_with_the_one_who_started_this() -> None:
    """Asks the kernel to kill this process when its parent dies, as where a whole call is killed for its time.

    A process that it starts has to ask for itself: `preexec_fn` of `subprocess`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


Task = tuple[str, Callable[[], Row]]
"""A row's key and what measures it."""


@dataclass(frozen=True)
class Day:
    """What all parts share."""

    device: torch.device
    small: bool
    store: Store
    until: float = float("inf")
    """By time.monotonic(): when the budget is spent. A task that can stop by itself, with all saved, does so before."""
    runs: Path = ROOT / "runs" / "gpu_day"
    """Where the study's runs lie."""
    only: str = ""
    """What the names of the rows to measure contain."""
    again: bool = False
    """Rows that failed are measured once more."""
    keep: bool = False
    """Rows that other sources measured count."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def wants(self, row: Row) -> bool:
        """Whether a row has still to be measured: by this code, to its end, or once more because it failed."""
        measured = bool(row) and (self.keep or row.get("code") == self.store.machine.code)
        return not measured or bool(row.get("unfinished")) or (self.again and not row.get("ok", True))

    @property
    def data(self) -> Path:
        """CIFAR-10's latents, as `bench/pack.sh` has brought them along."""
        return ROOT / "data" / "cifar10-8x8"

    @property
    def effort(self) -> Effort:
        """Of a comparison."""
        if self.small:
            return Effort(rounds=3, seconds=1, least=2, warmup=1)
        return Effort(rounds=20, seconds=1.5, least=5) if self.device.type == "cuda" else Effort()

    @property
    def sizes(self) -> list[Size]:
        """Of the ops."""
        return [Size("S/2", 2, 16)] if self.small else [Size("XL/2", 256), Size("B/2", 256)]

    @property
    def setups(self) -> list[Setup]:
        """Of the step."""
        setups = step_times.default_setups(self.device)
        if not self.small:
            return setups
        return [replace(s, batch=4, tokens=16, depth=2, options=()) for s in setups if s.size == setups[0].size]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32
