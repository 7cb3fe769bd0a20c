"""Where stage 2 starts to pay, from scores whose answer is known: plain scores 1/x after x FLOPs, a student 1/(2y).

A student of y FLOPs of its own, on a teacher of c, has taken x = y + c: its gain is 2 (x − c) / x, above 1 from x = 2c.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from st_fast.core.errors import UserError
from st_fast.study.shares import chart, overtakes, point, read_shares, section, table
from st_fast.study.summary import section as section_of_summary

HORIZONS = (4e9, 8e9, 16e9)
EVERY = 1e9


def arm(name: str, teacher: float, worse: float, most: float = 16e9) -> dict:
    evals = []
    for number in range(1, round((most - teacher) / EVERY) + 1):
        own = number * EVERY
        score = worse / (2 * own if teacher else own)
        evals.append({"step": number, "flops": own, "seconds": 1.0, "frechet": 1e9 * score})
    end = {"step": evals[-1]["step"], "flops": evals[-1]["flops"], "seconds": 1.0}
    return {
        "name": name, "definition": "0", "run": "0", "stage": {"name": name}, "recipe": {}, "start": {}, "protocol": {},
        "evals": evals, "own": end, "teacher": {"flops": teacher, "seconds": 0.0},
    }  # fmt: skip


def write(folder: Path, seed: int, worse: float = 1.0, **told) -> None:
    arms = [arm("long", 6e9, worse), arm("plain", 0.0, 1.0), arm("short", 2e9, worse)]
    whole = {"study": "tiny", "title": "Tiny", "seed": seed, "baseline": "plain", "horizons": list(HORIZONS)}
    (folder / f"tiny-seed{seed}.json").write_text(json.dumps(whole | {"missing": [], "arms": arms} | told))


@pytest.fixture
def found(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, worse=1.6)
    write(tmp_path, 2, missing=["short"])
    (shares,) = read_shares(tmp_path)
    return shares


def test_the_gain_is_what_the_formula_says_and_a_half_done_seed_is_left_out(found):
    assert len(found.plain) == 2 and [arms[0].label for arms in found.taught] == ["short", "long"]
    for arms, teacher in zip(found.taught, (2e9, 6e9), strict=True):
        for horizon in HORIZONS:
            one = point(arms, found.plain, horizon)
            if horizon <= teacher:
                assert one is None, "no student had been scored by then"
                continue
            gain = 2 * (horizon - teacher) / horizon
            assert one.share == pytest.approx(teacher / horizon)
            assert one.gains == pytest.approx([gain, gain / 1.6])


def test_a_student_overtakes_at_the_first_score_that_beats_plain_at_the_same_total(found):
    (short, _), (long, late) = found.taught
    assert overtakes(short, found.plain[0]) == 5e9, "2 (x − 2e9) > x from 4e9 on"
    assert overtakes(long, found.plain[0]) == 13e9
    assert overtakes(late, found.plain[1]) is None, "1.6 times the distance: pays from 30e9 on, which it never sees"
    text = table(found)
    assert "13 GFLOP (1 of 2)" in text.replace("\u00a0", " ")


def test_the_figure_has_a_curve_a_horizon_with_its_range_over_the_seeds(found):
    drawn = chart(found)
    assert [curve.label.replace("\u00a0", " ") for curve in drawn.curves] == [f"{h:g} GFLOP in all" for h in (4, 8, 16)]
    last = drawn.curves[-1]
    assert last.x == pytest.approx([2 / 16, 6 / 16])
    assert last.y == pytest.approx([2 * 14 / 16 / 1.6**0.5, 2 * 10 / 16 / 1.6**0.5]), "geometric means"
    assert last.high == pytest.approx([2 * 14 / 16, 2 * 10 / 16])
    assert last.low == pytest.approx([2 * 14 / 16 / 1.6, 2 * 10 / 16 / 1.6])
    assert len(drawn.curves[0].x) == 1, "the long teacher alone costs more than the first horizon"


def test_the_section_names_the_best_share_and_in_how_many_seeds_it_pays(found):
    text = section([found], "study/shares.png").replace("\u00a0", " ")
    assert "at 16 GFLOP the best of 2 shares is 12.5 %: gain 1.38 (1.09 to 1.75), above 1 in 2 of 2 seeds" in text
    assert "at 4 GFLOP the best of 1 shares is 50.0 %: gain 0.791 (0.625 to 1), above 1 in 0 of 2 seeds" in text
    assert "![Gain over plain training by the teacher's share" in text and "(study/shares.png)" in text


def test_files_of_studies_without_horizons_are_passed_over_and_one_without_its_baseline_is_refused(tmp_path):
    write(tmp_path, 0, horizons=[])
    assert read_shares(tmp_path) == []
    for wrong in ({"baseline": "plein"}, {"horizons": [4e9, "8e9"]}, {"horizons": [0]}, {"horizons": 4e9}):
        write(tmp_path, 0, **wrong)
        with pytest.raises(UserError, match="tiny: its seeds' files don't name horizons and a baseline"):
            read_shares(tmp_path)


def test_seeds_that_lack_the_baseline_or_name_other_horizons_are_refused(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, horizons=[4e9])
    with pytest.raises(UserError, match="tiny: its seeds' files name different horizons"):
        read_shares(tmp_path)
    write(tmp_path, 1, arms=[arm("short", 2e9, 1.0)])
    with pytest.raises(UserError, match="tiny: its seeds' files don't name horizons and a baseline"):
        read_shares(tmp_path)
    more = arm("more", 3e9, 1.0)
    write(tmp_path, 1, arms=[arm("short", 2e9, 1.0), more, arm("plain", 0.0, 1.0), arm("long", 6e9, 1.0)])
    (shares,) = read_shares(tmp_path)
    shared = [["short"] * 2, ["long"] * 2]
    assert [[one.label for one in arms] for arms in shares.taught] == shared, "arms that all seeds have"


def test_the_best_share_is_that_of_the_largest_mean_not_the_largest_spread(tmp_path):
    for seed, worse in enumerate((1.0, 1.6)):
        write(tmp_path, seed, arms=[arm("plain", 0.0, 1.0), arm("short", 2e9, 1.0), arm("long", 6e9, worse)])
    text = section(read_shares(tmp_path), "x.png").replace("\u00a0", " ")
    assert "at 16 GFLOP the best of 2 shares is 12.5 %: gain 1.75 (1.75 to 1.75), above 1 in 2 of 2 seeds" in text


def test_without_a_score_within_any_budget_nothing_is_said_to_be_best(tmp_path):
    write(tmp_path, 0, horizons=[1e8])
    assert section(read_shares(tmp_path), "x.png").count("no student had been scored at any budget") == 1


def test_the_summary_says_what_each_stage_buys_at_equal_flops_and_steps(tmp_path):
    """Stage 2 with a teacher of 2e9 ends at 14 steps; plain at 16; a random teacher's student is 1.5 times as good."""
    arms = [arm("plain", 0.0, 1.0), arm("first", 0.0, 1.25), arm("taught", 2e9, 1.0), arm("random", 0.0, 1 / 1.5)]
    for one, method in zip(arms, ("none", "velocity_head", "self_transcendence", "self_transcendence"), strict=True):
        one["stage"]["supervision"], one["title"] = method, one["name"].upper()
    arms[2]["start"] = {"batch_size": 10, "teacher_flops_per_image": 1e7}
    write(tmp_path, 0, arms=arms, reference="taught")
    write(tmp_path, 1, arms=arms, reference="taught", missing=["more"])
    *_, row = (line for line in section_of_summary(tmp_path).splitlines() if line.startswith("|"))
    cells = [cell.strip().replace("\u00a0", " ") for cell in row.strip("|").split("|")]
    assert cells == [
        "Tiny", "1", "+25.0 %, better in 0 of 1", "−50.0 %, better in 1 of 1 (TAUGHT)", "−33.3 %, better in 1 of 1",
        f"−{100 * (1 - 16 / 28):.1f} %, better in 1 of 1", f"{100 * 2 / 16:.1f} %, {100 * 14 * 1e8 / 16e9:.1f} %",
    ]  # fmt: skip


def test_a_summary_of_nothing_is_empty(tmp_path):
    assert section_of_summary(tmp_path) == ""
    write(tmp_path, 0)
    assert section_of_summary(tmp_path) == "", "without a reference there is nothing to tell"
