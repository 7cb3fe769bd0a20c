"""Recipe file + overrides → a checked `Recipe`, or one line that says what is wrong. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from st_fast.recipe.batch import agreed, made_for
from st_fast.recipe.check import check
from st_fast.recipe.document import Document, read_document, section_with
from st_fast.recipe.error import RecipeError, cut, did_you_mean, key_text, unknown_name, wrong_value
from st_fast.recipe.methods import METHODS
from st_fast.recipe.overrides import apply_override
from st_fast.recipe.schema import SECTIONS, SIZES, Model, Recipe, Stage, Start
from st_fast.recipe.typed import build, field_types, typed_value

PATCHES = (2, 4, 8)
"""The patch sizes that SiT's names take."""

STAGE_KEYS = ("name", "supervision", "steps")
"""What every stage has; all else belongs to its method or its start."""


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


def load_run(run: str | Path) -> Recipe:
    """The recipe that the folder of a run keeps, for reading what was trained by however many processes."""
    return load(Path(run) / "recipe.toml", ranks=None)


def parse(document: Document) -> Recipe:
    """The document with every value of its field's type; nothing resolved yet."""
    sections: dict[str, Any] = {}
    for name, table in document.sections.items():
        check_keys(table, field_types(SECTIONS[name]), name, section_with)
        sections[name] = build(SECTIONS[name], table, name)
    sections.setdefault("model", Model())
    stages = tuple(parse_stage(table, position) for position, table in enumerate(document.stages, 1))
    return Recipe(stages=stages, **sections)


def parse_stage(table: dict[str, Any], position: int) -> Stage:
    """One [[stage]]: its own three keys, those of its start, and the rest as settings of its `supervision` method."""
    label = f"stage[{position}]"
    for key in STAGE_KEYS:
        if key not in table:
            raise RecipeError(f"{label} has no {key}", "every [[stage]] has " + ", ".join(STAGE_KEYS), f"{label}.{key}")
    kinds = field_types(Stage)
    name = typed_value(f"{label}.name", kinds["name"], table["name"])
    label = f"stage.{name}"
    supervision = typed_value(f"{label}.supervision", str, table["supervision"])
    if supervision not in METHODS:
        allowed = ", ".join(METHODS) + did_you_mean(supervision, METHODS)
        raise wrong_value(f"{label}.supervision", supervision, allowed)
    steps = typed_value(f"{label}.steps", kinds["steps"], table["steps"])
    own, start = field_types(METHODS[supervision]), field_types(Start)
    check_keys(table, [*STAGE_KEYS, *own, *start], label, method_with)
    method, begin = ({key: table[key] for key in kinds if key in table} for kinds in (own, start))
    return Stage(name, build(METHODS[supervision], method, label), steps, build(Start, begin, label))


def check_keys(table: Iterable[str], known: Iterable[str], prefix: str, elsewhere: Callable[[str], str]) -> None:
    """RecipeError for a key that is not known; `elsewhere` hints at where such a key does belong, if anywhere."""
    known = list(known)
    for key in table:
        if key not in known:
            raise unknown_name(f"{prefix}.{key_text(key)}", key, known, elsewhere(key))


def method_with(key: str) -> str:
    """A hint at the methods that have such a setting; empty where none has."""
    owners = [name for name, method in METHODS.items() if key in field_types(method)]
    return f"a setting of supervision {' and '.join(owners)}" if owners else ""


def resolve(recipe: Recipe, path: Path) -> Recipe:
    """Fills in the model's sizes from its name, and the run's folder from the recipe's."""
    run = recipe.run
    if not run.out:
        run = replace(run, out=typed_value("run.out", str, f"runs/{path.stem}"))
    return replace(recipe, model=resolve_model(recipe.model), run=run)


def resolve_model(model: Model) -> Model:
    """The model with depth, width, heads and patch filled from a name such as "SiT-XL/2"; those given must agree."""
    if model.name == "custom":
        for key in ("depth", "width", "heads", "patch"):
            if getattr(model, key) == 0:
                why = 'model.name = "custom" leaves it to you'
                raise wrong_value(f"model.{key}", 0, "an integer at least 1, or a model.name such as SiT-XL/2", why)
        return model
    named = {f"SiT-{size}/{patch}": (*shape, patch) for size, shape in SIZES.items() for patch in PATCHES}
    if model.name not in named:
        options = ["custom", *named]
        raise wrong_value("model.name", model.name, ", ".join(options) + did_you_mean(model.name, options))
    depth, width, heads, patch = named[model.name]
    for key, size in (("depth", depth), ("width", width), ("heads", heads), ("patch", patch)):
        if getattr(model, key) not in (0, size):
            why = f'model.name = "{model.name}" has {key} {size}'
            raise wrong_value(f"model.{key}", getattr(model, key), f'{size}, or model.name = "custom"', why)
    return replace(model, depth=depth, width=width, heads=heads, patch=patch)
