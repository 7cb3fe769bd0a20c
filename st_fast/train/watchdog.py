"""Ends a run in which a rank hangs or has died, naming the rank and its last position.

A thread of every rank regularly posts the position of its main thread in the key-value store of torchrun's rendezvous.
A rank whose main thread makes no progress for `deadline` seconds hangs; one without messages for half a minute is dead
or frozen. A rank that notices this prints one line and exits with code 1.
The same messages tell the others at once that a rank was asked to stop by a signal.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from st_fast.core.checkpoint.saver import SAVING
from st_fast.core.errors import EXIT_FAILED, Interrupted, RunFailed, UserError
from st_fast.core.joining import Attempt
from st_fast.core.machine import local_rank
from st_fast.core.ranks import Ranks, Rendezvous
from st_fast.core.signals import asked_to_stop, pass_on

WAITING = ("all-reduce", "log", "agree")
"""Phases in which a rank may be waiting for others; a rank that hangs in another phase is the cause."""
SILENCE = 25.0
"""Seconds without a message after which a rank counts as dead: less than torchrun waits before it kills the rest."""
COLLECTIVE_ERROR = re.compile("gloo|nccl|connection|timed out|timeout", re.IGNORECASE)
SAVE_PATIENCE = 20.0
"""Seconds that a checkpoint being written may take before the process ends; an incomplete one is ignored."""


class Board(Rendezvous):
    """Where ranks leave messages: each writes its own, under its number, and reads all."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt, "watch")
        self._keys = [f"{self.prefix}/{rank}" for rank in range(attempt.count)]

    def read_all(self) -> list[str | None]:
        """The newest message of every rank; None before its first."""
        # One request for all where possible; `multi_get` of a missing key would wait for it.
        there = self._keys if self.store.check(self._keys) else [k for k in self._keys if self.store.check([k])]
        words = dict(zip(there, self.store.multi_get(there), strict=True)) if there else {}
        return [words[key].decode() if key in words else None for key in self._keys]


@dataclass
class Seen:
    """The last message of a rank, when it arrived, and when the rank last made progress."""

    word: dict[str, Any]
    spoke: float
    moved: float


class Watchdog:
    """One per process. `deadline`: seconds that a rank may make no progress, by this process's own clock."""

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
        # Two threads, because a store whose host is frozen blocks its clients for ever.
        self._talker = threading.Thread(target=self._talk, name="st_fast-talk", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="st_fast-watchdog", daemon=True)

    def start(self) -> None:
        """Starts both threads."""
        self._talker.start()
        self._watcher.start()

    def leave(self, reason: str, blames: bool = False) -> None:
        """Tells the others that this rank ends: "" if all is well, otherwise why; `blames`: because of another rank."""
        self._left, self._blames = reason, blames
        self._over.set()
        self._talker.join(2 * self.interval)

    def blame(self) -> str | None:
        """After a collective failed: the rank at fault, if that shows within a few seconds."""
        patience = time.monotonic() + 8 * self.interval
        while time.monotonic() < patience:
            time.sleep(self.interval / 4)
            if text := self._gone(silence=4 * self.interval):
                return text
        return None

    def verdict(self) -> str | None:
        """The ranks that are dead, gone or hanging, in one line; None while all is well."""
        now = time.monotonic()
        if now - self._board_answered > self.silence and self.board is not None:
            return f"the rendezvous at {self.board.where} has not answered for {self.silence:.0f} s"
        if text := self._gone(self.silence):
            return text
        stuck = [rank for rank, seen in enumerate(self._seen) if now - seen.moved > self.deadline]
        running = [rank for rank, seen in enumerate(self._seen) if seen.word.get("left") is None]
        if not stuck or (len(stuck) < len(running) and all(self._waits(rank) for rank in stuck)):
            return None  # ranks that only wait are not at fault, and the one they wait for makes progress
        # At fault are those furthest behind, without ranks that merely wait unless all of them do.
        behind = min(self._seen[rank].word.get("step", 0) for rank in stuck)
        last = [rank for rank in stuck if self._seen[rank].word.get("step", 0) == behind]
        culprits = [rank for rank in last if not self._waits(rank)] or last
        return f"no progress for {self.deadline:.0f} s: {'; '.join(map(self._described, culprits[:8]))}"

    def _waits(self, rank: int) -> bool:
        return self._seen[rank].word.get("phase") in WAITING

    def _gone(self, silence: float) -> str | None:
        """The first rank that has ended, or has not posted for `silence` seconds."""
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
        word, name = self._seen[rank].word, f"rank {rank} of {self.ranks.count}"
        if not word:
            return f"{name} (never heard of)"
        where = f" at {word['where']}" if word["where"] else ""
        stage = f"{word['stage']} " if word["stage"] else ""
        process = f"process {word['pid']} on {word['host']}"
        return f"{name} ({process}) in {stage}step {word['step']}, phase {word['phase']}{where}"

    def _share(self) -> None:
        """Posts this rank's position and reads those of the others."""
        self._beats += 1
        state = {"beat": self._beats, "left": self._left, "blames": self._blames, "stop": asked_to_stop()}
        process = {"pid": os.getpid(), "host": socket.gethostname(), "where": innermost_line(self._thread_id)}
        mine = json.dumps(asdict(self.ranks.heartbeat) | state | process)
        words: list[str | None] = [None] * self.ranks.count
        if self.board is not None:
            try:
                self.board.write(str(self.ranks.rank), mine)
                words = self.board.read_all()
                self._board_answered = time.monotonic()
            except RuntimeError:  # the store is gone or slow; `verdict` keeps the time
                pass
        words[self.ranks.rank] = mine
        now = time.monotonic()
        for seen, text in zip(self._seen, words, strict=True):
            word = json.loads(text) if text else seen.word
            if word.get("beat") != seen.word.get("beat"):
                seen.spoke = now
            if word.get("ticks") != seen.word.get("ticks") or word.get("left") is not None:
                seen.moved = now
            seen.word = word
        # They stop at the same step in any case; but the first may be drawing or scoring, and should not finish that.
        if name := next(filter(None, (seen.word.get("stop") for seen in self._seen)), None):
            pass_on(name)

    def _talk(self) -> None:
        self._share()
        while not self._over.wait(self.interval):
            self._share()
        self._share()  # with `left`

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            # The main thread may be ending by itself.
            if (text := self.verdict()) and not self._over.wait(2 * self.interval):
                self._end(text)

    def _end(self, text: str) -> None:
        heard = [r for r, seen in enumerate(self._seen) if time.monotonic() - seen.spoke <= 4 * self.interval]
        if local_rank() == 0 or self.ranks.rank == min([*heard, self.ranks.rank]):  # one line a machine, not hundreds
            print(f"st_fast: {text}; the run ends, its checkpoints are whole", file=sys.stderr, flush=True)
        for thread in threading.enumerate():
            if thread.name == SAVING:
                thread.join(SAVE_PATIENCE)
        os._exit(EXIT_FAILED)


def innermost_line(thread: int) -> str:
    """`file.py:line in function` of the innermost frame of a thread in st_fast's code; "" if there is none."""
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
    """Watches all ranks inside the block; 0 seconds: not at all.

    RunFailed, naming the rank, where torch.distributed reports an error in the block that another rank has caused.
    """
    if deadline <= 0:
        yield
        return
    dog = Watchdog(ranks, deadline, Board(ranks.attempt) if ranks.attempt else None)
    dog.start()
    try:
        yield
    except Interrupted:
        dog.leave("")
        raise
    except BaseException as error:
        # torch.distributed may have raised it because of another rank: gloo has no class for such errors.
        collective = isinstance(error, RuntimeError) and COLLECTIVE_ERROR.search(str(error))
        culprit = dog.blame() if ranks.count > 1 and collective else None
        own = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        dog.leave(culprit or own.splitlines()[0], blames=culprit is not None)
        if culprit is None:
            raise
        raise RunFailed(culprit) from error
    dog.leave("")
