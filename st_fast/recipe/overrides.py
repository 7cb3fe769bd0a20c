"""`--section.key=value` and `--stage.<name>.<key>=value` on the command line, applied to a recipe's tables."""

from __future__ import annotations

import datetime
import tomllib
from typing import Any

from st_fast.recipe.document import Document, check_section
from st_fast.recipe.error import RecipeError, cut, key_text, show, unknown_name

FORM = "--section.key=value or --stage.<name>.<key>=value"


def apply_override(document: Document, override: str) -> str:
    """Sets one value in the document and returns its key, such as "optim.lr".

    RecipeError if the argument has another form or names a table that doesn't exist.
    """
    flag, equals, text = override.partition("=")
    parts = flag.removeprefix("--").split(".")
    is_stage = parts[0] == "stage"
    if not flag.startswith("--") or not equals or len(parts) != (3 if is_stage else 2) or not all(parts):
        raise RecipeError(f"can't read the argument {show(override)}", FORM)
    table = _stage_table(document, parts[1]) if is_stage else _section_table(document, parts[0])
    table[parts[-1]] = _value(text, flag)
    return ".".join(parts)


def _value(text: str, flag: str) -> Any:
    """The text as a TOML value; what is none, such as a bare word, a path or a date, is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        if text.lstrip()[:1] in ('"', "'", "[", "{"):
            raise RecipeError(f"{flag}={cut(text)} is not a TOML value", "a closed string or list", flag) from None
        return text
    is_date = isinstance(parsed["value"], (datetime.date, datetime.time))
    return text if is_date or len(parsed) > 1 else parsed["value"]


def _section_table(document: Document, name: str) -> dict[str, Any]:
    check_section(name)
    return document.sections.setdefault(name, {})


def _stage_table(document: Document, name: str) -> dict[str, Any]:
    for stage in document.stages:
        if stage.get("name") == name:
            return stage
    names = [stage["name"] for stage in document.stages if isinstance(stage.get("name"), str)]
    raise unknown_name(f"stage.{key_text(name)}", name, names)
