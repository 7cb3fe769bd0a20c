"""CUDA's streams, events and graphs without CUDA: ops run at once, and what orders them is checked or recorded.

`Races` is a happens-before checker. Every stream has a vector clock; waiting merges clocks, as events do on a device.
Each op that reads or writes a tensor must come after the writes (and, to write, after the reads) that it depends on,
by the waits that were queued and not by luck. Memory that one stream allocated and another used must have been told to
the allocator by `record_stream`.

`Graph` records the ops of a capture and replays them on the same memory, without the Python that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event:
    """As `torch.cuda.Event`: what a stream had queued, and knew of, when it was recorded."""

    def __init__(self) -> None:
        self.known: dict[Stream, int] = {}

    def record(self, stream: Stream) -> None:
        self.known = dict(stream.known)


class Stream:
    """As `torch.cuda.Stream`."""

    current: Stream

    def __init__(self, device: object = None) -> None:
        self.known: dict[Stream, int] = {self: 0}

    def wait_event(self, event: Event) -> None:
        for stream, time in event.known.items():
            self.known[stream] = max(self.known.get(stream, 0), time)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    """As `torch.cuda.stream`."""
    before, Stream.current = Stream.current, stream
    yield
    Stream.current = before


class Races(TorchDispatchMode):
    """Notes in `found` every op that nothing orders after what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ops = 0
        self._kept: list[object] = []  # or an address would stand for another tensor later
        self._owner: dict[int, Stream] = {}
        self._written: dict[int, tuple[Stream, int]] = {}
        self._read: dict[int, dict[Stream, int]] = {}
        self._users: dict[int, set[Stream]] = {}
        self._recorded: dict[int, set[Stream]] = {}

    def record(self, tensor: Tensor, stream: Stream) -> None:
        """`Tensor.record_stream`."""
        self._recorded.setdefault(_memory(tensor), set()).add(stream)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stream = Stream.current
        stream.known[stream] += 1
        self.ops += 1
        now, name = stream.known[stream], str(func)
        written = _written(func, args, kwargs or {})
        for tensor in _tensors((args, kwargs)):
            self._use(tensor, stream, now, name, writes=_memory(tensor) in written)
        out = func(*args, **(kwargs or {}))
        inputs = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            memory = _memory(tensor)
            if memory not in inputs:
                self._kept.append(tensor.untyped_storage())
                self._owner.setdefault(memory, stream)
                self._written[memory] = (stream, now)
        return out

    def _use(self, tensor: Tensor, stream: Stream, now: int, name: str, writes: bool) -> None:
        memory = _memory(tensor)
        self._kept.append(tensor.untyped_storage())
        writer, time = self._written.get(memory, (stream, 0))
        if stream.known.get(writer, 0) < time:
            self.found.append(f"{name} uses {tuple(tensor.shape)} before it is surely written")
        if writes:
            for reader, last in self._read.get(memory, {}).items():
                if stream.known.get(reader, 0) < last:
                    self.found.append(f"{name} overwrites {tuple(tensor.shape)} before it is surely read")
            self._written[memory] = (stream, now)
        self._read.setdefault(memory, {})[stream] = now
        self._users.setdefault(memory, set()).add(stream)

    def unrecorded(self) -> list[str]:
        """Memory that a stream used which is neither its allocator nor known to it."""
        owned = [memory for memory in self._users if memory in self._owner]
        strangers = [self._users[m] - {self._owner[m]} - self._recorded.get(m, set()) for m in owned]
        return [f"{len(found)} streams use memory of another" for found in strangers if found]


class Graph:
    """As `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.ops:
            new = func(*args, **kwargs)
            for old, fresh in zip(_tensors(out), _tensors(new), strict=True):
                if _memory(old) != _memory(fresh):
                    old.detach().copy_(fresh)


class _Recording(TorchDispatchMode):
    def __init__(self, ops: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self._ops = ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._ops.append((func, args, kwargs or {}, out))
        return out


@contextmanager
def capture(graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    """As `torch.cuda.graph`; the ops run once while they are recorded, which a device leaves to the first replay."""
    with _Recording(graph.ops), on(stream):
        yield


def install(patch: Callable[..., None], races: Races | None = None) -> None:
    """Puts the fakes where the real ones are; `patch` is `monkeypatch.setattr`."""
    Stream.current = Stream()
    patch(torch.cuda, "Stream", Stream)
    patch(torch.cuda, "Event", Event)
    patch(torch.cuda, "current_stream", lambda device=None: Stream.current)
    patch(torch.cuda, "stream", on)
    patch(torch.cuda, "CUDAGraph", Graph)
    patch(torch.cuda, "graph", capture)
    patch(Tensor, "record_stream", lambda tensor, stream: races.record(tensor, stream) if races else None)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: Any, kwargs: Any) -> set[int]:
    """The memory that an op changes, by its schema."""
    found: set[int] = set()
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found |= {_memory(tensor) for tensor in _tensors(value)}
    return found
