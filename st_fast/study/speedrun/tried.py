"""What was tried on a task, with its figures: a line of JSON each, whether it helped or not."""

import fcntl
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from st_fast.core.errors import UserError
from st_fast.core.files import make_folder, parse_json, read_bytes
from st_fast.core.records import record_from
from st_fast.study.speedrun.attempt import Result
from st_fast.study.speedrun.origin import check_line, current_code
from st_fast.study.speedrun.task import Task

FILE = "tried.jsonl"


@dataclass(frozen=True)
class Tried:
    """One seed of a change: what it was, over which recipe, and what came out."""

    what: str
    recipe: str
    overrides: tuple[str, ...]
    seed: int
    distance: float
    flops: float
    seconds: float
    revision: str
    """Of the code."""


def check_note(task: Task, what: str, seed: int) -> str:
    """The revision of the code, for `note`. UserError, before anything is trained, for what can't be in a list."""
    check_line("--note", what)
    if seed in task.seeds:
        raise UserError(f"--seed {seed}: one of the task's, which are for records; with --note give another")
    code = current_code()
    if code.changes:
        raise UserError("--note: the code is changed, and a list names a revision alone: commit the change first")
    return code.revision


def note(folder: Path, what: str, recipe: str, overrides: Sequence[str], result: Result, revision: str) -> Path:
    """Adds a line to the task's list, once; returns its file."""
    path = folder / FILE
    told = Tried(what, recipe, tuple(overrides), result.seed, result.distance, result.flops, result.seconds, revision)
    line = json.dumps(asdict(told)) + "\n"
    make_folder(folder)
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two attempts may end at once
        file.seek(0)
        if line not in file.read():
            file.write(line)
    return path


def read_tried(folder: Path) -> list[Tried]:
    """The task's list in its order; empty where there is none."""
    path = folder / FILE
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        where = f"{path}: line {number}"
        one = record_from(Tried, parse_json(line, Path(where)), where)
        for text in (one.what, one.recipe, *one.overrides):
            check_line(f"{where}:", text)
        found.append(one)
    return found
