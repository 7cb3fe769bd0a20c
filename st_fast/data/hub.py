"""A Hugging Face dataset on disk (`save_to_disk`) as numbered images with labels."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from st_fast.core.errors import UserError, first_line, how_to_install
from st_fast.core.files import open_regular, printable, shown
from st_fast.data.archives import MAX_FILE
from st_fast.data.captions import KEYS, cleaned
from st_fast.data.labels import MAX_CLASSES, numbered_names
from st_fast.data.sources import Source


def open_hub_dataset(path: Path, subset: str = "", captioned: bool = False) -> Source:
    """Its image and label columns; `subset` names a split. UserError lists the splits or columns that there are.

    captioned: without a label column all are of one class, and captions are read.
    """
    where = f"source {str(path)!r}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{where}: a Hugging Face dataset, which the package datasets reads; it is not installed: "
            f"{how_to_install('hub')}"
        ) from error
    try:
        data: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow's and json's own, by what is broken
        raise UserError(f"{where}: not a readable Hugging Face dataset ({shown(first_line(error))})") from None
    if isinstance(data, datasets.DatasetDict):
        splits = ", ".join(map(printable, data))
        if not subset and len(data) > 1:
            raise UserError(f"{where}: it holds {splits}: choose one, --subset {printable(next(iter(data)))}")
        if subset and subset not in data:
            raise UserError(f"{where}: no split {subset!r}; it holds {splits or 'none'}")
        data = data[subset or next(iter(data))]
    elif subset and subset != str(getattr(data, "split", "")):
        raise UserError(f"{where}: --subset {subset}: it has no splits; leave --subset out")
    image = _column(where, data.features, datasets.Image, "image")
    labelled = any(name == "label" or isinstance(kind, datasets.ClassLabel) for name, kind in data.features.items())
    label = _column(where, data.features, datasets.ClassLabel, "label") if labelled or not captioned else ""
    data = data.cast_column(image, datasets.Image(decode=False))
    if not len(data):
        raise UserError(f"{where}: no row in it")
    labels, classes = np.zeros(len(data), np.int64), tuple[str, ...]()
    if label:
        known = tuple(map(str, getattr(data.features[label], "names", None) or ()))
        labels, classes = _numbers(f"{where}: column {shown(label)}", list(data[label]), known)
    count = len(classes) or int(labels.max()) + 1
    column = next((key for key in KEYS if key in data.features), "") if captioned else ""
    texts = list(data[column]) if column else []

    def read(number: int) -> bytes:
        cell = data[number][image]
        if isinstance(cell, dict) and cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if not isinstance(cell, dict) or not cell.get("path"):
            raise OSError("no image in this row")
        with open_regular(Path(cell["path"])) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_FILE:
                raise OSError(f"{size} bytes, at most {MAX_FILE} are read")
            return file.read(size)

    rows = [f"row {number}" for number in range(len(data))]
    return Source(
        f"{path.name} (Hugging Face dataset)", rows, labels, count, tuple(map(printable, classes)), read,
        captions=lambda number: cleaned(texts[number]) if texts else (),
    )  # fmt: skip


def _column(where: str, features: Any, kind: type, usual: str) -> str:
    """The only column of that kind, or the one with the usual name."""
    found: list[str] = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if usual in found or (usual in features and not found and usual == "label"):
        return usual
    there = ", ".join(f"{printable(name)} ({type(feature).__name__})" for name, feature in features.items())
    raise UserError(
        f"{where}: {len(found) or 'no'} {kind.__name__} columns and none of them called {usual}; it has {there[:400]}; "
        f"rename the column to {usual}"
    )


def _numbers(where: str, values: Iterable[Any], known: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as (n,) int64 and the classes' names; strings are numbered by their sorted names."""
    values = list(values)
    text = any(isinstance(value, str) for value in values)
    limit = len(known) or MAX_CLASSES

    def right(value: object) -> bool:
        if text:
            return isinstance(value, str) and value != ""
        return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) < limit

    wrong = [row for row, value in enumerate(values) if not right(value)]
    if wrong:
        raise UserError(
            f"{where}: row {wrong[0]} has the label {shown(values[wrong[0]])}, as have {len(wrong)} of {len(values)} "
            f"rows no class number (0 … {limit - 1}) or name; remove those rows"
        )
    if not text:
        return np.array(values, np.int64), known
    classes = numbered_names(values)
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[value] for value in values], np.int64), classes
