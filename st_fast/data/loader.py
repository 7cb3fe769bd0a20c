"""Loaders: requests (arrays of record indices) in, batches out, in order. Which records, the caller decides.

So every loader gives the same batches for the same requests, bit for bit, and has no state to save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import torch

from st_fast.core.errors import UserError
from st_fast.core.machine import free_memory
from st_fast.data.ahead import Answer, ReadAhead, TorchLoader
from st_fast.data.dali import DaliLoader, dali_missing
from st_fast.data.shards import RecordSet

Say = Callable[[str], None]
KINDS = ("auto", "resident", "dali", "torch")

RESIDENT_SHARE = 0.25
"""The share of the free memory that a set may take to be held there: the step needs the rest."""
TRIAL_RECORDS = 4_096
TRIAL_BATCHES, TRIAL_BATCH = 32, 256


class Loader(Protocol):
    """Answers requests with batches."""

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Answer]:
        """One answer for each request (n,) of record indices, in order; reads ahead."""
        ...

    def close(self) -> None:
        """Gives back threads and memory."""
        ...


class ResidentLoader:
    """The whole set as one tensor on the host or the device, gathered by index: the ceiling for the other loaders."""

    def __init__(self, records: RecordSet, device: torch.device, count: int | None = None) -> None:
        manifest = records.manifest
        count = manifest.count if count is None else count
        self._device = device
        dtype = getattr(torch, manifest.dtype)
        self._moments = torch.empty((count, *manifest.shape), dtype=dtype, device=device)
        self._labels = torch.from_numpy(records.labels[:count]).to(device)
        step = max(1, 2**24 // manifest.record_bytes)
        parts = [np.arange(start, min(start + step, count)) for start in range(0, count, step)]
        ahead = ReadAhead(records)
        for part, (moments, _) in zip(parts, ahead.stream(parts), strict=True):
            self._moments[part[0] : part[-1] + 1] = moments
        ahead.close()

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Answer]:
        """One answer for each request, on this loader's device. Nothing is read ahead: all is in memory."""
        for request in requests:
            rows = torch.from_numpy(np.ascontiguousarray(request, np.int64))
            if self._device.type == "cuda":
                rows = rows.pin_memory().to(self._device, non_blocking=True)
            yield self._moments.index_select(0, rows), self._labels.index_select(0, rows)

    def close(self) -> None:
        """Frees the memory."""
        self._moments = self._labels = torch.empty(0)


def kept_bytes(kind: str, records: RecordSet, device: torch.device) -> tuple[int, int]:
    """Bytes of the set that the loader of that kind keeps on the device, at least and at most: "auto" may keep it."""
    size = records.manifest.count * records.manifest.record_bytes
    may = kind == "auto" and size <= RESIDENT_SHARE * free_memory(device)
    return size * (kind == "resident"), size * (kind == "resident" or may)


def make_loader(kind: str, records: RecordSet, device: torch.device, say: Say) -> Loader:
    """The loader of that kind; UserError for an unknown one. "auto" says what it takes and why.

    On the CPU that is the resident one where the set fits; on CUDA the faster of DALI and, where it fits, resident.
    Without DALI, threads and PyTorch take its place, with a notice.
    """
    if kind not in KINDS:
        raise UserError(f"data.loader = {kind!r}: one of {', '.join(KINDS)}")
    if kind == "auto":
        kind = _choose(records, device, say)
    if kind == "resident":
        return ResidentLoader(records, device)
    missing = dali_missing() if kind == "dali" else ""
    if missing:
        say(f"data: DALI isn't there ({missing}), the torch loader takes its place: pip install 'st_fast[data]'")
    return TorchLoader(records, device) if kind == "torch" or missing else DaliLoader(records, device)


def _choose(records: RecordSet, device: torch.device, say: Say) -> str:
    size = records.manifest.count * records.manifest.record_bytes
    free = free_memory(device)
    fits = size <= RESIDENT_SHARE * free
    streaming = "torch" if dali_missing() else "dali"
    room = f"the set's {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB free"
    if device.type == "cpu" or not fits:
        kind = "resident" if fits else streaming
        say(f"data: loader = {kind} ({room})")
        return kind
    loaders: dict[str, Callable[[], Loader]] = {
        "resident": lambda: ResidentLoader(records, device, min(TRIAL_RECORDS, records.manifest.count)),
        streaming: lambda: (TorchLoader if streaming == "torch" else DaliLoader)(records, device),
    }
    count = min(TRIAL_RECORDS, records.manifest.count)
    rates = {name: trial_rate(make, count, device) for name, make in loaders.items()}
    kind = max(rates, key=lambda name: rates[name])
    say(f"data: loader = {kind} ({', '.join(f'{name} {rate:,.0f} samples/s' for name, rate in rates.items())}; {room})")
    return kind


def trial_rate(make: Callable[[], Loader], count: int, device: torch.device) -> float:
    """Samples a second that a loader delivers to the device, over TRIAL_BATCHES random batches after two to warm up."""
    loader = make()
    rng = np.random.default_rng(0)
    requests = [rng.integers(0, count, min(TRIAL_BATCH, count)) for _ in range(TRIAL_BATCHES + 2)]
    start = 0.0
    for number, (moments, _) in enumerate(loader.stream(requests)):
        if moments.device != device:
            moments.to(device, non_blocking=True)
        if number == 1:
            _finish(device)
            start = time.perf_counter()
    _finish(device)
    loader.close()
    return TRIAL_BATCHES * len(requests[0]) / (time.perf_counter() - start)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
