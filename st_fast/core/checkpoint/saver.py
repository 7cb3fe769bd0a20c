"""Saving during training: a snapshot on the host, written by a thread while the next steps run."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core.checkpoint.groups import bytes_of
from st_fast.core.checkpoint.store import SaveFailed, prune, save, sweep
from st_fast.core.checkpoint.together import Groups, Team, Whole, split
from st_fast.core.errors import Unreadable
from st_fast.core.files import json_bytes

Copied = tuple[torch.cuda.Event, torch.cuda.Event]
"""Around the copying of a snapshot from a CUDA device, which works on nothing else meanwhile."""
SAVING = "st_fast-save"
"""The name of the thread that writes."""


class Saver:
    """Writes checkpoints of one stage and prunes old ones; one write is in flight, a second `save` waits for it.

    `report` gets one line, from the writing thread, if a save fails (training goes on, nothing already saved is
    touched). Make a Saver only while holding the run's lock: it first removes leftovers of a killed process. With a
    `team` every rank has a Saver and they write together; the first rank prunes and sweeps. The snapshot takes as much
    host memory as the state and is used again by every save; page-locked for CUDA.
    """

    def __init__(
        self, root: Path, report: Callable[[str], None], *, keep: int = 3, keep_every: int = 0,
        also: Callable[[int], bool] = lambda step: False, team: Team | None = None,
    ) -> None:  # fmt: skip
        self._root, self._report, self._keep, self._keep_every = Path(root), report, keep, keep_every
        self._also = also
        self._team, self._leads = team, team is None or team.first
        self.stalled = 0.0  # seconds that all saves together have held up the training, the device's copying included
        self._host: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._last: tuple[int, Groups, Whole, Mapping[str, Any]] | None = None
        self._reported = ""
        self._error: BaseException | None = None
        if self._leads:
            sweep(self._root)

    def save(self, step: int, groups: Groups, meta: Mapping[str, Any]) -> float:
        """Takes the state as it is now and starts writing it; returns the seconds the caller was held up.

        The tensors may be changed as soon as this returns (on CUDA: by work queued on the current stream).
        """
        start = time.perf_counter()
        self.wait()
        self._path = None
        meta = json.loads(json_bytes(dict(meta)))  # a snapshot of the metadata too, and its errors told here
        whole: Whole = {}
        if self._team is not None:
            groups, whole = split(groups, self._team.rank)
        snapshot, copied = self._snapshot(groups)
        self._last, self._reported = (step, snapshot, whole, meta), ""
        self._start(copied)
        stall = time.perf_counter() - start
        self.stalled += stall
        return stall

    def again(self) -> None:
        """Starts writing the last snapshot once more, where that failed; tells no reason twice in a row."""
        if self.wait() is None and self._last is not None:
            self._start([])

    def _start(self, copied: list[Copied]) -> None:
        assert self._last is not None
        self._thread = threading.Thread(target=self._write, args=(*self._last, copied), name=SAVING)
        self._thread.start()

    def wait(self) -> Path | None:
        """Waits for the write in flight; the path of the last save, or None if it failed or there was none.

        An error that is no failure of the file system is raised here (or by the next `save`), not swallowed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._path

    def _snapshot(self, groups: Groups) -> tuple[Groups, list[Copied]]:
        """Copies of all tensors in host memory, and the events around the copying from each CUDA device."""
        host: dict[tuple[str, str], Tensor] = {}
        devices = {tensor.device for tensors in groups.values() for tensor in tensors.values() if tensor.is_cuda}
        before = [_mark(device) for device in devices]
        for name, tensors in groups.items():
            for key, tensor in tensors.items():
                buffer = self._host.get((name, key))
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                host[name, key] = buffer
                _copy(tensor.detach(), buffer)
        self._host = host
        # The copies are queued on the current stream, so later kernels on it can't overtake them: the thread waits
        # for them, the caller does not.
        copied = [(start, _mark(device)) for start, device in zip(before, devices, strict=True)]
        return {name: {key: host[name, key] for key in tensors} for name, tensors in groups.items()}, copied

    def _write(self, step: int, groups: Groups, whole: Whole, meta: Mapping[str, Any], copied: list[Copied]) -> None:
        try:
            for begun, ended in copied:
                ended.synchronize()
                self.stalled += begun.elapsed_time(ended) / 1e3
            if self._team is not None:
                self._path = self._team.save(self._root, step, groups, whole, meta)
            else:
                self._path = save(self._root, step, groups, meta)
            if self._leads:
                prune(self._root, self._keep, self._keep_every, self._also)
        except SaveFailed as error:
            if str(error) != self._reported:
                self._reported = str(error)
                self._report(self._reported)
        except (OSError, Unreadable) as error:
            self._report(
                f"{self._root}: old checkpoints could not be deleted ({getattr(error, 'strerror', None) or error})"
            )
        except BaseException as error:
            self._error = error


def _mark(device: torch.device) -> torch.cuda.Event:
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))


def _copy(source: Tensor, host: Tensor) -> None:
    if source.device.type == "cpu" and source.is_contiguous():
        # Tensor.copy_ starts and joins a thread team for each tensor: many times slower when the cores are busy.
        bytes_of(host)[:] = bytes_of(source)
    else:
        host.copy_(source, non_blocking=True)
