"""Names the rank that hangs or died, where it stands, and ends the run with a code: a job never waits for ever.

Every rank has a thread that tells the others once in a while, through a store of key-value pairs at torchrun's own
rendezvous, where its main thread stands. A rank whose main thread gets no further for `deadline` seconds hangs; one
that says nothing for half a minute is dead or frozen. Whoever notices says so in one line and leaves with exit code 1.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from st_fast.core.checkpoint.saver import SAVING
from st_fast.core.errors import EXIT_FAILED, Interrupted, RunFailed, UserError
from st_fast.core.machine import local_rank
from st_fast.core.ranks import Ranks, Rendezvous

WAITING = ("all-reduce", "log", "agree")
"""Phases in which a rank may be waiting for others; whoever stands still elsewhere is whom they wait for."""
SILENCE = 25.0
"""Seconds without a word after which a rank counts as dead: less than torchrun gives ranks to end after one died."""

SAVE_PATIENCE = 20.0
"""Seconds that a checkpoint under way may take before the process ends; one cut short is only not there."""


class Board(Protocol):
    """Where ranks leave their words: `post` one's own, `read` everybody's (None: nothing yet)."""

    where: str
    """Its address, for messages."""

    def post(self, rank: int, word: str) -> None: ...

    def read(self) -> list[str | None]: ...


class StoreBoard:
    """A board on a client of its own to the store of torchrun's rendezvous; OSError-like errors where it is gone."""

    def __init__(self, count: int) -> None:
        rendezvous = Rendezvous("watch")
        self.where, self._client = rendezvous.where, rendezvous.store
        self._keys = [f"{rendezvous.prefix}/{rank}" for rank in range(count)]

    def post(self, rank: int, word: str) -> None:
        self._client.set(self._keys[rank], word)

    def read(self) -> list[str | None]:
        # One question for all, as it nearly always is; `multi_get` of a key that is not there would wait for it.
        there = self._keys if self._client.check(self._keys) else [k for k in self._keys if self._client.check([k])]
        words = dict(zip(there, self._client.multi_get(there), strict=True)) if there else {}
        return [words[key].decode() if key in words else None for key in self._keys]


@dataclass
class Seen:
    """What this process knows of one rank: its last word, when it last spoke, and when it last got on."""

    word: dict[str, Any]
    spoke: float
    moved: float


class Watchdog:
    """One a process. `deadline` in seconds: how long a rank may stand still. Times are this process's own clock's."""

    def __init__(self, ranks: Ranks, deadline: float, board: Board | None = None) -> None:
        self.ranks, self.deadline, self.board = ranks, deadline, board
        self.interval = min(2.0, deadline / 10)
        self.silence = min(SILENCE, deadline)
        self._thread_id = threading.get_ident()
        self._beats = 0
        self._left: str | None = None
        self._blames = False
        self._over = threading.Event()
        now = time.monotonic()
        self._seen = [Seen({}, now, now) for _ in range(ranks.count)]
        self._board_answered = now
        # Two threads, because a store whose host is frozen keeps its clients waiting for ever.
        self._talker = threading.Thread(target=self._talk, name="st_fast-talk", daemon=True)
        self._judge = threading.Thread(target=self._watch, name="st_fast-watchdog", daemon=True)

    def start(self) -> None:
        """Starts talking and watching."""
        self._talker.start()
        self._judge.start()

    def leave(self, reason: str, blames: bool = False) -> None:
        """This rank ends: "" if in good order, otherwise why, which its peers quote; `blames`: another rank is why."""
        self._left, self._blames = reason, blames
        self._over.set()
        self._talker.join(2 * self.interval)

    def blame(self) -> str | None:
        """After a collective failed: who is to blame, if that shows within a few seconds."""
        patience = time.monotonic() + 8 * self.interval
        while time.monotonic() < patience:
            time.sleep(self.interval / 4)
            if text := self._gone(silence=4 * self.interval):
                return text
        return None

    def verdict(self) -> str | None:
        """Who is dead, gone or hung, in one line; None while all is well."""
        now = time.monotonic()
        if now - self._board_answered > self.silence and self.board is not None:
            return f"the rendezvous at {self.board.where} has not answered for {self.silence:.0f} s"
        if text := self._gone(self.silence):
            return text
        stuck = [rank for rank, seen in enumerate(self._seen) if now - seen.moved > self.deadline]
        running = [rank for rank, seen in enumerate(self._seen) if seen.word.get("left") is None]
        if not stuck or (len(stuck) < len(running) and all(self._waits(rank) for rank in stuck)):
            return None  # those who only wait are not at fault, and whoever they wait for still gets on
        named = "; ".join(self._described(rank) for rank in self._culprits(stuck))
        return f"no progress for {self.deadline:.0f} s: {named}"

    def _culprits(self, stuck: list[int]) -> list[int]:
        """Of those who stand still: who is furthest behind and not merely waiting; all of them if that is nobody."""
        behind = min(self._seen[rank].word.get("step", 0) for rank in stuck)
        last = [rank for rank in stuck if self._seen[rank].word.get("step", 0) == behind]
        return ([rank for rank in last if not self._waits(rank)] or last)[:8]

    def _waits(self, rank: int) -> bool:
        return self._seen[rank].word.get("phase") in WAITING

    def _gone(self, silence: float) -> str | None:
        now = time.monotonic()
        for rank, seen in enumerate(self._seen):
            if rank == self.ranks.rank:
                continue
            left = seen.word.get("left")
            if left:
                return str(left) if seen.word["blames"] else f"{self._described(rank)}, ended: {left}"
            if left is None and now - seen.spoke > silence:
                return f"{self._described(rank)}, is dead or frozen: not a word for {now - seen.spoke:.0f} s"
        return None

    def _described(self, rank: int) -> str:
        word = self._seen[rank].word
        who = f"rank {rank} of {self.ranks.count}"
        if not word:
            return f"{who} (never heard of)"
        where = f" at {word['where']}" if word["where"] else ""
        stage = f"{word['stage']} " if word["stage"] else ""
        process = f"process {word['pid']} on {word['host']}"
        return f"{who} ({process}) in {stage}step {word['step']}, phase {word['phase']}{where}"

    def _word(self) -> dict[str, Any]:
        self._beats += 1
        return asdict(self.ranks.heartbeat) | {
            "beat": self._beats,
            "left": self._left,
            "blames": self._blames,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "where": innermost_line(self._thread_id),
        }

    def _share(self) -> None:
        """Says where this rank stands and reads where the others do."""
        mine = self._word()
        words: list[str | None] = [None] * self.ranks.count
        if self.board is not None:
            try:
                self.board.post(self.ranks.rank, json.dumps(mine))
                words = self.board.read()
                self._board_answered = time.monotonic()
            except RuntimeError:  # torch.distributed's errors: gone with its host, or slow; `verdict` keeps the time
                pass
        words[self.ranks.rank] = json.dumps(mine)
        now = time.monotonic()
        for seen, text in zip(self._seen, words, strict=True):
            word = json.loads(text) if text else seen.word
            if word.get("beat") != seen.word.get("beat"):
                seen.spoke = now
            if word.get("ticks") != seen.word.get("ticks") or word.get("left") is not None:
                seen.moved = now
            seen.word = word

    def _talk(self) -> None:
        self._share()
        while not self._over.wait(self.interval):
            self._share()
        self._share()  # its last words

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            if text := self.verdict():
                self._end(text)

    def _end(self, text: str) -> None:
        if self._over.wait(2 * self.interval):  # the main thread may just be finding out by itself
            return
        heard = [r for r, seen in enumerate(self._seen) if time.monotonic() - seen.spoke <= 4 * self.interval]
        if local_rank() == 0 or self.ranks.rank == min([*heard, self.ranks.rank]):  # one a machine, not hundreds
            print(f"st_fast: {text}; the run ends, its checkpoints are whole", file=sys.stderr, flush=True)
        for thread in threading.enumerate():
            if thread.name == SAVING:
                thread.join(SAVE_PATIENCE)
        os._exit(EXIT_FAILED)


def innermost_line(thread: int) -> str:
    """`file.py:line in function` of the innermost frame of a thread that is this package's code; "" if none is."""
    package = str(Path(__file__).parents[1])
    frame = sys._current_frames().get(thread)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(package):
            return f"{Path(code.co_filename).relative_to(package)}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return ""


@contextmanager
def watched(ranks: Ranks, deadline: float) -> Iterator[None]:
    """Watches all ranks inside the block; 0 seconds: not at all. A failed collective becomes the name of who failed.

    Raises RunFailed where torch.distributed reports an error in the block and another rank is seen to be its cause.
    """
    if deadline <= 0:
        yield
        return
    dog = Watchdog(ranks, deadline, StoreBoard(ranks.count) if ranks.count > 1 else None)
    dog.start()
    try:
        yield
    except Interrupted:
        dog.leave("")
        raise
    except BaseException as error:
        culprit = dog.blame() if ranks.count > 1 and _of_a_collective(error) else None
        dog.leave(culprit or _first_line(error), blames=culprit is not None)
        if culprit is None:
            raise
        raise RunFailed(culprit) from error
    dog.leave("")


def _of_a_collective(error: BaseException) -> bool:
    """Whether torch.distributed may have raised it because of another rank: it has no class for that with gloo."""
    words = ("gloo", "nccl", "connection", "timed out", "timeout")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _first_line(error: BaseException) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0]
