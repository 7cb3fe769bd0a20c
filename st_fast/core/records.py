"""Dataclasses out of JSON that anybody may have written, each field's type checked; and the records of a run's log."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from st_fast.core.files import BadFile, is_count, read_bytes, shown

Record = TypeVar("Record")
PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number from 0", is_count),
    float: ("a number", lambda value: type(value) in (int, float) and math.isfinite(value)),
    str: ("text", lambda value: type(value) is str),
    bool: ("true or false", lambda value: type(value) is bool),
}


def record_from(kind: type[Record], value: object, where: str, strict: bool = True) -> Record:
    """The dataclass `kind` out of a JSON object with its fields; `BadFile`, which begins with `where`, if it isn't one.

    Fields are int (from 0), float, str, bool, tuples of these, `Mapping[str, …]` of these or of Any, Literal,
    dataclasses of such fields, and `… | None`. A `BadFile` that the dataclass itself raises gets `where` in front.
    Fields that the dataclass does not have are refused; without `strict` they are taken for a newer version's, and
    passed over.
    """
    if not isinstance(value, dict):
        raise BadFile(f"{where} = {shown(value)}: an object is needed")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    optional = {n for n, field in fields.items() if field.default is not field.default_factory}  # MISSING is both
    if strict and (strangers := sorted(value.keys() - fields)):
        raise BadFile(f"{where}: the field {shown(strangers[0])} is unknown; known are {', '.join(fields)}")
    if missing := [name for name in fields if name not in value and name not in optional]:
        raise BadFile(f"{where}: the field {missing[0]} is missing")
    hints = typing.get_type_hints(kind)
    found = {n: _value(hints[n], value[n], f"{where}: {n}", strict) for n in fields if n in value}
    try:
        return kind(**found)
    except BadFile as error:
        raise BadFile(f"{where}: {error}") from None


def log_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's log.jsonl: objects with kind, stage and step. BadFile if there is no such file.

    A line that is none, as a kill, a power cut or an editor leaves it, is passed over: weights don't hang on the log.
    """
    for line in read_bytes(path).decode("utf-8-sig", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and all(
            type(record.get(key)) is kind for key, kind in (("kind", str), ("stage", str), ("step", int))
        ):
            yield record


def _value(kind: Any, value: Any, where: str, strict: bool) -> Any:
    if kind is Any:
        return value
    if kind in PLAIN:
        needed, fits = PLAIN[kind]
        if not fits(value):
            raise BadFile(f"{where} = {shown(value)}: {needed} is needed")
        return value
    origin, kinds = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in kinds or type(value) is not type(kinds[kinds.index(value)]):
            raise BadFile(f"{where} = {shown(value)}: one of {', '.join(map(str, kinds))} is needed")
        return value
    if origin is types.UnionType:
        return None if value is None else _value(kinds[0], value, where, strict)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise BadFile(f"{where} = {shown(value)}: an object is needed")
        return {key: _value(kinds[1], item, f"{where}: {shown(key)}", strict) for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list) or (kinds[-1] is not ... and len(value) != len(kinds)):
            raise BadFile(f"{where} = {shown(value)}: a list{f' of {len(kinds)}' * (kinds[-1] is not ...)} is needed")
        return tuple(
            _value(kinds[0] if kinds[-1] is ... else kinds[number], item, f"{where}[{number}]", strict)
            for number, item in enumerate(value)
        )
    return record_from(kind, value, where, strict)
