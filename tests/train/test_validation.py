"""The loss on held-out records: what it is of, that training never sees them, and how a stage ends by it."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from st_fast.core import checkpoint, signals
from st_fast.core.checkpoint.meta import Validated
from st_fast.core.errors import Interrupted, UserError
from st_fast.data.held_out import split
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import open_data
from st_fast.model import SiT
from st_fast.prepare.writing import write_shards
from st_fast.recipe import load
from st_fast.recipe.error import RecipeError
from st_fast.report import validation as told
from st_fast.report.arms import make_arms
from st_fast.report.collect import read_runs
from st_fast.report.figures import Chart, all_figures
from st_fast.train import trackers
from st_fast.train.batches import record_order
from st_fast.train.run import run
from tests import tiny, tiny_shapes, tiny_text
from tests.faults.ranks import Nursery, finish
from tests.truth import program

IMAGES, SCALE, SPLIT_SEED = 24, 0.7, 2**33 + 11
SHARED = ("--validate.share=0.25", f"--validate.split_seed={SPLIT_SEED}", "--validate.bins=4")
EVERY_3 = (*SHARED, "--validate.every=3", "--validate.batch_size=5")


def write_data(folder: Path, images: int = IMAGES, seed: int = 0, flip: bool = True, **manifest: object) -> Path:
    """Random latents of five classes, each image with its twin where `flip`."""
    records, generator = images * (1 + flip), torch.Generator().manual_seed(seed)
    moments = torch.randn(records, 8, 4, 4, generator=generator)
    moments[:, 4:] = moments[:, 4:].abs() * 0.3
    made = Manifest(0, (8, 4, 4), "float16", SCALE, VaeInfo("none"), "random", 5, flip)
    made = replace(made, **manifest)
    write_shards(folder, [(moments.half(), torch.arange(records) % 5)], made, shard_size=16)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("validated") / "data")


@pytest.fixture(autouse=True)
def quiet(monkeypatch, one_thread):
    monkeypatch.setattr("st_fast.train.run.matmul_rate", lambda device, dtype: 1e11)
    yield
    signals._let_go()


def written(home: Path, data: Path, stages: int = 1) -> Path:
    """The tiny recipe's first stages."""
    home.mkdir(parents=True, exist_ok=True)
    parts = tiny.RECIPE.format(data=data, out=home / "out").split("[[stage]]")
    (home / "t.toml").write_text("[[stage]]".join(parts[: stages + 1]))
    return home / "t.toml"


def trained(home: Path, data: Path, *options: str, stages: int = 1) -> Path:
    """The run folder of the tiny recipe's first stages."""
    run(load(written(home, data, stages), options))
    return home / "out"


def state(out: Path, stage: str = "align") -> dict[str, Tensor]:
    found = checkpoint.latest(out / stage / "checkpoints", pytest.fail)
    assert found
    return {f"{group}/{key}": tensor for group, tensors in found.groups.items() for key, tensor in tensors.items()}


def validated(out: Path, stage: str = "align") -> Validated:
    found = checkpoint.latest(out / stage / "checkpoints", pytest.fail)
    assert found
    return found.said.validated


def taken(out: Path) -> list[tuple[str, int, float, float]]:
    """Stage, step and both losses of every validation."""
    return [(r["stage"], r["step"], r["loss"], r.get("train_loss", 0.0)) for r in tiny.records(out, "validate")]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An undisturbed run that validates both weights."""
    torch.set_num_threads(1)
    return trained(tmp_path_factory.mktemp("whole"), data, *EVERY_3, "--validate.weights=both", "--flow.path=cosine")


def kept_and_held(images: int = IMAGES) -> tuple[np.ndarray, np.ndarray]:
    """Records that are trained on and that are not, in rising order, by the format's own draws."""
    drawn = program.permutation(SPLIT_SEED, 21, 0, images)
    held, kept = drawn[: images // 4], drawn[images // 4 :]
    held, kept = (np.sort(np.concatenate([2 * some, 2 * some + 1])) for some in (held, kept))
    return kept, held


def expected(out: Path, group: str, data: Path, number: int, bins: int) -> list[float]:
    """By bin, in float64 from the files alone; number 0: held out, 1: trained on."""
    found = checkpoint.latest(out / "align" / "checkpoints", pytest.fail)
    assert found
    weights: Mapping[str, Tensor] = program.as_float64(found.groups[group])
    setting = program.Setting(
        depth=3, heads=2, patch=2, channels=4, classes=5, dropout=0.1, qk_norm=True, path="cosine", batch=8,
        scale=SCALE, lr=0, warmup=0, betas=(0, 0), eps=1, decay=0, clip=1, ema=0,
    )  # fmt: skip
    records = kept_and_held()[1 - number]
    count = len(records) // bins * bins
    chosen = records[program.permutation(SPLIT_SEED, 19, number, len(records))][:count]
    shards = [load_file(path) for path in sorted(data.glob("*.safetensors"))]
    moments, labels = (torch.cat([shard[key] for shard in shards])[chosen] for key in ("moments", "labels"))
    mean, std = moments.double().chunk(2, dim=1)
    draws = torch.stack([program.normals(SPLIT_SEED, 19, place, (2, 4, 4, 4)) for place in range(count)])
    u = torch.tensor([(program.words(SPLIT_SEED, 20, place, 1)[0] + 0.5) / 2**32 for place in range(count)])
    t = (torch.arange(count) + u.double()) / count
    x_t, velocity = program.path(setting, SCALE * (mean + std * draws[:, 0]), draws[:, 1], t)
    predicted, _ = program.network(setting, weights, x_t, t, labels)
    losses = (predicted - velocity).square().mean((1, 2, 3))
    return losses.view(bins, -1).mean(1).tolist()


def test_the_losses_are_those_of_float64_by_bin_for_both_weights_and_both_kinds_of_records(whole, data):
    last = tiny.records(whole, "validate")[-1]
    assert last["step"] == 10 and last["records"] == 12
    for prefix, group, number in (
        ("", "ema", 0),
        ("train_", "ema", 1),
        ("raw_", "model", 0),
        ("raw_train_", "model", 1),
    ):
        wanted = expected(whole, group, data, number, 4)
        assert last[f"{prefix}by_time"] == pytest.approx(wanted, rel=2e-6)
        assert last[f"{prefix}loss"] == pytest.approx(sum(wanted) / 4, rel=2e-6)
    assert [record["step"] for record in tiny.records(whole, "validate")] == [3, 6, 9, 10]
    values = [last[key] for key in ("loss", "train_loss", "raw_loss", "raw_train_loss")]
    assert len(set(values)) == 4 and all(0.1 < value < 10 for value in values)


def test_training_never_sees_what_is_held_out_nor_its_twin_and_has_the_order_of_as_many_records(data):
    recipe = load(written(data.parent / "order", data), SHARED)
    records, (kept, held) = open_data(data, verify=False), kept_and_held()
    found = split(records, 0.25, SPLIT_SEED)
    assert found[0].tolist() == kept.tolist() and found[1].tolist() == held.tolist()
    assert set(held // 2).isdisjoint(kept // 2) and sorted([*kept, *held]) == list(range(2 * IMAGES))
    order = record_order(recipe, records)(np.arange(2 * len(kept)))
    for epoch in order[: len(kept)], order[len(kept) :]:
        assert sorted(epoch) == kept.tolist()
    alone = program.permutation(3, 7, 0, len(kept))
    assert order[: len(kept)].tolist() == kept[alone].tolist()
    assert not np.array_equal(split(records, 0.25, 0)[1], held)
    plain = load(written(data.parent / "order", data))
    assert record_order(plain, records)(np.arange(48)).tolist() == program.permutation(3, 7, 0, 48).tolist()


def test_what_a_run_reads_to_train_is_never_of_the_held_out(data, tmp_path, monkeypatch):
    read, stream = set(), "st_fast.data.loader.ResidentLoader.stream"
    from st_fast.data.loader import ResidentLoader

    real = ResidentLoader.stream

    def noted(self, requests):
        return real(self, (read.update(request.tolist()) or request for request in requests))

    monkeypatch.setattr(stream, noted)
    trained(tmp_path, data, *EVERY_3, "--stage.align.steps=12")
    kept, _ = kept_and_held()
    assert read == set(kept.tolist())


def test_validating_changes_no_bit_of_what_is_trained(data, tmp_path):
    other = write_data(tmp_path / "other", images=9, seed=1)
    alone = state(trained(tmp_path / "alone", data))
    watched = trained(tmp_path / "watched", data, "--validate.every=2", f"--validate.path={other}", "--validate.bins=3")
    ours = state(watched)
    assert ours.keys() == alone.keys() and all(torch.equal(ours[key], alone[key]) for key in ours)
    assert [record["records"] for record in tiny.records(watched, "validate")] == [18] * 5
    assert validated(watched).step == 10 and validated(tmp_path / "alone" / "out") == Validated()


def test_the_same_records_have_the_same_times_and_noise_in_a_run_of_another_seed(data, tmp_path):
    recipes = [load(written(tmp_path, data), [*EVERY_3, f"--run.seed={seed}", "--optim.lr=1e-30"]) for seed in (3, 4)]
    for number, recipe in enumerate(recipes):
        run(replace(recipe, run=replace(recipe.run, out=str(tmp_path / f"out{number}"))))
    # A network whose last layer is zero predicts zero, whatever its seed.
    one, two = (taken(tmp_path / f"out{number}") for number in (0, 1))
    assert [loss for *_, loss, _ in one] == pytest.approx([loss for *_, loss, _ in two], rel=1e-6)


def test_a_signal_during_a_validation_saves_at_once_and_the_resume_has_the_same_bits(
    whole, data, tmp_path, monkeypatch
):
    options = (*EVERY_3, "--validate.weights=both", "--flow.path=cosine", "--run.save_every=100")
    forward, calls = SiT.forward, []

    def struck(self, *given):
        if not self.training and not calls.append(1) and len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")
        return forward(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(SiT, "forward", struck)
        with pytest.raises(Interrupted, match=r"^SIGTERM: saved align at step 3;"):
            trained(tmp_path, data, *options)
    assert taken(tmp_path / "out") == [] and validated(tmp_path / "out") == Validated()
    trained(tmp_path, data, *options, "--stage.align.steps=7")
    out = trained(tmp_path, data, *options)
    assert [line for line in taken(out) if line[1] != 7] == taken(whole)
    ours, theirs = state(out), state(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_step_that_was_validated_before_its_checkpoint_is_not_validated_again(data, tmp_path):
    trained(tmp_path, data, *EVERY_3, "--stage.align.steps=6")
    out = trained(tmp_path, data, *EVERY_3, "--stage.align.steps=9")
    assert [step for _, step, *_ in taken(out)] == [3, 6, 9]
    (out / "log.jsonl").unlink()  # what is known stands in the checkpoint
    trained(tmp_path, data, *EVERY_3, "--stage.align.steps=12")
    assert [step for _, step, *_ in taken(out)] == [12]


def test_another_protocol_begins_anew(data, tmp_path):
    out = trained(tmp_path, data, *EVERY_3)
    before = validated(out)
    trained(tmp_path, data, *EVERY_3, "--stage.align.steps=12", "--validate.num=8")
    assert len(tiny.records(out, "validate")) == 5 and before.lowest is not None
    assert validated(out).protocol != before.protocol and validated(out).lowest_at == 12


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_ranks_find_what_one_does(sharding, whole, data, tmp_path, tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("ranks"))
    options = (*EVERY_3, "--validate.weights=both", "--flow.path=cosine", f"--run.sharding={sharding}")
    terms = {"at": "validation", "do": "pause", "seconds": 0, "steps": [], "terms": [6], "rank": 1}
    recipe = written(tmp_path, data)
    assert finish(nursery.start(2, recipe, *options, breaks=terms if sharding == "none" else None)) == (
        [75, 75] if sharding == "none" else [0, 0]
    )
    if sharding == "none":  # a signal to one rank in the midst of it ends it on both, and the resume makes it
        assert [step for _, step, *_ in taken(tmp_path / "out")] == [3]
        assert finish(nursery.start(2, recipe, *options)) == [0, 0]
    nursery.close()
    for ours, theirs in zip(tiny.records(tmp_path / "out", "validate"), tiny.records(whole, "validate"), strict=True):
        for key in ("by_time", "train_by_time", "raw_by_time", "raw_train_by_time"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
        assert (ours["step"], ours["protocol"]) == (theirs["step"], theirs["protocol"])


PATIENT = (*EVERY_3, "--validate.patience=2", "--validate.min_delta=100", "--stage.align.steps=40")


@pytest.fixture
def ended(data, tmp_path) -> Path:
    """A run of two stages of which the first ends early: after the first validation none is lower by 100."""
    return trained(tmp_path, data, *PATIENT, "--stage.transcend.steps=5", stages=2)


def test_a_stage_ends_by_patience_teaches_the_next_one_and_is_not_begun_again(ended, data, tmp_path, capsys):
    (align, transcend) = tiny.records(ended, "end")
    assert (align["step"], align["ended_by"], align["lowest_at"]) == (9, "validation", 3)
    assert transcend["step"] == 5 and "ended_by" not in transcend
    teacher = next(r["teacher"] for r in tiny.records(ended, "start") if r["stage"] == "transcend")
    assert teacher["step"] == 9
    assert tiny.records(ended, "train")[8]["step"] == 9, "its last step has a line"
    logged = (ended / "log.jsonl").read_bytes()
    capsys.readouterr()
    trained(tmp_path, data, *PATIENT, "--stage.transcend.steps=5", stages=2)
    assert "align: complete at step 9" in capsys.readouterr().out and (ended / "log.jsonl").read_bytes() == logged
    trained(tmp_path, data, *PATIENT, "--stage.transcend.steps=7", stages=2)
    assert tiny.records(ended, "end")[-1]["step"] == 7, "a longer second stage goes on with the same teacher"


def test_patience_is_counted_on_after_a_resume_and_a_longer_one_goes_on(data, tmp_path):
    out = trained(tmp_path, data, *PATIENT, "--stage.align.steps=7")
    found = validated(out)
    assert (found.step, found.since) == (7, 1), "a validation that a longer stage would not have had does not count"
    trained(tmp_path, data, *PATIENT)
    assert [end["step"] for end in tiny.records(out, "end")] == [7, 9]
    trained(tmp_path, data, *PATIENT, "--validate.patience=4")
    assert tiny.records(out, "end")[-1]["step"] == 15
    trained(tmp_path, data, *EVERY_3, "--stage.align.steps=17")
    assert tiny.records(out, "end")[-1]["step"] == 17


def test_a_lower_loss_begins_the_count_again_and_one_too_little_lower_does_not(data, tmp_path, monkeypatch):
    values = iter([5.0, 4.0, 6.0, 3.0, 2.9, 3.1, 1.0])
    monkeypatch.setattr("st_fast.train.validation.losses", lambda *given: torch.full((len(given[3]),), next(values)))
    alone = ("--validate.train=false", "--validate.batch_size=12", "--validate.min_delta=0.5")
    out = trained(tmp_path, data, *PATIENT, *alone)
    assert [loss for *_, loss, _ in taken(out)] == [5.0, 4.0, 6.0, 3.0, pytest.approx(2.9), pytest.approx(3.1)]
    assert (validated(out).lowest, validated(out).lowest_at, tiny.records(out, "end")[-1]["step"]) == (3.0, 12, 18)


def test_the_report_says_where_a_stage_ended_and_shows_losses_over_steps_and_by_time(ended):
    (log,) = read_runs([ended])
    align, transcend = log.stages
    assert align.ended and align.ended_early and transcend.ended and not transcend.ended_early
    page = (ended / "report.html").read_text()
    assert "“align” ended after 9 of 40 steps, as its loss on held-out records had not fallen since step 3." in page
    assert "not finished" not in page
    charts = {one.key: one for one in all_figures(make_arms([log]))["losses"] if isinstance(one, Chart)}
    over, by_time = charts["validation_loss"].curves, charts["validation_by_time"].curves
    names = ["align, held out", "align, training records", "transcend, held out", "transcend, training records"]
    assert [curve.label for curve in over] == [curve.label for curve in by_time] == names
    losses = [loss for stage, _, loss, _ in taken(ended) if stage == "align"]
    assert over[0].x == [3, 6, 9] and over[0].y == losses and by_time[0].x == [0.125, 0.375, 0.625, 0.875]
    ((head, lines),) = told.tables(make_arms([log]))
    assert head == ["Records", "Step", "Mean", "t 0 – 0.25", "t 0.25 – 0.5", "t 0.5 – 0.75", "t 0.75 – 1"]
    assert [line[:2] for line in lines] == [
        [name, step] for name, step in zip(names, ("9", "9", "5", "5"), strict=True)
    ]
    assert told.incomparable(make_arms([log])) == []


def test_trackers_get_a_curve_of_the_loss_and_of_each_bin(whole):
    record = tiny.records(whole, "validate")[0]
    found = trackers.numbers(record)
    assert found["validate/loss"] == record["loss"] and found["validate/raw_train_loss"] == record["raw_train_loss"]
    assert found["validate/loss_t0.375"] == record["by_time"][1] and len(found) == 4 + 4 * 4


@pytest.mark.parametrize("error", [UserError("shard: bits flipped"), MemoryError(), OSError(5, "I/O error")])
def test_what_fails_is_one_line_and_training_goes_on(error, data, tmp_path, monkeypatch, capsys):
    def fail(*given):
        raise error

    monkeypatch.setattr("st_fast.train.validation.losses", fail)
    out = trained(tmp_path, data, *EVERY_3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("; training goes on")]
    assert [line.split(": no validation: ")[0] for line in lines] == [f"align {step}" for step in (3, 6, 9, 10)]
    assert ("--validate.batch_size" in lines[0]) == isinstance(error, MemoryError)
    assert tiny.records(out, "end")[-1]["step"] == 10 and taken(out) == []


def test_a_loss_that_is_not_finite_is_never_the_lowest(data, tmp_path, monkeypatch):
    monkeypatch.setattr("st_fast.train.validation.losses", lambda *given: torch.full((len(given[3]),), math.nan))
    out = trained(tmp_path, data, *EVERY_3, "--validate.patience=2", "--stage.align.steps=20")
    assert validated(out).lowest is None and tiny.records(out, "end")[-1]["step"] == 6
    assert read_runs([out])[0].stages[0].ended


def test_latents_of_several_shapes_and_captions_are_validated(tmp_path):
    shapes = tiny_shapes.write_data(tmp_path / "shapes")
    (tmp_path / "s.toml").write_text(
        tiny_shapes.RECIPE.format(data=shapes, out=tmp_path / "of shapes").rpartition("[[stage]]")[0]
    )
    options = ("--validate.every=5", "--validate.share=0.2", "--validate.bins=2", "--stage.align.steps=5")
    run(load(tmp_path / "s.toml", options))
    records, sizes = open_data(shapes, verify=False), list(tiny_shapes.COUNTS.values())
    _, held = split(records, 0.2, 0)
    counts = [sum(start <= record < start + size for record in held) for start, size in ((0, 21), (21, 13), (34, 10))]
    assert counts == [round(0.2 * size) for size in sizes]
    assert tiny.records(tmp_path / "of shapes", "validate")[0]["records"] == sum(counts) // 2 * 2
    texts = tiny_text.make_data(tmp_path / "texts", flip=True)
    (tmp_path / "t.toml").write_text(
        tiny_text.RECIPE.format(data=texts, out=tmp_path / "of texts").rpartition("[[stage]]")[0]
    )
    run(load(tmp_path / "t.toml", options))
    (found,) = tiny.records(tmp_path / "of texts", "validate")
    assert found["records"] == 6 and all(0.1 < value < 10 for value in found["by_time"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--validate.every=2"], "no record is held out"),
        (["--validate.share=0.1", "--validate.path=x"], "names held-out records already"),
        (["--validate.patience=2"], "nothing is validated"),
        (["--validate.min_delta=0.1"], "no stage ends by its loss"),
        (["--validate.num=5"], "each of validate.bins = 10 needs a record"),
        (["--validate.share=1"], r"in \[0, 1\)"),
        (["--validate.bins=101"], "at most 100"),
        (["--validate.weights=all"], "ema"),
    ],
)
def test_a_recipe_that_cannot_be_validated_is_refused_in_one_line(options, words, data, tmp_path):
    with pytest.raises(RecipeError, match=words) as error:
        load(written(tmp_path, data), options)
    assert "\n" not in str(error.value)


def test_held_out_records_that_do_not_fit_are_refused_before_the_first_step(data, tmp_path):
    names = tuple("abcde")
    other = write_data(tmp_path / "scaled", 9, seed=1, scale=0.5)
    named = write_data(tmp_path / "named", 9, seed=1, class_names=names)
    turned = write_data(tmp_path / "turned", 9, seed=2, class_names=names[::-1])
    wide = tiny_shapes.write_bucket_of_squares(tmp_path / "wide")
    every = ("--validate.every=2", "--validate.bins=2")
    cases: list[tuple[Path, tuple[str, ...], str]] = [
        (data, (*every, f"--validate.path={data}"), "these are the training data"),
        (data, (*every, f"--validate.path={other}"), "not of the training data's kind: scale 0.5"),
        (named, (*every, f"--validate.path={turned}"), "its class 0 is 'e'"),
        (data, (*every, f"--validate.path={wide}"), "latents are"),
        (data, (*every, f"--validate.path={tmp_path / 'none'}"), "none"),
        (data, (*every, "--validate.share=0.01"), "leaves none to hold out"),
        (data, ("--validate.share=0.99",), "leaves none to train on"),
        (data, (*every, "--validate.share=0.1", "--validate.bins=10"), "there are 4 held-out records"),
    ]
    for trained_on, options, words in cases:
        with pytest.raises(UserError, match=words) as error:
            trained(tmp_path / "run", trained_on, *options)
        assert "\n" not in str(error.value) and not (tmp_path / "run" / "out" / "align").exists(), words
    shapes = tiny_shapes.write_data(tmp_path / "shapes")
    (tmp_path / "s.toml").write_text(tiny_shapes.RECIPE.format(data=shapes, out=tmp_path / "run" / "out"))
    with pytest.raises(UserError, match="it leaves 3 records of a shape"):
        run(load(tmp_path / "s.toml", ["--validate.share=0.7"]))
