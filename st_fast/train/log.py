"""What a run reports while it trains: the log file, progress line, throughput, and steps that went wrong.

Pauses (saving, sampling, evaluation) are kept out of training time. Losses stay on the device between two lines.
A step whose gradient norm is not finite has changed nothing: the optimiser skips it on the device, on all ranks, since
the norm is that of the summed gradients. Skipped steps and spikes of the loss are found here, in what was read anyway.
"""

import json
import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from st_fast.core.checkpoint.meta import SkippedSteps, SpikeHistory
from st_fast.core.errors import RunFailed
from st_fast.core.files import BadFile
from st_fast.core.ranks import Ranks
from st_fast.core.records import log_records
from st_fast.core.writing import Writer

SPIKE_STEPS = 5
"""Steps in a row above the threshold that make a spike; a single hard batch does not."""
SPIKE_HISTORY, SPIKE_WARMUP = 256, 20
"""Steps that the usual loss is the median of, and how many of them are needed before anything is judged."""
JUDGED_EVERY = 10
"""Steps from one look for a spike to the next: a number of its own, so that logging and saving decide nothing."""
METER_ROOM = 1_024
"""Steps whose scalars stay on the device at most."""


class Log:
    """Appends records to log.jsonl on the first rank and passes each on to `track`; other ranks say nothing.

    `files` writes it, and what else the run writes while it trains, and survives a full disk. As a context: what waited
    for the disk is written, or named, also where an interruption or an error ends the run.
    """

    def __init__(self, path: Path, ranks: Ranks, track: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self.path, self.active, self._track = path, ranks.first, track
        self.files = Writer(self.say)
        if self.active:
            self.files.mend(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.files.missing:
            self.files.close()

    def write(self, kind: str, stage: str, step: int, **values: Any) -> None:
        """One line: what happened, where and when."""
        if not self.active:
            return
        record = {"kind": kind, "stage": stage, "step": step, "time": round(time.time(), 3)} | values
        self.files.append(self.path, json.dumps(record) + "\n")
        if self._track is not None:
            self._track(record)

    def has(self, kind: str, stage: str, step: int | None = None) -> bool:
        """Whether there is such a record of the stage, of this step if one is named; True where nothing is written."""
        if not self.active:
            return True
        try:
            return any(
                (record["kind"], record["stage"]) == (kind, stage) and step in (None, record["step"])
                for record in log_records(self.path)
            )
        except BadFile:
            return False

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.active:
            print(text, flush=True)


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


@dataclass(frozen=True)
class Readings:
    """The scalars of the steps since the last reading, in order; sums over ranks, the same on every rank."""

    first: int
    """Number of the first of these steps, counted from 1 as in the log."""
    denoise: Sequence[float]
    aux: Sequence[float]
    norms: Sequence[float]
    bad_ranks: Sequence[Sequence[int]]
    """By step: the ranks whose own losses were not finite."""
    updates: int
    """How many updates the optimiser has made by the last of these steps; skipped steps do not count."""
    direction: Sequence[float] = ()
    """The loss of the velocity's direction; empty in a stage that has none."""

    @property
    def bad(self) -> list[int]:
        """Offsets of the steps that were skipped."""
        return [i for i, norm in enumerate(self.norms) if not math.isfinite(norm)]

    def means(self) -> dict[str, float]:
        """Means over the steps that were not skipped; NaN if all were."""
        kept = np.isfinite(self.norms)
        denoise, aux, norm, *more = (
            float(np.asarray(values, np.float64)[kept].mean()) if kept.any() else math.nan
            for values in (self.denoise, self.aux, self.norms, *filter(len, [self.direction]))
        )
        found = {"loss": sum([denoise, aux, *more]), "denoise": denoise, "aux": aux, "grad_norm": norm}
        return found | dict.fromkeys(["direction"] * len(more), sum(more))


def joined(parts: Sequence[Readings]) -> Readings:
    """Readings of steps that follow one another as one."""
    denoise, aux, norms, direction = (
        array("f", chain.from_iterable(getattr(one, name) for one in parts))
        for name in ("denoise", "aux", "norms", "direction")
    )
    bad_ranks = list(chain.from_iterable(one.bad_ranks for one in parts))
    return Readings(parts[0].first, denoise, aux, norms, bad_ranks, parts[-1].updates, direction or ())


class Meter:
    """Keeps the scalars of up to `room` steps on the device and brings them to the host when asked."""

    def __init__(self, device: torch.device, room: int = METER_ROOM) -> None:
        self.values = torch.zeros(room, 5, device=device)
        self.steps = 0
        self._losses = [0, 1]
        """The columns that are losses, of which each rank has a part."""

    @torch.no_grad()
    def add(self, denoise: Tensor, aux: Tensor, norm: Tensor, updates: Tensor, direction: Tensor | None = None) -> None:
        """Stores a step's scalars, without waiting for the device; `updates`: how many were made, with this step."""
        found = [denoise, aux, norm, updates] + ([] if direction is None else [direction])
        self._losses = [0, 1, *range(4, len(found))]
        self.values[self.steps, : len(found)].copy_(torch.stack(found))
        self.steps += 1

    @property
    def full(self) -> bool:
        """Whether it must be read before the next step."""
        return self.steps == len(self.values)

    def read(self, ranks: Ranks, step: int) -> Readings:
        """The steps since the last reading, up to `step`, over all ranks; waits for the device."""
        mine, count = self.values[: self.steps], self.steps
        # 20 bytes a step, of which run.log_every may keep a million: arrays, and one empty list for all good steps.
        losses = torch.stack([mine[:, column] for column in self._losses], dim=1)
        denoise, aux, *direction = (array("f", column) for column in ranks.sum(losses.clone()).T.tolist())
        norms, updates = (array("f", column) for column in mine[:, 2:4].T.tolist())
        self.steps = 0
        bad_ranks: list[list[int]] = [[]] * count
        if not all(map(math.isfinite, norms)):  # the same on every rank, so all of them ask
            bad = torch.zeros(ranks.count, count)
            bad[ranks.rank] = (~torch.isfinite(losses)).any(dim=1).float().cpu()
            bad_ranks = [column.nonzero()[:, 0].tolist() for column in ranks.sum(bad).T]
        return Readings(step - count + 1, denoise, aux, norms, bad_ranks, int(updates[-1]), *direction)


class Skips:
    """Counts skipped steps of a stage, and ends the run after too many in a row."""

    def __init__(self, stage: str, allowed: int) -> None:
        self.stage, self.allowed = stage, allowed
        self.total = self.in_row = 0

    def add(self, readings: Readings) -> None:
        """Takes in readings."""
        for norm in readings.norms:
            bad = not math.isfinite(norm)
            self.in_row = self.in_row + 1 if bad else 0
            self.total += bad

    def state(self) -> SkippedSteps:
        """What a checkpoint keeps of it."""
        return SkippedSteps(self.total, self.in_row)

    def restore(self, state: SkippedSteps) -> None:
        """Goes on from there."""
        self.total, self.in_row = state.total, state.in_row

    def check(self, step: int) -> None:
        """RunFailed if the last `allowed` steps or more up to `step` were all skipped."""
        if self.in_row >= self.allowed:
            raise RunFailed(
                f"{self.stage}: the gradients of the last {self.in_row} steps up to {step} were not finite "
                f"(run.max_bad_steps = {self.allowed}); weights are as before them"
            )


class SpikeDetector:
    """A spike: the denoising loss is above `ratio` × its usual value for SPIKE_STEPS steps in a row; 0 finds none.

    The usual value is the median of the last SPIKE_HISTORY steps below the threshold, so a spike does not raise it.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.usual: deque[float] = deque(maxlen=SPIKE_HISTORY)
        self.found: int | None = None
        """The step that a spike began with, until `take` is called; losses up to then count for nothing."""
        self._high = 0

    def add(self, readings: Readings) -> None:
        """Takes in readings, of any number of steps at a time."""
        for number, loss in enumerate(readings.denoise, readings.first):
            if self.ratio == 0 or self.found is not None:
                return
            if not math.isfinite(loss):
                continue
            if len(self.usual) >= SPIKE_WARMUP and loss > self.ratio * median(self.usual):
                self._high += 1
                if self._high >= SPIKE_STEPS:
                    self._high, self.found = 0, number - SPIKE_STEPS + 1
            else:
                self._high = 0
                self.usual.append(loss)

    def take(self) -> int | None:
        """The step that a spike began with, if there was one since the last call."""
        found, self.found = self.found, None
        return found

    def state(self) -> SpikeHistory:
        """What a checkpoint keeps of it."""
        return SpikeHistory(tuple(self.usual), self._high, self.found)

    def restore(self, state: SpikeHistory) -> None:
        """Goes on from there."""
        self._high, self.found = state.high, state.found
        self.usual.extend(state.usual)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this device's own matrix product, measured once a process on random data: what MFU is a share of."""
    side, repeats = (8192, 10) if device.type == "cuda" else (1024, 4)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _least_seconds(device, lambda: torch.mm(a, b), 3, repeats)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy larger than any cache; the best of a few."""
    count = 2**28 if device.type == "cuda" else 2**25
    source, target = (torch.ones(count, device=device) for _ in range(2))
    return 2 * source.nbytes / _least_seconds(device, lambda: target.copy_(source), 4)


def _least_seconds(device: torch.device, work: Callable[[], object], tries: int, repeats: int = 1) -> float:
    """The best of some tries, after a warm-up each; the mean of `repeats` calls in a try."""
    wait, best = torch.cuda.synchronize if device.type == "cuda" else (lambda device: None), math.inf
    for _ in range(tries):
        work()
        wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait(device)
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def progress_line(stage: str, step: int, steps: int, values: dict[str, float], eta: float) -> str:
    """One greppable line."""
    losses = f"loss {values['loss']:.4f} (denoise {values['denoise']:.4f} + aux {values['aux']:.4f}"
    losses += f" + direction {values['direction']:.4f})" if "direction" in values else ")"
    speed = f"{values['images_per_s']:.1f} images/s, MFU {100 * values['mfu']:.1f} %, {values['peak_gib']:.2f} GiB"
    place = f"{stage} {step:>{len(str(steps))}}/{steps}"
    return f"{place} | {losses} | norm {values['grad_norm']:.3f} | {speed} | ETA {duration(eta)}"


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
