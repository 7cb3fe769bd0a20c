"""The guide's table of faults names a test for each, and the tests are there."""

from __future__ import annotations

import ast
import re

from tests.tiny import ROOT

ROW = re.compile(
    r"^\| (\d+) \| ([^|]+) \| \[([\w/.]+)\]\(\.\./tests/([\w/.]+)\): ((?:`\w+`(?:, )?)+) \|$", re.MULTILINE
)
FAULTS = 66


def test_each_fault_has_a_test_that_exists():
    rows = ROW.findall((ROOT / "docs" / "resuming-and-faults.md").read_text(encoding="utf-8"))
    assert [int(number) for number, *_ in rows] == list(range(1, FAULTS + 1))
    for _, fault, shown, file, names in rows:
        assert shown == file
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert (named := set(re.findall(r"`(\w+)`", names))) and named <= there, (fault, named - there)
