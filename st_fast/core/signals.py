"""SIGTERM and SIGINT become a flag that all ranks act on at the same step boundary; a second one changes nothing."""

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
    """Whether this process was asked to stop, and by which signal first. Called as a signal's handler."""

    name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name


class StopConsensus:
    """Answers, once a step, whether any rank was asked to stop: the same on every rank at the same step.

    With several ranks the answer is that of the step before: the all-reduce runs between the hosts during the step,
    so no rank waits for it and no device takes part.
    """

    def __init__(self, stop: StopRequest, ranks: Ranks) -> None:
        self._stop, self._ranks = stop, ranks
        self._asked: tuple[dist.Work, Tensor] | None = None

    def __call__(self) -> bool:
        if self._ranks.count == 1:
            return bool(self._stop)
        answer = self.close()
        flag = torch.tensor([float(bool(self._stop))])
        work = dist.all_reduce(flag, async_op=True)
        assert work is not None
        self._asked = (work, flag)
        return answer

    @property
    def signal(self) -> str:
        """The name of the signal, as far as this rank knows."""
        return self._stop.name or "a signal to another rank"

    def close(self) -> bool:
        """Waits for the all-reduce in flight, so that no rank leaves while another one needs it; gives its answer."""
        if self._asked is None:
            return False
        (work, flag), self._asked = self._asked, None
        self._ranks.heartbeat.beat("agree")
        work.wait()
        return flag.item() > 0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catches SIGTERM and SIGINT inside the block; a signal that a block around this one has caught counts as well.

    If one came, later ones are ignored to the process's end: all is saved, and a second one must not turn the
    documented exit code into a death by signal.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    for handler in before.values():
        if isinstance(handler, StopRequest):  # of a block around this one, which may have caught a signal already
            request.name = request.name or handler.name
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if request else handler)
