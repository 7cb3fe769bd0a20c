"""A study's page follows from its runs: which way, how much, in how many seeds, at what cost."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from st_fast.core.errors import RunFailed, UserError
from st_fast.core.files import BadFile, write_json_atomic
from st_fast.report.arms import make_arms
from st_fast.report.collect import read_run
from st_fast.report.repeats import Repeats, rows
from st_fast.study import summary
from st_fast.study.page import body, charts, placed, read_page, samples, write_page
from st_fast.study.plan import jobs, read_study
from st_fast.study.results import Results, certainty, comparisons, difference, half_done, price, together
from st_fast.study.seeds import METRIC, Seed, as_json, complete, definition, from_json, gather, hash_of
from tests import pixels
from tests.report.conftest import ALIGN, BATCH, RECIPE, plain, stage_records, two_stages, write_run

STAGE_1 = '[[arm]]\nname = "stage1"\ntitle = "stage 1 alone"\nstage = "align"\n'
SEEDS = (0, 1, 2)


def of_seed(seed: int, run: Path, other: int) -> Path:
    """The run, made from the draws of another seed, as one of this seed."""
    recipe = (run / "recipe.toml").read_text()
    assert f"seed = {other}\n" in recipe
    (run / "recipe.toml").write_text(recipe.replace(f"seed = {other}\n", f"seed = {seed}\n"))
    return run


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
            seed: make_arms([read_run(of_seed(seed, make(folder / f"{number}-{seed}", seed=other), other))])[-1]
            for seed in SEEDS
            for other in [seed + 10 * number]
        }
        groups.append(Repeats(title, by_seed))
    return Results(replace(read_study(path), seeds=SEEDS), groups, rows(groups, groups[0], METRIC), [])


def test_each_comparison_says_what_the_runs_say(results):
    told = {arm: others for arm, *others in comparisons(results)}
    rows_of = {row.label: row for row in results.rows}
    base, taught = rows_of["plain SiT"], rows_of["ω = 5"]
    others = [row for row in results.rows if row is not base]
    assert list(told) == [row.label for row in sorted(others, key=lambda row: statistics.fmean(row.at_cost))]
    gap = statistics.fmean(a - b for a, b in zip(taught.at_cost, base.final, strict=True))
    assert gap > 0, "the made-up stage 2 doesn't make up for its teacher"
    flops, steps, beside_itself = told["ω = 5"]
    assert re.fullmatch(rf"{gap:.3g} ± \S+ higher \(worse\), 3 of 3", flops) and beside_itself == "–"
    plain, students = (results.group(name).by_seed for name in ("plain", "omega5"))
    at_end = [students[s].final(METRIC) - plain[s].at(METRIC, "step", students[s].stage.step) for s in SEEDS]
    assert steps.startswith(f"{abs(statistics.fmean(at_end)):.3g} ±")
    assert "lower (better)" in steps if statistics.fmean(at_end) < 0 else "higher (worse)" in steps
    assert told["stage 1 alone"][2] == "–" and told["random"][2] != "–"
    at_end = [results.group("stage1").by_seed[s].final(METRIC) - plain[s].final(METRIC) for s in SEEDS]
    assert told["stage 1 alone"][1].startswith(f"{abs(statistics.fmean(at_end)):.3g} ±"), "its head costs FLOPs as well"
    run = results.group("omega5").by_seed[0]
    share = f"{100 * run.teacher.flops / run.total.flops:.1f}\u00a0%"
    assert f"{share} of the FLOPs of “ω = 5” trained its teacher" in price(results)
    assert "all 3 seeds agree on a sign in 25.0\u00a0% of comparisons, and 3 arms" in certainty(results)


@pytest.mark.parametrize("keys", [{"sections": {"sample": {"cfg_scale": 3.0}}}, {"stage": {"supervision": "repa"}}])
def test_an_arm_drawn_otherwise_or_taught_from_outside_is_never_the_best_but_in_the_tables_end(keys, results, tmp_path):
    def sentence_and_rows(study) -> tuple[str, list[str]]:
        text = body(replace(results, study=study), tmp_path)
        verdict = text.split("### The verdict")[1].split("###")[0]
        return text.split("**At equal FLOPs:**")[1].split("\n")[0], re.findall(r"(?m)^\| ([^|]*?) \|", verdict)[2:]

    sentence, (base, *before) = sentence_and_rows(results.study)
    best = min(results.rows[1:], key=lambda row: statistics.fmean(row.at_cost)).label
    assert f"“{best}”" in sentence
    apart = {best, before[0]}
    arms = [replace(arm, **keys) if arm.title in apart else arm for arm in results.study.arms]
    sentence, after = sentence_and_rows(replace(results.study, arms=tuple(arms)))
    assert not any(f"“{title}”" in sentence for title in apart)
    assert (
        after == [base, *(t for t in before if t not in apart), *(t for t in before if t in apart)] != [base, *before]
    )


def test_arms_of_other_lengths_are_compared_where_the_shorter_ends(results):
    short = results.group("random").by_seed
    cut = {seed: replace(arm, stage=_until(arm.stage, 400)) for seed, arm in short.items()}
    groups = [replace(g, by_seed=cut) if g.by_seed is short else g for g in results.groups]
    told = {arm: others for arm, *others in comparisons(replace(results, groups=groups))}
    plain = results.group("plain").by_seed
    gaps = [cut[seed].at(METRIC, "step", 400) - plain[seed].at(METRIC, "step", 400) for seed in SEEDS]
    assert told["random"][1].startswith(f"{abs(statistics.fmean(gaps)):.3g} ±")
    ends = {seed: arm.quality(METRIC, "flops")[0][-1] for seed, arm in cut.items()}
    assert all(ends[seed] < plain[seed].total.flops for seed in SEEDS)
    gaps = [cut[seed].final(METRIC) - plain[seed].at(METRIC, "flops", ends[seed]) for seed in SEEDS]
    at_its_end = statistics.fmean(cut[seed].final(METRIC) - plain[seed].final(METRIC) for seed in SEEDS)
    assert told["random"][0].startswith(f"{abs(statistics.fmean(gaps)):.3g} ±")
    assert abs(at_its_end - statistics.fmean(gaps)) > 0.1, "plain training's end would be another comparison"


@pytest.mark.parametrize(("over", "shown"), [(0.5, 1000), (1.5, 800)])
def test_samples_of_a_run_that_ends_within_a_step_of_the_budget_are_its_last(results, over, shown):
    study, seeds = results.study, as_seeds(results)
    arm, budget = seeds[0].arms["omega5"], seeds[0].arms["plain"].total.flops
    steps = [record["step"] for record in arm.stage.records["sample"]]
    assert steps[-2:] == [800, 1000]
    excess = over * arm.own.flops / arm.stage.step
    seeds[0].arms["omega5"] = replace(arm, teacher=replace(arm.teacher, flops=budget - arm.own.flops + excess))
    titles = [title for title, _ in samples(together(study, seeds), seeds)]
    assert any(title.startswith(f"ω = 5: step {shown:,},") for title in titles), titles


def as_seeds(results):
    """The seeds' runs, as `collect` gives them."""
    expected = {job.arm.name: definition(job) for job in jobs(results.study, Path()) if job.arm is not None}
    found = []
    for seed in SEEDS:
        arms = {arm.name: results.group(arm.name).by_seed[seed] for arm in results.study.arms}
        hashes = {name: hash_of(arm.run.path) for name, arm in arms.items()}
        found.append(Seed(seed, arms, expected, hashes, ()))
    return found


def _until(stage, step):
    kept = {kind: [record for record in found if record["step"] <= step] for kind, found in stage.records.items()}
    return replace(stage, records=kept)


def test_a_difference_says_its_direction_and_the_seeds_that_agree():
    assert difference([3.0, 4.0], [1.0, 1.0]) == "2.5 ± 0.707 higher (worse), 2 of 2"
    assert difference([1.0, 4.0, 0.0], [2.0, 1.0, 9.0]).endswith("lower (better), 2 of 3")
    assert difference([1.0], [math.nan]) == "–", "one of them had not been scored by then"


def test_a_seed_that_lacks_an_arm_is_told_and_in_no_mean(results):
    study = results.study
    seeds = as_seeds(results)
    seeds[1].arms.pop("omega5")
    found = together(study, seeds)
    assert found.seeds == [0, 2] and [row.seeds for row in found.rows] == [[0, 2]] * 4
    expected = statistics.fmean(results.group("plain").by_seed[seed].final(METRIC) for seed in (0, 2))
    assert statistics.fmean(found.rows[0].final) == pytest.approx(expected)
    assert half_done(found) == [
        "**Seed 1 is half done** (3 of 4 arms; “ω = 5” left) and is in no figure or mean below."
    ]
    none = together(study, seeds[1:2])
    assert none.rows == [] and "No seed is complete yet" in body(none, Path("study"))


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
    last = replace(results, study=replace(results.study, reference="random"))
    looks = [[(c.label, c.colour, c.dash) for c in chart.curves[:2]] for chart in charts(last)[0]]
    assert looks == [[("plain SiT", 0, 0), ("random", 1, 0)]] * 2, "in every panel an arm looks the same"
    for chart in (frechet, teachers):
        always = [arm.title for arm in results.study.arms if not arm.panel or arm.name == "omega5"]
        own = [arm.title for arm in results.study.arms if arm.panel == chart.title and arm.name != "omega5"]
        assert [curve.label for curve in chart.curves] == always + own


@pytest.mark.parametrize(("step", "share"), [(200, 0.0), (300, 0.5), (400, 1.0)])
def test_a_score_at_a_step_lies_between_its_neighbours(results, step, share):
    arm = results.group("plain").by_seed[0]
    first, second = arm.quality(METRIC, "step")[1][:2]
    assert arm.at(METRIC, "step", step) == pytest.approx(first ** (1 - share) * second**share)
    assert arm.at(METRIC, "step", 100) != arm.at(METRIC, "step", 100), "nothing is known before the first evaluation"


def test_the_page_begins_with_what_was_bought_and_ends_with_what_it_took(results):
    for group in results.groups:
        for arm in group.by_seed.values():
            arm.stage.evals[-1]["metrics"] |= {"sampler": "heun", "steps": 10}
    text = body(results, Path("study"))
    places = [text.index(part) for part in (
        "## Tiny", "- **At equal FLOPs:** Over 3 seeds, ",
        "- **At equal steps of the new model:** “ω = 5” beside “plain SiT”: ",
        "Controls, whose teachers know less or nothing, beside “ω = 5”: “random” ", "- **Certainty:**",
        "### How it was done", "(heun, 10 steps, guidance 1.9)",
        "### The verdict", "| ω = 5 |", "### Every comparison", "at equal steps |",
        "study/tiny-quality.png", "12 runs on cpu, and their teachers",
        "with `--seed 3 --write", "[seed 0](study/tiny-seed0.json)",
    )]  # fmt: skip
    assert places == sorted(places)


def test_a_full_disk_leaves_the_page_as_it_was(results, tmp_path, monkeypatch):
    page, real, seeds = tmp_path / "page.md", os.write, as_seeds(results)
    page.write_text("# What was there\n")

    def full(descriptor, data):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{page}.partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RunFailed, match=r"page\.md: can't be written: No space left on device"):
            write_page(results.study, seeds, page)
    assert page.read_text() == "# What was there\n" and sorted(p.name for p in tmp_path.iterdir()) == [
        "page",
        "page.md",
    ]
    write_page(results.study, seeds, page)
    assert page.read_text().startswith("# What was there\n") and "## Tiny" in page.read_text()


def test_the_page_follows_from_the_seeds_files_alone(results, tmp_path):
    seeds = as_seeds(results)
    write_page(results.study, seeds, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    again = write_page(results.study, [], tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == text and again.rows == results.rows
    told, seed = from_json(tmp_path / "page" / "tiny-seed1.json")
    assert told["missing"] == [] and list(seed.arms) == [arm.name for arm in results.study.arms]
    for name, arm in seed.arms.items():
        ours = results.group(name).by_seed[1]
        assert (arm.own, arm.teacher, arm.teacher_forward_flops) == (ours.own, ours.teacher, ours.teacher_forward_flops)
        assert arm.quality(METRIC, "flops") == ours.quality(METRIC, "flops")


def test_a_seeds_file_keeps_the_arms_whose_runs_are_gone(results, tmp_path):
    seeds = as_seeds(results)
    write_page(results.study, seeds, tmp_path / "page.md")
    file = tmp_path / "page" / "tiny-seed1.json"
    before = file.read_bytes()
    seeds[1].arms.pop("omega5"), seeds[1].hashes.pop("omega5"), seeds[1].definitions.pop("omega5")
    again = write_page(results.study, seeds[1:2], tmp_path / "page.md")
    assert file.read_bytes() == before and again.seeds == list(SEEDS)


@pytest.fixture
def written(results, tmp_path):
    """A folder with the seeds' files, and the seeds."""
    seeds = as_seeds(results)
    for seed in seeds:
        write_json_atomic(tmp_path / f"tiny-seed{seed.seed}.json", as_json(results.study, seed))
    return tmp_path, seeds


def test_a_run_that_is_not_the_one_of_its_seeds_file_is_named_by_its_hash(results, written):
    folder, seeds = written
    before = seeds[2].hashes["plain"]
    seeds[2].hashes["plain"] = "0123456789ab"
    with pytest.raises(
        UserError, match=rf"tiny-seed2.json: arm 'plain' was written from run {before}, .* 0123456789ab now"
    ):
        gather(results.study, folder, seeds)
    run = results.group("plain").by_seed[2].run.path
    (run / "log.jsonl").write_text((run / "log.jsonl").read_text().replace('"step": 1600', '"step": 1601'))
    assert hash_of(run) not in (before, "0123456789ab"), "a figure changed by hand changes the hash"


def test_a_file_of_another_study_is_refused(results, written):
    folder, _ = written
    told = json.loads((folder / "tiny-seed1.json").read_text())
    (folder / "tiny-seed1.json").write_text(json.dumps(told | {"study": "small"}))
    with pytest.raises(UserError, match=r"tiny-seed1\.json: .*its name is small-seed1\.json"):
        gather(results.study, folder, [])


def test_a_file_of_another_definition_of_an_arm_is_refused(results, written):
    folder, _ = written
    arms = tuple(
        replace(arm, stage=arm.stage | {"steps": 9}) if arm.name == "omega5" else arm for arm in results.study.arms
    )
    with pytest.raises(UserError, match=r"tiny-seed0.json: arm 'omega5' is \w{8} there, \w{8} in .*tiny.toml"):
        gather(replace(results.study, arms=arms), folder, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arm: arm["start"].update(dataset="ff" * 32), "trained on different data"),
        (lambda arm: arm["recipe"]["optim"].update(batch_size=3), "their optim.batch_size differ"),
        (lambda arm: arm["recipe"]["flow"].update(time="lognormal"), "their flow.time differ"),
        (lambda arm: arm["recipe"]["run"].update(seed=7), "their run.seed differ"),
        (lambda arm: arm["protocol"].update(floor_frechet=0.5), "their test images differ"),
        (lambda arm: arm["protocol"].update(classifier_digest="ee" * 32), "their classifiers differ"),
        (lambda arm: arm["recipe"]["sample"].update(cfg_scale=7.0), "their sample.cfg_scale differ"),
    ],
)
def test_arms_that_differ_in_data_noise_or_test_images_are_refused(results, written, change, words):
    folder, _ = written
    path = folder / "tiny-seed1.json"
    told = json.loads(path.read_text())
    for arm in told["arms"]:
        arm["start"]["dataset"], arm["protocol"]["classifier_digest"] = "aa" * 32, "bb" * 32
        arm["protocol"]["floor_frechet"] = 0.25
        arm["recipe"] |= {"flow": {"time": "uniform"}, "sample": {"cfg_scale": 1.5}}
    path.write_text(json.dumps(told))
    for other in (0, 2):
        (folder / f"tiny-seed{other}.json").unlink()
    gather(results.study, folder, [])
    change(told["arms"][1])
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match=f"can't be compared: .*{words}"):
        gather(results.study, folder, [])


@pytest.mark.parametrize("text", ['{"seed": 0}', '{"seed": 0, "missing": [], "arms": [{"name": "x"}]}', "[1]", "{"])
def test_a_seeds_file_that_is_none_is_named(results, tmp_path, text):
    (tmp_path / "tiny-seed0.json").write_text(text)
    with pytest.raises(UserError, match=r"tiny-seed0\.json: "):
        gather(results.study, tmp_path, [])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tiny-seed0-old.json", lambda told: told),
        ("tiny-seed7.json", lambda told: told),
        ("other-seed0.json", lambda told: told),
        ("tiny-seed0.json", lambda told: told | {"seed": 0.5}),
        ("tiny-seed0.json", lambda told: told | {"title": "a | b"}),
        ("tiny-seed0.json", lambda told: told | {"missing": "omega5"}),
        ("tiny-seed0.json", lambda told: told | {"arms": told["arms"][:1] * 2}),
        ("tiny-seed0.json", lambda told: told["arms"][0]["own"].update(flops=0) or told),
        ("tiny-seed0.json", lambda told: told["arms"][0].update(recipe=[]) or told),
        ("tiny-seed0.json", lambda told: told["arms"][0]["evals"][-1].update(frechet=-3.0) or told),
        ("tiny-seed0.json", lambda told: told["arms"][0]["evals"][-1].update(step=1) or told),
    ],
)
def test_a_file_that_cannot_be_that_seeds_is_named_and_in_no_figure(results, written, name, change):
    folder, _ = written
    told = json.loads((folder / "tiny-seed0.json").read_text())
    (folder / name).write_text(json.dumps(change(told)))
    for read in (lambda: gather(results.study, folder, []), lambda: complete(folder)):
        with pytest.raises(BadFile, match=rf"{re.escape(name)}: not a seed's results"):
            read()


def test_a_teachers_log_changed_after_its_students_file_was_written_is_refused(results, written):
    folder, seeds = written
    arm = seeds[1].arms["omega5"]
    seeds[1].arms["omega5"] = replace(arm, teacher=replace(arm.teacher, flops=arm.teacher.flops / 2))
    with pytest.raises(UserError, match=r"tiny-seed1.json: the teacher of arm 'omega5' cost .* there, .* now"):
        gather(results.study, folder, seeds)


def test_a_seeds_file_outlives_one_of_its_runs(results, tmp_path):
    page, seeds = tmp_path / "page.md", as_seeds(results)
    write_page(results.study, seeds, page)
    before = {path: path.read_text() for path in (tmp_path / "page").glob("*.json")}
    seeds[0].arms.pop("random")
    write_page(results.study, [replace(seeds[0], missing=("random",))], page)
    assert {path: path.read_text() for path in (tmp_path / "page").glob("*.json")} == before


def test_every_seeds_file_follows_the_study_in_what_is_compared(results, tmp_path):
    page, seeds = tmp_path / "page.md", as_seeds(results)
    write_page(results.study, seeds, page)
    arms = tuple(replace(arm, title="noise") if arm.name == "random" else arm for arm in results.study.arms)
    write_page(replace(results.study, reference="random", title="Small", arms=arms), seeds[1:2], page)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| Small |")]
    assert len(rows) == 1 and "(noise)" in rows[0] and "| Tiny |" not in page.read_text()


def test_horizons_that_no_student_reached_leave_their_section_out(results, tmp_path):
    page = tmp_path / "page.md"
    write_page(replace(results.study, horizons=(1.0,)), as_seeds(results), page)
    assert "## Tiny" in page.read_text() and "shares.png" not in page.read_text()


def test_scores_without_an_accuracy_are_drawn_alone(results, written):
    folder, _ = written
    for path in folder.glob("*.json"):
        told = json.loads(path.read_text())
        for arm in told["arms"]:
            arm["evals"] = [{k: v for k, v in one.items() if k != "accuracy"} for one in arm["evals"]]
        path.write_text(json.dumps(told))
    assert len(charts(together(results.study, gather(results.study, folder, [])))) == 1


def test_what_others_wrote_on_the_page_stays(tmp_path):
    begin, end = "<!-- study tiny: begin -->", "<!-- study tiny: end -->"
    for text in (f"# A\n\n{begin}\nlost its end\n\n## Mine\n", f"{begin}\nx\n\n{begin}\nold\n{end}\n\n## Mine\n"):
        for _ in range(3):
            text = placed(text, "tiny", "new\n")
        assert "## Mine" in text and text.count("new\n") == 1 and "old" not in text
    assert placed(f"# A\n\n{begin}\nold\n{end}", "tiny", "new\n") == f"# A\n\n{begin}\nnew\n{end}\n"
    quoted = placed("", "tiny", f"notes\n{end}\nmore\n")
    assert placed(quoted, "tiny", "new\n") == placed("", "tiny", "new\n")


def test_a_page_that_is_none_is_refused(tmp_path):
    (tmp_path / "latin.md").write_bytes("é".encode("latin-1"))
    (tmp_path / "folder.md").mkdir()
    for name, words in (("latin.md", "not text in UTF-8"), ("folder.md", "Markdown file"), ("study", "Markdown file")):
        with pytest.raises(UserError, match=rf"{name}: .*{words}"):
            read_page(tmp_path / name)


def test_a_study_whose_reference_has_no_teacher_has_no_row_about_teachers(results, written):
    folder, _ = written
    assert "Stage 2, at equal steps" in summary.section(folder)
    for path in folder.glob("*-seed*.json"):
        content = json.loads(path.read_text())
        content["reference"] = content["baseline"]
        path.write_text(json.dumps(content))
    assert summary.section(folder) == ""
