"""How many mutations the fuzz tests try: a short cut by default, all of them with ST_FAST_FUZZ=full."""

from __future__ import annotations

import os


def blocks(short: int, full: int) -> range:
    """Numbers of the blocks to run, each with seeds of its own; the short cut is the beginning of the full run."""
    return range(full if os.environ.get("ST_FAST_FUZZ") == "full" else short)
