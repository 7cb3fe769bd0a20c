"""st_fast: a fast, honest trainer for self-transcending diffusion transformers.

    import st_fast
    run = st_fast.Trainer(st_fast.make_recipe("recipes/digits.toml")).fit()

The names of `__all__` are the Python API (docs/python.md), loaded when they are asked for, and torch with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from st_fast.core.machine import choose_threads

if TYPE_CHECKING:
    from st_fast.core.errors import Interrupted, RunFailed, UserError
    from st_fast.model.own import tap
    from st_fast.recipe import Recipe
    from st_fast.train.api import TrainedRun, Trainer, make_recipe, open_run
    from st_fast.train.callbacks import Event
    from st_fast.train.supervision.standalone import SelfTranscendence

__version__ = "0.1.0"

_FROM = {
    "Event": "train.callbacks",
    "Interrupted": "core.errors",
    "Recipe": "recipe",
    "RunFailed": "core.errors",
    "SelfTranscendence": "train.supervision.standalone",
    "TrainedRun": "train.api",
    "Trainer": "train.api",
    "UserError": "core.errors",
    "make_recipe": "train.api",
    "open_run": "train.api",
    "tap": "model.own",
}
__all__ = [
    "Event", "Interrupted", "Recipe", "RunFailed", "SelfTranscendence", "TrainedRun", "Trainer", "UserError",
    "make_recipe", "open_run", "tap",
]  # fmt: skip

choose_threads()  # before anything imports torch, which reads it when it loads


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"st_fast.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
