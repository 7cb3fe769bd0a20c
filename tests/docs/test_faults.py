"""The guide's table of faults names a test for each, and the tests are there."""

from __future__ import annotations

import ast
import re

from tests.tiny import ROOT

ROW = re.compile(
    r"^\| (\d+) \| ([^|]+) \| \[([\w/.]+)\]\(\.\./tests/([\w/.]+)\): ((?:`\w+`(?:, )?)+) \|$", re.MULTILINE
)


def test_each_fault_has_a_test_that_exists():
    text = (ROOT / "docs" / "resuming-and-faults.md").read_text(encoding="utf-8")
    text = text.partition("## Every fault has a test")[2]
    rows, begun = ROW.findall(text), re.findall(r"^\| *(\d+)", text, re.MULTILINE)
    assert begun == [number for number, *_ in rows] == [str(n + 1) for n in range(len(rows))] and len(rows) > 60
    for _, fault, shown, file, names in rows:
        assert shown == file
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert (named := set(re.findall(r"`(\w+)`", names))) and named <= there, (fault, named - there)
