"""docs/frontier.md: the table of methods."""

import re
from pathlib import Path

import pytest

from st_fast.recipe import cost
from st_fast.recipe.load import load

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"\| \[\w+\]\(\.\./(recipes/\w+\.toml)\) \| (\d\.\d\d) \|", (ROOT / "docs/frontier.md").read_text())


@pytest.mark.parametrize(("path", "printed"), ROWS)
def test_the_table_has_each_methods_flops_over_a_plain_step(path: str, printed: str) -> None:
    recipe = load(ROOT / path, ranks=8)
    plain = 6.0 * cost.trunk_macs(recipe.model)
    assert f"{cost.stage_cost(recipe, recipe.stages[0]).total / plain:.2f}" == printed


def test_the_table_has_all_methods_and_sprints_last_phase() -> None:
    assert len(ROWS) >= 9
    recipe = load(ROOT / "recipes/sit_xl_sprint.toml", ranks=8)
    each = cost.stage_cost(recipe, recipe.stages[0])
    assert (each.student + each.dense_student) / (6.0 * cost.trunk_macs(recipe.model)) == pytest.approx(1.01, abs=5e-3)
