"""Records that can be read by index, and reading them ahead on threads, in order.

Reading outlives a disk that stalls or fails for a moment. Threads suffice: reading, CRC and copying all release the
interpreter's lock.
"""

import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from st_fast.core.checkpoint.meta import FilesIdentity as FilesIdentity
from st_fast.core.errors import RunFailed, UserError
from st_fast.data.manifest import Manifest


class Readable(Protocol):
    """Records that can be read ahead: latents, features or images."""

    manifest: Any
    """Has `shape` and `dtype` of one record."""
    labels: np.ndarray
    """(count,) int64."""

    @abstractmethod
    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads records `indices` (n,) into out (n, *shape) of the set's dtype; `BadFile` names a bad record."""


Answer = tuple[Tensor, Tensor]
"""Moments (n, 2C, H, W) or features, in the set's dtype; labels (n,) int64. On the host (for CUDA pinned) or device."""


def nothing() -> None:
    """Where nobody looks for signs of progress."""


class RecordSet(Readable):
    """Latents that can be read by index: shards, or REPA's layout in place."""

    manifest: Manifest

    @property
    def files(self) -> FilesIdentity | None:
        """Of a layout whose manifest has no hashes."""
        return None

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def digest(self) -> str:
        """The manifest's digest: a resumed run compares it."""
        return self.manifest.digest

    def shape_of(self, indices: np.ndarray) -> tuple[int, ...]:
        """The shape of each of these records, which are read at once."""
        return self.manifest.shape

    def by_shape(self, indices: np.ndarray) -> list[np.ndarray]:
        """The records in groups of one shape, each of which can be read at once."""
        return [indices]

    @abstractmethod
    def verify(self, beat: Callable[[], None] = nothing) -> None:
        """Reads everything once, with `beat` as a sign of progress; `BadFile` names the first bad record."""

    @abstractmethod
    def close(self) -> None:
        """Closes files and threads; the set can't be read any more."""

    def gather(self, indices: np.ndarray, pinned: bool = False) -> Answer:
        """Records `indices` (n,) → moments (n, 2C, H, W) in the set's dtype, labels (n,) int64; fresh host tensors."""
        return read_records(self, indices, pinned)


def with_std(moments: Tensor, posterior: str) -> Tensor:
    """Records in the form that networks are fed from, (n, 2C, H, W): latents without a posterior get a std of 0."""
    return torch.cat((moments, torch.zeros_like(moments)), dim=1) if posterior == "mean" else moments


def mean_and_std(moments: Tensor, manifest: Manifest) -> tuple[Tensor, Tensor]:
    """Records (n, *shape) → float32 mean and std of their latents, each (n, C, H, W), not scaled."""
    mean, std = with_std(moments, manifest.posterior).float().chunk(2, dim=1)
    return mean, std


def read_records(records: Readable, indices: np.ndarray, pinned: bool = False) -> Answer:
    """Records `indices` (n,) and their labels as fresh host tensors, page-locked if `pinned`."""
    shape = records.shape_of(indices) if isinstance(records, RecordSet) else records.manifest.shape
    dtype = getattr(torch, records.manifest.dtype)
    rows = torch.empty((len(indices), *shape), dtype=dtype, pin_memory=pinned)
    records.read_into(indices, rows.numpy())
    labels = torch.from_numpy(records.labels[indices])
    return rows, labels.pin_memory() if pinned else labels


@dataclass(frozen=True)
class Patience:
    """How long a read may take, how often it is tried, and the pause before the second try (doubled after each)."""

    timeout: float = 60.0
    attempts: int = 3
    pause: float = 0.5


_Task = tuple[np.ndarray, "Future[Answer]"]


class ReadAhead:
    """Answers requests in order from `workers` daemon threads, `depth` requests ahead; each answer is fresh memory.

    A read that fails or exceeds `patience.timeout` is tried again on another thread; after `patience.attempts` the
    error names the records. Daemon threads, so that one stuck in the kernel can't keep the process alive.
    """

    def __init__(
        self, records: Readable, workers: int = 2, depth: int = 4, pinned: bool = False, patience: Patience = Patience()
    ) -> None:
        self._read = records.gather if isinstance(records, RecordSet) else partial(read_records, records)
        self._depth, self._pinned, self._patience = depth, pinned, patience
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._threads = 0
        for _ in range(workers):
            self._add_thread()

    def stream(self, requests: Iterable[np.ndarray]) -> Generator[Answer, None, None]:
        """One answer for each request (n,) of record indices, in order."""
        pending: deque[_Task] = deque()
        try:
            for request in requests:
                pending.append(self._submit(request))
                if len(pending) > self._depth:
                    yield self._result(*pending.popleft())
            while pending:
                yield self._result(*pending.popleft())
        finally:
            for _, future in pending:
                future.cancel()

    def close(self) -> None:
        """Lets the threads end once they are done with what they are reading."""
        for _ in range(self._threads):
            self._tasks.put(None)
        self._threads = 0

    def _add_thread(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name="st_fast data", daemon=True).start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            request, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._read(request, self._pinned))
            except BaseException as error:  # handed to the caller, who decides
                future.set_exception(error)

    def _submit(self, request: np.ndarray) -> _Task:
        task: _Task = (np.asarray(request, np.int64), Future())
        self._tasks.put(task)
        return task

    def _result(self, request: np.ndarray, future: Future[Answer]) -> Answer:
        patience, failure = self._patience, ""
        for attempt in range(patience.attempts):
            try:
                return future.result(timeout=patience.timeout)
            except TimeoutError:
                failure = f"no answer within {patience.timeout:g} s"
                self._add_thread()  # the one that reads this may be stuck for good
            except (OSError, UserError) as error:
                if isinstance(error, UserError) and attempt + 1 == patience.attempts:
                    raise
                failure = str(error)
            if attempt + 1 < patience.attempts:
                time.sleep(patience.pause * 2**attempt)
                future = self._submit(request)[1]
        raise RunFailed(
            f"data: {len(request)} records from {int(request[0])} on could not be read in {patience.attempts} attempts "
            f"({failure}); the storage stalls or fails"
        )
