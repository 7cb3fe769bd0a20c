"""The progress bar of all long work on data: with an ETA, quiet for short work, rare in log files."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

QUIET_SECONDS = 3.0
LOG_SECONDS = 10.0
"""Between two lines where standard error is no terminal."""


def bar(
    items: Iterable[Any] | None, what: str, total: int, unit: str, done: int = 0, hidden: bool = False
) -> "tqdm[Any]":
    """A bar over `items`, or (items = None) one that is moved by `update`.

    `unit` is in the singular: tqdm writes "1.70s/step" and "3.1step/s".
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        items, what, total, leave=False, initial=done, unit=unit, disable=hidden, delay=QUIET_SECONDS,
        mininterval=0.2 if terminal else LOG_SECONDS, miniters=1, dynamic_ncols=terminal,
    )  # fmt: skip
