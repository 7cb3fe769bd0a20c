"""The names of classes in the README.md of a Hugging Face data set, its "card", which begins with YAML about the set.

    dataset_info:                    # or a list of these, each with its config_name
      features:
      - name: label
        dtype:
          class_label:
            names:                   # or a list of them
              '0': cat
              '1': dog

A card is a courtesy: one that is missing, broken or of another shape gives no names, and is no error.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from st_fast.core.files import BadFile, open_regular

CARD = "README.md"
CARD_BYTES = 2**19
"""Of a card's beginning, in which its YAML must end: parsing takes some hundred bytes of memory for each byte."""
ABOVE = 4
"""Folders that are looked into for the card: the files' own, those of their split and configuration, the set's."""
FRONT = re.compile(rb"(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?\n)---[ \t]*\r?(?:\n|\Z)", re.DOTALL)
DEFAULT_FOLDER = "data"
"""Where `push_to_hub` puts the files of the configuration "default"; those of another lie in a folder of its name."""


def names_on_card(file: Path) -> dict[str, tuple[str, ...]]:
    """The names of classes by column, for a file of a data set: of the nearest card at or above it that has any.

    Of a card with several configurations, those of the one in whose folder the file lies, or what all of them say.
    """
    file = file.absolute()
    for folder in file.parents[:ABOVE]:
        if infos := _infos(folder / CARD):
            parts = ["default" if part == DEFAULT_FOLDER else part for part in file.relative_to(folder).parts[:-1]]
            return _agreed([info for info in infos if info.get("config_name") in parts] or infos)
    return {}


def _infos(card: Path) -> list[Mapping[str, Any]]:
    """A card's "dataset_info", of each configuration; none where there is no such card, or no YAML library."""
    try:
        with open_regular(card) as opened:
            front = FRONT.match(opened.read(CARD_BYTES) or b"")
    except BadFile:
        return []
    if front is None or b"class_label" not in front[1]:
        return []
    try:
        import yaml  # which the packages that read parquet bring
    except ImportError:
        return []
    try:  # BaseLoader takes every scalar as text: a class called "no" is not False, and no tag makes an object
        content = yaml.load(front[1].decode(), getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    found = content.get("dataset_info") if isinstance(content, dict) else None
    return [info for info in (found if isinstance(found, list) else [found]) if isinstance(info, dict)]


def _agreed(infos: list[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The names of each column that have them in all configurations, and the same ones."""
    tables = [_columns(info.get("features")) for info in infos]
    return {
        column: names
        for column, names in tables[0].items()
        if names and all(table.get(column) == names for table in tables)
    }


def _columns(features: object) -> dict[str, tuple[str, ...]]:
    """The names of classes by column, as a configuration tells them; () for a column that has none."""
    found = dict[str, tuple[str, ...]]()
    for feature in features if isinstance(features, list) else ():
        if isinstance(feature, dict) and isinstance(name := feature.get("name"), str):
            kind = feature.get("dtype")
            label = kind.get("class_label") if isinstance(kind, dict) else None
            found[name] = _in_order(label.get("names")) if isinstance(label, dict) else ()
    return found


def _in_order(names: object) -> tuple[str, ...]:
    """Names as a list, or by their numbers as text: each number from 0 on once, each name another; else ()."""
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return ()
    return tuple(names) if len(set(names)) == len(names) else ()
