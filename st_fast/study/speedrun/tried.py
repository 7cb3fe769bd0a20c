"""What was tried on a task, with its figures: a line of JSON each, whether it helped or not."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from st_fast.core.files import BadFile, make_folder, read_bytes, write_atomic
from st_fast.core.records import record_from
from st_fast.study.speedrun.attempt import Result
from st_fast.study.speedrun.origin import check_line

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


def note(folder: Path, what: str, recipe: str, overrides: Sequence[str], result: Result) -> Path:
    """Adds a line to the task's list, once; returns its file."""
    check_line("--note", what)
    path = folder / FILE
    told = Tried(what, recipe, tuple(overrides), result.seed, result.distance, result.flops, result.seconds)
    line = json.dumps(asdict(told)) + "\n"
    make_folder(folder)
    before = read_bytes(path).decode() if path.exists() else ""
    if line not in before:
        write_atomic(path, (before + line).encode())
    return path


def read_tried(folder: Path) -> list[Tried]:
    """The task's list in its order; empty where there is none."""
    path = folder / FILE
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(read_bytes(path).decode(errors="replace").splitlines(), 1):
        try:
            found.append(record_from(Tried, json.loads(line), f"{path}: line {number}"))
        except ValueError:
            raise BadFile(f"{path}: line {number} is no JSON") from None
    return found
