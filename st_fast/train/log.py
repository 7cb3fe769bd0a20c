"""What a run says while it goes: the log file, the progress line, throughput, MFU and ETA.

Pauses (saving, sampling, evaluation) are kept out of training time. Losses stay on the device between two lines.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core.ranks import Ranks
from st_fast.train.guard import Readings


class Log:
    """Appends records to log.jsonl on the first rank and passes each on to `track`; other ranks say nothing."""

    def __init__(self, path: Path, ranks: Ranks, track: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self.path, self.active, self._track = path, ranks.first, track
        if self.active and path.exists():
            _drop_half_line(path)

    def write(self, kind: str, stage: str, step: int, **values: Any) -> None:
        """One line: what happened, where and when."""
        if not self.active:
            return
        record = {"kind": kind, "stage": stage, "step": step, "time": round(time.time(), 3)} | values
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._track is not None:
            self._track(record)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.active:
            print(text, flush=True)


def _drop_half_line(path: Path) -> None:
    """Cuts off what a killed process left behind its last full line."""
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)


@dataclass
class Clock:
    """Training time of a stage in seconds, pauses excluded, carried across interruptions."""

    seconds: float = 0.0
    _since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.seconds = self.read()
        self._since = None

    def read(self) -> float:
        return self.seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside out of the training time."""
        self.stop()
        try:
            yield
        finally:
            self.start()


class Meter:
    """Keeps the scalars of up to `room` steps on the device and brings them to the host when asked."""

    def __init__(self, device: torch.device, room: int) -> None:
        self.values = torch.zeros(room, 3, device=device)
        self.steps = 0

    @torch.no_grad()
    def add(self, denoise: Tensor, aux: Tensor, norm: Tensor) -> None:
        """Takes in a step's scalars, without waiting for the device."""
        self.values[self.steps].copy_(torch.stack((denoise, aux, norm)))
        self.steps += 1

    def read(self, ranks: Ranks, step: int) -> Readings:
        """The steps since the last reading, up to `step`, over all ranks; waits for the device."""
        mine, count = self.values[: self.steps], self.steps
        denoise, aux = ranks.sum(mine[:, :2].clone()).T.tolist()
        norms, self.steps = mine[:, 2].tolist(), 0
        bad_ranks: list[list[int]] = [[] for _ in range(count)]
        if not all(map(math.isfinite, norms)):  # the same on every rank, so all of them ask
            bad = torch.zeros(ranks.count, count)
            bad[ranks.rank] = (~torch.isfinite(mine[:, :2])).any(dim=1).float().cpu()
            bad_ranks = [column.nonzero()[:, 0].tolist() for column in ranks.sum(bad).T]
        return Readings(step - count + 1, denoise, aux, norms, bad_ranks)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this device's own matrix product, measured once a process on random data: what MFU is a share of."""
    side, repeats = (8192, 10) if device.type == "cuda" else (1536, 4)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        torch.mm(a, b)
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        _wait(device)
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2 * side**3 / best


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds; the best of a few."""
    count = 2**28 if device.type == "cuda" else 2**25
    source, target = (torch.ones(count, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def progress_line(stage: str, step: int, steps: int, values: dict[str, float], eta: float) -> str:
    """One greppable line."""
    losses = f"loss {values['loss']:.4f} (denoise {values['denoise']:.4f} + aux {values['aux']:.4f})"
    speed = f"{values['images_per_s']:.1f} images/s, MFU {100 * values['mfu']:.1f} %, {values['peak_gib']:.2f} GiB"
    place = f"{stage} {step:>{len(str(steps))}}/{steps}"
    return f"{place} | {losses} | norm {values['grad_norm']:.3f} | {speed} | ETA {duration(eta)}"


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
