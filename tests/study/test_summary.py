"""What a study's page says in short follows from its runs: which way, how much, in how many seeds, at what price."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace

import numpy as np
import pytest

from st_fast.report.arms import make_arms
from st_fast.report.collect import read_run
from st_fast.report.repeats import Repeats, rows
from st_fast.study.page import body
from st_fast.study.plan import read_study
from st_fast.study.results import METRIC, Results
from st_fast.study.summary import at_step, certainty, difference, in_short
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


def test_each_paragraph_says_what_the_runs_say(results):
    said = in_short(results)
    assert [re.match(r"\*\*(.*?)[:,?]?\*\*", text)[1] for text in said] == [
        "Stage 1 bought", "Stage 2 bought", "Counted in steps of the new model alone", "The price",
        "Is it what the teacher knows", "How sure",
    ]  # fmt: skip
    rows_of = {row.label: row for row in results.rows}
    base, taught = rows_of["plain SiT"], rows_of["ω = 5"]
    gap = statistics.fmean(a - b for a, b in zip(taught.at_cost, base.final, strict=True))
    assert gap > 0, "the made-up stage 2 doesn't make up for its teacher"
    assert re.search(rf": {gap:.3g} ± \S+ higher \(worse\) than “plain SiT”, in 3 of 3 seeds; ", said[1])
    run = results.group("omega5").by_seed[0]
    share = f"{100 * run.teacher.flops / run.total.flops:.1f}\u00a0%"
    assert f"{share} of the FLOPs of “ω = 5” trained its teacher" in said[3]
    assert "Controls, whose teachers know less or nothing: “random” ends" in said[4]
    assert "all 3 agree on a sign in 25.0\u00a0% of comparisons, and 3 arms" in said[5]


def test_a_stage_that_buys_nothing_is_said_to_be_worse():
    assert difference([3.0, 4.0], [1.0, 1.0], "plain") == "2.5 ± 0.707 higher (worse) than “plain”, in 2 of 2 seeds"
    assert difference([1.0, 4.0, 0.0], [2.0, 1.0, 9.0], "x").endswith("lower (better) than “x”, in 2 of 3 seeds")


def test_one_seed_is_said_to_prove_nothing(results):
    base = replace(results.rows[0], seeds=[0])
    assert "not at all: one seed" in certainty(results, base)


@pytest.mark.parametrize(("step", "share"), [(200, 0.0), (300, 0.5), (400, 1.0)])
def test_a_score_at_a_step_lies_between_its_neighbours(results, step, share):
    arm = results.group("plain").by_seed[0]
    first, second = arm.quality(METRIC, "step")[1][:2]
    assert at_step(arm, step) == pytest.approx(first + share * (second - first))
    assert at_step(arm, 100) != at_step(arm, 100), "nothing is known before the first evaluation"


def test_the_page_begins_with_what_was_bought_and_ends_with_what_it_took(results):
    for group in results.groups:
        for arm in group.by_seed.values():
            arm.stage.evals[-1]["metrics"] |= {"sampler": "heun", "steps": 10}
    text = body(results, ["study/tiny-quality.png"])
    places = [text.index(part) for part in (
        "## Tiny", "- **Stage 1 bought:**", "- **How sure:**", "### How it was done", "(heun, 10 steps, guidance 1.9)",
        "### The verdict", "| ω = 5 |", "### Every arm", "- random: ends", "study/tiny-quality.png", "12 runs on cpu",
    )]  # fmt: skip
    assert places == sorted(places)
