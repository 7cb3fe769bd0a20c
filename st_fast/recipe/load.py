"""Recipe file + overrides → a checked `Recipe`, or one line that says what is wrong; and back to TOML. No torch."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from st_fast.core.errors import UserError
from st_fast.core.options import did_you_mean
from st_fast.recipe.architecture import Model, resolve_model
from st_fast.recipe.batch import agreed, made_for
from st_fast.recipe.check import check
from st_fast.recipe.document import (
    Document,
    apply_override,
    as_document,
    parse_toml,
    read_document,
    section_with,
)
from st_fast.recipe.error import RecipeError, cut, key_text, unknown_name, wrong_value
from st_fast.recipe.keys import build, keys, typed_value
from st_fast.recipe.methods import METHODS, supervision_name
from st_fast.recipe.routing import Routing
from st_fast.recipe.schema import SECTIONS, Contrast, Recipe, Stage, Start

STAGE_KEYS = ("name", "supervision", "steps")
"""What every stage has; all else belongs to its method, its start, its contrast or its route."""


def load(path: str | Path, overrides: Sequence[str] = (), ranks: int | None = 1) -> Recipe:
    """The recipe at `path` with `--section.key=value` and `--stage.<name>.<key>=value` applied, resolved and checked.

    RecipeError, in one line, for anything wrong in the file, the overrides or between them; `ranks` is the number of
    processes that will share a batch (ValueError below 1), None whichever the recipe was made for.
    """
    if ranks is not None and ranks < 1:
        raise ValueError(f"ranks = {ranks}: at least 1")
    flags: dict[str, str] = {}
    try:
        document = read_document(Path(path))
        for override in overrides:
            flags[apply_override(document, override)] = override
        recipe = resolve(parse(document), Path(path))
        ranks = made_for(recipe) if ranks is None else ranks
        recipe = agreed(recipe, ranks)
        check(recipe, ranks)
    except RecipeError as error:
        if error.place:
            raise
        raise error.at(" ".join(filter(None, [str(path), cut(flags.get(error.key, ""))]))) from None
    return recipe


def shipped(name: str) -> Path:
    """The recipe of that name that comes with st_fast: of the clone, or of the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    raise UserError(f"recipe {name}: not among those of this installation")


def load_run(run: str | Path) -> Recipe:
    """The recipe that the folder of a run keeps, for reading what was trained by however many processes."""
    return load(Path(run) / "recipe.toml", ranks=None)


def from_text(text: str, where: str) -> Recipe:
    """What `to_toml` wrote, resolved; RecipeError names `where` it stood."""
    return resolve(parse(as_document(parse_toml(text, where))), Path(where))


def parse(document: Document) -> Recipe:
    """The document with every value of its field's type; nothing resolved yet."""
    sections: dict[str, Any] = {}
    for name, table in document.sections.items():
        check_keys(table, keys(SECTIONS[name]), name, section_with)
        sections[name] = build(SECTIONS[name], table, name)
    sections.setdefault("model", Model())
    stages = tuple(parse_stage(table, position) for position, table in enumerate(document.stages, 1))
    return Recipe(stages=stages, **sections)


def parse_stage(table: dict[str, Any], position: int) -> Stage:
    """One [[stage]]: its own three keys, those of start, contrast and route, and its method's settings."""
    label = f"stage[{position}]"
    for key in STAGE_KEYS:
        if key not in table:
            raise RecipeError(f"{label} has no {key}", "every [[stage]] has " + ", ".join(STAGE_KEYS), f"{label}.{key}")
    own = keys(Stage)
    name = typed_value(f"{label}.name", own["name"].kind, table["name"])
    label = f"stage.{name}"
    supervision = typed_value(f"{label}.supervision", str, table["supervision"])
    if supervision not in METHODS:
        allowed = ", ".join(METHODS) + did_you_mean(supervision, METHODS)
        raise wrong_value(f"{label}.supervision", supervision, allowed)
    steps = typed_value(f"{label}.steps", own["steps"].kind, table["steps"])
    parts = keys(METHODS[supervision]), keys(Start), keys(Contrast), keys(Routing)
    check_keys(table, [*STAGE_KEYS, *(key for part in parts for key in part)], label, method_with)
    method, begin, contrast, route = ({key: table[key] for key in part if key in table} for part in parts)
    return Stage(
        name, build(METHODS[supervision], method, label), steps, build(Start, begin, label),
        build(Contrast, contrast, label), build(Routing, route, label),
    )  # fmt: skip


def check_keys(table: Iterable[str], known: Iterable[str], prefix: str, elsewhere: Callable[[str], str]) -> None:
    """RecipeError for a key that is not known; `elsewhere` hints at where such a key does belong, if anywhere."""
    known = list(known)
    for key in table:
        if key not in known:
            raise unknown_name(f"{prefix}.{key_text(key)}", key, known, elsewhere(key))


def method_with(key: str) -> str:
    """A hint at the methods that have such a setting; empty where none has."""
    owners = [name for name, method in METHODS.items() if key in keys(method)]
    return f"a setting of supervision {', '.join(owners)}" if owners else ""


def resolve(recipe: Recipe, path: Path) -> Recipe:
    """Fills in the model's sizes from its name, and the run's folder from the recipe's."""
    run = recipe.run
    if not run.out:
        run = replace(run, out=typed_value("run.out", str, f"runs/{path.stem}"))
    return replace(recipe, model=resolve_model(recipe.model), run=run)


def to_toml(recipe: Recipe) -> str:
    """Every section and stage with every value, defaults included."""
    tables = [(f"[{name}]", vars(getattr(recipe, name))) for name in SECTIONS]
    for stage in recipe.stages:
        own = {"name": stage.name, "supervision": supervision_name(stage.method), "steps": stage.steps}
        own |= vars(stage.method) | vars(stage.start) | vars(stage.contrastive) | vars(stage.routing)
        tables.append(("[[stage]]", own))
    return "\n".join(
        "".join([f"{header}\n", *(f"{key} = {to_literal(value)}\n" for key, value in table.items())])
        for header, table in tables
    )


def to_literal(value: Any) -> str:
    """A bool, int, float, string or tuple of these in TOML; TypeError for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but TOML also wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(to_literal(item) for item in value)}]"
    raise TypeError(f"{value!r} is a {type(value).__name__}; a recipe holds bools, numbers, strings and tuples of them")
