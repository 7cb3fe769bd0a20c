"""Kills one of two ranks under `torchrun --max-restarts`, at a random moment, again and again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests import tiny
from tests.faults.ranks import ONE_THREAD, TORCHRUN


def ranks_of(job: int) -> dict[int, int]:
    """Process ids of torchrun's ranks, by rank."""
    found = {}
    try:
        children = Path(f"/proc/{job}/task/{job}/children").read_text().split()
        for child in map(int, children):
            words = dict(w.partition("=")[::2] for w in Path(f"/proc/{child}/environ").read_text().split("\0"))
            if "RANK" in words:
                found[int(words["RANK"])] = child
    except OSError:  # ended meanwhile
        return {}
    return found


def killed_again_and_again(
    recipe: Path, output: Path, moments: list[float], rng: random.Random, *options: str, limit: float = 600.0,
    sooner: Callable[[], bool] = lambda: False,
) -> tuple[int, int]:  # fmt: skip
    """Trains the recipe on two ranks under one torchrun, killing one of them that many seconds after each start, or as
    soon as `sooner` holds.

    Returns torchrun's exit code and how many were killed: a run that ends before its moment ends undisturbed.
    """
    own = ["--nproc-per-node=2", f"--max-restarts={len(moments)}", f"--master-port={rng.randint(20_000, 60_000)}"]
    argv = [str(TORCHRUN), *own, "-m", "st_fast.train", str(recipe), *options]
    with output.open("wb") as file:
        job = subprocess.Popen(argv, stdout=file, stderr=file, cwd=tiny.ROOT, env=os.environ | ONE_THREAD)
    end, killed, here = time.monotonic() + limit, 0, dict[int, int]()

    def until(condition: Callable[[], bool]) -> None:
        while not condition() and job.poll() is None and time.monotonic() < end:
            time.sleep(0.01)

    for moment in moments:
        before = set(here.values())
        until(lambda old=before: len(now := ranks_of(job.pid)) == 2 and not old & set(now.values()))  # type: ignore[misc]
        here = ranks_of(job.pid)
        start = time.monotonic()
        until(lambda start=start, moment=moment: sooner() or time.monotonic() - start > moment)  # type: ignore[misc]
        victim = here.get(rng.randrange(2))
        if job.poll() is not None or victim is None or victim not in ranks_of(job.pid).values():
            break
        os.kill(victim, signal.SIGKILL)
        killed += 1
    until(lambda: False)
    if job.poll() is None:
        job.kill()
        for pid in ranks_of(job.pid).values():
            os.kill(pid, signal.SIGKILL)
    return job.wait(), killed
