"""Ranks: this process's rank and device under torchrun, its heartbeat, and the few collectives of all ranks."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from st_fast.core.contention import watched
from st_fast.core.errors import EXIT_FAILED, Interrupted, UserError
from st_fast.core.joining import Attempt, client, join
from st_fast.core.machine import local_rank, rank, rank_count

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

JOINING = 300.0
"""Seconds that a rank waits for others to come, where nothing else is said."""

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
    attempt: Attempt | None = None
    """Where the ranks met; None for one rank."""

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

    def gather(self, mine: Tensor) -> Tensor:
        """Every rank's tensor, all of one shape (n, …), in the order of ranks: (count · n, …). Without gradient."""
        if self.count == 1:
            return mine
        self.heartbeat.beat("agree")
        whole = mine.new_empty((self.count * len(mine), *mine.shape[1:]))
        dist.all_gather(list(whole.chunk(self.count)), mine.contiguous())
        return whole

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
            self.heartbeat.beat("read")  # no phase in which it could wait for others
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
    """A client of its own to the store in which this start's ranks met; RuntimeError where it is gone. For a thread."""

    def __init__(self, attempt: Attempt, about: str) -> None:
        self.where = "{}:{}".format(*attempt.address)
        self.store = client(attempt.address)
        self.prefix = f"{attempt.name}/{about}"

    def write(self, key: str, message: str) -> None:
        """Leaves a message for the other ranks."""
        self.store.set(f"{self.prefix}/{key}", message)

    def read(self, key: str) -> str | None:
        """The message under a key, None if there is none yet; never waits for one."""
        name = f"{self.prefix}/{key}"
        return self.store.get(name).decode() if self.store.check([name]) else None


Watching = Callable[[Ranks], AbstractContextManager[None]]
"""What looks after all ranks from the moment they have met."""


@contextmanager
def process_group(
    device: str, patience: float, joining: float = JOINING, watching: Watching = lambda ranks: nullcontext()
) -> Iterator[Ranks]:
    """Joins the other ranks that torchrun started and leaves them at the end.

    device: "auto", "cpu" or "cuda"; "auto" takes CUDA where there is one. CUDA tensors travel by NCCL, those of the
    host by gloo, so that agreements between hosts never wait for a device. patience, in seconds, is how long a rank
    waits in a collective; the watchdog should lose its own patience earlier, because it knows whom to name. joining,
    in seconds, is how long it waits for others to come; then a line names them, and the process ends with code 1.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    count, number = rank_count(), rank()
    device_here = torch.device(kind, local_rank()) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device_here)
    if count == 1:
        alone = Ranks(0, 1, device_here)
        with watching(alone), watched(torch.get_num_threads() if kind == "cpu" else 1):
            yield alone
        return
    attempt = join(number, count, joining)
    global joined
    joined = True
    found = Ranks(number, count, device_here, attempt=attempt)
    with watching(found):
        try:
            found.heartbeat.beat("join")
            with ends_process(joining, f"joining: the ranks that have met could not connect within {joining:.0f} s"):
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                    timeout=timedelta(seconds=patience), rank=number, world_size=count,
                    store=PrefixStore(attempt.name, client(attempt.address)),
                    device_id=device_here if kind == "cuda" else None,
                )  # fmt: skip
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


@contextmanager
def ends_process(seconds: float, why: str) -> Iterator[None]:
    """Ends the process with a line and exit code 1 if what is inside, which nothing can interrupt, takes longer."""

    def end() -> None:
        print(f"st_fast: {why}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether it is a DTensor. Whoever made one has imported them; nobody else waits half a second for that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
