"""How a stage divides an image's tokens: groups with times of their own, and those that a route keeps. Without torch.

Counts are exact, the same in every sample, so that shapes never change; which tokens they are is drawn for each sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenGroups:
    """Groups of random tokens, each with a time of its own."""

    shares: tuple[float, ...]
    """Of the tokens, 1 in all."""
    separated: bool = False
    """Whether a token attends to its own group alone."""
    whole: float = 0.0
    """Chance of a sample to be one group all the same."""


@dataclass(frozen=True)
class TokenRoute:
    """Blocks first + 1 … last run on a part of the tokens."""

    first: int
    last: int
    rate: float
    """Share of each group's tokens that they leave out."""
    structured: bool = False
    """Whether one token of each 2 × 2 is kept, instead of any."""

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        return range(self.first + 1, self.last + 1)

    def around(self, tap: int | tuple[int, ...]) -> bool:
        """Whether a stream that is read there, or one of several, is that of the kept tokens alone."""
        return any(one in self.blocks for one in (tap if isinstance(tap, tuple) else (tap,)))


@dataclass(frozen=True)
class TokenPlan:
    """What becomes of the tokens at a step."""

    lengths: tuple[int, ...]
    """Tokens of each group."""
    separated: bool = False
    whole: float = 0.0
    route: TokenRoute | None = None
    kept: tuple[int, ...] = ()
    """Tokens of each group that the route keeps."""
    path_drop: float = 0.0
    """Chance of a sample to lose what the blocks within a fusion made of it."""


def token_plan(
    tokens: int, groups: TokenGroups | None, route: TokenRoute | None, path_drop: float = 0.0
) -> TokenPlan | None:
    """Of an image with so many tokens; None where all of them run alike."""
    if groups is None and route is None and path_drop == 0.0:
        return None
    groups = groups or TokenGroups((1.0,))
    lengths = divided(tokens, groups.shares)
    kept = () if route is None else kept_lengths(lengths, route.rate)
    return TokenPlan(lengths, groups.separated, groups.whole, route, kept, path_drop)


def divided(tokens: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers near tokens·share that add up: rounded down, the rest to the largest remainders."""
    exact = [tokens * share for share in shares]
    found = [math.floor(one + 1e-9) for one in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (found[i] - exact[i], i))
    for i in by_remainder[: tokens - sum(found)]:
        found[i] += 1
    return tuple(found)


def kept_lengths(lengths: Sequence[int], rate: float) -> tuple[int, ...]:
    """How many tokens of each group are left where this share is dropped, to the nearest whole number."""
    return tuple(math.floor(length * (1 - rate) + 0.5 + 1e-9) for length in lengths)
