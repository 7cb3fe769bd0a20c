"""The soak: its table says what its file says, goes on where it stopped, and a lost run is counted as lost."""

from __future__ import annotations

import json
import sys

import pytest

from tests import soak
from tests.faults import random_faults
from tests.tiny import ROOT

RESULT = ROOT / "bench" / "results" / "soak.json"


def test_the_committed_soak_had_200_kills_and_lost_nothing():
    rows = {row["fault"]: row for row in json.loads(RESULT.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == list(soak.FAULTS)
    assert rows["kill -9 of both ranks at a random moment"]["tried"] >= 200
    assert all(row["tried"] == row["survived"] > 0 and row["lost"] == 0 for row in rows.values())


def test_the_readme_quotes_the_file():
    readme = "before\n<!-- soak:begin -->\nold\n<!-- soak:end -->\nafter\n"
    new = soak.quoted(readme, RESULT)
    assert new.startswith("before\n<!-- soak:begin -->\nRandom faults") and "\nold\n" not in new
    assert "| a rank hangs, dies or fails |" in new and new.endswith("<!-- soak:end -->\nafter\n")
    assert soak.quoted(new, RESULT) == new
    with pytest.raises(ValueError, match="0 blocks"):
        soak.quoted("nothing", RESULT)
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert soak.quoted(text, RESULT) == text


def test_kinds_take_turns_to_what_is_wanted_and_a_lost_run_is_lost(monkeypatch, tmp_path):
    class Nothing:
        folder, runs = tmp_path, 1

    monkeypatch.setattr(soak, "FAULTS", {"a": lambda _: (5, True), "b": lambda _: (1, False)})
    rows, wanted = [soak.Row("a"), soak.Row("b")], {"a": 10, "b": 2}
    seen = [[(row.tried, row.lost) for row in rows] for _ in soak.run(Nothing(), rows, wanted, 60)]
    assert seen == [[(5, 0), (0, 0)], [(5, 0), (1, 1)], [(10, 0), (1, 1)], [(10, 0), (2, 2)]]
    assert list(soak.run(Nothing(), [soak.Row("a")], {"a": 5}, 0.0)) == []  # the budget


def test_what_was_left_open_is_taken_up_and_what_is_complete_is_done_anew(tmp_path):
    out, wanted = tmp_path / "soak.json", {"a": 10}
    record = {"wanted": wanted, "seed": 0, "seconds": 5, "rows": [{"fault": "a", "tried": 4, "survived": 4, "lost": 0}]}
    out.write_text(json.dumps(record))
    assert soak.left_open(out, wanted, 0) == ([soak.Row("a", 4, 4, 0)], 5)
    assert soak.left_open(out, {"new": 3} | wanted, 0) == ([soak.Row("new"), soak.Row("a", 4, 4, 0)], 5)
    assert soak.left_open(out, {"a": 11}, 0) == ([soak.Row("a")], 0.0)
    assert soak.left_open(out, wanted, 1) == ([soak.Row("a")], 0.0)
    record["rows"][0]["tried"] = 10
    out.write_text(json.dumps(record))
    assert soak.left_open(out, wanted, 0) == ([soak.Row("a")], 0.0)


def test_a_short_cut_of_the_soak_loses_nothing(monkeypatch, tmp_path):
    """Two kills of a sharded run, for real: the rest of CI kills whole ones."""
    monkeypatch.setattr(random_faults, "KILLS_A_RUN", 2)
    monkeypatch.setattr(sys, "argv", ["soak", "--kills", "0", "--others", "1", "--out", str(tmp_path / "soak.json")])
    monkeypatch.setattr(soak, "FAULTS", {"kill -9 of both ranks of a sharded run": random_faults.kills_of_shards})
    assert soak.main() == 0
    (row,) = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))["rows"]
    assert row["tried"] >= 1 and row["survived"] == row["tried"] and row["lost"] == 0
