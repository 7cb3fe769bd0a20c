"""Everything a stage cost is counted: its own steps, its teacher's forwards, and the training of all its teachers."""

from typing import Any

import pytest

from st_fast.report.arms import make_arms
from st_fast.report.collect import read_runs
from st_fast.report.figures import all_figures, costs
from st_fast.report.html import render


def end(stage: str, step: int, flops: float, seconds: float) -> dict[str, Any]:
    return {"kind": "end", "stage": stage, "step": step, "flops": flops, "seconds": seconds}


def entry(name: str, teacher: str = "") -> str:
    return f'[[stage]]\nname = "{name}"\nsteps = 10\n' + (f'teacher = "{teacher}"\n' if teacher else "")


def test_a_stage_with_a_teacher_costs_its_teachers_training_too(runs) -> None:
    align, transcend = make_arms(read_runs([runs.two_stages()]))
    own = 1000 * runs.batch * (runs.flops + runs.teacher_flops)
    assert align.total.flops == pytest.approx(600 * runs.batch * runs.flops)
    assert transcend.own.flops == pytest.approx(own)
    assert transcend.total.flops == pytest.approx(own + 600 * runs.batch * runs.flops)
    assert transcend.total.seconds == pytest.approx(120 + 60)
    assert transcend.teacher_forward_flops == pytest.approx(1000 * runs.batch * runs.teacher_flops)
    assert align.teacher_forward_flops == 0


def test_every_teacher_of_a_chain_is_counted_once(runs) -> None:
    recipe = entry("a") + entry("b", "a") + entry("c", "b")
    records = [end("a", 10, 1e3, 1.0), end("b", 10, 1e4, 10.0), end("c", 10, 1e5, 100.0)]
    arms = make_arms(read_runs([runs.custom(recipe, records)]))
    assert [(arm.total.flops, arm.total.seconds) for arm in arms] == [(1e3, 1.0), (1.1e4, 11.0), (1.11e5, 111.0)]
    assert all(arm.total.known for arm in arms)


@pytest.mark.parametrize(("stop_step", "asked"), [(3, 3), (0, 10), (99, 10)])
def test_teacher_forwards_stop_counting_where_supervision_stops(runs, stop_step: int, asked: int) -> None:
    recipe = entry("a") + entry("b", "a") + f"stop_step = {stop_step}\n"
    start = {"kind": "start", "stage": "b", "step": 0, "flops_per_image": 100.0, "teacher_flops_per_image": 50.0}
    records = [end("a", 10, 1e3, 1.0), start | {"batch_size": 4}, end("b", 10, 4 * (10 * 100.0 + asked * 50.0), 2.0)]
    assert make_arms(read_runs([runs.custom(recipe, records)]))[1].teacher_forward_flops == pytest.approx(
        4 * asked * 50.0
    )


def test_teacher_forwards_stop_counting_where_supervision_ended_by_itself_which_the_page_says(runs) -> None:
    recipe = entry("a") + entry("b", "a") + "stop_step = 9\nstop_below = -0.05\n"
    start = {"kind": "start", "stage": "b", "step": 0, "flops_per_image": 100.0, "teacher_flops_per_image": 50.0}
    compared = [
        {"kind": "gradients", "stage": "b", "step": step, "cosine": cosine, "stopped": cosine < -0.05}
        for step, cosine in ((2, 0.1), (4, -0.0731))
    ]
    records = [end("a", 10, 1e3, 1.0), start | {"batch_size": 4}, *compared, end("b", 10, 1e5, 2.0)]
    folder = runs.custom(recipe, records)
    assert make_arms(read_runs([folder]))[1].teacher_forward_flops == pytest.approx(4 * 4 * 50.0)
    assert "ended by itself after 4 steps" in (page := render(read_runs([folder]))) and "-0.0731" in page


@pytest.mark.parametrize(("step", "share"), [("00000400", 400), ("00000600", 600)])
def test_a_teacher_of_another_run_costs_what_its_log_says_up_to_that_checkpoint(runs, step: str, share: int) -> None:
    other = runs.two_stages("other")
    recipe = entry("student", str(other / "align" / "checkpoints" / step))
    arm = make_arms(read_runs([runs.custom(recipe, [end("student", 10, 1e3, 7.0)])]))[0]
    assert arm.teacher.flops == pytest.approx(share * runs.batch * runs.flops)
    assert arm.teacher.seconds == pytest.approx(share * 0.1)
    assert arm.total.known


@pytest.mark.parametrize("key", ["teacher", "init"])
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(
    ("said", "flops", "seconds"),
    [({"step": 10}, 1e3, 1.0), ({"step": 0}, 0.0, 0.0), ({}, 5e3, 5.0), ({"step": None}, 5e3, 5.0), ("a", 5e3, 5.0)],
)
def test_steps_that_a_model_made_after_it_was_taken_are_not_charged(
    runs, key: str, outside: bool, said: Any, flops: float, seconds: float
) -> None:
    first = [end("a", 10, 1e3, 1.0), end("a", 50, 5e3, 5.0)]
    start = {"kind": "start", "stage": "b", "step": 0, key: said}
    name = str(runs.custom(entry("a"), first, "other") / "a") if outside else "a"
    recipe = ("" if outside else entry("a")) + entry("b") + f'{key} = "{name}"\n'
    arm = make_arms(read_runs([runs.custom(recipe, [*first, start, end("b", 10, 1e4, 10.0)][2 * outside :])]))[-1]
    assert (arm.teacher.flops, arm.teacher.seconds, arm.teacher.known) == (flops, seconds, True)


def test_a_model_that_is_teacher_and_start_is_counted_once_with_all_before_it(runs) -> None:
    recipe = entry("a") + entry("b", "a") + entry("c", "b") + 'init = "b"\n' + entry("d", "a") + 'init = "b"\n'
    records = [end(name, 10, flops, 1.0) for name, flops in (("a", 1e3), ("b", 1e4), ("c", 1e5), ("d", 1e6))]
    arms = make_arms(read_runs([runs.custom(recipe, records)]))
    assert [arm.total.flops for arm in arms] == [1e3, 1.1e4, 1.11e5, 1.011e6]
    assert all(arm.total.known for arm in arms)


def test_a_start_from_another_run_costs_what_its_log_says_and_one_without_a_log_is_unknown(runs) -> None:
    other = runs.two_stages("other")
    recipe = entry("plain") + f'init = "{other}/align/checkpoints/00000400"\n'
    known = make_arms(read_runs([runs.custom(recipe, [end("plain", 10, 1e3, 7.0)])]))[0]
    assert known.total.known and known.total.flops == pytest.approx(400 * runs.batch * runs.flops + 1e3)
    recipe = entry("plain") + 'init = "/nowhere/repa.pt"\n'
    unknown = read_runs([runs.custom(recipe, [end("plain", 10, 1e3, 7.0)])])
    assert not make_arms(unknown)[0].total.known
    assert "The cost of a model before “plain” isn" in render(unknown)


def test_a_teacher_without_a_log_makes_the_total_a_lower_bound(runs) -> None:
    recipe = entry("student", "/nowhere/teacher")
    arms = make_arms(read_runs([runs.custom(recipe, [end("student", 10, 1e3, 7.0)])]))
    assert not arms[0].total.known
    assert [bar.known for figure in costs(arms) for bar in figure.rows] == [False, False]


def test_quality_over_total_cost_starts_where_the_teacher_ended(runs) -> None:
    figures = {figure.key: figure for figure in all_figures(make_arms(read_runs([runs.two_stages()])))["quality"]}
    assert list(figures) == [f"{m}_{a}" for m in ("frechet", "accuracy") for a in ("step", "flops", "seconds")]
    align, transcend = figures["frechet_flops"].curves
    per_step = runs.batch * (runs.flops + runs.teacher_flops)
    assert transcend.x == pytest.approx(
        [600 * runs.batch * runs.flops + step * per_step for step in (200, 400, 600, 800, 1000)]
    )
    assert align.x == pytest.approx([step * runs.batch * runs.flops for step in (200, 400, 600)])
    assert figures["accuracy_step"].curves[1].x == [200, 400, 600, 800, 1000]
    assert figures["accuracy_seconds"].curves[1].x[0] == pytest.approx(60 + 24)
    assert [level.y for level in figures["frechet_flops"].levels] == [0.152]


def test_bars_split_the_total_without_a_rest(runs) -> None:
    arms = make_arms(read_runs([runs.two_stages(), runs.plain()]))
    by_flops, by_time = costs(arms)
    assert [sum(bar.sizes) for bar in by_flops.rows] == pytest.approx([arm.total.flops for arm in arms])
    assert [sum(bar.sizes) for bar in by_time.rows] == pytest.approx([arm.total.seconds for arm in arms])
