"""TOML values → the types of a dataclass's fields, with the limits written beside them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from st_fast.recipe.error import RecipeError, did_you_mean, wrong_value

Section = TypeVar("Section")

_INT64 = 2**63


class _Mismatch(Exception):
    """A value is not of its field's type; the text, if any, says what is allowed better than the type does."""


def field_types(cls: type) -> dict[str, Any]:
    """The fields of a dataclass with their types, limits included."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls)}


def build(cls: type[Section], table: Mapping[str, Any], prefix: str) -> Section:
    """A table, its keys known to be fields, as the dataclass `cls`; RecipeError for a value of wrong type or range."""
    types = field_types(cls)
    return cls(**{key: typed_value(f"{prefix}.{key}", types[key], value) for key, value in table.items()})


def typed_value(key: str, kind: Any, value: object) -> Any:
    """The value as the field's type: a list becomes a tuple, an integer a float where one is wanted."""
    try:
        return _convert(kind, value)
    except _Mismatch as mismatch:
        raise _refusal(key, kind, value, str(mismatch)) from None


def _refusal(key: str, kind: Any, value: object, allowed: str) -> RecipeError:
    if isinstance(value, str) and (words := choices(kind)):
        return wrong_value(key, value, describe(kind) + did_you_mean(value, words))
    return wrong_value(key, value, allowed or describe(kind))


def choices(kind: Any) -> tuple[str, ...]:
    """The words that a field takes: of a choice between words, or between words and something else."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(word for member in get_args(kind) for word in choices(member)) if _is_union(kind) else ()


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def describe(kind: Any) -> str:
    """A field's type in words: "a number above 0"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if _is_union(kind):
        return ", or ".join(map(describe, arguments))
    if origin is Annotated:
        return " ".join([describe(arguments[0]), *map(str, arguments[1:])])
    if origin is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(f'"{choice}"' for choice in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    return {bool: "true or false", int: "an integer", float: "a finite number", str: "a string in quotes"}[kind]


def _convert(kind: Any, value: object) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if _is_union(kind):
        return _convert_to_one(arguments, value)
    if origin is Annotated:
        converted = _convert(arguments[0], value)
        if not all(limit.allows(converted) for limit in arguments[1:]):
            raise _Mismatch
        return converted
    if origin is Literal:
        if value not in arguments:
            raise _Mismatch
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _Mismatch
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item) for item in value)
        if len(value) != len(arguments):
            raise _Mismatch
        return tuple(_convert(item_kind, item) for item_kind, item in zip(arguments, value, strict=True))
    return _CONVERTERS[kind](value)


def _convert_to_one(kinds: tuple[Any, ...], value: object) -> Any:
    """The value as the first of the types that takes it."""
    for kind in kinds:
        with suppress(_Mismatch):
            return _convert(kind, value)
    raise _Mismatch


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Mismatch
    return value


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Mismatch
    if not -_INT64 <= value < _INT64:
        raise _Mismatch("an integer that fits 64 bits")
    return value


def _float(value: object) -> float:
    number = float(_int(value)) if not isinstance(value, float) else value
    if not math.isfinite(number):
        raise _Mismatch
    return number


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise _Mismatch
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value):
        raise _Mismatch("a string without control characters, line breaks or broken Unicode")
    return value


_CONVERTERS = {bool: _bool, int: _int, float: _float, str: _str}
