"""A tiny task with a record of its own, and what alters it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from st_fast.core.files import sha256_file
from st_fast.study.speedrun import record, verify
from st_fast.study.speedrun.__main__ import main
from st_fast.study.speedrun.origin import Code
from st_fast.study.speedrun.record import CLAIM, SUMS, read_record
from st_fast.study.speedrun.task import Task, read_task
from tests.tiny import ROOT

HEAD = "0123456789" * 4
DIFF = "diff --git a/{0} b/{0}\n--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n-a\n+b\n"


RECIPE_TEXT = """# a tiny one
[model]
depth = 2
width = 32
heads = 1
patch = 4
channels = 4
latent_size = 8
num_classes = 10
class_dropout = 0.1
[optim]
batch_size = 16
lr = 1e-2
[run]
log_every = 1
[sample]
sampler = "euler"
steps = 2
cfg_scale = 1.0
[[stage]]
name = "first"
supervision = "velocity_head"
depth = 1
hidden = 16
steps = 3
[[stage]]
name = "second"
supervision = "self_transcendence"
teacher = "first"
student_depth = 1
teacher_depth = 2
cfg_scale = 3.0
hidden = 16
steps = 4
"""


def silent(text: str) -> None:
    """Where lines go that no test reads."""


def in_this_process(tree: Path, arguments: list[str], threads: int) -> None:
    assert tree == ROOT and arguments[0] == "speedrun" and threads == 2
    main(arguments[1:])


@contextmanager
def this_tree(code: Code) -> Iterator[Path]:
    yield ROOT


def task_of(made: Path) -> Task:
    return read_task(str(made / "tiny"))


def summed(folder: Path) -> None:
    """Writes the sums anew, as one who wants to deceive would."""
    names = sorted({path.name for path in folder.iterdir()} - {SUMS})
    (folder / SUMS).write_text("".join(f"{sha256_file(folder / name)}  {name}\n" for name in names))


def checked(folder: Path, made: Path) -> None:
    record.check(folder, read_record(folder), task_of(made))


def verified(folder: Path, made: Path, seed: int = 5, **options: bool) -> list[str]:
    lines: list[str] = []
    data = made / "data" / "speedrun-tiny"
    how = {"run_changes": False, "rerun": True} | options
    verify.verify(folder, str(made / "tiny"), seed, data, None, **how, say=lines.append)
    return lines


def changed_byte(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] = ord("0") + (raw[at] - ord("0") + 1) % 10 if chr(raw[at]).isdigit() else raw[at] ^ 1
    path.write_bytes(bytes(raw))


def rewritten(copy: Path, **changes: object) -> None:
    (copy / CLAIM).write_text(json.dumps(json.loads((copy / CLAIM).read_text()) | changes))
    summed(copy)
