"""Dataclasses out of JSON that anybody may have written: each field's type checked, the wrong one named."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from st_fast.core.files import BadFile, is_count, shown

Record = TypeVar("Record")
PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number from 0", is_count),
    float: ("a number", lambda value: type(value) in (int, float) and math.isfinite(value)),
    str: ("text", lambda value: type(value) is str),
    bool: ("true or false", lambda value: type(value) is bool),
}


def record_from(kind: type[Record], value: object, where: str) -> Record:
    """The dataclass `kind` out of a JSON object with its fields; `BadFile`, which begins with `where`, if it isn't one.

    Fields are int (from 0), float, str, bool, tuples of these, and dataclasses of such fields. A `BadFile` that the
    dataclass itself raises gets `where` in front.
    """
    if not isinstance(value, dict):
        raise BadFile(f"{where} = {shown(value)}: an object is needed")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    optional = {n for n, field in fields.items() if field.default is not field.default_factory}  # MISSING is both
    if strangers := sorted(value.keys() - fields):
        raise BadFile(f"{where}: the field {shown(strangers[0])} is unknown; known are {', '.join(fields)}")
    if missing := [name for name in fields if name not in value and name not in optional]:
        raise BadFile(f"{where}: the field {missing[0]} is missing")
    types = typing.get_type_hints(kind)
    found = {name: _value(types[name], item, f"{where}: {name}") for name, item in value.items()}
    try:
        return kind(**found)
    except BadFile as error:
        raise BadFile(f"{where}: {error}") from None


def _value(kind: Any, value: Any, where: str) -> Any:
    if kind in PLAIN:
        needed, fits = PLAIN[kind]
        if not fits(value):
            raise BadFile(f"{where} = {shown(value)}: {needed} is needed")
        return value
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list) or (kinds[-1] is not ... and len(value) != len(kinds)):
            raise BadFile(f"{where} = {shown(value)}: a list{f' of {len(kinds)}' * (kinds[-1] is not ...)} is needed")
        return tuple(
            _value(kinds[0] if kinds[-1] is ... else kinds[number], item, f"{where}[{number}]")
            for number, item in enumerate(value)
        )
    return record_from(kind, value, where)
