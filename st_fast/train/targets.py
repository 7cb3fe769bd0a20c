"""When targets are made: before the student's pass, beside it on a side stream, or a step ahead.

"ahead" starts the target of the micro-batch that comes next as soon as this one's backward pass is queued, so that it
runs beside the exchange of gradients and the memory-bound optimiser. A frozen teacher does not see the update in
between, so the target is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from st_fast.model.side_stream import Later, side
from st_fast.recipe.schema import Run
from st_fast.train.batches import Batch
from st_fast.train.ranges import named
from st_fast.train.supervision import Noised, Supervision

Target = Later[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Lesson:
    """A micro-batch for the student with the target that was started for it; None where nothing is supervised."""

    noised: Noised
    target: Target | None


@dataclass(frozen=True)
class _Ahead:
    """A lesson that was started before its turn, and the micro-batch that it is of."""

    batch: Batch
    noised: Later[Noised]
    target: Target


class Targets:
    """Makes lessons of micro-batches, by `run.teacher_placement`. `noise` draws a micro-batch's noise."""

    def __init__(
        self, noise: Callable[[Batch], Noised], supervision: Supervision, run: Run, device: torch.device
    ) -> None:
        self._noise, self._supervision = noise, supervision
        self.looks_ahead = run.teacher_placement == "ahead"
        self._side = side(run, device, wanted=run.teacher_placement != "before")
        self._ahead: _Ahead | None = None

    def lesson(self, step: int, batch: Batch) -> Lesson:
        """The lesson of this micro-batch, started now unless it was started before."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.batch is batch:
            return Lesson(ahead.noised(), ahead.target)
        with named("noise"):
            noised = self._noise(batch)
        return Lesson(noised, self.target(step, noised))

    def target(self, step: int, noised: Noised) -> Target | None:
        """Starts the target of a noised micro-batch; None if nothing is supervised at this step."""
        with named("teacher"):
            if not self._supervision.active(step):
                return None
            self._side.follow()
            return self._side.start(lambda: self._supervision.target(noised), noised)

    def start_ahead(self, step: int, batch: Batch) -> None:
        """Starts the lesson of the micro-batch that comes next, after all that is queued so far."""
        if not self._supervision.active(step):
            return
        self._side.follow()
        with named("noise"):
            noised = self._side.start(lambda: self._noise(batch), batch)
        with named("teacher"):
            target = self._side.start(lambda: self._supervision.target(noised.unjoined))
        self._ahead = _Ahead(batch, noised, target)
