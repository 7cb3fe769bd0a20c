"""Which arm leads at which budget, from scores whose answer is known: after x FLOPs plain training scores 1/x.

An arm that is `ahead(x)` times as good scores 1/(ahead(x)·x), so its gain at x is ahead(x).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from st_fast.study.frontier import RULES, advice, charts, read_frontiers, rule, section, sentences, table
from st_fast.study.shares import read_shares

HORIZONS = [4e9, 16e9]
EVERY = 1e9

ARMS = {
    "always": lambda x: 1.5,
    "late": lambda x: 0.5 + x / 16e9,  # 0.75 at the first horizon, 1.5 at the last; ahead from 8e9 on
    "early": lambda x: 2.0 - x / 12e9,  # 5/3, 2/3
    "never": lambda x: 0.5,
}


def arm(name: str, ahead, method: str = "sra", teacher: float = 0.0) -> dict:
    evals = []
    for number in range(1, round((16e9 - teacher) / EVERY) + 1):
        total = number * EVERY + teacher
        score = {"frechet": 1e9 / (ahead(total) * total)}
        evals.append({"step": number, "flops": number * EVERY, "seconds": 1.0} | score)
    end = {"step": evals[-1]["step"], "flops": evals[-1]["flops"], "seconds": 1.0}
    sample = {"sample": {"cfg_scale": 2.0 if name == "always" else 1.0}}
    if name == "late":  # written by a version that knew of another kind of guidance, and used none
        sample["sample"] |= {"guidance": "cfg", "internal_guidance": 1.0}
    return {
        "name": name, "title": f"the {name} arm", "panel": "Losses" if name == "late" else "Routes",
        "definition": "0", "run": "0", "stage": {"name": name, "supervision": method}, "recipe": sample, "start": {},
        "protocol": {}, "evals": evals, "own": end, "teacher": {"flops": teacher, "seconds": 0.0},
    }  # fmt: skip


def write(folder: Path, seed: int, worse: float = 1.0) -> None:
    plain = arm("plain", lambda x: 1.0, "none")
    others = [arm(name, lambda x, ahead=ahead: ahead(x) / worse) for name, ahead in ARMS.items()]
    others += [arm("encoder", lambda x: 3.0, "repa"), arm("taught", lambda x: 1.1, "self_transcendence", 2e9)]
    whole = {"study": "tiny", "title": "Tiny", "seed": seed, "baseline": "plain", "horizons": HORIZONS, "missing": []}
    (folder / f"tiny-seed{seed}.json").write_text(json.dumps(whole | {"arms": [plain, *others]}))


@pytest.fixture
def found(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, worse=1.25)
    (frontier,) = read_frontiers(tmp_path)
    return frontier


def named(found, name):
    return next(one for one in found.contenders if one.arms[0].label == name)


def test_the_gain_is_how_much_less_distance_there_is_at_the_same_total(found):
    for name, ahead in ARMS.items():
        for horizon, point in zip(HORIZONS, named(found, name).points, strict=True):
            assert point.gains == pytest.approx([ahead(horizon), ahead(horizon) / 1.25], rel=2e-3)
    assert named(found, "taught").points[0].gains == pytest.approx([1.1, 1.1], rel=0.02), "its teacher is in the total"
    titles = [one.arms[0].label for one in found.contenders]
    assert titles == ["encoder", "always", "late", "taught", "early", "never"], "best first at the largest budget"


def test_the_table_says_from_where_on_an_arm_is_ahead_and_in_how_many_seeds(found):
    rows = {
        cells[1].strip(): cells
        for line in table(found).replace("\u00a0", " ").splitlines()
        if (cells := line.split("|"))
    }
    late = rows["the late arm"]
    assert late[2].strip() == "from 11 GFLOP on (2 of 2)", "from 9e9 on, and 1.25 times as far from 13e9 on"
    assert late[3].strip() == "0.671 (0.6 to 0.75), 0 of 2"
    mean = math.sqrt(1.5 * 1.2)
    assert late[4].strip() == f"{mean:.3g} (1.2 to 1.5), 2 of 2"
    assert rows["the never arm"][2].strip() == "never (0 of 2)"
    assert rows["the early arm"][2].strip() == "until 9.5 GFLOP (2 of 2)", "as good at 12e9, and at 9e9"


def test_what_to_use_follows_from_the_seeds(found):
    kinds = {one.arms[0].label: RULES.index(rule(one)) for one in found.contenders}
    assert kinds == {"encoder": 0, "always": 0, "taught": 0, "late": 1, "early": 2, "never": 4}
    chance, *lines = advice(found)
    assert "with a chance of 25.0\u00a0%, and 6 arms are compared" in chance
    assert lines[0].startswith(f"{RULES[0]}: the encoder arm (3 (3 to 3), with an external network), the taught arm (")
    assert lines[0].endswith("the taught arm (1.1 (1.1 to 1.1)).")
    assert [line.partition(":")[0] for line in lines] == [
        "Use",
        "For longer runs",
        "For short runs",
        "Not at this size",
        "Drawn in another way, and so to be compared with one another alone",
    ]
    assert lines[-1].endswith(": the always arm (1.34 (1.2 to 1.5)).")


def test_an_arm_ahead_in_some_seeds_alone_is_undecided(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, worse=1.8)
    (found,) = read_frontiers(tmp_path)
    assert rule(named(found, "always")) == RULES[3]


def test_arms_with_an_external_network_lead_nobodys_list(found):
    first, last = sentences(found)
    assert "encoder" not in first + last and "always" not in first + last, "nor do arms that are drawn with guidance"
    first, last = (line.replace("\u00a0", " ") for line in (first, last))
    lead = "2 of 4 arms without an external network or guidance lead plain training in 2 of 2 seeds"
    assert first.startswith(f"At 4 GFLOP {lead}: “the early arm” (1.49 (1.33 to 1.67)), “the taught arm”")
    assert last.startswith(f"At 16 GFLOP {lead}: “the late arm” (1.34 (1.2 to 1.5)), “the taught arm”")


def test_no_arm_ahead_is_said_plainly(tmp_path):
    write(tmp_path, 0, worse=9.0)
    (found,) = read_frontiers(tmp_path)
    without = [one for one in found.contenders if one.arms[0].label != "taught"]
    line = sentences(type(found)(found.title, found.horizons, found.plain, without))[1].replace("\u00a0", " ")
    assert line == (
        "At 16 GFLOP none of 3 arms without an external network or guidance leads plain training in 1 of 1 seeds."
    )
    assert advice(found)[0].startswith("With one seed, chance can't be told from effect")


def test_the_figure_has_a_panel_a_kind_and_a_curve_an_arm(found):
    drawn = {chart.title: chart for chart in charts(found)}
    assert set(drawn) == {"Losses", "Routes"}
    (late,) = drawn["Losses"].curves
    assert late.x[-1] == pytest.approx(16e9)
    assert late.y[-1] == pytest.approx(math.sqrt(1.5 * 1.2), rel=1e-3)
    assert (late.low[-1], late.high[-1]) == pytest.approx((1.2, 1.5), rel=1e-3)
    assert [curve.label for curve in drawn["Routes"].curves][:2] == ["the encoder arm", "the always arm"]


def test_a_study_of_teachers_is_no_such_study_and_the_other_way_round(found, tmp_path):
    text = section([found], "frontier.png")
    assert "## Which arm leads at equal FLOPs?" in text and "Tiny, 2 seeds, samples drawn without guidance:" in text
    assert read_shares(tmp_path) == [], "one teacher is no choice of shares"
