"""The errors that mutation testing plants: which ones, that each is one, and that one is noticed by the tests."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.changes import changed, mutants
from tests.mutants.files import FILES
from tests.mutants.trial import ROOT

SOURCE = '''
"""A text with 1 and a < b."""
LIMIT: int = 3

@wrapped(2)
def f(a, b: Optional[1], *, c=0.5):
    """Another."""
    if a <= b and not c:
        keep(a)
    return max(g(a, b), -a) + x[b:] if c is None else f"{a + 1}"
'''
CHANGES = {
    "LIMIT: int = 3": {"3 → 4", "3 → 2"},
    "@wrapped(2)": {"2 → 3", "2 → 1"},
    'def f(a, b: Optional[1], *, c=0.5):': {"0.5 → 1.0", "@wrapped(2) def f →  def f"},
    "if a <= b and not c:": {
        "a <= b and (not c) → not (a <= b and (not c))", "a <= b and (not c) → a <= b or not c", "a <= b → a < b",
    },
    "keep(a)": {"keep(a) → None"},
    'return max(g(a, b), -a) + x[b:] if c is None else f"{a + 1}"': {
        "c is None → c is not None", "max → min", "g(a, b) → g(b, a)", "-a → +a", "[b:] → [b + 1:]",
        "max(g(a, b), -a) + x[b:] → max(g(a, b), -a) - x[b:]",
        "return max(g(a, b), -a) + x[b:] if c is None else f'{a + 1}' → return None",
        "max(g(a, b), -a) + x[b:] if c is None else f'{a + 1}' → "
        "max(g(a, b), -a) + x[b:] if not c is None else f'{a + 1}'",
    },
}  # fmt: skip


def test_what_is_changed_is_each_thing_once_and_no_text_or_annotation():
    found: dict[str, set[str]] = {}
    for mutant in mutants(SOURCE)[1]:
        found.setdefault(mutant.line, set()).add(mutant.change)
    assert found == CHANGES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.path)
def test_every_mutant_of_a_file_is_other_code_with_a_name_of_its_own(file):
    source = (ROOT / file.path).read_text(encoding="utf-8")
    tree, found = mutants(source, file.names)
    assert found and len({mutant.key for mutant in found}) == len(found)
    before = ast.dump(tree)
    for mutant in found[:: max(1, len(found) // 25)]:
        assert changed(tree, mutant, ast.dump) != before, mutant.key
        changed(tree, mutant, lambda changed_tree: compile(changed_tree, "x", "exec"))
    assert ast.dump(tree) == before
    assert all((ROOT / "tests" / name).exists() for name in file.tests)


def test_planted_errors_are_noticed(tmp_path: Path):
    out = tmp_path / "mutants.json"
    command = [sys.executable, "-m", "tests.mutants", "st_fast/evaluate/metrics.py", "--sample", "3", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = json.loads(out.read_text())["st_fast/evaluate/metrics.py"]["verdicts"]
    assert len(verdicts) == 3 and sum(said.startswith("killed by tests/") for said in verdicts.values()) >= 2
    assert "| all | 3 |" in done.stdout
