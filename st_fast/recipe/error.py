"""A mistake in a recipe as data, and how values and near names are shown in its one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from st_fast.core.errors import UserError
from st_fast.core.options import did_you_mean

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,60}")


class RecipeError(UserError):
    """A recipe can't be used: one line with the place (file or flag), the problem and what is allowed.

    `key`, `value` and `allowed` keep the parts for programs; `key` is empty where the mistake is the file's.
    """

    def __init__(self, problem: str, allowed: str, key: str = "", value: object = None, place: str = "") -> None:
        super().__init__(problem, allowed, key, value, place)
        self.problem, self.allowed, self.key, self.value, self.place = problem, allowed, key, value, place

    def at(self, place: str) -> RecipeError:
        """The same mistake with the place it was found in."""
        return RecipeError(self.problem, self.allowed, self.key, self.value, place)

    @property
    def short(self) -> str:
        """`key = value` alone."""
        return self.problem.partition(": ")[0]

    def __str__(self) -> str:
        text = f"{self.place}: {self.problem}" if self.place else self.problem
        text = f"{text}; allowed: {self.allowed}"
        # Escaped is what a terminal or a log would not keep in one line: control characters, separators, surrogates.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def wrong_value(key: str, value: object, allowed: str, why: str = "") -> RecipeError:
    """`key = value` can't stand; `why` is said where the value alone does not show it."""
    problem = f"{key} = {show(value)}" + (f": {why}" if why else "")
    return RecipeError(problem, allowed, key, value)


def unknown_name(key: str, name: str, options: Iterable[str], elsewhere: str = "") -> RecipeError:
    """`key` ends in a name that is none of the options; `elsewhere` is where that name does belong."""
    options = list(options)
    hint = f" ({elsewhere})" if elsewhere else did_you_mean(name, options)
    return RecipeError(f"{key} is unknown{hint}", ", ".join(options) or "none, there are none", key)


def key_text(name: str) -> str:
    """A key as it may be written in TOML: bare where that is possible, else quoted and cut."""
    return name if _BARE_KEY.fullmatch(name) else show(name)


def show(value: Any, inside: bool = False) -> str:
    """A value about as TOML writes it, short enough for a message; `inside` another one it is shorter still."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(cut(value), ensure_ascii=False)
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, (list, tuple)):
        items = [show(item, inside=True) for item in value[:4]] + (["..."] if len(value) > 4 else [])
        return "[...]" if inside else f"[{', '.join(items)}]"
    return "{...}" if isinstance(value, dict) else str(value)


def cut(text: str) -> str:
    """The text, its middle left out where it is too long for a message."""
    return text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"
