"""Labels of images out of the files beside them: .cls, .json, and the dataset.json of EDM and REPA."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import FREE_BYTES, BadFile, parse_json, printable, shown
from st_fast.data.archives import Files

LABELS_FILE = "dataset.json"
"""Labels by file name as EDM and REPA write them: {"labels": [["00000/img00000000.png", 3], …]}."""
LABEL_KEYS = ("label", "class", "cls", "class_id", "class_index", "label_id", "target", "class_name", "wnid")
"""What a label is called in the .json beside an image."""
UNLABELLED_HINT = "--unlabelled takes all images as one class"
NULL_LABEL = "its label is null"
"""Why an image is skipped that stands in a table or .json without one."""
MAX_CLASSES = 1_000_000
COUNTED = 20
"""Classes at most of which each one's count is told."""
JSON_FACTOR = 16
"""Bytes of memory that a byte of dataset.json may take: a line "name, label" takes six."""


def numbered_names(names: Iterable[str]) -> tuple[str, ...]:
    """The different names in the order of their numbers: sorted, by value where all are whole numbers."""
    different = set(names)
    if all(name.isascii() and name.isdigit() and len(name) <= 20 for name in different):
        return tuple(sorted(different, key=lambda name: (int(name), name)))
    return tuple(sorted(different))


def sibling(name: str, kind: str) -> str:
    """The file of that kind of the same sample: webdataset's keys end at the first dot."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}.{kind}"


def by_cls(files: Files, known: set[str], images: list[str]) -> tuple[list[int], tuple[str, ...]]:
    """key.jpg beside key.cls, which holds the label as a number."""
    labels = []
    for name in images:
        label_name = sibling(name, "cls")
        if label_name not in known:
            raise UserError(f"{files.where}: {shown(name)} has no {shown(label_name)} with its label beside it")
        data = small(files, label_name).strip()
        if not re.fullmatch(rb"\d{1,20}", data) or int(data) >= MAX_CLASSES:
            raise UserError(
                f"{files.where}: {shown(label_name)}: {shown(data)} is not a class number (0 … {MAX_CLASSES - 1})"
            )
        labels.append(int(data))
    return labels, ()


def by_json(
    files: Files, images: list[str], prefix: str, captioned: bool, key: str = ""
) -> tuple[list[int], tuple[str, ...]] | None:
    """key.jpg beside key.json with its label, a number or a name; None where they have none and folders are classes.

    A null is -1. captioned: labels may be missing. key: what the label is called there, if it is not one of LABEL_KEYS.
    UserError where an image lacks the key that others have, and where no image has a label under it.
    """
    given, labels, known = key, list[int | str | None](), list[int | str]()
    for name in images:
        label_name = sibling(name, "json")
        table = parse_json(small(files, label_name), Path(f"{files.where}: {shown(label_name)}"))
        key = key or next((key for key in LABEL_KEYS if key in table), "")
        if not key:
            tops = {top_folder(name, prefix) for name in images}
            if captioned or (len(tops - files.shards) > 1 and not all(top.isdigit() for top in tops)):
                return None
            raise UserError(
                f"{files.where}: no label: {shown(label_name)} beside {shown(name)} holds {_keys(table)}; a .cls, or "
                f"one of {', '.join(LABEL_KEYS)} in the .json, would be read; --label-column names another key, "
                f"{UNLABELLED_HINT}"
            )
        if key not in table:
            asked = f"--label-column {given}: " if given else ""
            raise UserError(f"{asked}{files.where}: {shown(label_name)} holds {_keys(table)}, no {key}")
        labels.append(label := table[key])
        if label is None:
            continue
        right = type(label) is int and 0 <= label < MAX_CLASSES if not isinstance(label, str) else label
        if not right or (known and type(label) is not type(known[0])):
            raise UserError(
                f"{files.where}: {shown(label_name)}: {key} = {shown(label)}; a class number (0 … {MAX_CLASSES - 1}), "
                "or a name for all images, is needed"
            )
        known.append(label)
    if not known:
        raise UserError(
            f"{files.where}: {key} is null in all {len(labels)} .json files; --label-column names another key, "
            f"{UNLABELLED_HINT}"
        )
    names = numbered_names(label for label in known if isinstance(label, str))
    number = {name: i for i, name in enumerate(names)}
    return [-1 if label is None else label if isinstance(label, int) else number[label] for label in labels], names


def _keys(table: dict[str, Any]) -> str:
    return ", ".join(printable(key)[:40] for key in list(table)[:12]) or "nothing"


def numbered(labels: list[str]) -> tuple[list[int], tuple[str, ...]]:
    classes = numbered_names(labels)
    number = {name: i for i, name in enumerate(classes)}
    return [number[label] for label in labels], classes


def small(files: Files, name: str) -> bytes:
    """The content of a file that holds a label; `BadFile` in one line where it can't be read."""
    try:
        return files.read(name)
    except OSError as error:
        raise BadFile(f"{files.where}: {shown(name)} can't be read ({error.strerror or error})") from None


def by_table(files: Files, labels_file: str, images: list[str]) -> tuple[list[str], list[int]]:
    """Every image has its label in a dataset.json beside or above it; -1 for a null."""
    folder = labels_file.removesuffix(LABELS_FILE)
    place = f"{files.where}: {labels_file}"
    table = read_labels(parse_labels_file(small(files, labels_file), place), place, nulls=True)
    images = [name for name in images if name.startswith(folder)]
    missing = [name for name in images if name[len(folder) :] not in table]
    if missing or len(images) != len(table):
        first = f"; {shown(missing[0])} has no label" if missing else ""
        raise UserError(f"{files.where}: {len(images)} images, but {len(table)} labels in {labels_file}{first}")
    return images, [table[name[len(folder) :]] for name in images]


def parse_labels_file(data: bytes, where: str) -> dict[str, Any]:
    """The content of a dataset.json, of which only the limits of JSON are checked."""
    return parse_json(data, Path(where), max(FREE_BYTES, JSON_FACTOR * len(data)))


def read_labels(document: dict[str, Any], where: str, nulls: bool = False) -> dict[str, int]:
    """A dataset.json's labels: file name → class number. UserError names what is wrong.

    nulls: some files' labels may be null, which is -1 then.
    """
    labels = document.get("labels", "")
    if labels is None:
        raise UserError(f'{where}: "labels" is null, an unlabelled set; st_fast.prepare {UNLABELLED_HINT}')
    if not isinstance(labels, list):
        raise UserError(f'{where}: {{"labels": [[file, class], …]}} is needed, not {shown(labels)}')
    try:
        table = {str(name).replace("\\", "/"): label for name, label in labels}
    except (ValueError, TypeError) as error:
        raise UserError(f'{where}: {{"labels": [[file, class], …]}} is needed ({error})') from None
    if nulls and table and all(label is None for label in table.values()):
        raise UserError(f"{where}: the label of every file is null, an unlabelled set; {UNLABELLED_HINT}")
    sound = ((type(label) is int and 0 <= label < MAX_CLASSES) or (nulls and label is None) for label in table.values())
    wrong = next((name for name, right in zip(table, sound, strict=True) if not right), None)
    if wrong is not None:
        raise UserError(
            f"{where}: the label of {shown(wrong)} is {shown(table[wrong])}; a class number (0 … {MAX_CLASSES - 1}) is "
            "needed"
        )
    if len(table) != len(labels):
        raise UserError(f"{where}: {len(labels)} labels, but only {len(table)} different file names")
    return {name: -1 if label is None else label for name, label in table.items()}


def top_folder(name: str, prefix: str) -> str:
    """The first folder of a name below `prefix`, or ""."""
    return name[len(prefix) :].rpartition("/")[0].partition("/")[0]


def counts_line(labels: np.ndarray, num_classes: int, class_names: Sequence[str]) -> str:
    """One line: how many there are of each class, or of very many classes the extremes and how many have none.

    labels (n,); those below 0 are of no class and not counted.
    """
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    if num_classes == 1 and not class_names:
        return f"all {counts[0]:,} of one class"
    if num_classes <= COUNTED:
        names = tuple(map(printable, class_names)) or tuple(map(str, range(num_classes)))
        return "classes: " + ", ".join(f"{name} {count}" for name, count in zip(names, counts.tolist(), strict=True))
    low, middle, high = np.percentile(counts[counts > 0], (0, 50, 100)) if counts.any() else (0, 0, 0)
    empty = f"; {none} have none" if (none := int((counts == 0).sum())) else ""
    return f"{num_classes} classes: {low:.0f} at least, {middle:.0f} in the middle, {high:.0f} at most{empty}"
