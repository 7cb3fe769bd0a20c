"""The table of scores: a line a stage, what real images score apart, and how all of it was measured, said once."""

import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from st_fast.report import plot
from st_fast.report.arms import make_arms
from st_fast.report.collect import read_runs
from st_fast.report.fairness import unfair, warnings
from st_fast.report.figures import Chart, Curve
from st_fast.report.html import render
from st_fast.report.scores import table
from tests.report.conftest import Runs


def rescored(runs: Runs, name: str, **changes: object):
    """A plain run whose evaluations say this; None leaves a key out."""
    left_out = {key for key, value in changes.items() if value is None}

    def edit(record):
        if "metrics" in record:
            metrics = record["metrics"] | changes
            record["metrics"] = {key: value for key, value in metrics.items() if key not in left_out}
        return record

    return runs.change(runs.plain(name), edit)


def test_scores_are_the_last_ones_and_real_images_have_a_line_of_their_own(runs) -> None:
    found = table(make_arms(read_runs([runs.two_stages()])))
    assert found.head == ["Stage", "Scored at step", "Fréchet distance ↓", "Accuracy ↑", "Precision ↑", "Recall ↑"]
    assert [line[:2] for line in found.lines] == [["align", "600"], ["transcend", "1,000"]]
    # 1 − exp(−1000 · 1.5 / 500) of the task is learnt
    assert found.lines[1][2:] == ["0.374", "92.7\u00a0%", "76.0\u00a0%", "66.5\u00a0%"]
    assert found.real == [["Real images", "", "0.152", "99.4\u00a0%", "–", "–"]]


def test_what_was_not_scored_has_no_line_and_what_nobody_measured_no_column(runs) -> None:
    half = runs.change(runs.two_stages(), lambda r: None if (r["kind"], r["stage"]) == ("eval", "transcend") else r)
    assert [line[0] for line in table(make_arms(read_runs([half]))).lines] == ["align"]
    paths = [
        rescored(runs, "a", precision=None, recall=None),
        rescored(runs, "b", fid=7.5, recall=None, precision=None),
    ]
    found = table(make_arms(read_runs(paths)))
    assert found.head[2:] == ["FID ↓", "Fréchet distance ↓", "Accuracy ↑"]
    assert [line[2] for line in found.lines] == ["–", "7.5"]
    none = runs.change(runs.plain("c"), lambda r: None if r["kind"] == "eval" else r)
    assert table(make_arms(read_runs([none]))).lines == table(make_arms(read_runs([none]))).protocol == []
    assert ">Scores</h3>" not in render(read_runs([none])) and ">Costs</h3>" in render(read_runs([none]))


def test_the_protocol_stands_once_on_the_page_where_all_agree(runs) -> None:
    said = {"num": 1500, "sampler": "heun", "steps": 18, "floor_num": 360}
    runs_read = read_runs([rescored(runs, "a", **said), rescored(runs, "b", **said)])
    found = table(make_arms(runs_read))
    assert found.protocol == [
        "Samples: 1,500 each, sampler heun in 18 steps, guidance scale 1.9.",
        "Classifier: SHA-256 abababababab.", "Real images: 360 held-out ones.",
    ]  # fmt: skip
    page = render(runs_read)
    assert all(page.count(sentence) == 1 for sentence in found.protocol)
    assert page.count(">Real images<") == 1


def test_where_stages_were_measured_differently_each_is_named(runs) -> None:
    paths = [
        rescored(runs, "a", cfg_scale=1.0, inception_sha256="cd" * 32, reference="VIRTUAL", reference_sha256="ef" * 32),
        rescored(runs, "b", floor_frechet=0.25, cfg_scale=3.0),
    ]
    recipe = paths[1] / "recipe.toml"
    recipe.write_text(recipe.read_text() + "\n[sample]\ncfg_range = [0.0, 0.7]\n")
    found = table(make_arms(read_runs(paths)))
    assert found.protocol[0] == (
        "Samples: 1,000 each, no guidance (a); 1,000 each, guidance scale 3.0 for times 0.0 to 0.7 (b)."
    )
    assert found.protocol[-1] == "Inception: weights cdcdcdcdcdcd, reference VIRTUAL efefefefefef."
    assert [line[0] for line in found.real] == ["Real images, as for a", "Real images, as for b"]
    assert [line[2] for line in found.real] == ["0.152", "0.25"]


@pytest.mark.parametrize("strange", ["<script>", 7, [1], {"a": 1}, True])
def test_a_protocol_may_say_anything(runs, strange: object) -> None:
    keys = ("cfg_scale", "sampler", "steps", "classifier_digest", "inception_sha256", "reference", "attributes_digest")
    path = rescored(runs, "a", **dict.fromkeys(keys, strange))
    recipe = path / "recipe.toml"
    recipe.write_text(recipe.read_text() + f"\n[sample]\ncfg_range = [{'7' if strange == 7 else '{}'}, 1]\n")
    assert "<script>" not in render(read_runs([path]))


@pytest.mark.parametrize("labels", [["plain", "stage1", "omega5", "repa"], ["a"] * 9, ["stage 2, guided by 5"] * 3])
def test_a_legend_is_no_wider_than_its_figure(labels) -> None:
    curves = [Curve(label, [0.0, 1.0], [1.0, 2.0], place) for place, label in enumerate(labels)]
    canvas = plot.draw(Chart("", "", "", "", "number", "", "number", False, curves))
    FigureCanvasAgg(canvas).draw()
    (legend,) = canvas.legends
    assert 0 < legend.get_window_extent().width <= canvas.bbox.width


@pytest.mark.parametrize(("mfu", "told"), [(0.4, "40.0\u00a0%"), (1.0, "100.0\u00a0%"), (1.01, "–"), (5.3, "–")])
def test_an_mfu_that_no_device_can_have_is_not_told(runs, mfu, told) -> None:
    path = runs.change(runs.plain(), lambda record: record | {"mfu": mfu} if record["kind"] == "train" else record)
    assert re.search(rf"<td[^>]*>{told}</td>\s*</tr>", render(read_runs([path])))


def test_shifts_are_told_and_runs_that_differ_in_them_are_not_ranked(runs) -> None:
    paths = [rescored(runs, "a", sampler="sde", steps=250, shift=1.5), rescored(runs, "b", sampler="sde", steps=250)]
    for path, shift in zip(paths, (1.5, None), strict=True):
        said = "" if shift is None else f"\n[flow]\nshift = 2.0\n[sample]\nshift = {shift}\n"
        (path / "recipe.toml").write_text((path / "recipe.toml").read_text() + said)
    found = read_runs(paths)
    assert "sampler sde in 250 steps shifted by 1.5" in table(make_arms(found)).protocol[0]
    reasons = unfair(found)
    assert [any(f"{key}.shift differ" in reason for reason in reasons) for key in ("sample", "flow")] == [True, True]
    assert any("different shifts of time" in told for told in warnings(found, make_arms(found), reasons))
    assert unfair(found[1:] * 2) == []


def test_internal_guidance_is_told_and_runs_that_differ_in_it_are_not_ranked(runs) -> None:
    paths = [rescored(runs, "a", internal_guidance=1.4), rescored(runs, "b"), rescored(runs, "c")]
    for path, scale in zip(paths, (1.4, 1.0, None), strict=True):
        recipe = path / "recipe.toml"
        guided = "" if scale is None else f"internal_guidance = {scale}\ninternal_range = [0.3, 1.0]\n"
        said = f"\n[sample]\n{guided}" if scale != 1.0 else f"\n[sample]\ninternal_guidance = {scale}\n"
        recipe.write_text(recipe.read_text() + said)
    found = read_runs(paths)
    assert table(make_arms(found)).protocol[0] == (
        "Samples: 1,000 each, guidance scale 1.9, Internal Guidance 1.4 for times 0.3 to 1.0 (a); "
        "1,000 each, guidance scale 1.9 (b, c)."
    )
    reasons = unfair(found)
    assert any("sample.internal_guidance differ" in reason for reason in reasons)
    told = warnings(found, make_arms(found), reasons)
    assert any("different Internal Guidance" in sentence for sentence in told)
    older = read_runs(paths[1:])  # of the two one is of a version that had no such setting
    assert unfair(older) == [] and not any("Internal" in text for text in warnings(older, make_arms(older), []))
