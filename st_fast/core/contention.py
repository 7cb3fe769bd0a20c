"""Lets OpenMP's threads sleep sooner while other work keeps them from their processors.

A thread of libgomp that waits for another one looks 300,000 times before it sleeps, some 20 ms. With a processor for
each thread that is fastest, as nobody ever sleeps. Beside other work the thread it waits for may stand in the queue of
its processor, and the looking takes the time that the other would need.
libgomp itself looks only 100 times while it has more threads than there are processors. So, while this process's
threads are kept waiting for processors, a few more are there, asleep. Results do not depend on it.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""By which a user says how threads wait."""
INTERVAL = 0.25
"""Seconds between two looks."""
CONTENDED = 0.25
"""Seconds a second, of all threads, in which they could run but had no processor. Half a core of other work beside
threads that wait awake makes about 0.5; a quiet machine next to nothing."""
SHORTEST, LONGEST = 2.0, 32.0
"""Seconds that threads sleep soon before it is tried whether they still must; twice as long each time that they must.
While they sleep soon it can't be seen: to be woken takes time on a quiet machine as well."""


def kept_waiting(tasks: Path = Path("/proc/self/task")) -> float:
    """Seconds that this process's living threads could run but had no processor; 0 where the system does not count."""
    total = 0
    for thread in tasks.glob("*"):
        try:
            total += int((thread / "schedstat").read_text().split()[1])
        except (OSError, ValueError, IndexError):  # the thread has ended, or not Linux
            continue
    return total / 1e9


def loaded_libgomps(maps: Path = Path("/proc/self/maps")) -> list[ctypes.CDLL]:
    """Every copy of GNU's OpenMP in this process: torch's, and perhaps another package's."""
    try:
        paths = set(re.findall(r"/\S*libgomp[^/\s]*\.so[^/\s]*$", maps.read_text(), re.MULTILINE))
    except OSError:
        return []
    return [library for path in sorted(paths) if hasattr(library := ctypes.CDLL(path), "GOMP_parallel")]


class SleepingThreads:
    """A thread with a team of its own in each libgomp, which counts them all: `count` of them, asleep until `end`."""

    def __init__(self, libraries: list[ctypes.CDLL], count: int) -> None:
        self._libraries, self._count, self._over = libraries, count, threading.Event()
        self._thread = threading.Thread(target=self._hold, name="st_fast-asleep", daemon=True)
        self._thread.start()

    def _hold(self) -> None:
        nothing = ctypes.CDLL(None).free  # free(NULL): a C function that takes a pointer and does nothing
        for library in self._libraries:
            library.GOMP_parallel(nothing, None, ctypes.c_uint(self._count), ctypes.c_uint(0))
        self._over.wait()  # the teams end with their thread

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def processors(library: ctypes.CDLL) -> int:
    """How many processors a libgomp counts, which it did when it was loaded: binding a thread later changes nothing."""
    return int(library.omp_get_num_procs())


def extra_threads(processors: int, threads: int) -> int:
    """Size of the team that brings libgomp's count above its processors' beside `threads` that compute.

    Less than 2 where these are more than the processors by themselves: libgomp's threads sleep soon as it is.
    """
    return processors - threads + 2


class Watch:
    """Looks at intervals whether threads are kept waiting. `asleep` while libgomp's threads sleep soon."""

    def __init__(self, libraries: list[ctypes.CDLL], count: int) -> None:
        self._libraries, self._count = libraries, count
        self._seen, self._when = kept_waiting(), time.monotonic()
        self._until, self._rest = 0.0, SHORTEST
        self.asleep: SleepingThreads | None = None

    def look(self) -> None:
        """Compares with the last look."""
        seen, now = kept_waiting(), time.monotonic()
        share = (seen - self._seen) / max(now - self._when, 1e-9)
        self._seen, self._when = seen, now
        if self.asleep is not None:
            if now >= self._until:
                self.end()
        elif share > CONTENDED:
            self.asleep = SleepingThreads(self._libraries, self._count)
            self._until, self._rest = now + self._rest, min(2 * self._rest, LONGEST)
        else:
            self._rest = SHORTEST

    def end(self) -> None:
        """libgomp waits as it always does."""
        if self.asleep is not None:
            self.asleep.end()
            self.asleep = None


@contextmanager
def watched(threads: int) -> Iterator[None]:
    """Inside, threads of libgomp sleep soon whenever others need their processors. threads: of one team of torch's.

    Does nothing for one thread, with another OpenMP, or where the user says how threads wait.
    """
    libraries = [] if threads < 2 or any(key in os.environ for key in OWN) else loaded_libgomps()
    count = extra_threads(min(map(processors, libraries), default=0), threads)
    if count < 2:
        yield
        return
    watch, over = Watch(libraries, count), threading.Event()

    def run() -> None:
        try:
            while not over.wait(INTERVAL):
                watch.look()
        finally:
            watch.end()

    thread = threading.Thread(target=run, name="st_fast-contention", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
