"""A resolved recipe as TOML text that `load` reads back to an equal recipe."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from st_fast.recipe.methods import supervision_name
from st_fast.recipe.schema import SECTIONS, Recipe, Stage


def to_toml(recipe: Recipe) -> str:
    """Every section and stage with every value, defaults included."""
    tables = [_table(f"[{name}]", _items(getattr(recipe, name))) for name in SECTIONS]
    tables += [_table("[[stage]]", _stage_items(stage)) for stage in recipe.stages]
    return "\n".join(tables)


def _stage_items(stage: Stage) -> dict[str, Any]:
    head = {"name": stage.name, "supervision": supervision_name(stage.method), "steps": stage.steps}
    return head | _items(stage.method) | _items(stage.start)


def _items(section: Any) -> dict[str, Any]:
    return {f.name: getattr(section, f.name) for f in fields(section)}


def _table(header: str, items: dict[str, Any]) -> str:
    return "".join([f"{header}\n", *(f"{key} = {_literal(value)}\n" for key, value in items.items())])


def _literal(value: Any) -> str:
    """A bool, int, float, string or tuple of these in TOML; TypeError for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but TOML also wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_literal(item) for item in value)}]"
    raise TypeError(f"{value!r} is a {type(value).__name__}; a recipe holds bools, numbers, strings and tuples of them")
