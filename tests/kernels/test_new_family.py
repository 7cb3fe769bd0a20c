"""A maintainer adds an op by copying one folder: everything that lists ops has it then, and no other file changes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import torch
from st_fast import kernels
from st_fast.core.ranks import Ranks
from st_fast.kernels import resources
from st_fast.model.smoke_test import validated_kernels
from st_fast.recipe import load
from st_fast.recipe.architecture import Model

NEW = ("new_norm_modulate", "new_gate_residual_norm_modulate", "new_gate_residual")
cpu = torch.device("cpu")
assert "copied" in kernels.FAMILIES and set(NEW) <= set(kernels.TABLE)
recipe = load("recipes/digits.toml", ["--kernels.new_norm_modulate=fused"])
table = kernels.select({op: "fused" for op in NEW}, cpu)
assert table.new_norm_modulate is kernels.new_norm_modulate
assert kernels.select({}, torch.device("cuda")).new_gate_residual is kernels.new_gate_residual
assert kernels.select({}, cpu).new_gate_residual is kernels.reference.new_gate_residual  # csrc has no such kernel
x, shift, scale = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
torch.testing.assert_close(kernels.new_norm_modulate(x, shift, scale), kernels.norm_modulate(x, shift, scale))
said = []
validated_kernels({op: "fused" for op in NEW}, recipe.model, Ranks(0, 1, cpu), torch.float32,
                  said.append)
assert said == [], said
names = {name for name, _, _ in resources.launches()}
assert "copied.forward" in names and "copied.forward" in resources.ceilings()
print(recipe.kernels.new_norm_modulate)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This repository with the folder adaln a second time, its ops under other names."""
    ignore = shutil.ignore_patterns("__pycache__", "*.lock")
    for folder in ("kernels", "st_fast", "bench", "tests", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignore)
    shutil.copytree(tmp_path / "kernels" / "adaln", tmp_path / "kernels" / "copied")
    for file in (tmp_path / "kernels" / "copied").glob("*.py"):
        file.write_text(re.sub(r"\b(?=(gate_residual|norm_modulate))", "new_", file.read_text()))
    return tmp_path


def test_a_folder_with_an_ops_name_is_one_line(checkout: Path) -> None:
    (checkout / "kernels" / "copied").rename(checkout / "kernels" / "new_gate_residual")
    done = process(checkout, "import st_fast.kernels")
    assert "new_gate_residual: a folder can't have the name of an op" in done.stderr.splitlines()[-1]


def process(checkout: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of the checkout's st_fast."""
    return warm.run("-c", program, *arguments, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)})


def run(checkout: Path, program: str, *arguments: str) -> str:
    """What a program in the checkout prints."""
    done = process(checkout, program, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_copied_folder_is_in_the_table_the_recipe_the_smoke_test_and_the_resources(checkout: Path) -> None:
    pytest.importorskip("triton")
    assert run(checkout, PROGRAM).strip() == "fused"


def test_a_copied_folder_is_checked_by_the_tests_that_every_op_passes(checkout: Path) -> None:
    found = run(checkout, warm.PYTEST, "-q", "-p", "no:cacheprovider", "tests/kernels/test_ops.py", "-k",
                "new_norm_modulate and not second_derivatives")  # fmt: skip
    assert found.count(".") >= 5 and "[100%]" in found, found


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("__init__.py", '"new_gate_residual"', '"gate_residual"', "adaln and copied both have an op gate_residual"),
        ("__init__.py", "OPS = ", "NAMES = ", "copied: __init__.py must have OPS and SWITCHES"),
        ("op.py", '"new_gate_residual": Op(', '"other": Op(', "copied: op.py has no new_gate_residual in DECLARED"),
    ],
)
def test_a_slip_in_a_copied_folder_is_one_line_that_names_it(
    file: str, old: str, new: str, message: str, checkout: Path
) -> None:
    path = checkout / "kernels" / "copied" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    done = process(checkout, "from st_fast import kernels\nfor op in kernels.OPS: kernels.declared(op)")
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1], done.stderr
