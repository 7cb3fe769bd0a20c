"""Ranks: this process's rank and device under torchrun, its heartbeat, and the few collectives of all ranks."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from st_fast.core.contention import watched
from st_fast.core.errors import Interrupted, UserError
from st_fast.core.machine import local_rank, rank_count

joined = False
"""Whether this process has been one of several ranks: `end_process` asks."""


@dataclass
class Heartbeat:
    """The phase of a rank's main thread: written by it, read by the watchdog. `ticks` counts signs of progress."""

    stage: str = ""
    step: int = 0
    phase: str = "start"
    ticks: int = 0
    over: bool = False
    """The training has given up."""

    def beat(self, phase: str) -> None:
        """The main thread has just entered this phase, or made progress within it."""
        self.phase = phase
        self.ticks += 1


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks, and its device."""

    rank: int
    count: int
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def first(self) -> bool:
        """Whether this rank writes the files and the log."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a small tensor, in place; every rank gets the same bits."""
        if self.count > 1:
            self.heartbeat.beat("agree")
            dist.all_reduce(values)
        return values

    def any(self, flags: list[bool]) -> list[bool]:
        """Whether each flag is raised on any rank: every rank gets the same answer. Goes over the host."""
        return (self.sum(torch.tensor(flags, dtype=torch.float32)) > 0).tolist()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors of all ranks with the first rank's."""
        if self.count == 1:
            return
        self.heartbeat.beat("agree")
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)

    def broadcast_from_rank0(self, say: Callable[[], Any]) -> Any:
        """The first rank's `say()`, on every rank; its UserError is raised on every rank."""
        if self.count == 1:
            return say()
        answer: list[Any] = [None, "", 0]  # the value, or an error's text and exit code
        if self.first:
            try:
                answer[0] = say()
            except UserError as error:
                answer[1:] = str(error), error.exit_code
        self.heartbeat.beat("agree")
        dist.broadcast_object_list(answer, 0, device=torch.device("cpu"))
        if answer[2]:
            failure = UserError(answer[1])
            failure.exit_code = answer[2]
            raise failure
        return answer[0]

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.count > 1:
            self.any([False])


def rows(length: int, rank: int, count: int) -> tuple[int, int]:
    """[start, stop) of a rank's part of a first dimension, as `torch.chunk` has it; later parts may be empty."""
    size = -(-length // count)
    return min(rank * size, length), min((rank + 1) * size, length)


class Rendezvous:
    """A client of its own to the store of torchrun's rendezvous; RuntimeError where that is gone. For one thread."""

    def __init__(self, about: str) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.where = f"{host}:{port}"
        self.store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.prefix = f"st_fast/{about}/{attempt}"

    def write(self, key: str, message: str) -> None:
        """Leaves a message for the other ranks."""
        self.store.set(f"{self.prefix}/{key}", message)

    def read(self, key: str) -> str | None:
        """The message under a key, None if there is none yet; never waits for one."""
        name = f"{self.prefix}/{key}"
        return self.store.get(name).decode() if self.store.check([name]) else None


@contextmanager
def process_group(device: str, patience: float) -> Iterator[Ranks]:
    """Joins the other ranks that torchrun started and leaves them at the end.

    device: "auto", "cpu" or "cuda"; "auto" takes CUDA where there is one. CUDA tensors travel by NCCL, those of the
    host by gloo, so that agreements between hosts never wait for a device. patience, in seconds, is how long a rank
    waits in a collective; the watchdog should lose its own patience earlier, because it knows whom to name.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    device_here = torch.device(kind, local_rank()) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device_here)
    count = rank_count()
    if count == 1:
        with watched(torch.get_num_threads() if kind == "cpu" else 1):
            yield Ranks(0, 1, device_here)
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        timeout=timedelta(seconds=patience),
        device_id=device_here if kind == "cuda" else None,
    )
    global joined
    joined = True
    found = Ranks(dist.get_rank(), count, device_here)
    try:
        with watched(torch.get_num_threads() if kind == "cpu" else 1):
            yield found
    except Interrupted:
        dist.destroy_process_group()
        raise
    except BaseException:
        found.heartbeat.over = True
        raise
    # After any other error peers may be gone, and taking leave of them would wait for them: the process just ends.
    dist.destroy_process_group()
