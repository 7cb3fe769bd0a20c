"""A record of the speedrun is true or refused: one altered figure is found, and the same seed gives the same bits."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from st_fast.core.errors import Interrupted, RunFailed, UserError
from st_fast.core.files import sha256_file
from st_fast.recipe.schema import Sample
from st_fast.sample.draw import balanced
from st_fast.sample.guided import sample
from st_fast.study.speedrun import attempt, carry_out, origin, record, rules, table, verify
from st_fast.study.speedrun.__main__ import main
from st_fast.study.speedrun.origin import Code
from st_fast.study.speedrun.prepare import images_digest, read_images, task_data
from st_fast.study.speedrun.record import CHANGES, CLAIM, RECIPE, SUMS, read_record
from st_fast.study.speedrun.score import Scorer
from st_fast.study.speedrun.task import FOLDER, Task, interval, p_value, read_task, task_names
from tests.tiny import ROOT

HEAD = "0123456789" * 4
RECIPE_TEXT = """# a tiny one
[model]
depth = 2
width = 32
heads = 1
patch = 4
channels = 4
latent_size = 8
num_classes = 10
class_dropout = 0.1
[optim]
batch_size = 16
lr = 1e-2
[run]
log_every = 1
[sample]
sampler = "euler"
steps = 2
cfg_scale = 1.0
[[stage]]
name = "first"
supervision = "velocity_head"
depth = 1
hidden = 16
steps = 3
[[stage]]
name = "second"
supervision = "self_transcendence"
teacher = "first"
student_depth = 1
teacher_depth = 2
cfg_scale = 3.0
hidden = 16
steps = 4
"""


def silent(text: str) -> None:
    """Where lines go that no test reads."""


def in_this_process(tree: Path, arguments: list[str], threads: int) -> None:
    assert tree == ROOT and arguments[0] == "speedrun" and threads == 2
    main(arguments[1:])


@contextmanager
def this_tree(code: Code) -> Iterator[Path]:
    yield ROOT


@pytest.fixture(scope="module", autouse=True)
def clean_clone() -> Iterator[None]:
    """As if this clone were clean, and without new processes, whose imports take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carry_out, "current_code", lambda: Code(HEAD, ""))
        patch.setattr(carry_out, "run_in", in_this_process)
        patch.setattr(verify, "run_in", in_this_process)
        patch.setattr(verify, "tree_of", this_tree)
        patch.setattr(verify, "check_revision", lambda revision: None)
        patch.setattr(verify, "unread", lambda code: code.changes)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny task, a recipe, and a record of the two, made by the command."""
    folder = tmp_path_factory.mktemp("speedrun")
    shutil.copytree(FOLDER / "digits", folder / "tiny")
    text = (folder / "tiny" / "task.toml").read_text()
    for line, other in (("digits", "tiny"), ("target = 0.2", "target = 90.0")):
        text = text.replace(
            f'name = "{line}"' if line == "digits" else line, f'name = "{other}"' if line == "digits" else other
        )
    text = text.replace("seeds = [0, 1, 2, 3, 4]", "seeds = [3, 5, 8]").replace("samples = 1000", "samples = 100")
    (folder / "tiny" / "task.toml").write_text(text)
    (folder / "mine.toml").write_text(RECIPE_TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["run", "tiny", "mine.toml", "--what", "a <tiny> one", "--by", "us", "--out", "1-mine"])
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The record, to be altered."""
    return Path(shutil.copytree(made / "1-mine", tmp_path / "record"))


def task_of(made: Path) -> Task:
    return read_task(str(made / "tiny"))


def summed(folder: Path) -> None:
    """Writes the sums anew, as one who wants to deceive would."""
    names = sorted({path.name for path in folder.iterdir()} - {SUMS})
    (folder / SUMS).write_text("".join(f"{sha256_file(folder / name)}  {name}\n" for name in names))


def checked(folder: Path, made: Path) -> None:
    record.check(folder, read_record(folder), task_of(made))


def verified(folder: Path, made: Path, seed: int = 5, **options: bool) -> list[str]:
    lines: list[str] = []
    data = made / "data" / "speedrun-tiny"
    how = {"run_changes": False, "rerun": True} | options
    verify.verify(folder, str(made / "tiny"), seed, data, None, **how, say=lines.append)
    return lines


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


def test_a_score_is_that_of_the_samples_that_were_drawn(made: Path) -> None:
    """The distance again from its definition, by scipy's square root of a matrix and statistics of our own."""
    from scipy.linalg import sqrtm

    task, out = task_of(made), made / "runs" / "speedrun" / "tiny" / "1-mine" / "seed3"
    with np.load(out / "samples" / "samples.npz") as file:
        images, labels = file["arr_0"].transpose(0, 3, 1, 2), file["arr_1"]
    scorer = Scorer(task)
    ours = scorer.classifier.features(images).astype(np.float64)
    held_out, held_labels = read_images("digits", 32, "test", None)
    real = scorer.classifier.features(held_out).astype(np.float64)
    a, b = np.cov(ours.T), np.cov(real.T)
    expected = np.square(ours.mean(0) - real.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    told = attempt.read_attempt(out).result
    assert told.distance == pytest.approx(expected, rel=1e-6) and np.bincount(labels).tolist() == [10] * 10
    assert (scorer.classifier.predict(held_out) == held_labels).mean() == pytest.approx(task.accuracy)


def changed_byte(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] = ord("0") + (raw[at] - ord("0") + 1) % 10 if chr(raw[at]).isdigit() else raw[at] ^ 1
    path.write_bytes(bytes(raw))


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
    (copy / "more.txt").unlink()
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
    one, other = verify._measured(whole, stopped)
    assert (
        one == other and set(one) == {"a train 50", "a train 100", "a train 150"} and one["a train 50"]["loss"] == 0.02
    )
    for change in ({"flops": 7}, {"lr": 0.5}):
        one, other = verify._measured(
            whole, log("x", start, train[0], start | {"resumed_from": 70}, train[1] | change, train[2])
        )
        assert one != other
    one, other = verify._measured(whole, log("x", start, train[0], train[1] | {"loss": 9.0}, train[2]))
    assert one != other


def test_a_loss_that_was_changed_in_a_log_is_found_by_the_run(copy: Path, made: Path) -> None:
    number = next(i for i, line in enumerate((copy / "seed5.jsonl").read_text().splitlines()) if '"train"' in line)
    with_log(copy, with_record({"loss": 0.5}, number))
    checked(copy, made)
    with pytest.raises(
        RunFailed, match=r"seed5\.jsonl: another log on the same kind of machine: first train \d\.loss 0\.5"
    ):
        verified(copy, made)


def rewritten(copy: Path, **changes: object) -> None:
    (copy / CLAIM).write_text(json.dumps(json.loads((copy / CLAIM).read_text()) | changes))
    summed(copy)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"what": "a | b"}, "one line of at most 200 characters"), ({"by": "a\nb"}, "one line of at most 200"),
        ({"revision": "HEAD"}, "40 hex digits are needed"), ({"format": "x"}, "this program reads"),
        ({"machine": {"device": "a", "threads": 3, "instructions": "b"}}, "threads = 3, the task has 2"),
    ],
)  # fmt: skip
def test_a_claim_that_can_not_be_true_is_refused(copy: Path, made: Path, changes: dict, says: str) -> None:
    rewritten(copy, **changes)
    with pytest.raises(UserError, match=r"record\.json") as refusal:
        checked(copy, made)
    assert says in str(refusal.value)


def test_sums_that_are_none_are_refused(copy: Path, made: Path) -> None:
    text = (copy / SUMS).read_text()
    for bad in ("\n" + text, text.replace("  ", " "), text.replace(CLAIM, "../x"), ""):
        (copy / SUMS).write_text(bad)
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


def test_a_record_that_misses_the_target_is_none(made: Path, tmp_path: Path, monkeypatch) -> None:
    other = Path(shutil.copytree(made / "tiny", tmp_path / "tiny"))
    text = (other / "task.toml").read_text()
    (other / "task.toml").write_text(text.replace("target = 90.0", "target = 1.0"))
    shutil.copytree(made / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFailed, match=r"no record: rec: not shown to be below 1 \(p = 1") as refusal:
        main(["run", "tiny", str(made / "mine.toml"), "--what", "x", "--out", "rec"])
    assert not (tmp_path / "rec").exists() and "runs/speedrun/tiny/rec" in str(refusal.value)


def test_other_data_or_images_than_the_tasks_are_refused(made: Path, tmp_path: Path) -> None:
    task = replace(task_of(made), images_sha256="0" * 64)
    with pytest.raises(UserError, match="holds other data than those of the task tiny"):
        task_data(task, made / "data" / "speedrun-tiny", None, silent)
    with pytest.raises(UserError, match=r"digits: the training images and their labels have SHA-256 .*other images"):
        task_data(task, tmp_path / "new", None, silent)
    with pytest.raises(UserError, match="--images FOLDER, with its training split, is needed"):
        task_data(replace(task, images="Fashion-MNIST"), tmp_path / "new", None, silent)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--data.path=data/digits", 'data.path = "data/digits": the task brings its training images'),
        ("--data.source=digits", 'data.source = "digits"'),
        ("--data.images=x", "data.images"),
        ("--evaluate.classifier=true", "evaluate.classifier = true: scoring in training reads the test images"),
        ("--evaluate.reference=x", "evaluate.reference = "),
        ("--stage.first.init=other/run", 'stage.first.init = "other/run": weights from outside'),
        ("--stage.second.teacher=other/run", 'stage.second.teacher = "other/run": a teacher from outside'),
        ("--sample.steps=33", "sample.steps = 33: 33 passes of the network a sample; 32 at most"),
        ("--sample.sampler=dopri5", 'sample.sampler = "dopri5"'),
        ("--sample.vae=x", "sample.vae"),
        ("--optim.micro_batch=auto", 'optim.micro_batch = "auto": the free memory would decide'),
        ("--run.device=cuda", 'run.device = "cuda": the task is one of cpu'),
    ],
)
def test_a_recipe_that_breaks_a_rule_is_refused_with_its_key(made: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as refusal:
        rules.read(made / "mine.toml", task_of(made), [override])
    assert says in str(refusal.value) and str(made / "mine.toml") in str(refusal.value)


def test_an_image_encoder_is_refused(made: Path, tmp_path: Path) -> None:
    text = RECIPE_TEXT.partition("[[stage]]")[0]
    (tmp_path / "repa.toml").write_text(
        f'{text}[[stage]]\nname = "a"\nsupervision = "repa"\nsteps = 2\ndepth = 1\nencoders = ["digits-encoder"]\n'
    )
    with pytest.raises(UserError, match=r"stage\.a\.encoders = \"digits-encoder\": an image encoder's training"):
        rules.read(tmp_path / "repa.toml", task_of(made))


@pytest.mark.parametrize(
    "settings",
    [
        Sample(sampler="euler", steps=7, cfg_scale=1.0), Sample(sampler="heun", steps=5, cfg_scale=1.0),
        Sample(sampler="sde", steps=6, cfg_scale=1.0),
        Sample(sampler="heun", steps=6, cfg_scale=2.0, cfg_range=(0.2, 0.7)),
        Sample(sampler="euler", steps=9, cfg_scale=2.0, cfg_range=(0.3, 0.9), shift=0.4),
        Sample(sampler="sde", steps=5, cfg_scale=3.0, cfg_range=(0.0, 1.0)),
    ],
)  # fmt: skip
def test_passes_of_the_network_are_counted_as_sampling_makes_them(settings: Sample) -> None:
    from st_fast import kernels
    from st_fast.model import build
    from st_fast.recipe.architecture import Model, resolve_model

    config = resolve_model(Model(depth=1, width=32, heads=1, patch=2, channels=3, latent_size=4, num_classes=3))
    model = build(config, kernels.select({}, torch.device("cpu")), 0).eval()
    rows = 0

    def count(module: object, inputs: tuple) -> None:
        nonlocal rows
        rows += len(inputs[0])

    model.register_forward_pre_hook(count)
    sample(model, balanced(0, 0, 3, 3, torch.device("cpu")), settings, "linear")
    assert rules.evaluations(settings, config.latent_shape) == rows / 3


def test_p_values_are_students_and_intervals_hold_what_they_say() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.normal(1.0, 0.3, 5).tolist()
        expected = stats.ttest_1samp(scores, 1.2, alternative="less").pvalue
        assert p_value(scores, 1.2) == pytest.approx(expected, rel=1e-9)
    assert p_value([1.0, 1.0, 1.0], 1.2) == 0.0 and p_value([1.2, 1.2], 1.2) == 1.0
    draws = rng.normal(2.0, 0.5, (4_000, 6))
    inside = [low <= last <= high for *some, last in draws.tolist() for low, high in [interval(some)]]
    assert 0.985 < np.mean(inside) < 0.995


def test_samples_are_scored_by_this_clones_judge(made: Path, monkeypatch) -> None:
    """A run whose own code has scored it better than it is."""

    def flattered(tree: Path, arguments: list[str], threads: int) -> None:
        in_this_process(tree, arguments, threads)
        file = Path(arguments[arguments.index("--out") + 1]) / attempt.FILE
        told = json.loads(file.read_text())
        told["result"]["distance"] *= 0.9
        file.write_text(json.dumps(told))

    monkeypatch.setattr(verify, "run_in", flattered)
    with pytest.raises(RunFailed, match="by this clone's judge"):
        verified(made / "1-mine", made)


def test_a_task_that_st_fast_does_not_have_is_not_looked_for_elsewhere(copy: Path, made: Path) -> None:
    rewritten(copy, task=str(made / "tiny"))
    with pytest.raises(UserError, match="st_fast has no task of that name; --task names its folder"):
        verify.verify(copy, None, 5, made / "data", None, run_changes=False, rerun=True, say=silent)


def test_other_classes_than_the_tasks_are_refused_before_training(made: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(made)
    with pytest.raises(UserError, match=r"model\.num_classes = 12: the task tiny has 10"):
        main(["try", "tiny", "mine.toml", "--seed", "1", "--model.num_classes=12", "--out", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


def test_a_run_that_was_interrupted_goes_on_and_says_the_same(made: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "data", tmp_path / "data")
    trained: list[str] = []

    def killed_at_the_second(tree: Path, arguments: list[str], threads: int) -> None:
        trained.append(arguments[arguments.index("--seed") + 1])
        if len(trained) == 2:
            raise KeyboardInterrupt
        in_this_process(tree, arguments, threads)

    command = [
        "run",
        str(made / "tiny"),
        str(made / "mine.toml"),
        "--what",
        "a <tiny> one",
        "--by",
        "us",
        "--out",
        "again",
    ]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(carry_out, "run_in", killed_at_the_second)
        main(command)
    assert not Path("again").exists()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="seed3: holds an attempt with code"):
        patch.setattr(attempt, "_code", lambda: "another")
        main(command)
    main(command)
    first, second = read_record(made / "1-mine"), read_record(Path("again"))
    assert [replace(one, seconds=0.0) for one in first.results] == [replace(one, seconds=0.0) for one in second.results]
    with pytest.raises(UserError, match="again: there already"):
        main(command)
    with pytest.raises(UserError, match="holds an attempt with"):
        main(["try", str(made / "tiny"), str(made / "mine.toml"), "--seed", "3", "--optim.lr=0.02",
              "--out", "runs/speedrun/tiny/again/seed3"])  # fmt: skip


def test_the_table_has_records_that_beat_those_before_and_no_others(made: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(table, "task_names", lambda: ["tiny"])
    monkeypatch.setattr(table, "read_task", lambda name: task_of(made))
    monkeypatch.chdir(tmp_path)
    page, folder = tmp_path / "docs" / "speedrun.md", tmp_path / "docs" / "speedrun" / "tiny"
    shutil.copytree(made / "1-mine", folder / "1-mine")
    page.write_text("# Rules\n")
    shutil.copytree(made / "data", tmp_path / "data")
    for seed in ("20", "21"):
        for note, flag in (("nothing", ()), ("a higher rate", ("--optim.lr=0.02",))):
            main(["try", str(made / "tiny"), str(made / "mine.toml"), "--seed", seed, "--note", note,
                  "--out", f"r{seed}{note[0]}", *flag])  # fmt: skip
    main(["table", str(page), "--html", "board.html"])
    text, html = page.read_text(), (tmp_path / "board.html").read_text()
    assert (
        text.startswith("# Rules\n")
        and "| 1 | a &lt;tiny&gt; one |" in text
        and record.identity(folder / "1-mine") in text
    )
    assert "a &lt;tiny&gt; one" in html and "<tiny>" not in html
    assert "| a higher rate | mine | `--optim.lr=0.02` | 20, 21 |" in text
    main(["table", str(page)])
    assert page.read_text() == text
    with pytest.raises(UserError, match="no such page"):
        main(["table", str(tmp_path / "none.md")])
    (tmp_path / "other.md").write_text("# Another page\n")
    with pytest.raises(UserError, match=r"other\.md: neither tables of the speedrun in it nor a folder"):
        main(["table", str(tmp_path / "other.md")])
    assert (tmp_path / "other.md").read_text() == "# Another page\n"
    shutil.copytree(made / "1-mine", folder / "2-same")
    with pytest.raises(UserError, match=r"2-same: neither 10% fewer FLOPs nor 10% less time"):
        main(["table", str(page)])
    changed_byte(folder / "1-mine" / CLAIM, 200)
    with pytest.raises(UserError, match="1-mine"):
        main(["table", str(page)])


@pytest.fixture
def repository(tmp_path: Path, monkeypatch) -> Callable[..., str]:
    """A clone with one file of code, in place of this one; calls git in it."""

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path / "clone", check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / "clone" / "st_fast").mkdir(parents=True)
    git("init", "-q")
    (tmp_path / "clone" / "st_fast" / "a.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(origin, "ROOT", tmp_path / "clone")
    return git


def test_code_is_run_as_it_was(repository, tmp_path: Path) -> None:
    file = tmp_path / "clone" / "st_fast" / "a.py"
    first = origin.current_code()
    assert first == Code(repository("rev-parse", "HEAD").strip(), "")
    with origin.tree_of(first) as tree:
        assert tree == tmp_path / "clone"
    file.write_text("x = 2\n")
    changed = origin.current_code()
    assert changed.revision == first.revision and "+x = 2" in changed.changes
    repository("commit", "-qam", "three", "--allow-empty")
    file.write_text("x = 3\n")
    (tmp_path / "clone" / "st_fast" / "_csrc_cpu_abc.so").write_bytes(b"built")
    for code, text in ((first, "x = 1\n"), (changed, "x = 2\n")):
        with origin.tree_of(code) as tree:
            assert tree != tmp_path / "clone" and (tree / "st_fast" / "a.py").read_text() == text
            assert (tree / "st_fast" / "_csrc_cpu_abc.so").read_bytes() == b"built"
        assert not tree.exists() and file.read_text() == "x = 3\n" and "clone" in repository("worktree", "list")
    assert len(repository("worktree", "list").splitlines()) == 1


def test_what_this_clone_has_not_in_its_history_is_unread(repository, tmp_path: Path) -> None:
    file, first = tmp_path / "clone" / "st_fast" / "a.py", origin.current_code()
    assert origin.unread(first) == "" and origin.touched("") == []
    repository("checkout", "-qb", "theirs")
    file.write_text("x = 9\n")
    repository("commit", "-qam", "theirs")
    theirs = origin.current_code()
    repository("checkout", "-q", "-")
    assert origin.touched(origin.unread(theirs)) == ["st_fast/a.py"] and origin.unread(first) == ""
    for setting in (("diff.noprefix", "true"), ("color.ui", "always"), ("diff.mnemonicPrefix", "true")):
        repository("config", *setting)
    file.write_text("x = 5\n")
    assert origin.touched(origin.current_code().changes) == ["st_fast/a.py"]
    with pytest.raises(UserError, match="git can't read it"):
        origin.touched("nonsense\n")
    assert origin.state(origin.current_code()) != origin.state(first)
    repository("checkout", "-q", ".")
    (tmp_path / "clone" / "page.md").write_text("a document")
    repository("add", ".")
    repository("commit", "-qm", "a page")
    later = origin.current_code()
    assert later.revision != first.revision and origin.state(later) == origin.state(first)


def test_a_process_runs_the_code_of_its_tree(tmp_path: Path, monkeypatch) -> None:
    """Also where the working directory has another st_fast, as this clone's root has."""
    tree = tmp_path / "tree"
    (tree / "st_fast").mkdir(parents=True)
    (tree / "st_fast" / "__init__.py").write_text("")
    main_file = tree / "st_fast" / "__main__.py"
    main_file.write_text(
        "import os, sys, pathlib\n"
        "pathlib.Path(sys.argv[1]).write_text(f'{__file__} {os.environ[\"OMP_NUM_THREADS\"]}')\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    monkeypatch.chdir(ROOT)
    said = tmp_path / "said"
    origin.run_in(tree, [str(said), "0"], 3)
    assert said.read_text() == f"{main_file} 3"
    with pytest.raises(RunFailed, match="ended with exit code 2; what is wrong stands above"):
        origin.run_in(tree, [str(said), "2"], 3)
    with pytest.raises(Interrupted):
        origin.run_in(tree, [str(said), "75"], 3)


def test_code_that_git_cannot_name_is_refused(repository, tmp_path: Path) -> None:
    code = origin.current_code()
    with pytest.raises(UserError, match=r"revision aaaaaaaaaaaa: this clone of st_fast has no such commit"):
        origin.check_revision("a" * 40)
    with (
        pytest.raises(UserError, match=r"doesn't apply to revision"),
        origin.tree_of(replace(code, changes="nonsense")),
    ):
        pass
    (tmp_path / "clone" / "st_fast" / "b.py").write_text("y = 1\n")
    with pytest.raises(UserError, match=r"b\.py: git doesn't know this file"):
        origin.current_code()


DIFF = "diff --git a/{0} b/{0}\n--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n-a\n+b\n"


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
    with pytest.raises(UserError, match=r"its code changes st_fast/study/speedrun/score\.py, which judges"):
        verified(copy, made, run_changes=True)
    (copy / CHANGES).unlink()
    summed(copy)
    assert "--no-rerun" in verified(copy, made, rerun=False)[-1]


@pytest.mark.parametrize("name", task_names())
def test_the_tasks_files_are_those_of_their_hashes(name: str) -> None:
    task = read_task(name)
    for file in task.files:
        assert sha256_file(task.path(file)) == task.files[file]
    assert 0 < task.floor < task.target and 0.4 < task.accuracy < 1
    if task.images == "digits":
        assert images_digest(*read_images("digits", task.side, "train", None)) == task.images_sha256


def test_no_task_and_a_wrong_one_are_one_line(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no task\.toml; it says what the task is"):
        main(["make", str(tmp_path)])
    with pytest.raises(UserError, match=r"'digit' is no task \(did you mean digits\?\)"):
        read_task("digit")
    other = Path(shutil.copytree(made / "tiny", tmp_path / "other"))
    text = (other / "task.toml").read_text()
    for old, new, says in (
        ("seeds = [3, 5, 8]", "seeds = [3, 5]", "3 seeds or more"),
        ("seeds = [3, 5, 8]", "seeds = [3, 3, 5]", "each once"),
        ("target = 90.0", "target = 0.0", "a target above 0"), ("threads = 2", "", "threads is missing"),
        ("[files]", "[fails]", "fails"), ("samples = 100", "samples = 64", "samples = 64: at least 65"),
    ):  # fmt: skip
        (other / "task.toml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=says):
            read_task(str(other))


def test_the_records_of_this_repository_are_true_and_stand_in_the_tables(tmp_path: Path) -> None:
    """All but the run again, which each of them takes minutes for."""
    shutil.copytree(ROOT / "docs" / "speedrun", tmp_path / "speedrun")
    shutil.copy2(ROOT / "docs" / "speedrun.md", tmp_path / "speedrun.md")
    table.write_table(tmp_path / "speedrun.md", None, silent)
    assert (tmp_path / "speedrun.md").read_text() == (ROOT / "docs" / "speedrun.md").read_text()
