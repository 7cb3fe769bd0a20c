"""A recipe file, and the command line's changes to it, as plain tables: sections and stages, not yet typed."""

import datetime
import os
import re
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_fast.recipe.error import RecipeError, cut, key_text, show, unknown_name, wrong_value
from st_fast.recipe.keys import keys
from st_fast.recipe.schema import SECTIONS

FORM = "--section.key=value or --stage.<name>.<key>=value"
MAX_BYTES = 1 << 20
"""A recipe is a page of text; anything larger is another file given by mistake."""

MAX_DOTS = 100
"""In a line: reading a key takes time that grows with the square of its parts."""
MAX_STAGES = 1_000

RENAMED: dict[str, tuple[str, dict[Any, Any]]] = {"evaluate.judge": ("classifier", {"none": False, "classifier": True})}
"""Keys of older recipes → the key today, and today's value of each old one."""


@dataclass(frozen=True)
class Document:
    """The tables of a recipe by section, and its stages in order; overrides change them in place."""

    sections: dict[str, dict[str, Any]]
    stages: list[dict[str, Any]]


def read_document(path: Path) -> Document:
    """The file's tables. RecipeError if it can't be read, isn't TOML, or holds something else than known tables."""
    return as_document(parse_toml(read_text(path), str(path)))


def read_text(path: Path) -> str:
    """The file's text; RecipeError if it is missing, a folder, unreadable, too large or not UTF-8."""
    place = str(path)
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to must not hang; it means nothing to a regular file.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("not a regular file")
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as error:
        problem = "is a folder" if isinstance(error, IsADirectoryError) else "no such file"
        raise RecipeError(problem, "the path of a recipe, such as recipes/digits.toml", place=place) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"can't be read: {reason}", "a readable file", place=place) from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES} bytes", "a recipe of at most 1 MiB", place=place)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        problem = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise RecipeError(problem, "text in UTF-8", place=f"{place}:{line}:{column}") from None


def parse_toml(text: str, place: str) -> dict[str, Any]:
    """The text as TOML; RecipeError with line and column for a mistake in its syntax."""
    for row, written in enumerate(text.split("\n"), 1):
        if written.count(".") > MAX_DOTS and not written.lstrip().startswith("#"):
            problem = f"a line with {written.count('.')} dots"
            raise RecipeError(problem, "section.key, of two parts", place=f"{place}:{row}:1")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise RecipeError("nested too deeply", "tables of plain values", place=place) from None
    except ValueError as error:
        problem, line, column = _position(str(error), text)
        where = f"{place}:{line}:{column}" if line else place
        raise RecipeError(problem, 'TOML: [section], key = value, text in "quotes"', place=where) from None


def _position(message: str, text: str) -> tuple[str, int, int]:
    """tomllib's message without its position, and that position; line 0 where it gives none."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if found is None:
        return message, 0, 0
    lines = text.split("\n")
    return found[1], int(found[2] or len(lines)), int(found[3] or len(lines[-1]) + 1)


def as_document(raw: dict[str, Any]) -> Document:
    """Sorts top-level entries into sections and stages; RecipeError for an unknown section or one that is no table."""
    sections: dict[str, dict[str, Any]] = {}
    stages = raw.get("stage", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise wrong_value("stage", stages, "tables, each under a line [[stage]] of its own")
    if len(stages) > MAX_STAGES:
        raise RecipeError(f"{len(stages)} stages", f"at most {MAX_STAGES}", "stage")
    for name, table in raw.items():
        if name == "stage":
            continue
        check_section(name)
        if not isinstance(table, dict):
            raise wrong_value(name, table, f"a table, under a line [{name}]")
        sections[name] = renamed(name, table)
    return Document(sections, stages)


def renamed(section: str, table: dict[str, Any]) -> dict[str, Any]:
    """The table with keys of older recipes replaced (`RENAMED`)."""
    today: dict[str, Any] = {}
    for key, value in table.items():
        new, values = RENAMED.get(f"{section}.{key}", (key, {}))
        if new != key and new in table:
            raise RecipeError(f"{key}, the older name of {new}, is given as well", new, f"{section}.{new}")
        today[new] = values.get(value, value) if isinstance(value, str) else value
    return today


def check_section(name: str) -> None:
    """RecipeError unless a section has that name; a key out of its section is told where it belongs."""
    if name not in SECTIONS:
        raise unknown_name(key_text(name), name, [*SECTIONS, "stage"], section_with(name))


def section_with(key: str) -> str:
    """A hint at the sections that have such a key; empty where none has."""
    owners = [f"{section}.{key}" for section, kind in SECTIONS.items() if key in keys(kind)]
    return f"did you mean {' or '.join(owners)}?" if owners else ""


def apply_override(document: Document, override: str) -> str:
    """Sets one value in the document and returns its key, such as "optim.lr".

    RecipeError if the argument has another form or names a table that doesn't exist.
    """
    flag, equals, text = override.partition("=")
    parts = flag.removeprefix("--").split(".")
    is_stage = parts[0] == "stage"
    if not flag.startswith("--") or not equals or len(parts) != (3 if is_stage else 2) or not all(parts):
        raise RecipeError(f"can't read the argument {show(override)}", FORM)
    if is_stage:
        found = [stage for stage in document.stages if stage.get("name") == parts[1]]
        if not found:
            names = [stage["name"] for stage in document.stages if isinstance(stage.get("name"), str)]
            raise unknown_name(f"stage.{key_text(parts[1])}", parts[1], names)
        table = found[0]
    else:
        check_section(parts[0])
        table = document.sections.setdefault(parts[0], {})
    given = {parts[-1]: _value(text, flag)}
    given = given if is_stage else renamed(parts[0], given)
    table.update(given)
    return ".".join([*parts[:-1], *given])


def _value(text: str, flag: str) -> Any:
    """The text as a TOML value; what is none, such as a bare word, a path or a date, is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}") if text.count(".") <= MAX_DOTS else {}
    except (ValueError, RecursionError):
        parsed = {}
    if not parsed:
        if text.lstrip()[:1] in ('"', "'", "[", "{"):
            raise RecipeError(f"{flag}={cut(text)} is not a TOML value", "a closed string or list", flag)
        return text
    is_date = isinstance(parsed["value"], (datetime.date, datetime.time))
    return text if is_date or len(parsed) > 1 else parsed["value"]
