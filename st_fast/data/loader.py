"""Loaders: requests (arrays of record indices) in, batches out, in order. The caller decides which records.

So every loader gives the same batches for the same requests, bit for bit, and has no state to save. The "torch" loader
is `ReadAhead` alone.
"""

import importlib
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from st_fast.core.errors import RunFailed, Say, UserError, first_line, how_to_install
from st_fast.core.machine import free_memory
from st_fast.data.ahead import Answer, Patience, Readable, ReadAhead
from st_fast.data.buckets import BucketSet
from st_fast.data.given import GivenDataset

RESIDENT_SHARE = 0.25
"""The share of the free memory that a set may take to be held there: the step needs the rest."""
TRIAL_RECORDS = 4_096
TRIAL_BATCHES, TRIAL_BATCH = 32, 256
PART_BYTES = 2**24
"""Bytes that a resident set is read in at a time."""
PREFETCH = 2
"""Batches that DALI's pipeline holds beside the ones read ahead."""


class ResidentLoader:
    """The whole set as one tensor on the host or the device, gathered by index: the ceiling for the other loaders."""

    def __init__(self, records: Readable, device: torch.device, count: int | None = None) -> None:
        self._device, manifest = device, records.manifest
        count = manifest.count if count is None else count
        dtype = getattr(torch, manifest.dtype)
        self._moments = torch.empty((count, *manifest.shape), dtype=dtype, device=device)
        self._labels = torch.from_numpy(records.labels[:count]).to(device)
        step = max(1, PART_BYTES // manifest.record_bytes)
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


class ResidentBuckets:
    """Latents of several shapes, each of them resident."""

    def __init__(self, records: BucketSet, device: torch.device) -> None:
        self._records = records
        self._parts = [ResidentLoader(part, device) for part in records.parts]

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Answer]:
        """One answer for each request, whose records are of one bucket."""
        for request in requests:
            bucket = self._records.bucket_of(request)
            yield from self._parts[bucket].stream([request - self._records.starts[bucket]])

    def close(self) -> None:
        """Frees the memory."""
        for part in self._parts:
            part.close()


def dali_missing() -> str:
    """Why DALI can't be used here, or ""."""
    try:
        importlib.import_module("nvidia.dali.plugin.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        return first_line(error)
    return ""


class DaliLoader:
    """Batches through an NVIDIA DALI pipeline, copied to the device while the step before is computed.

    DALI's own readers know one sample a file or shuffle within a window only, so the records of a batch come in from
    outside (`external_source`), each batch as one DALI sample: no cost per record, and any batch size.
    """

    def __init__(self, records: Readable, device: torch.device, patience: Patience | None = None) -> None:
        if missing := dali_missing():
            raise UserError(f'data.loader = "dali": DALI can\'t be imported ({missing}): {how_to_install("data")}')
        self._records, self._device = records, device
        self._ahead = ReadAhead(records, patience=patience or Patience())

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Answer]:
        """One answer for each request, on the loader's device."""
        from nvidia.dali import Pipeline, fn, types

        batches, cuda = self._ahead.stream(requests), self._device.type == "cuda"
        device_id = (self._device.index or 0) if cuda else None
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=PREFETCH)
        moments_type = {"float16": types.FLOAT16, "float32": types.FLOAT}[self._records.manifest.dtype]
        with pipeline:
            source = ([[part.numpy()] for part in batch] for batch in batches)
            outputs = fn.external_source(source, num_outputs=2, dtype=[moments_type, types.INT64], ndim=[4, 1])
            pipeline.set_outputs(*(output.gpu() if cuda else output for output in outputs))
        pipeline.build()
        try:
            while (answer := self._next(pipeline)) is not None:
                yield answer
        finally:
            batches.close()

    def close(self) -> None:
        """Lets the threads end."""
        self._ahead.close()

    def _next(self, pipeline: Any) -> Answer | None:
        """The next outputs, copied into tensors of our own so that DALI may use its memory again; None at the end."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            outputs = pipeline.run(stream)
        except StopIteration:
            return None
        except (RuntimeError, IndexError) as error:
            raise RunFailed(f"data: DALI's pipeline failed ({first_line(error)})") from error
        dtypes = (getattr(torch, self._records.manifest.dtype), torch.int64)
        moments, labels = (
            feed_ndarray(output[0], torch.empty(output[0].shape(), dtype=dtype, device=self._device), stream)
            for output, dtype in zip(outputs, dtypes, strict=True)
        )
        return moments, labels


Loader = ResidentLoader | ResidentBuckets | DaliLoader | ReadAhead | GivenDataset
"""`stream` answers requests (n,) of record indices in order, `close` gives back threads and memory."""


def kept_bytes(kind: str, records: Readable, device: torch.device) -> tuple[int, int]:
    """Bytes of the set that the loader of that kind keeps on the device, at least and at most: "auto" may keep it."""
    size = 0 if isinstance(records, GivenDataset) else _set_bytes(records)
    may = kind == "auto" and size <= RESIDENT_SHARE * free_memory(device)
    return size * (kind == "resident"), size * (kind == "resident" or may)


def _set_bytes(records: Readable) -> int:
    parts = records.parts if isinstance(records, BucketSet) else (records,)
    return sum(part.manifest.count * part.manifest.record_bytes for part in parts)


def make_loader(kind: str, records: Readable, device: torch.device, say: Say) -> Loader:
    """The loader of that kind. "auto" reports its choice and the reason.

    On the CPU that is the resident one where the set fits; on CUDA the faster of DALI and, where it fits, resident.
    Without DALI the torch loader replaces it, with a notice. Of latents of several shapes "auto" is the resident loader
    or the torch one, and UserError if it is DALI's.
    """
    if isinstance(records, BucketSet):
        return _make_of_buckets(kind, records, device, say)
    if isinstance(records, GivenDataset):
        return records  # by PyTorch's DataLoader
    if kind == "auto":
        kind = _choose(records, device, say)
    missing = dali_missing() if kind == "dali" else ""
    if missing:
        say(f"data: DALI isn't there ({missing}), the torch loader takes its place: {how_to_install('data')}")
    return _make("torch" if missing else kind, records, device)


def _make_of_buckets(kind: str, records: BucketSet, device: torch.device, say: Say) -> Loader:
    size, free = _set_bytes(records), free_memory(device)
    if kind == "dali":
        allowed = '"auto", "torch" or "resident"'
        raise UserError(f'data.loader = "dali": not for latents of several shapes; allowed: {allowed}')
    if kind == "auto":
        kind = "resident" if size <= RESIDENT_SHARE * free else "torch"
        say(f"data: loader = {kind} (the set's {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB free)")
    return ResidentBuckets(records, device) if kind == "resident" else _make(kind, records, device)


def _make(kind: str, records: Readable, device: torch.device, count: int | None = None) -> Loader:
    if kind == "resident":
        return ResidentLoader(records, device, count)
    return DaliLoader(records, device) if kind == "dali" else ReadAhead(records, pinned=device.type == "cuda")


def _choose(records: Readable, device: torch.device, say: Say) -> str:
    size, free = kept_bytes("resident", records, device)[0], free_memory(device)
    fits = size <= RESIDENT_SHARE * free
    streaming = "torch" if dali_missing() else "dali"
    memory = f"the set's {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB free"
    if device.type == "cpu" or not fits:
        kind = "resident" if fits else streaming
        say(f"data: loader = {kind} ({memory})")
        return kind
    count = min(TRIAL_RECORDS, records.manifest.count)
    rates = {k: trial_rate(_make(k, records, device, count), count, device) for k in ("resident", streaming)}
    kind = max(rates, key=lambda name: rates[name])
    told = ", ".join(f"{name} {rate:,.0f} samples/s" for name, rate in rates.items())
    say(f"data: loader = {kind} ({told}; {memory})")
    return kind


def trial_rate(loader: Loader, count: int, device: torch.device) -> float:
    """Samples a second that a loader delivers to the device, over TRIAL_BATCHES random batches after two to warm up."""
    rng = np.random.default_rng(0)
    requests = [rng.integers(0, count, min(TRIAL_BATCH, count)) for _ in range(TRIAL_BATCHES + 2)]
    start, finish = 0.0, partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    for number, (moments, _) in enumerate(loader.stream(requests)):
        if moments.device != device:
            moments.to(device, non_blocking=True)
        if number == 1:
            finish()
            start = time.perf_counter()
    finish()
    loader.close()
    return TRIAL_BATCHES * len(requests[0]) / (time.perf_counter() - start)
