"""`st_fast.train` with something broken in it: what, where and when the environment variable BREAK says, as JSON.

{"at": "step" | "data" | "validation" | "pictures" | "metrics" | "write", "do": an action below, "rank": which (absent:
every one), "stage": …, "steps": [counted from 1; absent: all], "marker": a file to make when it happens, "terms":
[steps at which SIGTERM comes], "flock": false where files can't be locked}.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from st_fast.core.checkpoint import saver
from st_fast.core.command import run_command
from st_fast.core.errors import RunFailed
from st_fast.data.loader import ResidentLoader
from st_fast.train import __main__ as train
from st_fast.train import stage
from st_fast.train.examiner import Examiner
from st_fast.train.step import Step
from st_fast.train.validation import Validation

PLAN = json.loads(os.environ["BREAK"])
MINE = PLAN.get("rank") in (None, int(os.environ.get("RANK", "0")))


def fail(step: Step | None, batches: Any) -> None:
    raise RunFailed("data: the storage stalls or fails")


def not_finite(step: Step | None, batches: Any) -> None:
    for latents in (batches[0].x, batches[0].x_t, batches[0].velocity):
        latents.fill_(float("nan"))


@torch.no_grad()
def blow_up(step: Step | None, batches: Any) -> None:
    for parameter in step.model.final_layer.parameters():
        parameter.mul_(8).add_(1)


def take_memory(step: Step | None, batches: Any) -> None:
    torch.empty(2**50, dtype=torch.uint8)


def fill_disk(step: Step | None, batches: Any) -> None:
    """Half of one more write reaches a file, then none does: for some "seconds", or as many "writes" as the plan says.

    What is printed is not written to a file.
    """
    end, left, real, half = time.monotonic() + PLAN.get("seconds", 3600), [PLAN.get("writes", 2**30)], os.write, [True]

    def write(descriptor: int, data: Any) -> int:
        over = time.monotonic() > end or left[0] == 0
        if descriptor <= 2 or over or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return real(descriptor, data)
        if half:
            half.pop()
            return real(descriptor, data[: (len(data) + 1) // 2])
        left[0] -= 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    setattr(os, "write", write)  # noqa: B010


def unlocked(*arguments: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


ACTIONS: dict[str, Callable[[Step | None, Any], None]] = {
    "hang": lambda step, batches: time.sleep(3600),
    "pause": lambda step, batches: time.sleep(PLAN["seconds"]),
    "kill": lambda step, batches: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda step, batches: os.kill(os.getpid(), signal.SIGSTOP),
    "fail": fail,
    "nan": not_finite,
    "blow up": blow_up,
    "take memory": take_memory,
    "fill the disk": fill_disk,
}


def strike(name: str, number: int, step: Step | None = None, batches: Any = None) -> None:
    """Does it, if this is the stage and the step for it."""
    if number in PLAN.get("terms", []):
        os.kill(os.getpid(), signal.SIGTERM)
    if PLAN.get("stage") in (None, name) and number in PLAN.get("steps", [number]):
        if "marker" in PLAN:
            Path(PLAN["marker"]).touch()
        ACTIONS[PLAN["do"]](step, batches)


def wrap(owner: Any, name: str, before: Callable[..., None]) -> None:
    """Lets `before` run, with the same arguments, before each call."""
    real = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments, **options)
        return real(*arguments, **options)

    setattr(owner, name, wrapped)


def arm() -> None:
    at, names = PLAN["at"], {}
    wrap(stage.StageTrainer, "resume", lambda self, clock: names.update(now=self.stage.name))
    if at == "step":
        wrap(Step, "__call__", lambda self, step, batches: strike(names["now"], step + 1, self, batches))
    elif at == "data":
        real = ResidentLoader.stream

        def stream(self: ResidentLoader, requests: Any) -> Iterator[Any]:
            for number, answer in enumerate(real(self, requests), start=1):
                strike(names["now"], number)
                yield answer

        setattr(ResidentLoader, "stream", stream)  # noqa: B010
    elif at == "validation":
        wrap(Validation, "_measure", lambda self, *_: strike(names["now"], self._ranks.heartbeat.step))
    elif at in ("pictures", "metrics"):
        setattr(Examiner, at, lambda self, model, stage, step, *told: strike(stage.name, step))
    else:
        wrap(saver, "save", lambda root, step, groups, meta: strike(root.parent.name, step))


if __name__ == "__main__":
    if PLAN["at"] in ("pictures", "metrics"):  # as on every rank; the tiny data has no VAE, so nothing is drawn
        setattr(Examiner, "_check", lambda self: None)  # noqa: B010
        setattr(Examiner, "_kinds", lambda self: ("sample" if PLAN["at"] == "pictures" else "eval",))  # noqa: B010
    if not PLAN.get("flock", True):
        setattr(fcntl, "flock", unlocked)  # noqa: B010
    if MINE:
        arm()
    run_command(train.main)
