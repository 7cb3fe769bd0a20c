"""Drawing samples of a model. Published model cards import `balanced` and `sample` from here."""

from importlib import import_module

_HOMES = {"balanced": "draw", "sample": "guided"}


def __getattr__(name: str) -> object:
    """Imported when asked for, so that `python -m st_fast.sample` can refuse a missing run without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
