"""How the ranks of a job find one another, at every start anew: by messages in the key-value store of its rendezvous.

torchrun keeps one store for all attempts of a job (`--max-restarts`), and what earlier attempts wrote stays in it, the
addresses of dead processes included. So every attempt has a name of its own, which its first rank draws, and all
keys begin with it; a rank takes part in the attempt whose first rank has answered it by its own drawn token. The number
of the restart can't serve: after a node has failed it differs between the machines.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from st_fast.core.errors import RunFailed, UserError, first_line
from st_fast.core.machine import meeting_point

SLICE = timedelta(seconds=20)
"""For one request to the store."""
UNKNOWN_HOST = 5.0
"""Seconds in which a host's name must become known."""
AGENT_STORE = ("True", "1")
"""What torchrun sets where it keeps the store, and what torch's TCPStore takes for that."""
NAMED = 8
"""How many missing ranks a message names."""


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks of a job, and the store in which they leave messages."""

    name: str
    rank: int
    count: int
    address: tuple[str, int]
    store: TCPStore
    """Of the thread that joined; with rank 0, without torchrun, it is the store itself."""

    @property
    def keys(self) -> PrefixStore:
        """The part of the store that no other attempt has."""
        return PrefixStore(self.name, self.store)

    def exchange(self, topic: str, message: str, patience: float) -> list[str]:
        """Every rank's message on a topic, in order; each rank gives one. RunFailed names those that keep silent."""
        self.store.set(f"{self.name}/{topic}/{self.rank}", message)
        keys = [f"{self.name}/{topic}/{rank}" for rank in range(self.count)]
        _wait(lambda: self.store.check(keys), patience, lambda: self._silent(topic, keys, patience))
        return [word.decode() for word in self.store.multi_get(keys)]

    def _silent(self, topic: str, keys: list[str], patience: float) -> RunFailed:
        missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        return RunFailed(f"{named(missing, self.count)} did not answer within {patience:g} s ({topic})")


def join(rank: int, count: int, patience: float) -> Attempt:
    """Meets the other ranks of this start. RunFailed, naming who is missing, after `patience` seconds."""
    address, start = meeting_point(), time.monotonic()
    job, token = f"st_fast/{os.environ.get('TORCHELASTIC_RUN_ID', '')!a}", secrets.token_hex(8)
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") not in AGENT_STORE and rank == 0
    while True:
        left = patience - (time.monotonic() - start)
        store = _opened(address, own, left, patience)
        try:
            meet = _lead if rank == 0 else _follow
            return Attempt(meet(store, job, token, rank, count, left, patience), rank, count, address, store)
        except UserError:
            raise
        except RuntimeError:  # a store of the start before this one, which has just gone
            if own:
                raise
            time.sleep(0.2)


def _lead(store: TCPStore, job: str, token: str, rank: int, count: int, left: float, patience: float) -> str:
    """Calls an attempt out and answers all who come; its name."""
    name = f"{job}/{token}"
    keys = [f"{name}/here/{other}" for other in range(1, count)]
    store.set(f"{job}/attempt", name)
    _wait(lambda: store.check(keys), left, lambda: _missing(store, keys, count, patience))
    store.set(f"{name}/go", json.dumps(["", *(word.decode() for word in store.multi_get(keys))]))
    return name


def _follow(store: TCPStore, job: str, token: str, rank: int, count: int, left: float, patience: float) -> str:
    """Offers itself to the newest attempt until one has taken it; the attempt's name."""
    name = ""

    def taken() -> bool:
        nonlocal name
        if not store.check([f"{job}/attempt"]):
            return False
        if (newest := store.get(f"{job}/attempt").decode()) != name:
            name = newest
            store.set(f"{name}/here/{rank}", token)
        return store.check([f"{name}/go"]) and json.loads(store.get(f"{name}/go"))[rank] == token

    def late() -> RunFailed:
        # An attempt that was answered is an earlier one's, whose first rank has no successor yet.
        if not name or store.check([f"{name}/go"]):
            return RunFailed(f"joining: rank 0 of {count} did not come within {patience:g} s")
        return _missing(store, [f"{name}/here/{other}" for other in range(1, count)], count, patience)

    _wait(taken, left, late)
    return name


def _missing(store: TCPStore, keys: list[str], count: int, patience: float) -> RunFailed:
    missing = [number for number, key in enumerate(keys, 1) if not store.check([key])]
    return RunFailed(f"joining: {named(missing or [0], count)} did not come within {patience:g} s")


def named(ranks: list[int], count: int) -> str:
    """Ranks in words, not all of hundreds."""
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:NAMED]))}{more} of {count}"


def _wait(condition: Callable[[], bool], patience: float, late: Callable[[], RunFailed]) -> None:
    """Returns once the condition holds; in Python, so that signals are heard meanwhile."""
    end, pause = time.monotonic() + patience, 0.002
    while not condition():
        if time.monotonic() > end:
            raise late()
        time.sleep(pause)
        pause = min(1.5 * pause, 0.25)


def _opened(address: tuple[str, int], own: bool, left: float, patience: float) -> TCPStore:
    """A client of the store at the address or, where rank 0 keeps it, the store."""
    host, port = address
    start = time.monotonic()
    _look_up(host, port)  # torch's store would try for a minute, and print each time
    if own:
        try:
            return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=SLICE, multi_tenant=True)
        except RuntimeError as error:
            raise UserError(f"environment: MASTER_ADDR = {host}, MASTER_PORT = {port}: {first_line(error)}") from None
    late = RunFailed(f"joining: rank 0, or torchrun, has not opened {host}:{port} within {patience:g} s")
    while True:
        try:
            # Looked at first, because torch's client prints every attempt and hears no signal meanwhile.
            socket.create_connection(address, timeout=2.0).close()
            return client(address)
        except OSError:
            if time.monotonic() - start > left:
                raise late from None
            time.sleep(0.1)


def _look_up(host: str, port: int) -> None:
    """UserError unless the host's name is known, at the latest after UNKNOWN_HOST seconds."""
    start = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host, port)
            return
        except socket.gaierror as error:
            if time.monotonic() - start > UNKNOWN_HOST:
                raise UserError(f"environment: MASTER_ADDR = {host}: {error.strerror}") from None
        except UnicodeError:  # what no name of a host can be
            raise UserError(f"environment: MASTER_ADDR = {host}: no host's name") from None
        time.sleep(0.1)


def client(address: tuple[str, int]) -> TCPStore:
    """A client of its own to a store that is there, for one thread; RuntimeError where it is gone."""
    return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=SLICE)
