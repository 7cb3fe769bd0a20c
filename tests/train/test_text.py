"""Training on captions: what each visit sees, both stages stopped and resumed, every method, and what is refused."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core import checkpoint, random
from st_fast.core.errors import Interrupted, UserError
from st_fast.core.ranks import Ranks
from st_fast.core.signals import StopRequest
from st_fast.data.loader import ResidentLoader
from st_fast.data.shards import open_data
from st_fast.data.text import CAPTIONS, TextSet, captions_bytes, open_text
from st_fast.prepare.features import write_features
from st_fast.recipe import Recipe, load
from st_fast.train import trainer
from st_fast.train.batches import BatchIterator
from st_fast.train.conditions import kept_on_device, open_conditions
from st_fast.train.run import run
from tests import tiny, tiny_text
from tests.data import test_coco
from tests.train.supervision.encoders import Pictures

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_text.make_data(tmp_path_factory.mktemp("text") / "data")


def recipe_for(data: Path, folder: Path, *options: str) -> Recipe:
    path = folder / "text.toml"
    path.write_text(tiny_text.RECIPE.format(data=data, out=folder / "out"))
    return load(path, list(options))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The run folder of both stages without an interruption."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run(recipe_for(data, folder))
    return folder / "out"


def states(out: Path) -> dict[str, torch.Tensor]:
    found = {name: checkpoint.latest(out / name / "checkpoints", print) for name in ("align", "transcend")}
    return {f"{s}/{g}/{k}": t for s, c in found.items() for g, ts in c.groups.items() for k, t in ts.items()}


@pytest.mark.parametrize("flip", [False, True])
def test_a_visit_sees_one_of_its_images_captions_or_nothing_and_the_same_on_any_ranks(flip, tmp_path, monkeypatch):
    closed, close = list[object](), TextSet.close
    monkeypatch.setattr(TextSet, "close", lambda self: closed.append(close(self)))
    monkeypatch.setattr(ResidentLoader, "close", lambda self: closed.append(self))
    data = tiny_text.make_data(tmp_path / "data", flip)
    recipe = recipe_for(data, tmp_path, "--model.class_dropout=0.3", "--data.loader=auto")
    records, said = open_data(data, verify=False), list[str]()
    null, drawn = tiny_text.states_of([""])[0], []
    seen: dict[int, set[int]] = {}
    for count in (1, 2):
        steps = []
        for rank in range(count):
            loader, conditions = ResidentLoader(records, CPU), open_conditions(recipe, records)
            conditions.open(CPU, said.append)
            ranks = Ranks(rank, count, CPU)
            batches = BatchIterator(recipe, recipe.stages[0], loader, records, ranks, conditions=conditions)
            steps.append([batch for (batch,) in batches.steps(0, 24)])
            conditions.close()
        drawn.append(
            [
                torch.cat([getattr(b, name) for b in step])
                for step in zip(*steps, strict=True)
                for name in ("ordinals", "condition", "student_condition")
            ]
        )
    for ours, theirs in zip(*drawn, strict=True):
        assert torch.equal(ours, theirs)
    assert [line.partition(" (")[0] for line in said] == ["captions: loader = resident"] * 3
    assert [type(one) for one in closed] == 3 * [ResidentLoader, type(None)]
    dropped = 0
    shares = random.uniform(recipe.run.seed, random.Purpose.CAPTION, torch.arange(24 * 8))[:, 0]
    order = batches.order(np.arange(24 * 8))
    for place in range(0, len(drawn[0]), 3):
        for ordinal, state, student in zip(*drawn[0][place : place + 3], strict=True):
            image = int(order[ordinal]) // (1 + flip)
            captions = tiny_text.states_of(tiny_text.CAPTIONS[image])
            (which,) = (captions == state).all((1, 2)).nonzero()
            assert int(which) == int(float(shares[ordinal]) * len(captions)), "the draw of no other purpose"
            seen.setdefault(image, set()).add(int(which))
            assert torch.equal(student, state) or torch.equal(student, null)
            dropped += torch.equal(student, null)
    assert all(len(seen[i]) == len(c) for i, c in enumerate(tiny_text.CAPTIONS)), "every caption is drawn in 12 visits"
    assert 0.15 < dropped / (24 * 8) < 0.45


@pytest.fixture
def stop(monkeypatch) -> StopRequest:
    """A request that a test sets, in place of signals."""
    from contextlib import nullcontext

    request = StopRequest()
    monkeypatch.setattr("st_fast.train.run.stop_on_signals", lambda: nullcontext(request))
    return request


@pytest.mark.parametrize("step", [5, 16])
def test_stopped_in_the_middle_of_either_stage_it_goes_on_bit_by_bit(step, data, whole, tmp_path, monkeypatch, stop):
    recipe, call, made = recipe_for(data, tmp_path), trainer.Step.__call__, [0]

    def stepping(self, *arguments):
        made[0] += 1
        stop.name = "SIGTERM" if made[0] == step else stop.name
        return call(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Step, "__call__", stepping)
        with pytest.raises(Interrupted):
            run(recipe)
    stop.name = None
    run(recipe)
    ours, theirs = states(tmp_path / "out"), states(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    null = tiny_text.states_of([""]).float()
    assert torch.equal(theirs["transcend/model/null_context"], null)
    assert torch.equal(theirs["transcend/ema/null_context"], null)


def test_what_stays_on_the_device_is_latents_and_states_and_on_a_cpu_what_is_saved(data, whole, tmp_path):
    records, one_rank = open_data(data, verify=False), Ranks(0, 1, CPU)
    sizes = [(key, tensor.nbytes) for key, tensor in states(whole).items()]
    saved = max(sum(size for key, size in sizes if key.startswith(stage)) for stage in ("align", "transcend"))
    with closing(open_text(data, "", records)) as texts:
        kept = texts.manifest.count * texts.manifest.record_bytes + len(records) * records.manifest.record_bytes
    for loader, expected in (("resident", (1, 1)), ("auto", (0, 1)), ("torch", (0, 0))):
        recipe = recipe_for(data, tmp_path, f"--data.loader={loader}")
        least, most = kept_on_device(recipe, records, one_rank)
        assert most - least == kept * (expected[1] - expected[0])
        copy = least - kept * expected[0]
        assert copy == pytest.approx(saved, rel=0.02)


def test_both_stages_learn(whole):
    for name in ("align", "transcend"):
        losses = [r for r in tiny.records(whole, "train") if r["stage"] == name]
        assert all(r["aux"] > 0 for r in losses)
        assert sum(r["denoise"] for r in losses[-3:]) < sum(r["denoise"] for r in losses[:3])


class Standing:
    """An image encoder whose features follow from nothing but the place."""

    name, hash, width = "standing", "0" * 64, 5

    def grid(self, size: int) -> tuple[int, int]:
        return 2, 2

    def flops(self, size: int) -> float:
        return 1.0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.arange(20.0).view(1, 2, 2, 5).expand(len(images), -1, -1, -1)


METHODS = {
    "layer_sync": "student_depth = 1\nteacher_depth = 2",
    "sra": "student_depth = 1\nteacher_depth = 2",
    "dispersive": "depth = 1\ncontrast = 0.1",
    "sra2": "depth = 2\nhidden = 16",
    "internal_guidance": "depth = 2\ntarget_guidance = 0.5",
    "repa": f'encoders = ["{Standing.name}"]\ndepth = 2\nhidden = 16',
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_supervise_the_images_tokens(method, tmp_path):
    data = tiny_text.make_data(tmp_path / "data")
    if method == "repa":
        records = open_data(data, verify=False)
        write_features(data, records, Standing(), Pictures(torch.zeros(len(records), 3, 16, 16).byte(), records))
    recipe = recipe_for(data, tmp_path)
    path = tmp_path / "text.toml"
    text = path.read_text().partition("[[stage]]")[0]
    path.write_text(f'{text}[[stage]]\nname = "{method}"\nsupervision = "{method}"\nsteps = 3\n{METHODS[method]}\n')
    run(load(path))
    found = tiny.records(Path(recipe.run.out), "train")
    assert [r["step"] for r in found] == [1, 2, 3] and all(np.isfinite(r["aux"]) and r["aux"] != 0 for r in found)


def test_u_vits_layout_is_trained_on_in_place_whatever_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(test_coco, "SHAPE", (8, 4, 4))
    folder, losses = test_coco.write_layout(tmp_path / "train"), []
    sizes = (f"--model.text_width={test_coco.WIDTH}", f"--model.text_length={test_coco.LENGTH}")
    for loader in ("resident", "torch"):
        (tmp_path / loader).mkdir()
        steps = ("--stage.align.steps=3", "--stage.transcend.steps=3", f"--data.loader={loader}")
        run(recipe_for(folder, tmp_path / loader, *sizes, *steps))
        losses.append([record["loss"] for record in tiny.records(tmp_path / loader / "out", "train")])
        null = states(tmp_path / loader / "out")["transcend/ema/null_context"][0]
        assert np.array_equal(null.numpy(), np.load(tmp_path / "empty_context.npy"))
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_states_that_do_not_fit_and_captions_that_changed_are_refused_in_one_line(data, whole, tmp_path):
    for key, value, words in (("text_width", 7, "4 tokens of 6 channels"), ("text_length", 5, "model.text_length = 5")):
        with pytest.raises(UserError, match=words):
            run(recipe_for(data, tmp_path, f"--model.{key}={value}"))
    with pytest.raises(UserError, match="no complete text states of another"):
        run(recipe_for(data, tmp_path, "--data.text=another"))
    other = tiny_text.make_data(tmp_path / "other")
    (other / CAPTIONS).write_bytes(captions_bytes([*tiny_text.CAPTIONS[1:], ["something else"]]))
    with pytest.raises(UserError, match="states of other captions"):
        run(recipe_for(other, tmp_path))
    tiny_text.write_states(other)
    another = tiny_text.make_data(tmp_path / "another")
    tiny_text.write_states(another, mask=False)  # the same captions, read in another way
    before = (whole / "recipe.toml").read_bytes()
    for changed in (other, another):
        recipe = recipe_for(changed, tmp_path, "--stage.align.steps=12")
        with pytest.raises(UserError, match="captions or their states changed"):
            run(replace(recipe, run=replace(recipe.run, out=str(whole))))
    assert (whole / "recipe.toml").read_bytes() == before, "what is refused changes nothing: samples are drawn by it"


def test_a_teacher_that_other_states_trained_is_refused(whole, tmp_path, monkeypatch):
    kept = tiny_text.states_of
    monkeypatch.setattr(tiny_text, "states_of", lambda texts: 1.2 * kept(texts))
    other = tiny_text.make_data(tmp_path / "other")
    recipe_for(other, tmp_path)
    head, _, second = (path := tmp_path / "text.toml").read_text().split("[[stage]]")
    path.write_text(f"{head}[[stage]]{second}".replace('"align"', f'"{whole / "align"}"'))
    with pytest.raises(UserError, match=r"states of the empty caption are not those of the data") as told:
        run(load(path))
    assert "\n" not in str(told.value)
