"""TensorBoard, Weights & Biases and Trackio (`run.trackers`): they get the numbers of log.jsonl. Imports no torch.

Each tracker runs in its own thread, which takes finished records from a queue, so training never waits for it. An
error in it is reported in one line and turns it off; log.jsonl has everything.

To add one: a `Tracker` with an entry in TRACKERS, and its name in `recipe/schema.py` (`run.trackers`).
"""

import importlib
import os
import queue
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from st_fast.core.errors import UserError, how_to_install
from st_fast.core.files import BadFile, read_json, write_json_atomic
from st_fast.recipe.schema import Recipe

Record = Mapping[str, Any]
"""A line of log.jsonl: kind, stage, step, time and values."""
QUEUE_ROOM = 10_000
"""Records that may wait for a tracker; one that falls further behind is turned off."""
CLOSE_TIMEOUT = 10.0
"""Seconds that the end of a run waits for a tracker to finish."""


@dataclass(frozen=True)
class Target:
    """The run, for a tracker: its folder, its recipe and an id that a resumed run keeps."""

    out: Path
    recipe: Recipe
    run_id: str

    @property
    def name(self) -> str:
        return f"{self.out.name}-{self.run_id[:6]}"

    def overall(self, record: Record) -> int:
        """The record's step counted from the start of the first stage."""
        names = [stage.name for stage in self.recipe.stages]
        earlier = self.recipe.stages[: names.index(record["stage"])]
        return sum(stage.steps for stage in earlier) + int(record["step"])


class Tracker:
    """One service, opened, used and closed in one thread."""

    _run: Any
    """The service's own object for the run."""

    def write(self, record: Record, values: Mapping[str, float]) -> None:
        """Takes a record and its numbers, of which there may be none."""
        raise NotImplementedError

    def close(self) -> None:
        self._run.finish()


class TensorBoard(Tracker):
    """Event files in OUT/tensorboard/STAGE: each stage is one of TensorBoard's runs."""

    def __init__(self, target: Target) -> None:
        self.folder, self._writers = target.out / "tensorboard", dict[str, Any]()

    def write(self, record: Record, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        stage, step = record["stage"], record["step"]
        if record["kind"] == "start":  # drops what an interrupted process wrote after its last checkpoint
            self._writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=step + 1)
        for key, value in values.items():
            self._writers[stage].add_scalar(key, value, step, walltime=record["time"])
        if stage in self._writers:
            self._writers[stage].flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class Wandb(Tracker):
    """One run in the project WANDB_PROJECT (st_fast), continued after an interruption; a step axis for each stage.

    Steps are a metric of their own because W&B drops values of earlier steps, which a resumed run writes again.
    """

    def __init__(self, target: Target) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "st_fast"), id=target.run_id, name=target.name,
            dir=str(target.out), config=asdict(target.recipe), resume="allow",
        )  # fmt: skip
        for stage in target.recipe.stages:
            self._run.define_metric(f"{stage.name}/step")
            self._run.define_metric(f"{stage.name}/*", step_metric=f"{stage.name}/step")

    def write(self, record: Record, values: Mapping[str, float]) -> None:
        if values:
            stage = record["stage"]
            self._run.log({f"{stage}/step": record["step"]} | {f"{stage}/{key}": v for key, v in values.items()})


class Trackio(Tracker):
    """One run in the project st_fast, local unless TRACKIO_SPACE_ID names a Space; steps count through all stages."""

    def __init__(self, target: Target) -> None:
        import trackio

        self._target = target
        self._run = trackio.init(
            project="st_fast", name=target.name, config=asdict(target.recipe), resume="allow", embed=False
        )

    def write(self, record: Record, values: Mapping[str, float]) -> None:
        if values:
            named = {f"{record['stage']}/{key}": value for key, value in values.items()}
            self._run.log(named, step=self._target.overall(record))


TRACKERS: dict[str, Callable[[Target], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def check_installed(names: Sequence[str]) -> None:
    """UserError for a tracker whose package can't be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a package may break on import in any way
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            reason = "is not installed" if missing else f"can't be used ({without_keys(error)})"
            raise UserError(
                f'run.trackers = ["{name}"]: the package {name} {reason}; {how_to_install("track")}, or leave it out'
            ) from error


@contextmanager
def tracking(recipe: Recipe, out: Path, say: Callable[[str], None]) -> Iterator[Callable[[Record], None]]:
    """A function that gives a record to every tracker of the recipe; the block's end closes them in CLOSE_TIMEOUT.

    The first record opens them: a run that is refused before leaves nothing behind, here and in no service.
    """
    names, threads = dict.fromkeys(recipe.run.trackers), list[_Thread]()

    def write(record: Record) -> None:
        if not threads:
            threads.extend(_Thread(name, Target(out, recipe, run_id(out)), say) for name in names)
        for thread in threads:
            thread.put(record)

    try:
        yield write
    finally:
        for thread in threads:
            thread.close()


def run_id(out: Path) -> str:
    """The run's id for services that keep a list of runs: drawn once and kept in the run folder."""
    path = out / "tracker.json"
    try:
        return str(read_json(path)["id"])
    except (BadFile, KeyError):
        drawn = uuid.uuid4().hex[:16]
        with suppress(OSError):  # a full disk costs the run its place in the list, and nothing else
            write_json_atomic(path, {"id": drawn})
        return drawn


def numbers(record: Record) -> dict[str, float]:
    """The curves of a record: loss, lr, … of a "train" record, eval/fid, … of an "eval" record; none of other kinds.

    Of a "validate" record validate/loss, …, and of each bin of times a curve such as validate/loss_t0.25.
    """
    if record["kind"] == "validate":
        found = {f"validate/{key}": value for key, value in record.items() if key.endswith("loss")}
        for name, values in record.items():
            if name.endswith("by_time"):
                named = f"validate/{name.removesuffix('by_time')}loss_t"
                found |= {f"{named}{(bin + 0.5) / len(values):.3g}": value for bin, value in enumerate(values)}
    elif record["kind"] == "train":
        found = {key: value for key, value in record.items() if key not in ("step", "time")}
    else:
        found = {f"eval/{key}": value for key, value in record.get("metrics", {}).items()}
    return {key: value for key, value in found.items() if type(value) in (int, float)}


def without_keys(error: BaseException) -> str:
    """An error in one line without anything that could be an API key: services put them into addresses."""
    text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for name, value in os.environ.items():
        if len(value) >= 4 and re.search("KEY|TOKEN|SECRET|PASS", name.upper()):
            text = text.replace(value, "***")
    return re.sub(r"[\w-]{24,}", "***", text)[:200]


class _Thread:
    """A tracker in a daemon thread, which never keeps the process alive."""

    def __init__(self, name: str, target: Target, say: Callable[[str], None]) -> None:
        self.name, self._target, self._say = name, target, say
        self._records: queue.Queue[Record | None] = queue.Queue(QUEUE_ROOM)
        self._off = False
        self._thread = threading.Thread(target=self._work, name=f"st_fast {name}", daemon=True)
        self._thread.start()

    def put(self, record: Record | None) -> None:
        if self._off:
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._turn_off(f"{QUEUE_ROOM} records behind")

    def close(self) -> None:
        self.put(None)
        self._thread.join(0 if self._off else CLOSE_TIMEOUT)
        if self._thread.is_alive() and not self._off:
            self._turn_off(f"not finished within {CLOSE_TIMEOUT:g} s")

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self.name](self._target)
            while (record := self._records.get()) is not None:
                tracker.write(record, numbers(record))
            tracker.close()
        except BaseException as error:  # SystemExit too: no error of a tracker ends a run
            self._turn_off(without_keys(error))

    def _turn_off(self, why: str) -> None:
        if not self._off:
            self._off = True
            self._say(f"tracker {self.name} is off, the run goes on: {why}")
