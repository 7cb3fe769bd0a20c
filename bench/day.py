"""What all parts of a GPU day share: the device, the sizes, where rows go, and until when."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import step_times
from bench.cases import Size
from bench.results import Row, Store
from bench.timing import Effort
from bench.workload import Setup

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
    cifar: Path = Path("cifar10.zip")
    runs: Path = Path("runs/gpu_day")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    @property
    def effort(self) -> Effort:
        return Effort(rounds=3, seconds=1, least=2, warmup=1) if self.small else Effort()

    @property
    def sizes(self) -> list[Size]:
        """Of the ops."""
        return [Size("S/2", 2, 16)] if self.small else [Size("B/2", 256), Size("XL/2", 256)]

    @property
    def setups(self) -> list[Setup]:
        """Of the step."""
        setups = step_times.default_setups(self.device)
        return [replace(s, batch=4, tokens=16, depth=2) for s in setups] if self.small else setups

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32
