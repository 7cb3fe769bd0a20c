"""A small valid recipe that the tests of this folder spoil in one place each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """\
[model]
name = "custom"
depth = 6
width = 64
heads = 4
patch = 2
latent_size = 8
num_classes = 10

[data]
path = "data/small"

[optim]
batch_size = 96
lr = 1e-3

[[stage]]
name = "align"
supervision = "velocity_head"
depth = 2
steps = 100

[[stage]]
name = "transcend"
supervision = "self_transcendence"
teacher = "align"
student_depth = 2
teacher_depth = 4
steps = 200
"""


@pytest.fixture
def recipe_text() -> str:
    return RECIPE


@pytest.fixture
def spoil(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes the small recipe with one piece of its text replaced, and returns its path."""

    def write(old: str, new: str) -> Path:
        assert RECIPE.count(old) == 1, f"{old!r} is in the small recipe {RECIPE.count(old)} times"
        path = tmp_path / "small.toml"
        path.write_text(RECIPE.replace(old, new), encoding="utf-8")
        return path

    return write


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The small recipe, unspoilt."""
    path = tmp_path / "small.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path
