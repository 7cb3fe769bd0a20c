"""Which columns of a table hold images and labels, and what its labels mean: for tables of any library."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from st_fast.core.errors import UserError, counted
from st_fast.core.files import open_regular, printable, shown
from st_fast.data.archives import MAX_FILE
from st_fast.data.captions import KEYS, cleaned
from st_fast.data.labels import MAX_CLASSES, NULL_LABEL, UNLABELLED_HINT, numbered_names
from st_fast.data.source import Asked, Source

IMAGE, LABEL = "Image", "ClassLabel"
"""What Hugging Face calls columns of images and of classes."""


@dataclass(frozen=True)
class Column:
    """A column: its name, what it holds in a word, the classes' names where that is known."""

    name: str
    kind: str
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of columns. `values(name)` → those of all rows; `image(name, row)` → the bytes of an image's file, OSError
    where the row has none. `image` may be called from many threads. `names_apart(name)` → the names of classes that
    stand apart from the table, for a column of numbers: they are taken where there is one for each number.
    """

    where: str
    """Begins every message."""
    description: str
    columns: Sequence[Column]
    rows: int
    values: Callable[[str], Sequence[Any]]
    image: Callable[[str, int], bytes]
    names_apart: Callable[[str], tuple[str, ...]] = lambda name: ()


def source_of(table: Table, asked: Asked) -> Source:
    """The table's images and labels; rows without a label can't be read, so that preparing skips and names them.

    UserError for a column that is not there or not of its kind, labels that are no classes, and a table without rows.
    """
    image = image_column(table.where, table.columns, asked.image_column).name
    label = None if asked.unlabelled else label_column(table.where, table.columns, asked)
    if not table.rows:
        raise UserError(f"{table.where}: no row in it")
    labels, classes, count = np.zeros(table.rows, np.int64), tuple[str, ...](), 1
    own_numbers = False
    if label:
        where = f"{table.where}: column {shown(label.name)}"
        labels, classes = class_numbers(where, table.values(label.name), label.class_names)
        most, own_numbers = int(labels.max()), classes == label.class_names
        if not classes and len(names := table.names_apart(label.name)) > most:
            classes = names
        count = len(classes) or most + 1
    text = next((column.name for column in table.columns if column.name in KEYS), "") if asked.captioned else ""
    texts = table.values(text) if text else ()

    def read(row: int) -> bytes:
        if labels[row] < 0:
            raise OSError(NULL_LABEL)
        return table.image(image, row)

    return Source(
        table.description, [f"row {row}" for row in range(table.rows)], labels, count, tuple(map(printable, classes)),
        read, captions=lambda row: cleaned(texts[row]) if text else (), own_numbers=own_numbers,
    )  # fmt: skip


def image_column(where: str, columns: Sequence[Column], asked: str = "") -> Column:
    """The column of images of that name, or the only one, or the one called image."""
    if not asked:
        return _found(where, columns, IMAGE, "image", "--image-column NAME names one")
    column = _named(where, columns, asked, "--image-column")
    if column.kind not in (IMAGE, "binary", "large_binary"):
        there = _there(columns)
        raise UserError(f"--image-column {asked}: {where}: it holds {printable(column.kind)}, no images; {there}")
    return column


def label_column(where: str, columns: Sequence[Column], asked: Asked) -> Column | None:
    """The column of labels of that name, or the only one of classes, or the one called label.

    None where there is none and images may have none, since they have captions.
    """
    if asked.label_column:
        return _named(where, columns, asked.label_column, "--label-column")
    if asked.captioned and not any(column.kind == LABEL or column.name == "label" for column in columns):
        return None
    return _found(where, columns, LABEL, "label", f"--label-column NAME names one, {UNLABELLED_HINT}")


def _found(where: str, columns: Sequence[Column], kind: str, usual: str, remedy: str) -> Column:
    found = [column for column in columns if column.kind == kind]
    if len(found) == 1:
        return found[0]
    called = [column for column in found or columns if column.name == usual]
    if called and (found or kind == LABEL):
        return called[0]
    many = len(found) or "no"
    raise UserError(f"{where}: {many} {kind} columns and none of them called {usual}; {_there(columns)}; {remedy}")


def _named(where: str, columns: Sequence[Column], name: str, option: str) -> Column:
    column = next((column for column in columns if column.name == name), None)
    if column is None:
        raise UserError(f"{option} {name}: {where}: no such column; {_there(columns)}")
    return column


def _there(columns: Sequence[Column]) -> str:
    """The columns that there are, with what each holds."""
    return f"it has {', '.join(f'{printable(c.name)} ({printable(c.kind)})' for c in columns)[:400] or 'none'}"


def class_numbers(
    where: str, values: Sequence[Any], class_names: tuple[str, ...] = ()
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as (n,) int64, -1 for None and NaN, and the classes' names; strings are numbered by their sorted names.

    UserError for a value that is neither a class number nor, as all others, a name, and where no row has a label.
    """
    there = [(row, value) for row, value in enumerate(values) if value is not None and value == value]
    if not there:
        raise UserError(f"{where}: no row of {len(values)} has a label; {UNLABELLED_HINT}")
    text = any(isinstance(value, str) for _, value in there)
    limit = len(class_names) or MAX_CLASSES

    def right(value: object) -> bool:
        if text:
            return isinstance(value, str) and value != ""
        return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) < limit

    wrong = [(row, value) for row, value in there if not right(value)]
    if wrong:
        row, value = wrong[0]
        raise UserError(
            f"{where}: row {row} has the label {shown(value)}, {counted(len(wrong), 'row')} of {len(values)} no class "
            f"number (0 … {limit - 1}) or name; remove those rows, or {UNLABELLED_HINT}"
        )
    labels = np.full(len(values), -1, np.int64)
    if text:
        class_names = numbered_names(value for _, value in there)
        number = {name: i for i, name in enumerate(class_names)}
        there = [(row, number[value]) for row, value in there]
    rows, numbers = zip(*there, strict=True)
    labels[list(rows)] = numbers
    return labels, class_names


def image_bytes(cell: object) -> bytes:
    """The file of an undecoded image: its bytes, or what its path leads to. OSError where the row has none."""
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, Mapping) and cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    if not isinstance(cell, Mapping) or not cell.get("path"):
        raise OSError("no image in this row")
    with open_regular(Path(cell["path"])) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_FILE:
            raise OSError(f"{size} bytes, at most {MAX_FILE} are read")
        return file.read(size)
