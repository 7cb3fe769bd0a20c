"""A run that is not finished is told at the top of its report: which stage, at which step of how many, since when."""

from typing import Any

import pytest

from st_fast.report.__main__ import main
from st_fast.report.collect import read_runs
from st_fast.report.html import render
from st_fast.report.progress import unfinished

NOON = 1_700_049_600.0
"""2023-11-15 12:00 UTC."""


def recipe(*stages: tuple[str, int]) -> str:
    return "".join(f'[[stage]]\nname = "{name}"\nsteps = {steps}\n' for name, steps in stages)


def record(kind: str, stage: str, step: int, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "stage": stage, "step": step, **more}


def start(stage: str, time: float = NOON) -> dict[str, Any]:
    return record("start", stage, 0, time=time)


STATES = [
    ([start("a")], "“a” has begun, but logged none of its 1,200 steps yet; “b” has not begun."),
    ([start("a"), record("train", "a", 730)], "“a” is at step 730 of 1,200; “b” has not begun."),
    (
        [start("a"), record("train", "a", 1200)],
        "“a” has made its 1,200 steps, but has not ended: its last pictures and scores may be missing; "
        "“b” has not begun.",
    ),
    ([start("a"), record("end", "a", 1200)], "“b” has not begun."),
    ([start("a"), record("end", "a", 1200), start("b"), record("train", "b", 30)], "“b” is at step 30 of 70."),
    ([start("a"), record("end", "a", 900), start("b"), record("end", "b", 70)], "“a” is at step 900 of 1,200."),
]


@pytest.mark.parametrize(("records", "told"), STATES)
def test_a_run_is_unfinished_until_every_stage_of_its_recipe_has_ended_at_its_last_step(runs, records, told) -> None:
    found = read_runs([runs.custom(recipe(("a", 1200), ("b", 70)), records)])
    when = " Last logged on 2023-11-15 12:00 UTC, 3\u00a0min before this page was written."
    assert unfinished(found, NOON + 180) == [f"This run is not finished: {told}{when}"]
    assert f"This run is not finished: {told}" in render(found)


def test_finished_runs_are_not_told_of(runs, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs.custom(recipe(("a", 9)), [start("a"), record("end", "a", 9)])
    assert unfinished(read_runs([path])) == [] and "not finished" not in render(read_runs([path]))
    main([str(path), "--dry-run"])
    assert "not finished" not in capsys.readouterr().out


def test_in_a_comparison_each_unfinished_run_is_named_and_those_of_other_seeds_too(
    runs, capsys: pytest.CaptureFixture[str]
) -> None:
    seeded = "[run]\nseed = {}\n" + recipe(("a", 9))
    done = runs.custom(seeded.format(0), [start("a"), record("end", "a", 9)], "done")
    half = runs.custom(seeded.format(1), [start("a"), record("train", "a", 4)], "half")
    begun = runs.custom(seeded.format(1), [start("a")], "begun")
    one = unfinished(read_runs([done, half]), NOON)
    assert one[0].startswith("One of these runs is not finished; ")
    assert one[1:] == ["half: “a” is at step 4 of 9. Last logged on 2023-11-15 12:00 UTC."]
    assert unfinished(read_runs([done, half, begun]))[0].startswith("2 of these 3 runs are not finished; ")
    assert unfinished(read_runs([half, begun]))[0].startswith("None of these runs is finished; ")
    page = render(read_runs([done, half]), seeds_declared=True)
    assert "half: “a” is at step 4 of 9." in page and page.index("is not finished") < page.index('class="verdict"')
    main([str(done), str(half), "--dry-run"])
    assert "half: “a” is at step 4 of 9." in capsys.readouterr().out


@pytest.mark.parametrize("time", [None, "noon", True, 1e18, -1e18, float("nan")])
def test_a_log_without_sensible_times_is_unfinished_all_the_same(runs, time: object) -> None:
    found = read_runs([runs.custom(recipe(("a", 9)), [record("train", "a", 4, time=time)])])
    assert unfinished(found, NOON) == ["This run is not finished: “a” is at step 4 of 9."]
