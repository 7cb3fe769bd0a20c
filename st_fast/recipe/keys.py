"""A key of the recipe is a dataclass field: its type with the allowed range, its default, and one sentence of help.

    lr: Positive = fixed(1e-4, "Learning rate of AdamW.")
    keep: Count = free(2, "Newest checkpoints that a stage keeps.")

`fixed` keys change the numbers of training, so a resumed run may not change them without --accept-changes; `free` ones
may always change. This module also converts TOML values to the fields' types. Imports no torch.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from st_fast.core.options import did_you_mean
from st_fast.recipe.error import wrong_value

T = TypeVar("T")


def said(help: str, free: bool = False) -> dict[str, Any]:
    """The metadata of a key's field."""
    return {"help": help, "free": free}


def fixed(default: T, help: str) -> T:
    """A key that changes the numbers of training."""
    return field(default=default, metadata=said(help))


def free(default: T, help: str) -> T:
    """A key that a resume may change: it only looks at a run, or does the same work in another way."""
    return field(default=default, metadata=said(help, free=True))


@dataclass(frozen=True)
class Key:
    """What a field says about its key."""

    kind: Any
    """The type, with its limits."""
    default: Any
    """`dataclasses.MISSING` where the key must be given."""
    help: str
    free: bool


def keys(cls: type) -> dict[str, Key]:
    """The keys of a section, a method or a stage's start, by name."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        f.name: Key(
            hints[f.name],
            f.default if f.default_factory is MISSING else f.default_factory(),
            f.metadata.get("help", ""),
            f.metadata.get("free", False),
        )
        for f in fields(cls)
    }


@dataclass(frozen=True)
class Limit:
    """Which values of a type are allowed; `words` continue the type's name: "a number" + "above 0"."""

    words: str
    allows: Callable[[Any], bool]

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class UpTo:
    """A number up to something that only `check` knows: the model's blocks, or the steps of the stage."""

    low: int
    of: Literal["the model's depth", "the stage's steps"]

    def allows(self, value: int) -> bool:
        return True

    def __str__(self) -> str:
        return f"from {self.low} to {self.of}"


def _distinct(names: tuple[str, ...]) -> bool:
    return len(names) == len(set(names)) and all(names)


def between(least: float, most: float) -> Limit:
    """From `least` to a largest value, of what takes memory or time by its size."""
    return Limit(f"at least {least} and at most {most}", lambda value: least <= value <= most)


# Of steps and the like, which take no memory by their number; a thousand a second for 30 years.
Count = Annotated[int, Limit("at least 1 and at most 10^12", lambda value: 1 <= value <= 10**12)]
CountOrZero = Annotated[int, Limit("at least 0 and at most 10^12", lambda value: 0 <= value <= 10**12)]
CFG_MOST = 10**6
"""Guidance beyond it overflows in lower precision and makes no picture."""
Channels = Annotated[int, between(1, 2**18)]
Guidance = Annotated[float, between(0, CFG_MOST)]
Positive = Annotated[float, Limit("above 0", lambda value: value > 0)]
NonNegative = Annotated[float, Limit("at least 0", lambda value: value >= 0)]
Fraction = Annotated[float, Limit("in [0, 1]", lambda value: 0 <= value <= 1)]
BetweenZeroAndOne = Annotated[float, Limit("in (0, 1)", lambda value: 0 < value < 1)]
BelowOne = Annotated[float, Limit("in [0, 1)", lambda value: 0 <= value < 1)]
GROUPS_MOST = 16
Shares = Annotated[
    tuple[float, ...],
    Limit(
        f"with 2 to {GROUPS_MOST} above 0 that add up to 1",
        lambda shares: 2 <= len(shares) <= GROUPS_MOST and min(shares) > 0 and abs(math.fsum(shares) - 1) < 1e-6,
    ),
]
"""Of a whole."""
Cosine = Annotated[float, Limit("in [-1, 1]", lambda value: -1 <= value <= 1)]
TimeRange = Annotated[
    tuple[float, float], Limit("as [low, high] with 0 <= low < high <= 1", lambda ends: 0 <= ends[0] < ends[1] <= 1)
]
SHIFT_LEAST, SHIFT_MOST = 0.01, 100.0
Shift = Annotated[float, between(SHIFT_LEAST, SHIFT_MOST)] | Literal["auto"]
"""Of time: `st_fast.recipe.times`."""
PathText = Annotated[str, Limit("that is not only blanks", lambda path: not path or bool(path.strip()))]
"""Of a file or folder, or its name on the hub; what empty means, each key says."""
FOLDER_NAME = Limit(
    "of 1 to 64 letters, digits, _ and - that does not start with -",
    lambda name: re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name) is not None,
)
"""A name that is safe as a folder of its own: no separators, no dots, no spaces."""
Names = Annotated[
    tuple[str, ...],
    Limit("with at least one, none empty and none twice", lambda names: names != () and _distinct(names)),
]
NamesOrNone = Annotated[tuple[str, ...], Limit("with none empty and none twice", _distinct)]
Block = Annotated[int, UpTo(1, "the model's depth")]
"""A transformer block, counted from 1."""
StageStep = Annotated[int, UpTo(0, "the stage's steps")]


class _Mismatch(Exception):
    """A value is not of its field's type; the text, if any, says what is allowed better than the type does."""


def build(cls: type[T], table: Mapping[str, Any], prefix: str) -> T:
    """A table, its keys known to be fields, as the dataclass `cls`; RecipeError for a value of wrong type or range."""
    known = keys(cls)
    return cls(**{key: typed_value(f"{prefix}.{key}", known[key].kind, value) for key, value in table.items()})


def typed_value(key: str, kind: Any, value: object) -> Any:
    """The value as the field's type: a list becomes a tuple, an integer a float where one is wanted."""
    try:
        return _convert(kind, value)
    except _Mismatch as mismatch:
        if isinstance(value, str) and (words := choices(kind)):
            raise wrong_value(key, value, describe(kind) + did_you_mean(value, words)) from None
        raise wrong_value(key, value, str(mismatch) or describe(kind)) from None


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
    if _is_union(kind):  # the first of the types that takes it
        for member in arguments:
            with suppress(_Mismatch):
                return _convert(member, value)
        raise _Mismatch
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
        members = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) != len(members):
            raise _Mismatch
        return tuple(_convert(member, item) for member, item in zip(members, value, strict=True))
    return _plain(kind, value)


def _plain(kind: type, value: object) -> object:
    """A bool, an integer, a number or a string; an integer serves where a number is wanted."""
    if type(value) is int and kind in (int, float):
        if not -(2**63) <= value < 2**63:
            raise _Mismatch("an integer that fits 64 bits")
        return kind(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise _Mismatch
    if isinstance(value, float) and value and not 2.0**-126 <= abs(value) < 2.0**128:
        raise _Mismatch("0 or a number of 1e-37 to 1e38 in size, which float32 holds")
    if isinstance(value, str) and any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value):
        raise _Mismatch("a string without control characters, line breaks or broken Unicode")
    return value
