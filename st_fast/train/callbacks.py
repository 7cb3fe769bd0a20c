"""What a program is told while a run trains: an `Event` for each step and each record of the log.

Callbacks run on the first rank. One that raises does not lose what was trained: all ranks save at the same step, and
the run ends with a line that names the callback.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from st_fast.core.errors import RunFailed, Stopped, first_line


@dataclass(frozen=True)
class Event:
    """Something that has happened in a run."""

    kind: str
    """"step" after each step, or the kind of a log record: start, train, save, sample, eval, validate, skip, end, …"""
    stage: str
    step: int
    """How many steps of the stage are done."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The record's values, such as loss, lr and images_per_s of "train"; none of "step"."""
    model: nn.Module | None = None
    """The module that is trained, on its device, of a "step"; what changes its weights changes the run."""


Callback = Callable[[Event], object]


class Callbacks:
    """Calls each callback with each event, until one raises."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)
        self.failure = ""
        """Whose callback raised, and what; "" while none has."""

    def __call__(self, event: Event) -> None:
        """Tells all callbacks of an event."""
        for callback in self._callbacks if not self.failure else ():
            try:
                callback(event)
            except Stopped:  # a signal came while it ran
                raise
            except BaseException as error:  # whatever somebody's code raises, sys.exit too
                name = getattr(callback, "__qualname__", type(callback).__name__)
                where = f"{event.stage} step {event.step}"
                self.failure = f"callback {name} raised {type(error).__name__} at {where}: {first_line(error)}"
                return

    def record(self, record: Mapping[str, Any]) -> None:
        """Tells of a record of the log."""
        values = dict(record)
        self(Event(values.pop("kind"), values.pop("stage"), values.pop("step"), values))

    def check(self, saved: str) -> None:
        """RunFailed where a callback has raised; `saved` says what was saved since."""
        if self.failure:
            raise RunFailed(f"{self.failure}; {saved}, and the same call continues")
