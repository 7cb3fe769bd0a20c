"""What is there compared with what is asked for: one line that names every difference, or a place of its own.

A folder of latents, a set of samples and a run are continued only where what they were made with is what is asked for
now. Both are mappings of names to values as JSON has them. Imports no torch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from st_fast.core.errors import UserError

ABSENT = object()
"""The value of a key that one side lacks."""
VALUE, NAMED = 72, 12
"""Characters of a value, and differences, that a line shows."""


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """`key there (now asked)` for each value that differs, nested ones as `key.inner`; a key of one side counts.

    Values are compared as JSON keeps them: a tuple equals a list and 1 equals 1.0, but neither True nor "1".
    """
    return [f"{key} {_texts(old, new)[0]} (now {_texts(old, new)[1]})" for key, old, new in _pairs("", there, asked)]


def check_same(there: Mapping[str, Any], asked: Mapping[str, Any], found: str, remedy: str) -> None:
    """UserError "`found` each difference; `remedy`" where the two differ."""
    if named := differences(there, asked):
        more = [f"and {len(named) - NAMED} more"] if len(named) > NAMED else []
        raise UserError(f"{found} {', '.join(named[:NAMED] + more)}; {remedy}")


def short_digest(values: Mapping[str, Any]) -> str:
    """Eight hex digits for the end of a name: equal for equal JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def place_for(usual: Path, own: Path, same: Callable[[Path], bool]) -> Path:
    """Where to write or to continue: `usual`, unless something that is not the `same` lies there; else `own`."""
    if os.path.lexists(own):
        return own
    return own if os.path.lexists(usual) and not same(usual) else usual


def _pairs(name: str, there: Any, asked: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs: its name and both values."""
    if isinstance(there, Mapping) and isinstance(asked, Mapping):
        for key in [*asked, *(key for key in there if key not in asked)]:
            inner = f"{name}.{key}" if name else str(key)
            yield from _pairs(inner, there.get(key, ABSENT), asked.get(key, ABSENT))
    elif _of_mappings(there) and _of_mappings(asked) and len(there) == len(asked):
        for number, (old, new) in enumerate(zip(there, asked, strict=True)):
            yield from _pairs(f"{name}[{number}]", old, new)
    elif _plain(there) != _plain(asked):
        yield name, there, asked


def _of_mappings(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _plain(value: Any) -> object:
    """A value that is equal for equal JSON; a truth value is no number."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return (bool, value) if isinstance(value, bool) else repr(value) if value != value else value


def _texts(there: Any, asked: Any) -> tuple[str, str]:
    """Both values as short printable text; long ones from where they begin to differ."""
    old, new = _text(there), _text(asked)
    if len(old) <= VALUE and len(new) <= VALUE:
        return old, new
    pairs = enumerate(zip(old, new, strict=False))
    same = next((at for at, pair in pairs if pair[0] != pair[1]), min(len(old), len(new)))
    start = max(0, same - 8) if same > VALUE // 2 else 0
    return _cut(old, start), _cut(new, start)


def _cut(text: str, start: int) -> str:
    return f"{'…' * (start > 0)}{text[start : start + VALUE]}{'…' * (len(text) > start + VALUE)}"


def _text(value: Any) -> str:
    if value is ABSENT:
        return "not there"
    if isinstance(value, str):
        return value if value and value.isprintable() else ascii(value)
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=str)
    return str(value)
