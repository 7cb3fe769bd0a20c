"""SIGTERM and SIGINT become a flag that all ranks act on at the same step boundary; a second one changes nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from st_fast.core.ranks import Ranks


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and by which signal first."""

    name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


class StopConsensus:
    """Answers, once a step, whether any rank was asked to stop: the same on every rank at the same step.

    With several ranks the answer is that of the step before: the question travels between the hosts while the step
    runs, so nobody waits for it and no device is asked.
    """

    def __init__(self, stop: StopRequest, ranks: Ranks) -> None:
        self._stop, self._ranks = stop, ranks
        self._asked: tuple[dist.Work, Tensor] | None = None

    def __call__(self) -> bool:
        if self._ranks.count == 1:
            return bool(self._stop)
        answer = self._answer()
        flag = torch.tensor([float(bool(self._stop))])
        work = dist.all_reduce(flag, async_op=True)
        assert work is not None
        self._asked = (work, flag)
        return answer

    @property
    def signal(self) -> str:
        """By which signal, as far as this rank knows."""
        return self._stop.name or "a signal to another rank"

    def close(self) -> None:
        """Waits for the question still under way, so that no rank leaves while another asks."""
        self._answer()

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        (work, flag), self._asked = self._asked, None
        self._ranks.heartbeat.beat("agree")
        work.wait()
        return flag.item() > 0


class _Note:
    """The handler: notes the first signal in its request."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.request.name = self.request.name or signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catches SIGTERM and SIGINT inside the block; what a block around this one has caught already counts in it, too.

    If one came, later ones are ignored to the process's end: all is saved, and a second one must not turn the
    documented exit code into a death by signal.
    """
    request = StopRequest()
    note = _Note(request)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    for handler in before.values():
        if isinstance(handler, _Note):  # one came before this block was entered, and asks for the same
            request.name = request.name or handler.request.name
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if request else handler)
