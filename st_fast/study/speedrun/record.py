"""A record of the speedrun as a folder, and every check of it that needs no training.

record.json       the claim: task, revision, machine, versions, each seed's figures and hashes, the verdict
recipe.toml       as its author wrote it
changes.diff      what was changed in the code over the revision, if anything
seed0.jsonl, …    the log of each seed's training
samples.png       of the first seed
SHA256SUMS        of all other files, as `sha256sum --check` reads it
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from st_fast.core.errors import UserError
from st_fast.core.files import (
    BadFile,
    parse_json,
    read_bytes,
    read_json,
    sha256_file,
    shown,
    write_atomic,
    write_json_atomic,
)
from st_fast.core.records import record_from
from st_fast.recipe import Recipe, cost
from st_fast.study.speedrun import rules
from st_fast.study.speedrun.attempt import Attempt, Result
from st_fast.study.speedrun.origin import Code, Machine, check_line
from st_fast.study.speedrun.task import SIGNIFICANCE, Task, mean_and_deviation, p_value

FORMAT = "st_fast.speedrun/1"
CLAIM, RECIPE, CHANGES, PICTURE, SUMS = "record.json", "recipe.toml", "changes.diff", "samples.png", "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")
ROUNDING = 1e-12
"""Share by which a figure may differ from what follows from others, on another machine and by another SciPy."""
LARGEST = 4_096
"""Pixels of a side of the picture."""
SLACK = 1.0
"""Seconds by which two clocks may differ between two lines of a log."""


@dataclass(frozen=True)
class Record:
    """What a record claims."""

    format: str
    task: str
    task_sha256: str
    classifier_sha256: str
    what: str
    """What did it, in one line."""
    by: str
    date: str
    revision: str
    machine: Machine
    versions: Mapping[str, str]
    results: tuple[Result, ...]
    mean: float
    deviation: float
    p: float
    flops: float
    """Of a seed's training, mean over the seeds."""
    seconds: float
    verdict: str


def verdict(task: Task, results: tuple[Result, ...]) -> dict[str, Any]:
    """The figures of a record that follow from its seeds' results, by their names in `Record`."""
    distances = [result.distance for result in results]
    mean, deviation = mean_and_deviation(distances)
    p = p_value(distances, task.target)
    reached = "below" if p < SIGNIFICANCE else "not shown to be below"
    said = f"{reached} {task.target:g} (p = {p:.1e} over {len(results)} seeds)"
    flops, seconds = (math.fsum(getattr(one, name) for one in results) / len(results) for name in ("flops", "seconds"))
    return {"mean": mean, "deviation": deviation, "p": p, "flops": flops, "seconds": seconds, "verdict": said}


def write_record(
    folder: Path, record: Record, recipe: bytes, logs: Mapping[int, Path], code: Code, picture: bytes
) -> None:
    """Fills the folder, which is empty; the sums come last."""
    write_json_atomic(folder / CLAIM, asdict(record))
    write_atomic(folder / RECIPE, recipe)
    write_atomic(folder / PICTURE, picture)
    if code.changes:
        write_atomic(folder / CHANGES, code.changes.encode("utf-8", "surrogateescape"))
    for seed, log in logs.items():
        write_atomic(folder / _log(seed), read_bytes(log))
    names = sorted(path.name for path in folder.iterdir())
    write_atomic(folder / SUMS, "".join(f"{sha256_file(folder / name)}  {name}\n" for name in names).encode())


def identity(folder: Path) -> str:
    """By which a record is known: it changes with every bit of its files."""
    return sha256(read_bytes(folder / SUMS)).hexdigest()[:12]


def read_record(folder: Path) -> Record:
    """The claim, of a record whose files are all as they were written; `BadFile` names the first that is not."""
    listed = _listed(folder)
    there = {path.name for path in folder.iterdir()} - {SUMS}
    if strangers := there - listed.keys():
        raise BadFile(f"{folder / min(strangers)}: not in {SUMS}: no file of this record")
    for name, wanted in listed.items():
        if (found := sha256_file(folder / name)) != wanted:
            raise BadFile(f"{folder / name}: SHA-256 {found[:12]}…, {SUMS} has {wanted[:12]}…: it was changed")
    record = record_from(Record, read_json(folder / CLAIM), str(folder / CLAIM))
    if record.format != FORMAT:
        raise BadFile(f"{folder / CLAIM}: format is {shown(record.format)}; this program reads {FORMAT!r}")
    if not re.fullmatch("[0-9a-f]{40}", record.revision):
        raise BadFile(f"{folder / CLAIM}: revision = {shown(record.revision)}: a commit's 40 hex digits are needed")
    return record


def same_kind(one: Record | Attempt, other: Record | Attempt) -> bool:
    """Whether bits and times of the two can be compared: the same kind of machine, and the same versions."""
    return (one.machine, dict(one.versions)) == (other.machine, dict(other.versions))


def _listed(folder: Path) -> dict[str, str]:
    """Name → SHA-256 as SUMS has them, in its order; `BadFile` where that is none or lacks a file of every record."""
    if not folder.is_dir():
        raise BadFile(f"{folder}: no such folder; a record is one")
    *lines, last = read_bytes(folder / SUMS).decode(errors="replace").split("\n")
    lines += [last] if last else []
    matches = [LINE.fullmatch(line) for line in lines]
    bad = next((line for line, match in zip(lines, matches, strict=True) if match is None), None)
    if bad is not None:
        raise BadFile(f"{folder / SUMS}: {shown(bad)}: a SHA-256 and a file's name are needed in each line")
    found = {match[2]: match[1] for match in matches if match}
    if len(found) < len(lines):
        raise BadFile(f"{folder / SUMS}: names a file twice")
    for name in (CLAIM, RECIPE, PICTURE):
        if name not in found:
            raise BadFile(f"{folder / SUMS}: {name} is missing; a record has one")
    return found


def changes(folder: Path) -> str:
    """The diff over the record's revision; "" where there is none."""
    path = folder / CHANGES
    return read_bytes(path).decode("utf-8", "surrogateescape") if path.exists() else ""


def check(folder: Path, record: Record, task: Task) -> Recipe:
    """The record's recipe; UserError for whatever in it can't be true, by its own figures, its logs and the rules.

    That the figures are those of the recipe and the code, only a run can tell.
    """
    where = folder / CLAIM
    if record.task != task.name:
        raise BadFile(f"{where}: task is {shown(record.task)}, not {task.name!r}")
    if record.classifier_sha256 != task.classifier_sha256:
        raise BadFile(
            f"{where}: scored by a classifier of SHA-256 {shown(record.classifier_sha256[:12])}…; that of the task "
            f"{task.name} is {task.classifier_sha256[:12]}…: another classifier's distances can't be compared"
        )
    if record.task_sha256 != task.digest:
        raise BadFile(f"{where}: made for another version of the task {task.name}: its task.toml has another SHA-256")
    for name in ("what", "by"):
        check_line(f"{where}: {name} =", getattr(record, name))
    for name, text in asdict(record.machine).items():
        check_line(f"{where}: machine: {name} =", str(text))
    if not _is_date(record.date):
        raise BadFile(f"{where}: date = {shown(record.date)}: a day until today is needed, as 2026-01-31")
    files = {CLAIM, RECIPE, PICTURE, CHANGES, *(_log(seed) for seed in task.seeds)}
    if strangers := {path.name for path in folder.iterdir()} - {SUMS, *files}:
        raise BadFile(f"{folder / min(strangers)}: no file of a record")
    check_picture(folder / PICTURE)
    if task.device == "cpu" and record.machine.threads != task.threads:
        raise BadFile(f"{where}: machine: threads = {record.machine.threads}, the task has {task.threads}")
    if tuple(result.seed for result in record.results) != task.seeds:
        raise BadFile(f"{where}: results of other seeds than the task's, {', '.join(map(str, task.seeds))}")
    recipe = rules.read(folder / RECIPE, task)
    for result in record.results:
        _check_result(where, result)
        check_log(folder / _log(result.seed), recipe, task, result, record.versions)
    for name, value in verdict(task, record.results).items():
        told = getattr(record, name)
        same = math.isclose(told, value, rel_tol=ROUNDING) if isinstance(value, float) else told == value
        if not same:
            raise BadFile(f"{where}: {name} = {shown(told)}; from its results follows {shown(value)}")
    if record.p >= SIGNIFICANCE:
        raise UserError(f"{folder}: {record.verdict}: no record")
    return recipe


def _is_date(text: str) -> bool:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        return False
    return text == day.isoformat() and day <= datetime.now(UTC).date() + timedelta(days=1)  # of any time zone


def _check_result(where: Path, result: Result) -> None:
    """UserError for figures that nothing can have."""
    if result.distance < 0 or not 0 <= result.accuracy <= 1:
        raise BadFile(f"{where}: seed {result.seed}: distance {result.distance:.4g}, accuracy {result.accuracy:.4g}")
    for name in ("data_sha256", "weights_sha256", "samples_sha256"):
        if not re.fullmatch("[0-9a-f]{64}", value := getattr(result, name)):
            raise BadFile(f"{where}: seed {result.seed}: {name} = {shown(value)}: no SHA-256")


def check_picture(path: Path) -> NDArray[np.uint8]:
    """The picture's pixels; `BadFile` where it is no PNG of a size that samples have."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if max(image.size) <= LARGEST:
                return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        pass
    raise BadFile(f"{path}: no PNG of at most {LARGEST} pixels a side")


def _log(seed: int) -> str:
    return f"seed{seed}.jsonl"


def check_log(path: Path, recipe: Recipe, task: Task, result: Result, versions: Mapping[str, str]) -> None:
    """UserError where a seed's log is cut off, its clock ran backwards, or it isn't of this recipe and result."""
    records = list(_lines(path))
    _check_clock(path, records)
    flops, seconds = [], []
    for stage in recipe.stages:
        own = [record for record in records if record.get("stage") == stage.name]
        starts, ends = ([one for one in own if one["kind"] == kind] for kind in ("start", "end"))
        whole = bool(ends) and ends[-1]["step"] == stage.steps and {"flops", "seconds"} <= ends[-1].keys()
        if not starts or not whole:
            raise BadFile(f"{path}: cut off: stage {stage.name!r} has no end after {stage.steps} steps")
        asked = {
            "steps": stage.steps, "batch_size": recipe.optim.batch_size, "dataset": result.data_sha256,
            "torch": versions.get("torch"),
        }  # fmt: skip
        said = starts[-1].get("versions")
        told = starts[-1] | {"torch": said.get("torch") if isinstance(said, dict) else None}
        for key, value in asked.items():
            if told.get(key) != value:
                raise BadFile(f"{path}: {key} of stage {stage.name!r} is {shown(told.get(key))}, not {shown(value)}")
        formula = cost.stage_flops(recipe, stage, 0, stage.steps)
        if not math.isclose(ends[-1]["flops"], formula, rel_tol=1e-9):
            raise BadFile(
                f"{path}: {ends[-1]['flops']:.6g} FLOPs of stage {stage.name!r}; its recipe takes {formula:.6g}"
            )
        flops.append(ends[-1]["flops"])
        seconds.append(ends[-1]["seconds"])
    for name, value in (("flops", math.fsum(flops)), ("seconds", math.fsum(seconds))):
        if getattr(result, name) != value:
            raise BadFile(f"{path}: {value:.6g} {name} in all; {CLAIM} has {getattr(result, name):.6g}")
    if result.seconds <= 0:
        raise BadFile(f"{path}: {result.seconds:.6g} s of training")
    if task.minutes and result.seconds > 60 * task.minutes:
        raise UserError(f"{path}: {result.seconds / 60:.1f} minutes of training; the task allows {task.minutes:g}")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every record of a log; `BadFile` for a line that is none, as the last of a log that was cut off is."""
    for number, line in enumerate(read_bytes(path).splitlines(keepends=True), 1):
        where = Path(f"{path}: line {number}")
        record = parse_json(line, where)
        numbers = [record.get("time"), *(record[key] for key in ("seconds", "flops") if key in record)]
        right = type(record.get("kind")) is str and type(record.get("stage")) is str and type(record.get("step")) is int
        if not right or not line.endswith(b"\n") or any(type(one) not in (int, float) for one in numbers):
            raise BadFile(f"{where}: no record of a log: cut off, or changed")
        yield record


def _check_clock(path: Path, records: list[dict[str, Any]]) -> None:
    """UserError where time, or a stage's training time, ran backwards, or training took longer than passed."""
    for number, (before, after) in enumerate(pairwise(records), 2):
        passed = after["time"] - before["time"]
        if passed < 0:
            raise BadFile(f"{path}: line {number}: its clock ran backwards, by {-passed:.3f} s")
        same = before.get("stage") == after.get("stage") and after["kind"] != "start"
        if same and "seconds" in before and "seconds" in after:
            trained = after["seconds"] - before["seconds"]
            if trained < -SLACK / 100 or trained > passed + SLACK:
                raise BadFile(f"{path}: line {number}: {trained:.3f} s of training within {passed:.3f} s of its clock")
