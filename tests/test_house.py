"""The house: eleven rooms over at most eight floors, nothing loose, every import downwards (see CONTRIBUTING)."""

from __future__ import annotations

import ast
import os
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FrameType

import pytest
from setuptools import find_packages

import st_fast
from st_fast.recipe import load
from st_fast.recipe.schema import Recipe
from st_fast.train.run import run
from st_fast.train.supervision import NoisyBatch
from tests import tiny

HOUSE = Path(st_fast.__path__[0])
ROOMS = {"core", "recipe", "model", "data", "report", "sample", "evaluate", "prepare", "convert", "train", "study"}
OUTSIDE = {"kernels"}
"""The kernels can be lifted out of the project: they import nothing of it."""
FLOORS = 8
LONGEST = 400
"""Lines of a file."""


def imported(file: Path) -> set[str]:
    """The rooms that a file imports from, inside functions and for types as well."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # relative ones stay in their package
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("st_fast.")}


def files(room: str) -> list[Path]:
    return sorted((HOUSE / room).rglob("*.py"))


@cache
def needs(room: str) -> frozenset[str]:
    """The rooms that a room imports from."""
    return frozenset(set().union(*map(imported, files(room))) & ROOMS - {room})


def floor(room: str, above: tuple[str, ...] = ()) -> int:
    """1 for a room that needs no other."""
    assert room not in above, f"a circle: {' > '.join((*above, room))}"
    return 1 + max((floor(other, (*above, room)) for other in needs(room)), default=0)


def test_there_are_eleven_rooms_and_nothing_loose():
    entries = {entry.name for entry in HOUSE.iterdir() if not entry.name.startswith(("_csrc", "__pycache__"))}
    assert entries == ROOMS | OUTSIDE | {"__init__.py", "__main__.py"}
    assert all(files(room) for room in ROOMS)


def test_imports_form_no_circle_and_at_most_eight_floors():
    assert {room: floor(room) for room in ROOMS if floor(room) > FLOORS} == {}
    assert floor("core") == 1 and floor("study") == max(map(floor, ROOMS))


def test_no_room_knows_the_list_of_commands():
    assert {str(file) for room in ROOMS for file in files(room) if "__main__" in imported(file)} == set()


def test_the_report_reads_files_and_data_never_loads_a_network():
    assert needs("report") == {"core"} and "model" not in needs("data") and needs("recipe") == {"core"}


def test_kernels_can_be_lifted_out():
    own = [file for file in (HOUSE / "kernels").rglob("*.py") if imported(file) - OUTSIDE]
    assert own == []


def test_every_file_fits_in_the_head():
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for room in ROOMS for file in files(room)}
    assert {str(file): length for file, length in lengths.items() if length > LONGEST} == {}


def test_every_package_is_installed():
    wanted = tomllib.loads((HOUSE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = find_packages(str(HOUSE.parent), include=wanted["packages"]["find"]["include"])
    code = {
        Path(folder)
        for folder, _, files in os.walk(HOUSE, followlinks=True)
        if any(f.endswith(".py") for f in files) and "hub_tree" not in folder
    }
    assert {".".join(folder.relative_to(HOUSE.parent).parts) for folder in code} == set(packages)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("core.checkpoint.store", "st_fast.checkpoint"), ("data.manifest", "st_fast.latents"),
        ("data.features", "st_fast.features"), ("evaluate.classifier", "st_fast.judge/1"),
        ("sample.set", "st_fast.samples/1"), ("model.load", "st_fast.sit"),
    ],
)  # fmt: skip
def test_formats_keep_the_names_that_stand_in_files_already_written(module: str, name: str):
    assert name == import_module(f"st_fast.{module}").FORMAT


def test_a_recipe_and_a_batch_are_handed_through_few_rooms(tmp_path: Path):
    """Counts the files whose functions are given one, in a whole run of two stages."""
    recipe = load(tiny.write_recipe(tmp_path / "tiny.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out"))
    found: dict[type, set[Path]] = {Recipe: set(), NoisyBatch: set()}

    @cache
    def place(name: str) -> Path | None:
        return Path(name).relative_to(HOUSE) if HOUSE in Path(name).parents else None

    def note(frame: FrameType, event: str, result: object) -> None:
        if event == "call" and (file := place(frame.f_code.co_filename)):
            for kind in {type(value) for value in frame.f_locals.values()} & found.keys():
                found[kind].add(file)

    sys.setprofile(note)
    try:
        run(recipe)
    finally:
        sys.setprofile(None)
    rooms = {kind: {file.parts[0] for file in files} - OUTSIDE for kind, files in found.items()}
    assert len(rooms[Recipe]) <= 6 and len(found[Recipe]) <= 24, sorted(found[Recipe])
    assert rooms[NoisyBatch] == {"train", "model"} and len(found[NoisyBatch]) <= 5, sorted(found[NoisyBatch])
