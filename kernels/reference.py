"""Every family's definitions under one name: `reference.norm_modulate` is what `norm_modulate` is held to.

All functions compute in float32 (in float64 for float64 inputs, so that `gradcheck` applies) whatever the inputs'
dtype, and return the dtype of their first argument; losses are returned in the computing dtype. Shapes: B samples,
N tokens, D channels, H heads, d = D / H, M supervised samples.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from . import FAMILIES


def __getattr__(name: str) -> Any:
    """A definition, or a constant that belongs to it."""
    for family in FAMILIES:
        definition = import_module(f".{family}.definition", __package__)
        found = vars(definition).get(name)
        own = getattr(found, "__module__", definition.__name__) == definition.__name__  # not what it imports
        if found is not None and own and not name.startswith("_") and not isinstance(found, ModuleType):
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
