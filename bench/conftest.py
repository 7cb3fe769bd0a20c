"""Options of `pytest bench/`: those of `python -m bench` that choose what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("st_fast")
    group.addoption("--full", action="store_true", help="more sizes, rivals and rounds, and the sweep: an hour or so")
    group.addoption("--small", action="store_true", help="small sizes: a rehearsal")
    group.addoption("--again", action="store_true", help="also rows that failed, or that a busy machine measured")
    group.addoption("--base", metavar="REV", help="only: compare the ops with this revision; fail beyond the noise")
    group.addoption("--results", type=Path, help="folder of the JSON files (default as python -m bench has it)")
