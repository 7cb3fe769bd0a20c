"""A verdict over seeds pairs runs of one seed, counts the teacher, and isn't drawn from runs that can't be compared."""

import math
import re
import statistics
from dataclasses import replace

import pytest

from st_fast.report import write_report
from st_fast.report.arms import make_arms
from st_fast.report.collect import read_runs
from st_fast.report.fairness import unfair
from st_fast.report.repeats import choose_baseline, compared, group_by_seed, heads, rows, spread, verdict
from tests.report.test_report_page import Page


def scored(runs, path, scores):
    """The run with these Fréchet distances at its last stage's evaluations."""
    left = dict(scores)
    last = runs.log(path)[-1]["stage"]

    def edit(record):
        if record["kind"] == "eval" and record["stage"] == last:
            return record | {"metrics": record["metrics"] | {"frechet": left[record["step"]]}}
        return record

    return runs.change(path, edit)


def two_arms_three_seeds(runs):
    """Plain ends at 2, 3 and 4; the other arm gets there at step 400, 800 and never."""
    paths = []
    for seed, goal, when in ((0, 2.0, 400), (1, 3.0, 800), (2, 4.0, 9999)):
        plain = {step: 9.0 - step * 1e-3 for step in range(200, 1600, 200)} | {1600: goal}
        taught = {step: goal - 0.5 if step >= when else goal + 5.0 for step in range(200, 1001, 200)}
        paths += [
            scored(runs, runs.plain(f"seed{seed}/plain", seed), plain),
            scored(runs, runs.two_stages(f"seed{seed}/taught", seed), taught),
        ]
    return paths


def found_rows(runs):
    groups = group_by_seed(heads(make_arms(read_runs(two_arms_three_seeds(runs)))))
    return rows(groups, choose_baseline(groups, []), "frechet")


def test_runs_that_differ_in_their_seed_alone_are_one_arm(runs) -> None:
    groups = group_by_seed(heads(make_arms(read_runs(two_arms_three_seeds(runs)))))
    assert [sorted(group.by_seed) for group in groups] == [[0, 1, 2], [0, 1, 2]]


def test_a_copy_of_a_run_is_no_second_seed(runs) -> None:
    paths = [runs.plain("one", 3), runs.plain("copy", 3), runs.plain("other", 4)]
    groups = group_by_seed(heads(make_arms(read_runs(paths))))
    assert [sorted(group.by_seed) for group in groups] == [[3, 4], [3]]
    sentence = verdict(make_arms(read_runs(paths[:2]))).sentence
    assert "seeds" not in sentence and "With one seed" in sentence


def test_shares_and_scores_are_those_of_each_seeds_own_baseline(runs) -> None:
    plain, taught = found_rows(runs)
    whole = 1600 * runs.batch * runs.flops
    per_step, teacher = runs.batch * (runs.flops + runs.teacher_flops), 600 * runs.batch * runs.flops
    assert plain.final == plain.at_cost == [2.0, 3.0, 4.0]
    assert plain.reached == [1.0, 1.0, 1.0] and plain.better == 0
    assert taught.reached[0] == pytest.approx((teacher + 400 * per_step) / whole)
    assert taught.reached[1] == pytest.approx((teacher + 800 * per_step) / whole)
    assert taught.reached[2] is None
    assert taught.cost_share == pytest.approx([(teacher + 1000 * per_step) / whole] * 3)
    affordable = (whole - teacher) / per_step
    assert 600 < affordable < 800
    assert taught.at_cost == pytest.approx([1.5, 8.0 * (2.5 / 8.0) ** ((affordable - 600) / 200), 9.0])
    assert taught.final == [1.5, 2.5, 9.0]
    assert taught.better == 2


@pytest.mark.parametrize(
    ("budget", "distance", "share", "kid"),
    [(1.0, math.nan, math.nan, math.nan), (2.0, 9.0, 0.2, 0.3), (3.0, 6.0, 0.5, 0.1), (4.0, 4.0, 0.8, -0.1),
     (99.0, 4.0, 0.8, -0.1)],
)  # fmt: skip
def test_a_score_at_a_budget_lies_between_its_neighbours(runs, budget, distance, share, kid) -> None:
    """Of a distance halfway the geometric mean, unless one is below zero, as KID can be; of a share the mean."""
    records = [
        {"kind": "eval", "stage": "a", "step": step, "flops": flops, "metrics": metrics}
        for step, flops, metrics in (
            (1, 2.0, {"frechet": 9.0, "accuracy": 0.2, "kid": 0.3}),
            (2, 4.0, {"frechet": 4.0, "accuracy": 0.8, "kid": -0.1}),
        )
    ]
    arm = make_arms(read_runs([runs.custom("", records)]))[0]
    for metric, expected in (("frechet", distance), ("accuracy", share), ("kid", kid)):
        found = arm.at(metric, "flops", budget)
        assert found == pytest.approx(expected, nan_ok=True)
        assert budget not in (2.0, 4.0, 99.0) or found == expected, "to the bit where it was evaluated"


def test_spread_is_the_mean_and_the_sample_deviation() -> None:
    assert spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(statistics.stdev([1, 2, 6])))
    assert spread([5.0])[0] == 5.0 and math.isnan(spread([5.0])[1])
    assert all(map(math.isnan, spread([math.nan])))


def test_the_table_says_it_with_spread_and_counts(runs) -> None:
    table = compared(found_rows(runs), "frechet")
    plain, taught = table.lines
    assert plain[1] == "3 ± 1"
    assert taught[3] == "2 of 3"
    assert re.fullmatch(r"(.*) \((.*) to (.*); 2 of 3\)", taught[6])
    first, second = (100 * (600 * 1.5 + step * 1.9) / (1600 * 1.5) for step in (400, 800))
    assert f"{(first + second) / 2:.1f}" in taught[6] and f"{first:.1f}" in taught[6] and f"{second:.1f}" in taught[6]


def test_times_of_a_machine_with_other_work_are_left_out(runs) -> None:
    found = found_rows(runs)
    even = compared(found, "frechet")
    assert even.head[-1] == "of its time" and "of its time" in even.sentence and "Times are left out" not in even.note
    base = replace(found[0], seconds=[100.0, 130.0, 390.0])
    uneven = compared([base, *found[1:]], "frechet")
    assert uneven.head == even.head[:-1] and uneven.lines == [line[:-1] for line in even.lines]
    assert "time" not in uneven.sentence
    told = uneven.note.replace("\u00a0", " ")
    assert "Times are left out: “plain” took 1 min 40 s with one seed and 6 min 30 s with another" in told


def test_one_run_an_arm_has_a_verdict_without_spread(runs) -> None:
    table = verdict(make_arms(read_runs([runs.plain(), runs.two_stages()])))
    assert [line[0] for line in table.lines] == ["plain", "digits · transcend"]
    assert not any("±" in cell for line in table.lines for cell in line)
    assert verdict(make_arms(read_runs([runs.two_stages()]))).lines == [], "nothing to compare with"


def test_seeds_are_ranked_only_where_they_were_declared(runs) -> None:
    paths = two_arms_three_seeds(runs)
    logs = read_runs(paths)
    assert unfair(logs, seeds_declared=True) == []
    assert "run.seed" in unfair(logs)[0]
    page = Page(write_report(paths, out=paths[0] / "page.html").read_text())
    assert "Not a fair comparison" in page.text and "“At equal cost”" not in page.text
    assert verdict(make_arms(logs), unfair(logs)).sentence.startswith("These runs can't be ranked")
    page = Page(write_report(paths, out=paths[0] / "page.html", seeds_declared=True).read_text())
    assert "“At equal cost”" in page.text and "3 ± 1" in page.text and "Not a fair comparison" not in page.text
    assert "Compare with care" not in page.text
    assert "Over 3 seeds, no arm beats “plain” (Fréchet distance 3 ± 1) at its cost" in page.text
    assert page.text.count("Stage 2: Self-Transcendence") == 1, "once, not once a seed"


def test_arms_that_differ_in_their_outside_teacher_are_not_one_arm(runs) -> None:
    recipe = '[run]\nseed = {0}\n[[stage]]\nname = "s"\nsteps = 1\nteacher = "x/seed{0}/teacher-{1}/align"\n'
    record = {"kind": "end", "stage": "s", "step": 1, "flops": 1.0, "seconds": 1.0}
    paths = [
        runs.custom(recipe.format(seed, name), [record], f"seed{seed}/{name}")
        for seed in (0, 1)
        for name in ("stage1", "random")
    ]
    groups = group_by_seed(make_arms(read_runs(paths)))
    assert [sorted(group.by_seed) for group in groups] == [[0, 1], [0, 1]]


def test_runs_on_other_data_or_another_stream_are_marked_and_not_ranked(runs) -> None:
    def on(path, digest):
        return runs.change(path, lambda r: r | {"dataset": digest} if r["kind"] == "start" else r)

    same = [on(runs.plain("a"), "d1"), on(runs.two_stages("b"), "d1")]
    assert unfair(read_runs(same)) == []
    other = read_runs([same[0], on(runs.two_stages("b"), "d2")])
    assert len(unfair(other, seeds_declared=True)) == 1 and "different data" in unfair(other)[0]
    older = read_runs([same[0], runs.two_stages("c")])
    assert unfair(older) == [], "a log from before the digest was recorded says nothing against it"
    recipe = same[0] / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("batch_size = 128", "batch_size = 64"))
    reasons = unfair(read_runs([same[0], runs.two_stages("c")]))
    assert len(reasons) == 1 and "optim.batch_size" in reasons[0] and "\n" not in reasons[0]
