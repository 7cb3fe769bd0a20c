"""A folder with data, the tiny recipe and its first stage's checkpoint, made once."""

from pathlib import Path

import pytest

from tests.train.schedule import loop


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return loop.with_teacher(tmp_path_factory.mktemp("schedule"))
