"""Whether the tensors found are those expected, told completely in one line."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import shown

SHOWN = 8
"""How many of each kind of mismatch are written out; the rest are counted."""


def match_strictly(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str, shown_keys: int = SHOWN
) -> None:
    """Raises a UserError listing every missing key, unexpected key and shape or dtype that differs; `what` names it.

    Of each kind, `shown_keys` are written out and the rest counted.
    """
    both = [key for key in expected if key in found]
    problems = {
        "missing": [shown(key) for key in expected if key not in found],
        "unexpected": [shown(key) for key in found if key not in expected],
        "different": [_difference(key, expected[key], found[key]) for key in both],
    }
    named = {kind: [key for key in listed if key] for kind, listed in problems.items()}
    parts = [_listed(kind, keys, shown_keys) for kind, keys in named.items() if keys]
    if parts:
        raise UserError(f"{what}: tensors do not match: {'; '.join(parts)}")


def _difference(key: str, expected: Tensor, found: Tensor) -> str:
    if expected.shape == found.shape and expected.dtype == found.dtype:
        return ""
    return f"{shown(key)} (expected {_kind(expected)}, found {_kind(found)})"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _listed(kind: str, keys: list[str], limit: int) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:limit])}{more}"
