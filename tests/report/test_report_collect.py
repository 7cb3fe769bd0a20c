"""Logs are read as they are found: half lines after a kill, steps done twice, and mistakes told with their line."""

from pathlib import Path
from typing import Any

import pytest

from st_fast.core.errors import UserError
from st_fast.recipe.document import RENAMED
from st_fast.report import collect
from st_fast.report.collect import read_run, read_runs


def train(stage: str, step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "stage": stage, "step": step, "denoise": 1.0, **more}


def test_stages_come_in_the_recipes_order_with_their_records(runs) -> None:
    log = read_run(runs.two_stages())
    assert [stage.name for stage in log.stages] == ["align", "transcend"]
    align, transcend = log.stages
    assert (align.method, transcend.method, transcend.model("teacher")) == (
        "velocity_head",
        "self_transcendence",
        "align",
    )
    counts = [len(stage.records[kind]) for stage in log.stages for kind in ("train", "eval")]
    assert counts == [60, 3, 100, 5]
    assert (align.step, align.steps) == (600, 600)
    assert log.notes == ()


def test_steps_done_twice_count_once_and_the_last_counts(runs) -> None:
    records = [train("a", 10, denoise=5.0), train("a", 20, denoise=6.0), train("a", 10, denoise=1.0)]
    stage = read_run(runs.custom("", records)).stages[0]
    assert stage.series("train", "denoise") == ([10.0, 20.0], [1.0, 6.0])


def test_a_half_last_line_after_kill_9_is_left_out_with_a_note(runs) -> None:
    run = runs.two_stages()
    log = run / "log.jsonl"
    whole = log.read_bytes()
    for size in (len(whole) - 1, len(whole) - 2, len(whole) - 40):
        log.write_bytes(whole[:size])
        read = read_run(run)
        cut = size < len(whole) - 1  # without the newline alone the last record is whole
        assert any("cut off" in note for note in read.notes) == cut
        assert read.stages[1].ended != cut
        assert len(read.stages[1].records["train"]) == 100


@pytest.mark.parametrize("between", ["\n", ""])
def test_a_half_line_that_a_resumed_run_appended_to_loses_nothing_else(runs, between: str) -> None:
    run = runs.two_stages()
    log = run / "log.jsonl"
    lines = log.read_text().splitlines()
    resumed = lines[0].replace('"resumed_from": 0', '"resumed_from": 50').replace('"step": 0', '"step": 50')
    log.write_text("\n".join([*lines[:6], lines[6][:37]]) + between + "\n".join([resumed, *lines[6:]]) + "\n")
    read = read_run(run)
    assert len(read.stages[0].records["train"]) == 60
    assert sum("cut off" in note for note in read.notes) == 1
    assert any("resumed once" in note for note in read.notes)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("garbage", "'garbage'"),
        ("[1, 2]", "[1, 2]"),
        ('{"kind": "train", "stage": "align"}', "no 'step'"),
        ('{"kind": "train", "stage": 5, "step": 1}', "stage = 5; text is needed"),
        ('{"kind": "train", "stage": "align", "step": 1.5}', "step = 1.5; a whole number"),
        ('{"kind": "train", "stage": "align", "step": -1}', "step = -1"),
        ('{"kind": "train", "stage": "align", "step": 1, "mfu": "<b>"}', "mfu = '<b>'; a number"),
        ('{"kind": "eval", "stage": "align", "step": 1, "metrics": {"frechet": []}}', "metrics.frechet = []"),
        ('{"kind": "eval", "stage": "align", "step": 1, "metrics": 3}', "metrics = 3; an object"),
        ('{"kind": "sample", "stage": "align", "step": 1}', "file = None; a path"),
        ('{"kind": "train", "stage": "align", "step": 1, "loss": 1' + "0" * 400 + "}", "loss = 1000"),
    ],
)
def test_a_broken_line_is_left_out_and_named_with_its_number_and_value(runs, line: str, words: str) -> None:
    run = runs.two_stages()
    log = run / "log.jsonl"
    lines = log.read_text().splitlines()
    before = read_run(run)
    log.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    after = read_run(run)
    assert after.stages == before.stages
    (told,) = set(after.notes) - set(before.notes)
    assert told.startswith("Line 3 of the log is no record: ") and words in told and told.endswith("; it is left out.")
    assert "\n" not in told and len(told) < 400


def test_of_many_broken_lines_the_first_are_named_and_the_others_counted(runs) -> None:
    run = runs.two_stages()
    log = run / "log.jsonl"
    log.write_text("garbage\n" * 8 + log.read_text())
    notes = read_run(run).notes
    assert sum("'garbage'" in note for note in notes) == 5
    assert "3 more lines of the log are left out." in notes


def test_unknown_kinds_and_values_that_are_not_finite_are_passed_over(runs) -> None:
    records = [train("a", 10), {"kind": "rollback", "stage": "a", "step": 12, "loss": "what"}]
    records += [
        train("a", 20, denoise=float("nan")),
        train("a", 30, denoise=float("inf")),
        train("a", 40, denoise=None),
    ]
    stage = read_run(runs.custom("", records)).stages[0]
    assert stage.series("train", "denoise") == ([10.0], [1.0])
    assert stage.step == 40


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "log.jsonl").unlink(), "log.jsonl: missing"),
        (lambda run: (run / "recipe.toml").unlink(), "recipe.toml: missing"),
        (lambda run: (run / "log.jsonl").write_text("\n"), "holds no record"),
        (lambda run: (run / "log.jsonl").write_text("a\nb\n"), "holds no record yet; has this run begun? (Line 1 of"),
        (lambda run: (run / "recipe.toml").write_text("[model\n"), "recipe.toml: can't be read"),
        (lambda run: (run / "recipe.toml").write_text("stage = 3\n"), "stage = 3"),
    ],
)
def test_a_folder_that_is_no_run_is_told_in_one_line(runs, spoil, words: str) -> None:
    run = runs.two_stages()
    spoil(run)
    with pytest.raises(UserError) as error:
        read_run(run)
    assert words in str(error.value)
    assert "\n" not in str(error.value).strip()


def test_runs_of_one_name_are_told_apart_and_a_run_named_twice_is_refused(runs) -> None:
    first, second = runs.two_stages("a/digits"), runs.two_stages("b/digits")
    assert [log.name for log in read_runs([first, second])] == ["a/digits", "b/digits"]
    with pytest.raises(UserError, match="named twice"):
        read_runs([first, first / ".." / "digits"])
    with pytest.raises(UserError, match="no such run folder"):
        read_runs([Path("nowhere")])


def test_logs_with_the_keys_of_earlier_versions_stay_readable(runs) -> None:
    old = {"judge_accuracy": 0.99, "judge_digest": "ab", "accuracy": 0.9}
    record = {"kind": "eval", "stage": "a", "step": 10, "metrics": old}
    read = read_run(runs.custom("", [record])).stages[0].evals[0]["metrics"]
    assert read == {"classifier_accuracy": 0.99, "classifier_digest": "ab", "accuracy": 0.9}


def test_recipes_with_the_keys_of_earlier_versions_are_the_same_settings(runs) -> None:
    path = runs.two_stages("old")
    file = path / "recipe.toml"
    new, old = (
        file.read_text() + f"\n[evaluate]\n{key}\nnum = 7\n" for key in ("classifier = true", 'judge = "classifier"')
    )
    file.write_text(new)
    settings = read_run(path).recipe["evaluate"]
    file.write_text(old)
    assert read_run(path).recipe["evaluate"] == settings == {"classifier": True, "num": 7}
    assert RENAMED["evaluate.judge"] == ("classifier", collect.OLD_CLASSIFIER)
