"""A tiny task, a recipe, and a record of the two."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from st_fast.study.speedrun import attempt, carry_out, tried, verify
from st_fast.study.speedrun.__main__ import main
from st_fast.study.speedrun.origin import Code
from st_fast.study.speedrun.task import FOLDER
from tests.study.speedrun.made import HEAD, RECIPE_TEXT, in_this_process, this_tree


@contextmanager
def clean() -> Iterator[None]:
    """As if this clone were clean, and without new processes, whose imports take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (carry_out, tried):
            patch.setattr(module, "current_code", lambda: Code(HEAD, ""))
        patch.setattr(attempt, "code_here", lambda: HEAD)
        patch.setattr(carry_out, "run_in", in_this_process)
        patch.setattr(verify, "run_in", in_this_process)
        patch.setattr(verify, "tree_of", this_tree)
        patch.setattr(verify, "check_revision", lambda revision: None)
        for module in (carry_out, verify):
            patch.setattr(module, "unread", lambda code: re.findall(r"^\+\+\+ b/(.*)$", code.changes, re.MULTILINE))
        yield


@pytest.fixture(autouse=True)
def clean_clone() -> Iterator[None]:
    with clean():
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny task, a recipe, and a record of the two, made by the command."""
    folder = tmp_path_factory.mktemp("speedrun")
    shutil.copytree(FOLDER / "digits", folder / "tiny")
    text = (folder / "tiny" / "task.toml").read_text()
    for line, other in (
        ('name = "digits"', 'name = "tiny"'), ("target = 0.2", "target = 90.0"), ("samples = 1000", "samples = 100"),
        ("seeds = [0, 1, 2, 3, 4]", "seeds = [3, 5, 8]"),
    ):  # fmt: skip
        assert line in text
        text = text.replace(line, other)
    (folder / "tiny" / "task.toml").write_text(text)
    (folder / "mine.toml").write_text(RECIPE_TEXT)
    with clean(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["run", "tiny", "mine.toml", "--what", "a <tiny> one", "--by", "us", "--out", "1-mine"])
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The record, to be altered."""
    return Path(shutil.copytree(made / "1-mine", tmp_path / "record"))
