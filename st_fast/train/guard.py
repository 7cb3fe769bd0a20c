"""Numbers going wrong: steps that were not finite, and losses that spike. Looks at what was logged, never at a device.

A step whose gradient norm is not finite has changed nothing (the optimiser sees to that on the device, and the norm is
of gradients summed over ranks, so all ranks skip together). Here such steps are named, with the samples they saw.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from st_fast.core.errors import RunFailed

SPIKE_STEPS = 5
"""Steps in a row above the threshold that make a spike; a single hard batch does not."""
SPIKE_HISTORY, SPIKE_WARMUP = 256, 20
"""Steps that the usual loss is the median of, and how many of them are needed before anything is judged."""


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

    @property
    def bad(self) -> list[int]:
        """Offsets of the steps that were skipped."""
        return [i for i, norm in enumerate(self.norms) if not math.isfinite(norm)]

    def means(self) -> dict[str, float]:
        """Means over the steps that were not skipped; NaN if all were."""
        kept = np.isfinite(np.asarray(self.norms))
        denoise, aux, norm = (_mean(np.asarray(values)[kept]) for values in (self.denoise, self.aux, self.norms))
        return {"loss": denoise + aux, "denoise": denoise, "aux": aux, "grad_norm": norm}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


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

    def judge(self, step: int) -> None:
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
        self._high = 0

    def add(self, readings: Readings) -> int | None:
        """Takes in readings; the number of the step that a spike began with, if there is one."""
        if self.ratio == 0:
            return None
        for number, loss in enumerate(readings.denoise, readings.first):
            if not math.isfinite(loss):
                continue
            if len(self.usual) >= SPIKE_WARMUP and loss > self.ratio * median(self.usual):
                self._high += 1
                if self._high >= SPIKE_STEPS:
                    self._high = 0
                    return number - SPIKE_STEPS + 1
            else:
                self._high = 0
                self.usual.append(loss)
        return None
