"""A record of the speedrun is true or refused: one altered figure is found, and the same seed gives the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st_fast.core.errors import RunFailed, UserError
from st_fast.study.speedrun import attempt, record, verify
from st_fast.study.speedrun.record import CHANGES, CLAIM, PICTURE, RECIPE, SUMS, read_record
from st_fast.study.speedrun.score import Scorer
from st_fast.study.speedrun.task import interval, read_task
from tests.study.speedrun.made import (
    DIFF,
    HEAD,
    changed_byte,
    checked,
    in_this_process,
    rewritten,
    silent,
    summed,
    task_of,
    verified,
)


def test_a_record_that_was_just_made_is_true_to_the_bit(made: Path) -> None:
    lines = verified(made / "1-mine", made)
    assert "1-mine: true" in lines[-1] and any("the same to the bit" in line for line in lines)
    found = read_record(made / "1-mine")
    assert found.what == "a <tiny> one" and found.revision == HEAD and not (made / "1-mine" / CHANGES).exists()
    assert len({one.weights_sha256 for one in found.results}) == 3  # seeds differ
    distances = [one.distance for one in found.results]
    assert found.mean == pytest.approx(np.mean(distances)) and found.deviation == pytest.approx(
        np.std(distances, ddof=1)
    )


def test_one_changed_digit_in_any_file_is_found(made: Path, tmp_path: Path) -> None:
    names = [path.name for path in (made / "1-mine").iterdir()]
    assert {CLAIM, RECIPE, SUMS, "samples.png", "seed3.jsonl", "seed5.jsonl", "seed8.jsonl"} == set(names)
    for name in names:
        raw = (made / "1-mine" / name).read_bytes()
        digits = [at for at, byte in enumerate(raw) if chr(byte).isdigit()]
        for at in (digits[0], digits[len(digits) // 2], digits[-1]):
            copy = Path(shutil.copytree(made / "1-mine", tmp_path / f"{name}-{at}"))
            changed_byte(copy / name, at)
            with pytest.raises(UserError) as refusal:
                checked(copy, made)
            assert name == SUMS or str(copy / name) in str(refusal.value)


def test_a_file_that_is_missing_or_was_added_is_named(copy: Path, made: Path) -> None:
    (copy / "more.txt").write_text("x")
    with pytest.raises(UserError, match=r"more\.txt: not in SHA256SUMS"):
        checked(copy, made)
    summed(copy)
    with pytest.raises(UserError, match=r"more\.txt: no file of a record"):
        checked(copy, made)
    (copy / "more.txt").unlink()
    summed(copy)
    (copy / "seed8.jsonl").unlink()
    with pytest.raises(UserError, match=r"seed8\.jsonl"):
        checked(copy, made)


def leaves(value: object, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


def altered(value: object) -> object:
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    assert isinstance(value, int | float)
    return value + 1 if isinstance(value, int) else value * (1 + 1e-9)


TOLD = {"what", "by", "date"}
"""What nothing follows from; the revision has to be there, and its code is run."""


ONLY_A_RUN_TELLS = {"weights_sha256", "samples_sha256", "accuracy"}


def test_a_figure_that_was_changed_with_its_sums_is_found(made: Path, tmp_path: Path) -> None:
    claim = json.loads((made / "1-mine" / CLAIM).read_text())
    by_run = set()
    for path in leaves(claim):
        if path[0] in TOLD or path == ("revision",) or path[0] in ("machine", "versions"):
            continue
        copy = Path(shutil.copytree(made / "1-mine", tmp_path / "-".join(map(str, path))))
        told = json.loads(json.dumps(claim))
        place = told
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = altered(place[path[-1]])
        (copy / CLAIM).write_text(json.dumps(told))
        summed(copy)
        if path[-1] in ONLY_A_RUN_TELLS:
            checked(copy, made)
            if path[1] == 1:
                by_run.add(path[-1])
                with pytest.raises(RunFailed, match=path[-1]):
                    verified(copy, made, claim["results"][1]["seed"])
            continue
        with pytest.raises(UserError):
            checked(copy, made)
    assert by_run == ONLY_A_RUN_TELLS


def test_a_better_score_with_all_that_follows_from_it_is_found_by_the_run(copy: Path, made: Path) -> None:
    claim, task = json.loads((copy / CLAIM).read_text()), task_of(made)
    found = read_record(copy)
    results = tuple(replace(one, distance=one.distance * 0.9) for one in found.results)
    for result, told in zip(results, claim["results"], strict=True):
        told["distance"] = result.distance
    (copy / CLAIM).write_text(json.dumps(claim | record.verdict(task, results)))
    summed(copy)
    checked(copy, made)
    with pytest.raises(RunFailed, match="distance"):
        verified(copy, made)


def with_log(copy: Path, change: Callable[[list[str]], list[str]]) -> None:
    path = copy / "seed5.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    summed(copy)


def with_record(change: dict, number: int) -> Callable[[list[str]], list[str]]:
    def of(lines: list[str]) -> list[str]:
        told = json.loads(lines[number]) | change
        return [*lines[:number], json.dumps(told) + "\n", *lines[number:][1:]]

    return of


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines[:-1], "cut off: stage 'second' has no end after 4 steps"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "not valid JSON"),
        (lambda lines: [*lines[:2], "nonsense\n", *lines[2:]], "line 3: not valid JSON"),
        (with_record({"time": 5.0}, 3), "line 4: its clock ran backwards"),
        (with_record({"seconds": 1e4}, 2), "of training within"),
        (with_record({"seconds": -3.0}, 3), "of training within"),
        (with_record({"flops": 1.0}, -1), "FLOPs of stage 'second'; its recipe takes"),
        (with_record({"dataset": "0" * 64}, 0), "dataset of stage 'first'"),
        (with_record({"batch_size": 17}, 0), "batch_size of stage 'first' is 17, not 16"),
        (with_record({"versions": {"torch": "1.0"}}, 0), "torch of stage 'first'"),
        (with_record({"versions": 1}, 0), "torch of stage 'first'"),
        (with_record({"seconds": "x"}, 2), "line 3: no record of a log"),
        (with_record({"time": None}, 2), "line 3: no record of a log"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"flops"', '"flop"')], "cut off: stage 'second'"),
        (lambda lines: [line.replace('"time": 1', '"time": NaN, "x": 1') for line in lines], "not valid JSON"),
    ],
)
def test_a_log_that_is_not_of_this_run_is_refused(copy: Path, made: Path, change, says: str) -> None:
    with_log(copy, change)
    with pytest.raises(UserError, match=r"seed5\.jsonl") as refusal:
        checked(copy, made)
    assert says in str(refusal.value)


def test_a_stop_within_the_steps_of_a_line_is_no_difference(tmp_path: Path) -> None:
    """A resumed run's first line is a mean over fewer steps; every other line, and what is no mean, has to be equal."""

    def log(name: str, *records: dict) -> Path:
        lines = ({"stage": "a", "time": 1.0, "resumed_from": 0} | one for one in records)
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in lines))
        return tmp_path / name

    start = {"kind": "start", "step": 0}
    train = [{"kind": "train", "step": step, "loss": 1.0 / step, "flops": step} for step in (50, 100, 150)]
    whole = log("whole", start, *train)
    stopped = log(
        "stopped",
        start,
        train[0],
        {"kind": "start", "step": 70, "resumed_from": 70},
        train[1] | {"loss": 9.0},
        train[2],
    )
    one, other, partial = verify._measured(whole, stopped)
    assert one == other and partial == 1 and one["a train 50"]["loss"] == 0.02
    assert set(one) == {"a start", "a train 50", "a train 100", "a train 150"}
    for change in ({"flops": 7}, {"lr": 0.5}):
        one, other, _ = verify._measured(
            whole, log("x", start, train[0], start | {"resumed_from": 70}, train[1] | change, train[2])
        )
        assert one != other
    changed = train[1] | {"loss": 9.0}
    again = log("x", start, train[0], train[1], start | {"resumed_from": 50}, train[1], train[2])
    for false in (
        log("y", start, train[0], changed, train[2]), log("z", start, train[0], changed, *train[1:]),
        log("v", start, train[0], train[1], changed, train[2]),
        log("w", start | {"trunk_params": 1}, *train),
    ):  # fmt: skip
        one, other, _ = verify._measured(whole, false)
        assert one != other
    one, other, _ = verify._measured(whole, again)
    assert one == other


def test_a_loss_that_was_changed_in_a_log_is_found_by_the_run(copy: Path, made: Path) -> None:
    number = next(i for i, line in enumerate((copy / "seed5.jsonl").read_text().splitlines()) if '"train"' in line)
    with_log(copy, with_record({"loss": 0.5}, number))
    checked(copy, made)
    with pytest.raises(
        RunFailed, match=r"seed5\.jsonl: another log on the same kind of machine: first train \d\.loss 0\.5"
    ):
        verified(copy, made)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"what": "a | b"}, "one line of at most 200 characters"), ({"by": "a\nb"}, "one line of at most 200"),
        ({"revision": "HEAD"}, "40 hex digits are needed"), ({"format": "x"}, "this program reads"),
        ({"machine": {"device": "a", "threads": 3, "instructions": "b"}}, "threads = 3, the task has 2"),
        ({"machine": {"device": "a\nb", "threads": 2, "instructions": "b"}}, "machine: device = 'a"),
        ({"what": " "}, "one line of at most 200"), ({"date": "2199-01-01"}, "a day until today"),
        ({"date": "2026-99-99"}, "a day until today"),
    ],
)  # fmt: skip
def test_a_claim_that_can_not_be_true_is_refused(copy: Path, made: Path, changes: dict, says: str) -> None:
    rewritten(copy, **changes)
    with pytest.raises(UserError, match=r"record\.json") as refusal:
        checked(copy, made)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("distance", -5.0), ("accuracy", 1e300), ("weights_sha256", "haha"), ("samples_sha256", "0" * 63)],
)
def test_figures_that_nothing_can_have_are_refused(copy: Path, made: Path, key: str, value: object) -> None:
    results = json.loads((copy / CLAIM).read_text())["results"]
    results[1][key] = value
    rewritten(copy, results=results)
    with pytest.raises(UserError, match=rf"record\.json: seed 5: .*{key}"):
        checked(copy, made)


def test_a_picture_is_a_png_of_the_first_seeds_samples(copy: Path, made: Path) -> None:
    other = Image.new("RGB", Image.open(copy / PICTURE).size)
    other.save(copy / PICTURE)
    summed(copy)
    checked(copy, made)
    with pytest.raises(RunFailed, match=r"samples\.png: other samples than those drawn here"):
        verified(copy, made, 3)
    other.save(copy / PICTURE, format="JPEG")
    summed(copy)
    with pytest.raises(UserError, match=r"samples\.png: no PNG"):
        checked(copy, made)


def test_all_seeds_run_elsewhere_have_to_reach_the_target_themselves(
    copy: Path, made: Path, tmp_path, monkeypatch
) -> None:
    """Where each one's score alone could be one more of the record's false ones."""
    task = Path(shutil.copytree(made / "tiny", tmp_path / "tiny"))
    found = read_record(copy)
    target = min(one.distance for one in found.results)
    text = (task / "task.toml").read_text()
    (task / "task.toml").write_text(text.replace("target = 90.0", f"target = {target}"))
    lower = read_task(str(task))
    results = tuple(replace(one, distance=target * (0.5 + one.seed / 100)) for one in found.results)
    told = [asdict(one) for one in results]
    rewritten(copy, results=told, task_sha256=lower.digest, **record.verdict(lower, results))
    monkeypatch.setattr(verify, "compare", lambda *arguments: True)
    with pytest.raises(RunFailed, match="the scores here do not show a mean below"):
        verify.verify(
            copy, str(task), "all", made / "data" / "speedrun-tiny", None, run_changes=False, rerun=True, say=silent
        )


def test_sums_that_are_none_are_refused(copy: Path, made: Path) -> None:
    text = (copy / SUMS).read_text()
    for bad in (
        "\n" + text,
        text.replace("  ", " "),
        text.replace(CLAIM, "../x"),
        "",
        text * 2,
        text.replace("\n", "\r\n"),
    ):
        (copy / SUMS).write_bytes(bad.encode())
        with pytest.raises(UserError, match="SHA256SUMS"):
            checked(copy, made)
    with pytest.raises(UserError, match="no such folder; a record is one"):
        checked(copy / "none", made)


def test_another_classifier_or_task_is_refused_by_name(copy: Path, made: Path, tmp_path: Path) -> None:
    rewritten(copy, classifier_sha256="f" * 64)
    with pytest.raises(UserError, match=r"scored by a classifier of SHA-256 'ffffffffffff'…; that of the task tiny is"):
        checked(copy, made)
    other = Path(shutil.copytree(made / "tiny", tmp_path / "tiny"))
    changed_byte(other / "classifier.safetensors", 5_000)
    with pytest.raises(UserError, match=r"classifier\.safetensors: SHA-256 .*not the task's file"):
        Scorer(read_task(str(other)))


def test_a_record_from_another_kind_of_machine_is_compared_by_score_and_flops(copy: Path, made: Path) -> None:
    claim = json.loads((copy / CLAIM).read_text())
    rewritten(copy, machine=claim["machine"] | {"device": "Another CPU"})
    lines = verified(copy, made)
    assert any("another kind of machine: device" in line and "times can't be compared" in line for line in lines)
    assert any("one more of its kind" in line for line in lines) and not any("to the bit" in line for line in lines)
    task, found = task_of(made), read_record(copy)
    here = attempt.read_attempt(made / "runs" / "speedrun" / "tiny" / "1-mine" / "seed5")
    logs = (copy / "seed5.jsonl",) * 2
    _, high = interval([one.distance for one in found.results])
    for distance, true in ((high * 0.99, True), (high * 1.01, False)):
        again = replace(here, result=replace(here.result, distance=distance))
        if true:
            verify.compare(found, task, again, *logs, silent)
        else:
            with pytest.raises(RunFailed, match="not true"):
                verify.compare(found, task, again, *logs, silent)
    wide = [replace(one, distance=d) for one, d in zip(found.results, (80.0, 85.0, 75.0), strict=True)]
    again = replace(here, result=replace(here.result, distance=105.0))
    with pytest.raises(RunFailed, match=r"does not show a mean below 90 \(p = "):
        verify.compare(replace(found, results=tuple(wide)), task, again, *logs, silent)
    with pytest.raises(RunFailed, match="FLOPs"):
        verify.compare(found, task, replace(here, result=replace(here.result, flops=1.0)), *logs, silent)


@pytest.mark.parametrize(("share", "near"), [(0.7, False), (0.9, True), (1.1, True), (1.4, False)])
def test_a_time_is_confirmed_within_a_quarter(made: Path, share: float, near: bool) -> None:
    here = attempt.read_attempt(made / "runs" / "speedrun" / "tiny" / "1-mine" / "seed5")
    again = replace(here, result=replace(here.result, seconds=here.result.seconds * share))
    said: list[str] = []
    logs = (made / "1-mine" / "seed5.jsonl",) * 2
    assert verify.compare(read_record(made / "1-mine"), task_of(made), again, *logs, said.append) is near
    assert said[-1].endswith("not confirmed; was this machine busy?") is not near


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("distance", 1.0, "by this clone's scoring"), ("samples_sha256", "0" * 64, "another hash")],
)
def test_samples_are_scored_by_this_clones_scoring(made: Path, monkeypatch, key: str, value: object, says: str) -> None:
    """Where a run's own code tells what isn't so."""

    def flattered(tree: Path, arguments: list[str], threads: int) -> None:
        in_this_process(tree, arguments, threads)
        file = Path(arguments[arguments.index("--out") + 1]) / attempt.FILE
        told = json.loads(file.read_text())
        told["result"][key] = value
        file.write_text(json.dumps(told))

    monkeypatch.setattr(verify, "run_in", flattered)
    with pytest.raises(RunFailed, match=says):
        verified(made / "1-mine", made)


def test_a_task_that_st_fast_does_not_have_is_not_looked_for_elsewhere(copy: Path, made: Path) -> None:
    rewritten(copy, task=str(made / "tiny"))
    with pytest.raises(UserError, match="st_fast has no task of that name; --task names its folder"):
        verify.verify(copy, None, 5, made / "data", None, run_changes=False, rerun=True, say=silent)


def test_a_diff_runs_only_where_it_is_asked_for(copy: Path, made: Path) -> None:
    (copy / CHANGES).write_text(DIFF.format("st_fast/train/step.py"))
    summed(copy)
    with pytest.raises(
        UserError, match=r"history would run here \(st_fast/train/step\.py\): read it, then --run-changes"
    ):
        verified(copy, made)
    assert "record: true" in verified(copy, made, run_changes=True)[-1]
    (copy / CHANGES).write_text(DIFF.format("st_fast/study/speedrun/score.py"))
    summed(copy)
    with pytest.raises(UserError, match=r"its code changes st_fast/study/speedrun/score\.py, which scores"):
        verified(copy, made, run_changes=True)
    (copy / CHANGES).unlink()
    summed(copy)
    assert "--no-rerun" in verified(copy, made, rerun=False)[-1]
