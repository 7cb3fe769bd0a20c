"""A study's page follows from its runs: which way, how much, in how many seeds, at what cost."""

from __future__ import annotations

import errno
import os
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest

from st_fast.core.errors import RunFailed
from st_fast.report.arms import make_arms
from st_fast.report.collect import read_run
from st_fast.report.repeats import Repeats, rows
from st_fast.study.plan import read_study
from st_fast.study.results import METRIC, Results, body, certainty, charts, comparisons, difference, price, write_page
from tests import pixels
from tests.report.conftest import ALIGN, BATCH, RECIPE, plain, stage_records, two_stages, write_run

STAGE_1 = '[[arm]]\nname = "stage1"\ntitle = "stage 1 alone"\nstage = "align"\n'
SEEDS = (0, 1, 2)


def alone(path, seed):
    records = stage_records(path, np.random.default_rng(seed), "align", 1600, 0.8, teacher=False)
    return write_run(path, RECIPE.format(batch=BATCH, seed=seed) + ALIGN, records)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("summary")
    path = pixels.write_study(folder / "recipes", folder / "data")
    path.write_text(path.read_text() + STAGE_1)
    makers = {"plain SiT": plain, "ω = 5": two_stages, "random": two_stages, "stage 1 alone": alone}
    groups = []
    for number, (title, make) in enumerate(makers.items()):
        by_seed = {
            seed: make_arms([read_run(make(folder / f"{number}-{seed}", seed=seed + 10 * number))])[-1]
            for seed in SEEDS
        }
        groups.append(Repeats(title, by_seed))
    return Results(replace(read_study(path), seeds=SEEDS), groups, rows(groups, groups[0], METRIC))


def test_each_comparison_says_what_the_runs_say(results):
    told = {line[:3]: line[3:] for line in comparisons(results)}
    assert list(told) == [
        *[line for line in told if line[0] == "equal FLOPs" and line[2] == "plain SiT"],
        ("equal FLOPs", "ω = 5", "stage 1 alone"),
        ("equal steps of the new model", "ω = 5", "plain SiT"),
        ("equal steps of the new model", "random", "ω = 5"),
    ]
    rows_of = {row.label: row for row in results.rows}
    base, taught = rows_of["plain SiT"], rows_of["ω = 5"]
    gap = statistics.fmean(a - b for a, b in zip(taught.at_cost, base.final, strict=True))
    assert gap > 0, "the made-up stage 2 doesn't make up for its teacher"
    words, seeds = told["equal FLOPs", "ω = 5", "plain SiT"]
    assert re.fullmatch(rf"{gap:.3g} ± \S+ higher \(worse\)", words) and seeds == "3 of 3"
    run = results.group("omega5").by_seed[0]
    share = f"{100 * run.teacher.flops / run.total.flops:.1f}\u00a0%"
    assert f"{share} of the FLOPs of “ω = 5” trained its teacher" in price(results)
    assert "all 3 seeds agree on a sign in 25.0\u00a0% of comparisons, and 3 arms" in certainty(results)


def test_a_difference_says_its_direction_and_the_seeds_that_agree():
    assert difference([3.0, 4.0], [1.0, 1.0]) == ("2.5 ± 0.707 higher (worse)", "2 of 2")
    words, seeds = difference([1.0, 4.0, 0.0], [2.0, 1.0, 9.0])
    assert words.endswith("lower (better)") and seeds == "2 of 3"


def test_one_seed_is_said_to_prove_nothing(results):
    one = replace(results, rows=[replace(results.rows[0], seeds=[0]), *results.rows[1:]])
    assert certainty(one).startswith("none: with one seed")


def test_curves_are_means_with_their_range_and_the_reference_is_in_every_panel(results):
    (frechet, teachers), accuracy = charts(results)
    assert [chart.title for chart in (frechet, teachers)] == ["ω", "teacher"] and len(accuracy) == 2
    assert {"plain SiT", "ω = 5"} <= {curve.label for curve in teachers.curves}
    curve, arms = frechet.curves[0], results.group("plain").by_seed.values()
    scores = np.array([arm.quality(METRIC, "flops")[1] for arm in arms])
    assert curve.y == pytest.approx(scores.mean(axis=0))
    assert (curve.low, curve.high) == (scores.min(axis=0).tolist(), scores.max(axis=0).tolist())


@pytest.mark.parametrize(("step", "share"), [(200, 0.0), (300, 0.5), (400, 1.0)])
def test_a_score_at_a_step_lies_between_its_neighbours(results, step, share):
    arm = results.group("plain").by_seed[0]
    first, second = arm.quality(METRIC, "step")[1][:2]
    assert arm.at(METRIC, "step", step) == pytest.approx(first + share * (second - first))
    assert arm.at(METRIC, "step", 100) != arm.at(METRIC, "step", 100), "nothing is known before the first evaluation"


def test_the_page_begins_with_what_was_bought_and_ends_with_what_it_took(results):
    for group in results.groups:
        for arm in group.by_seed.values():
            arm.stage.evals[-1]["metrics"] |= {"sampler": "heun", "steps": 10}
    text = body(results, "study", with_samples=False)
    places = [text.index(part) for part in (
        "## Tiny", "- Over 3 seeds, ", "- **Certainty:**", "### How it was done", "(heun, 10 steps, guidance 1.9)",
        "### The verdict", "| ω = 5 |", "### Every comparison", "| equal FLOPs | random |",
        "Controls, whose teachers know less or nothing: “random”", "study/tiny-quality.png", "12 runs on cpu",
    )]  # fmt: skip
    assert places == sorted(places)


def test_a_full_disk_leaves_the_page_as_it_was(results, tmp_path, monkeypatch):
    page, real = tmp_path / "page.md", os.write
    page.write_text("# What was there\n")

    def full(descriptor, data):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{page}.partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RunFailed, match=r"page\.md: can't be written: No space left on device"):
            write_page(results, page)
    assert page.read_text() == "# What was there\n" and sorted(p.name for p in tmp_path.iterdir()) == [
        "page",
        "page.md",
    ]
    write_page(results, page)
    assert page.read_text().startswith("# What was there\n") and "## Tiny" in page.read_text()
