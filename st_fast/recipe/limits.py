"""What a recipe's values may be, written beside each field's type as `Annotated[type, limit]`. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Protocol


class Limit(Protocol):
    """Judges a value of the right type; its `str` continues the type's name: "a number" + "above 0"."""

    def allows(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Within:
    """A number between two ends; an end in `open_ends` is itself not allowed."""

    low: float = -math.inf
    high: float = math.inf
    open_ends: str = ""

    def allows(self, value: float) -> bool:
        above = value > self.low if "low" in self.open_ends else value >= self.low
        below = value < self.high if "high" in self.open_ends else value <= self.high
        return above and below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if 'low' in self.open_ends else 'at least'} {self.low:g}"
        left = "(" if "low" in self.open_ends else "["
        right = ")" if "high" in self.open_ends else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class TimeWindow:
    """A non-empty stretch of t in [0, 1], lower end first."""

    def allows(self, value: tuple[float, float]) -> bool:
        low, high = value
        return 0.0 <= low < high <= 1.0

    def __str__(self) -> str:
        return "as [low, high] with 0 <= low < high <= 1"


@dataclass(frozen=True)
class FolderName:
    """A name that is safe as a folder of its own: no separators, no dots, no spaces."""

    pattern = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")

    def allows(self, value: str) -> bool:
        return self.pattern.fullmatch(value) is not None

    def __str__(self) -> str:
        return "of 1 to 64 letters, digits, _ and - that does not start with -"


@dataclass(frozen=True)
class BlockNumber:
    """A transformer block counted from 1; `check` knows how many there are."""

    def allows(self, value: int) -> bool:
        return True

    def __str__(self) -> str:
        return "from 1 to the model's depth"


@dataclass(frozen=True)
class StepOfStage:
    """A step of the stage that the setting belongs to, 0 included; `check` knows how many there are."""

    def allows(self, value: int) -> bool:
        return True

    def __str__(self) -> str:
        return "from 0 to the stage's steps"


@dataclass(frozen=True)
class SomeNames:
    """At least so many names, none empty and none twice."""

    least: int = 1

    def allows(self, value: tuple[str, ...]) -> bool:
        return self.least <= len(value) == len(set(value)) and all(value)

    def __str__(self) -> str:
        return f"with {'at least one, ' * (self.least > 0)}none empty and none twice"


Count = Annotated[int, Within(1)]
CountOrZero = Annotated[int, Within(0)]
Positive = Annotated[float, Within(0, open_ends="low")]
NonNegative = Annotated[float, Within(0)]
Fraction = Annotated[float, Within(0, 1)]
BelowOne = Annotated[float, Within(0, 1, open_ends="high")]
TimeRange = Annotated[tuple[float, float], TimeWindow()]
Names = Annotated[tuple[str, ...], SomeNames()]
NamesOrNone = Annotated[tuple[str, ...], SomeNames(0)]
Block = Annotated[int, BlockNumber()]
StageStep = Annotated[int, StepOfStage()]
