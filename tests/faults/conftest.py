"""What the fault tests share: the data set, recipes of the tiny run, and its weights when nothing went wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from st_fast.core import checkpoint
from tests import tiny

pytest.register_assert_rewrite("tests.faults.ranks")

States = Callable[[Path], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """Every fault test is."""


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture
def recipe(data, tmp_path) -> Path:
    """The tiny recipe, writing to `tmp_path / "out"`."""
    return tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")


@pytest.fixture
def one_stage(recipe) -> Path:
    """The same recipe with its first stage only."""
    text = recipe.read_text()
    recipe.write_text(text[: text.rindex("[[stage]]")])
    return recipe


@pytest.fixture(scope="session")
def alone(data, tmp_path_factory) -> Path:
    """The run folder of one uninterrupted rank."""
    return tiny.run_whole(tmp_path_factory.mktemp("alone"), data)


@pytest.fixture
def states() -> States:
    """Every tensor of a run's newest checkpoints, by stage, group and name."""

    def read(out: Path) -> dict[str, Tensor]:
        found = {stage: checkpoint.latest(out / stage / "checkpoints", pytest.fail) for stage in ("align", "transcend")}
        assert all(found.values()), f"{out}: a stage has no checkpoint"
        return {f"{s}/{g}/{k}": t for s, c in found.items() for g, ts in c.groups.items() for k, t in ts.items()}

    return read


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    from tests.faults.ranks import Nursery

    found = Nursery(tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def pair(data, nursery, tmp_path_factory) -> Path:
    """The run folder of two uninterrupted ranks."""
    from tests.faults.ranks import finish

    folder = tmp_path_factory.mktemp("pair")
    assert finish(nursery.start(2, tiny.write_recipe(folder / "tiny.toml", data, folder / "out"))) == [0, 0]
    return folder / "out"
