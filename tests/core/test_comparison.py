"""Every difference between what is there and what is asked for is named, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from st_fast.core.comparison import check_same, differences
from st_fast.core.errors import UserError


@pytest.mark.parametrize(
    ("there", "asked", "named"),
    [
        ({"size": 16, "flip": False}, {"size": 16.0, "flip": False}, []),
        ({"shape": [1, 2]}, {"shape": (1, 2)}, []),
        ({"x": float("nan")}, {"x": float("nan")}, []),
        ({"size": 16, "flip": False}, {"size": 8, "flip": True}, ["size 16 (now 8)", "flip False (now True)"]),
        ({"flip": 1}, {"flip": True}, ["flip 1 (now True)"]),
        ({"a": None}, {}, ["a None (now not there)"]),
        ({}, {"a": None}, ["a not there (now None)"]),
        ({"optim": {"lr": 1e-4, "eps": 1}}, {"optim": {"lr": 2e-4, "eps": 1}}, ["optim.lr 0.0001 (now 0.0002)"]),
        ({"stage": [{"n": 1}, {"n": 2}]}, {"stage": [{"n": 1}, {"n": 3}]}, ["stage[1].n 2 (now 3)"]),
        ({"stage": [{"n": 1}]}, {"stage": []}, ['stage [{"n": 1}] (now [])']),
        ({"name": "a\x1b[2J"}, {"name": ""}, ["name 'a\\x1b[2J' (now '')"]),
    ],
)
def test_differences_are_named(there: dict[str, Any], asked: dict[str, Any], named: list[str]) -> None:
    assert differences(there, asked) == named


@pytest.mark.parametrize("at", [0, 59, 60, 500])
def test_long_values_show_where_they_differ(at: int) -> None:
    there = "x" * 1000
    [line] = differences({"a": there}, {"a": f"{there[:at]}y{there[at + 1 :]}"})
    assert "y" in line.partition("(now")[2] and len(line) < 200
    [line] = differences({"a": there}, {"a": there + "y"})
    assert "y" in line.partition("(now")[2] and len(line) < 200


def test_a_refusal_is_one_line_with_the_remedy() -> None:
    check_same({"a": 1}, {"a": 1}, "there:", "use another")
    with pytest.raises(UserError) as refusal:
        check_same({str(n): n for n in range(40)}, {str(n): n + 1 for n in range(40)}, "out: made with", "use another")
    text = str(refusal.value)
    assert text.startswith("out: made with 0 0 (now 1), 1 1 (now 2), ")
    assert text.endswith("and 28 more; use another") and "\n" not in text
