"""What a rank reads and when, and that the time it waits for data is all counted, and once."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from st_fast.core import random
from st_fast.core.ranks import Ranks
from st_fast.recipe import load
from st_fast.train.batches import BatchIterator, sent_to
from st_fast.train.supervision.capacity import capacity
from tests.train.schedule.loop import Loop


@pytest.mark.parametrize(
    "options",
    [(), ("--run.prefetch=true",), ("--run.prefetch=true", "--run.teacher_placement=ahead", "--optim.accumulation=2")],
    ids=str,
)
def test_every_wait_for_data_is_counted_once(options, folder):
    loop, answers = Loop(folder, "transcend", ("--run.streams=auto", *options)), []

    class Slow:
        def stream(self, requests):
            for answer in loader.stream(requests):
                time.sleep(0.02)
                answers.append(1)
                yield answer

    loader, loop.iterator.loader = loop.iterator.loader, Slow()
    start = time.perf_counter()
    list(loop.steps(0, 5))
    assert len(answers) == 5 * loop.iterator.recipe.optim.accumulation
    assert 0.02 * len(answers) <= loop.iterator.waited <= time.perf_counter() - start


@pytest.mark.parametrize("named", ["cuda", "cuda:0"], ids=["without a number", "with its number"])
def test_what_is_on_the_device_already_is_not_sent_again_however_the_device_is_named(named, monkeypatch):
    """Pinning memory of a device is an error, which "cuda" against "cuda:0" once led to."""
    copies: list[str] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copies.append("pinned") or tensor)
    with FakeTensorMode():
        there, here = torch.empty(3, device="cuda:0"), torch.empty(3)
        assert sent_to(torch.device(named), there) is there and not copies
        assert sent_to(torch.device("cuda:0"), here).device == torch.device("cuda:0") and copies == ["pinned"]
        assert sent_to(torch.device("cpu"), here) is here


class Counted:
    """A loader of 30 records that hands out their numbers; `asked`: the requests of each stream, made at once."""

    def __init__(self):
        self.asked, self.manifest = [], SimpleNamespace(scale=1.0, posterior="sample")

    def __len__(self):
        return 30

    def stream(self, requests):
        self.asked.append([request.tolist() for request in requests])
        return iter([(torch.tensor(one), torch.tensor(one) % 5) for one in self.asked[-1]])


def as_they_are(moments, *_):
    """In place of noisy latents."""
    return (moments,) * 4


def iterator(folder, options, rank=0, count=1, stage="transcend", features=()):
    """The stage's batches from a loader as above, with the records' numbers in place of noisy latents."""
    recipe, loader = load(folder / "tiny.toml", list(options)), Counted()
    ranks = Ranks(rank, count, torch.device("cpu"))
    made = BatchIterator(recipe, recipe.stage(stage), loader, loader, ranks, features, as_they_are)
    return made, loader


@pytest.mark.parametrize(("count", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2)])
def test_ranks_and_passes_take_a_batch_in_equal_parts_and_in_order(count, accumulation, folder):
    size, step, order = 24, 3, random.RecordOrder(3, 30)
    options = (f"--optim.batch_size={size}", f"--optim.accumulation={accumulation}")
    places, numbers, read = [], [], []
    share = size // count
    for rank in range(count):
        made, _ = iterator(folder, options, rank, count)
        parts = made.micro_batches()
        assert [part.stop - part.start for part in parts] == [share // accumulation] * accumulation
        places += [place for part in parts for place in range(part.start, part.stop)]
        (batches,) = made.steps(step, step + 1)
        numbers += torch.cat([one.ordinals for one in batches]).tolist()
        read += torch.cat([one.x for one in batches]).tolist()
        assert made.ranks.heartbeat.phase == "data" and made.ranks.heartbeat.ticks == accumulation
        mine = range(step * size + rank * share, step * size + (rank + 1) * share)
        assert made.samples(step, [rank]) == (list(mine), order(np.array(mine)).tolist())
    assert places == list(range(size)) and numbers == list(range(step * size, (step + 1) * size))
    assert read == order(np.array(numbers)).tolist() and made.samples(step, []) == (numbers, read)


@pytest.mark.parametrize(("count", "accumulation"), [(1, 1), (1, 4), (2, 3), (4, 2)])
def test_a_pass_of_fixed_size_is_that_of_a_ranks_part_of_a_pass(count, accumulation, folder):
    options = [
        f"--optim.accumulation={accumulation}",
        "--optim.batch_size=48",
        "--stage.transcend.t_range=[0.25, 0.75]",
    ]
    made, _ = iterator(folder, [*options, "--run.supervised_rows=padded"], 0, count)
    method, flow = made.stage.method, made.recipe.flow
    assert made.pass_rows == capacity(method.selection, flow, 48, 48 // (count * accumulation)).rows
    assert iterator(folder, [*options, "--run.supervised_rows=exact"], 0, count)[0].pass_rows == 0
    assert iterator(folder, [*options, "--run.supervised_rows=padded"], 0, count, "plain")[0].pass_rows == 0


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_step_is_made_when_it_is_asked_for_or_one_ahead_and_none_after_the_last(prefetch, folder):
    made, _ = iterator(folder, [f"--run.prefetch={str(prefetch).lower()}", "--run.streams=auto"])
    steps, heartbeat = made.steps(2, 5), made.ranks.heartbeat
    assert made.waited == 0
    for number, ahead in ((3, 1), (4, 1), (5, 0)):
        next(steps)
        assert heartbeat.step == number + ahead * prefetch
        assert heartbeat.ticks == number - 2 + ahead * prefetch
    assert list(steps) == []


@pytest.mark.parametrize(("first", "last", "supervised"), [(0, 5, 3), (2, 5, 1), (3, 5, 0), (0, 2, 2)])
def test_features_are_read_for_supervised_steps_only(first, last, supervised, folder):
    features = Counted(), Counted()
    options = ("--stage.transcend.stop_step=3", "--optim.accumulation=2")
    made, loader = iterator(folder, options, features=features)
    steps = list(made.steps(first, last))
    assert all(one.asked == [loader.asked[0][: 2 * supervised]] for one in features)
    assert len(loader.asked[0]) == 2 * (last - first)
    for number, batches in enumerate(steps):
        for one in batches:
            assert one.images is None and len(one.features) == (2 if number < supervised else 0)
            assert all(torch.equal(read, one.x) for read in one.features)


def test_images_are_handed_out_where_encoders_run_live(folder, monkeypatch):
    made, loader = iterator(folder, ["--stage.transcend.stop_step=1"], features=(Counted(),))
    monkeypatch.setattr(type(made.stage.method), "encodes_images", True)
    (now,), (later,) = made.steps(0, 2)
    assert now.images.tolist() == loader.asked[0][0] and later.images is None
    assert now.features == later.features == ()


def test_a_label_is_dropped_below_the_dropout_and_not_at_it(folder):
    chances = random.uniform(3, random.Purpose.CLASS_DROPOUT, torch.arange(8))[:, 0]
    dropout = chances.sort().values[3].item()
    made, _ = iterator(folder, [f"--model.class_dropout={dropout!r}"])
    ((batch,),) = made.steps(0, 1)
    assert int((batch.student_condition == 5).sum()) == 3
    assert torch.equal(batch.student_condition, torch.where(chances < dropout, 5, batch.condition))
