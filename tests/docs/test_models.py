"""docs/models.md: what each option costs."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from st_fast.recipe import cost
from st_fast.recipe.architecture import Model, resolve_model

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+ = [^`]+)` \| ([+−][\d,]+) \| ([+−][\d.]+ %) \| ([+−][\d.]+ %) \|$", PAGE, re.M)
B_2 = resolve_model(Model("SiT-B/2"))


def share(value: float, of: float) -> str:
    return f"{100 * (value / of - 1):+.1f} %".replace("-", "−")


@pytest.mark.parametrize(("option", "parameters", "flops", "kept"), ROWS)
def test_each_option_costs_what_the_page_says(option: str, parameters: str, flops: str, kept: str) -> None:
    model = resolve_model(replace(B_2, **tomllib.loads(option)))
    assert model.architecture() != B_2.architecture()
    assert f"{model.parameters - B_2.parameters:+,}".replace("-", "−") == parameters
    assert share(cost.trunk_macs(model), cost.trunk_macs(B_2)) == flops
    assert share(cost.activation_bytes(model, bf16=True), cost.activation_bytes(B_2, bf16=True)) == kept


def test_the_page_has_every_option_that_exchanges_a_part_of_the_block() -> None:
    options = {option.split()[0] for option, *_ in ROWS}
    assert options == {"norm", "position", "mlp", "qk_norm", "qkv_bias", "value_residual", "registers"}
    assert all(f"| `model.{option}` |" in PAGE for option in options)
