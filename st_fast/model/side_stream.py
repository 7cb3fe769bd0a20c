"""A side stream: a second queue of work for a CUDA device, or, where there is none, the one queue in the same order.

Tensors cross from one stream to the other with the two things that this takes: an event, so that nothing is read
before it is written, and `record_stream`, so that the allocator gives memory away only when its last reader is done.
Also the ways in which a guided teacher runs its two branches, with the condition and with the null condition.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from st_fast.recipe.schema import Run

T = TypeVar("T")


class Future(Generic[T]):
    """Work that was started; calling it gives what the work returned, fit for use on the current stream."""

    def __init__(self, value: T, done: torch.cuda.Event | None) -> None:
        self.unjoined = value
        """For work on the same side stream."""
        self._done = done

    def __call__(self) -> T:
        if self._done is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self._done)
            for tensor in tensors(self.unjoined):
                tensor.record_stream(current)
        return self.unjoined


class SideStream:
    """Where work is started beside the current stream. Without a stream it is done at once, on the current one."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream

    def follow(self) -> None:
        """What is started from now on comes after all that the current stream has queued."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def start(self, work: Callable[[], T], reads: Any = ()) -> Future[T]:
        """Queues the work; `reads` are the current stream's tensors that it uses, or dataclasses and tuples of these.

        These must be written already or be queued before: see `follow`.
        """
        if self._stream is None:
            return Future(work(), None)
        for tensor in tensors(reads):
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            value = work()
            done = torch.cuda.Event()
            done.record(self._stream)
        return Future(value, done)


def side_stream(run: Run, device: torch.device, wanted: bool) -> SideStream:
    """A side stream of the device if one is wanted, there is CUDA, and `run.streams` is not "off"."""
    there = wanted and device.type == "cuda" and run.streams != "off"
    return SideStream(torch.cuda.Stream(device)) if there else SideStream()


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors within dataclasses, tuples and lists, in order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def with_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same dataclasses and tuples around other tensors."""
    if isinstance(value, Tensor):
        return cast(T, change(value))
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: with_tensors(getattr(value, field.name), change) for field in fields(value)}
        return replace(value, **changed)
    if isinstance(value, tuple | list):
        return cast(T, type(value)(with_tensors(item, change) for item in value))
    return value


Features = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Tokens (B, N, D), or latents, t (B,) and a condition (B, …) → the stream after the teacher's block (B, N, D)."""
Branches = Callable[[Features, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Runs both: features, tokens, t, condition, null condition → the streams with the one and with the other."""


def batched(features: Features, tokens: Tensor, t: Tensor, condition: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """As one batch of 2B: the largest products."""
    both = features(tokens.repeat(2, *[1] * (tokens.ndim - 1)), t.repeat(2), torch.cat((condition, null)))
    conditional, unconditional = both.chunk(2)
    return conditional, unconditional


def apart(
    side: SideStream, features: Features, tokens: Tensor, t: Tensor, condition: Tensor, null: Tensor
) -> tuple[Tensor, Tensor]:
    """As two batches of B: one after the other, or with a side stream at the same time. Half the activations.

    A product's rows do not depend on how many there are, but for the rounding of a library that sums in another order
    for another size.
    """
    side.follow()
    unconditional = side.start(lambda: features(tokens, t, null), (tokens, t, null))
    return features(tokens, t, condition), unconditional()
