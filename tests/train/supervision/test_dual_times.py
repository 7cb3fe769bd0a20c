"""Self-Flow and SRA with dual time: times, noisy latents and losses against NumPy float64, and whole runs of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core import checkpoint, random
from st_fast.core.errors import Interrupted, UserError
from st_fast.core.random import Purpose
from st_fast.core.ranks import Ranks
from st_fast.data.loader import ResidentLoader
from st_fast.data.shards import open_data
from st_fast.kernels import noisy_latents
from st_fast.model import build
from st_fast.model.layout import Layout
from st_fast.recipe import Recipe, load
from st_fast.recipe.methods import DualTime, Method, SelfFlow
from st_fast.recipe.schema import Flow, Stage
from st_fast.recipe.tokens import TokenGroups
from st_fast.train.batches import BatchIterator
from st_fast.train.layouts import draw_times
from st_fast.train.optim import EmaModel
from st_fast.train.run import run
from st_fast.train.supervision import NoisyBatch, Parts, Supervision, create, select_rows
from tests import tiny
from tests.train.supervision.test_losses import BATCH, MODEL, TABLE, fill, hidden, noisy, silu, weights_of
from tests.train.supervision.test_self_methods import cosine_loss
from tests.train.test_training import STOP, signals, stop_at  # noqa: F401

CPU = torch.device("cpu")
SELF_FLOW_STAGE = """
[[stage]]
name = "self_flow"
supervision = "self_flow"
steps = 8
student_depth = 1
teacher_depth = 2
"""
DUAL_STAGE = """
[[stage]]
name = "sra_dual"
supervision = "sra_dual"
steps = 8
student_depth = 1
teacher_depth = 2
full_sample_prob = 0.3
"""
LENGTHS = 1, 3
"""Of the 2 × 2 tokens of the tiny latents."""


def made(method: Method) -> Supervision:
    parts = Parts(MODEL, TABLE, None, EmaModel(fill(build(MODEL, TABLE, 3), 3)), path="cosine", seed=5)
    supervision = create(Stage("s", method, 10), parts, seed=1)
    fill(supervision.heads, 4)
    return supervision


def in_groups(method: Method, separated: bool = False, whole: bool = False) -> NoisyBatch:
    """A batch of two groups with a time each; of every other sample they are the same where some are `whole`."""
    generator = torch.Generator().manual_seed(7)
    batch = noisy(method.selection)
    order = torch.rand(BATCH, 4, generator=generator).argsort(dim=1)
    t = torch.rand(BATCH, 2, generator=generator)
    one = torch.arange(BATCH) % 2 == 0
    t = torch.where(one[:, None], t[:, :1], t) if whole else t
    layout = Layout(order, LENGTHS, separated, one if whole else None)
    return replace(batch, t=t, layout=layout, student_condition=torch.full((BATCH,), 5))


def pixels(batch: NoisyBatch, t: np.ndarray) -> np.ndarray:
    """Times of the groups (B, 2) → of each of the 4 × 4 pixels, token by token."""
    assert batch.layout is not None
    image = np.empty((BATCH, 1, 4, 4))
    for sample in range(BATCH):
        for place, token in enumerate(batch.layout.order[sample].tolist()):
            row, column = 2 * (token // 2), 2 * (token % 2)
            image[sample, 0, row : row + 2, column : column + 2] = t[sample, 0 if place < LENGTHS[0] else 1]
    return image


def on_cosine_path(batch: NoisyBatch, times: np.ndarray) -> torch.Tensor:
    angle = np.pi / 2 * times
    return torch.from_numpy(np.cos(angle) * batch.x.numpy() + np.sin(angle) * batch.noise.numpy())


def expected_loss(supervision: Supervision, name: str, h: torch.Tensor, f: torch.Tensor, weight: float) -> float:
    """−cos over the channels of the head's output and f, mean over tokens and samples, times the weight."""
    w = weights_of(supervision.heads)
    assert w[f"{name}.linear1.weight"].shape == (32, 16) and w[f"{name}.linear2.weight"].shape == (16, 32)
    q = silu(h.detach().numpy() @ w[f"{name}.linear1.weight"].T + w[f"{name}.linear1.bias"])
    q = q @ w[f"{name}.linear2.weight"].T + w[f"{name}.linear2.bias"]
    return weight * float(cosine_loss(q, f.numpy()).mean())


def test_self_flows_loss_and_its_teacher_at_the_lower_time_of_the_whole_image_in_numpy():
    method = SelfFlow(student_depth=1, teacher_depth=2, weight=0.7)
    supervision, batch, h = made(method), in_groups(method), hidden()
    lowest = np.minimum(batch.t[:, 0].numpy(), batch.t[:, 1].numpy())
    assert 0 < (lowest == batch.t[:, 0].numpy()).sum() < BATCH
    x_t = on_cosine_path(batch, lowest[:, None, None, None].astype(np.float64))
    _, f = supervision.average()(x_t, torch.from_numpy(lowest), batch.student_condition, tap=2)
    target = supervision.target(batch)
    torch.testing.assert_close(target[0], f, rtol=1e-5, atol=1e-5)
    expected = expected_loss(supervision, "projector", h, target[0], 0.7)
    assert supervision.loss(h, target, batch).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("teacher_time", ["sra", "self_flow", "same"])
@pytest.mark.parametrize("separated", [False, True])
def test_dual_times_loss_and_its_teachers_times_in_numpy(teacher_time, separated):
    method = DualTime(1, 2, separated=separated, teacher_time=teacher_time, time_offset=0.6, weight=0.4)
    supervision, batch, h = made(method), in_groups(method, separated), hidden()
    t = batch.t.numpy().astype(np.float64)
    if teacher_time == "sra":
        u = random.uniform(5, Purpose.TEACHER_TIME, batch.ordinals, 2).numpy()
        wanted = np.maximum(t - 0.6 * u, 0)
        assert (wanted == 0).any() and (np.abs(u[:, 0] - u[:, 1]) > 0.01).all()
    else:
        wanted = t.min(1, keepdims=True).repeat(2, 1) if teacher_time == "self_flow" else t
    np.testing.assert_allclose(supervision.teacher_times(batch).numpy(), wanted, atol=1e-7)
    x_t = on_cosine_path(batch, pixels(batch, wanted))
    times, average = torch.from_numpy(wanted).float(), supervision.average()
    if teacher_time == "self_flow" and not separated:
        _, f = average(x_t, times[:, 0], batch.student_condition, tap=2)
    else:
        _, f = average(x_t, times, batch.student_condition, 2, batch.layout)
    target = supervision.target(batch)
    torch.testing.assert_close(target[0], f, rtol=1e-5, atol=1e-5)
    expected = expected_loss(supervision, "ap_head", h, target[0], 0.4)
    assert supervision.loss(h, target, batch).item() == pytest.approx(expected, rel=1e-6)


def test_a_whole_sample_has_one_time_for_the_teacher_too():
    method = DualTime(1, 2, full_sample_prob=0.5)
    supervision, batch = made(method), in_groups(method, separated=True, whole=True)
    t, whole = supervision.teacher_times(batch), batch.layout.whole
    assert (t[whole, 0] == t[whole, 1]).all() and (t[~whole, 0] != t[~whole, 1]).all() and (t <= batch.t).all()


def test_separated_groups_of_the_teacher_know_nothing_of_one_another():
    method = DualTime(1, 2, teacher_time="same")
    supervision, batch = made(method), in_groups(method, separated=True)
    second = torch.from_numpy(pixels(batch, np.array([[0.0, 1.0]] * BATCH))).bool()
    other = replace(batch, x=torch.where(second, batch.x + 1, batch.x))
    a, b = (supervision.target(one)[0] for one in (batch, other))
    first = torch.zeros(BATCH, 4, dtype=torch.bool).scatter_(1, batch.layout.order[:, :1], True)
    assert torch.equal(a[first], b[first]) and (a[~first] != b[~first]).any(dim=1).all()


@pytest.mark.parametrize("method", [SelfFlow(student_depth=1, teacher_depth=2), DualTime(1, 2)])
def test_head_and_student_are_trained_and_the_teacher_is_not(method):
    supervision, batch, h = made(method), in_groups(method), hidden()
    supervision.loss(h, supervision.target(batch), batch).backward()
    assert h.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in supervision.heads.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in supervision.average().parameters())


@pytest.mark.parametrize("time", ["uniform", "lognormal", "stratified"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_each_groups_times_are_drawn_alike_and_independently(time, path):
    settings, size = Flow(path=path, time=time), 4000
    one, groups = draw_times(None, settings, 3, 2, size), TokenGroups((0.2, 0.3, 0.5))
    t = draw_times(groups, settings, 3, 2, size)
    assert t.shape == (size, 3) and t.dtype == torch.float32 and torch.equal(t[:, 0], one)
    assert torch.equal(draw_times(TokenGroups((0.5, 0.5)), settings, 3, 2, size), t[:, :2])
    sigma = t / (1 - t) if path == "linear" else torch.tan(t.double() * np.pi / 2)
    u = torch.special.ndtr(sigma.log()) if time == "lognormal" else t
    deciles = (10 * u).long().clamp(max=9)
    for column in range(3):
        counts = torch.bincount(deciles[:, column], minlength=10)
        assert (counts - size / 10).abs().max() <= (1 if time == "stratified" else 5 * 19)
    assert (torch.corrcoef(u.T.double()) - torch.eye(3)).abs().max() < 0.08
    assert not torch.equal(t, draw_times(groups, settings, 3, 3, size))


def test_a_sample_that_is_one_group_has_one_time_the_same_ones_as_the_layouts():
    t = draw_times(TokenGroups((0.25, 0.75), whole=0.3), Flow(), 3, 2, 4000)
    one = random.uniform(3, Purpose.WHOLE_SAMPLE, torch.arange(8000, 12000))[:, 0] < 0.3
    assert torch.equal(t[:, 0] == t[:, 1], one) and one.float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_a_sample_with_several_times_is_supervised_where_all_lie_in_the_range():
    from st_fast.recipe.methods import Selection

    t = torch.tensor([[0.3, 0.6], [0.3, 0.9], [0.1, 0.5], [0.5, 0.5]])
    assert select_rows(t, slice(None), Selection((0.2, 0.7), "sample", 1.0))[0].tolist() == [0, 3]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    data = tiny.write_data(tmp_path / "data")
    path = tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    path.write_text(path.read_text().split("[[stage]]")[0] + SELF_FLOW_STAGE + DUAL_STAGE)
    return path


def batches_of(recipe: Recipe, stage: Stage, count: int = 1) -> list[NoisyBatch]:
    """The first three steps' batches as all of `count` ranks have them."""
    shards = open_data(Path(recipe.data.path), verify=False)
    iterators = [
        BatchIterator(recipe, stage, ResidentLoader(shards, CPU), shards, Ranks(rank, count, CPU))
        for rank in range(count)
    ]
    return [batch for iterator in iterators for batches in iterator.steps(0, 3) for batch in batches]


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["self_flow", "sra_dual"])
def test_each_pixel_is_bit_for_bit_what_its_groups_time_makes_of_a_whole_image(path, name, recipe):
    """As the op that makes noisy latents has it, at each of the two times."""
    settings = load(recipe, [f"--flow.path={path}"])
    shards = open_data(Path(settings.data.path), verify=False)
    order, number = BatchIterator(settings, settings.stages[0], None, shards, Ranks(0, 1, CPU)).order, 0
    for batch in batches_of(settings, settings.stage(name)):
        records = order(batch.ordinals.numpy())
        moments = shards.gather(records)[0]
        made = [noisy_latents(moments, batch.ordinals, t.contiguous(), 3, 1.0, path) for t in batch.t.unbind(1)]
        assert torch.equal(batch.x, made[0][0]) and torch.equal(batch.noise, made[0][3])
        lengths = {"self_flow": (3, 1), "sra_dual": (1, 3)}[name]
        assert batch.layout.lengths == lengths
        for sample, row in enumerate(batch.layout.order.tolist()):
            for place, token in enumerate(row):
                cut = slice(2 * (token // 2), 2 * (token // 2) + 2), slice(2 * (token % 2), 2 * (token % 2) + 2)
                group = int(place >= lengths[0])
                for found, wanted in ((batch.x_t, made[group][1]), (batch.velocity, made[group][2])):
                    assert torch.equal(found[sample, :, *cut], wanted[sample, :, *cut])
                    number += 1
    assert number == 2 * 4 * 3 * 8


def test_times_groups_and_whole_samples_are_those_of_one_rank_on_two_and_in_parts(recipe):
    found = []
    for count, parts in ((1, 1), (2, 1), (2, 2)):
        settings = load(recipe, [f"--optim.accumulation={parts}"])
        batches = batches_of(settings, settings.stage("sra_dual"), count)
        columns = [torch.cat([of(batch) for batch in batches]) for of in (
            lambda b: b.ordinals, lambda b: b.t, lambda b: b.layout.order, lambda b: b.layout.whole, lambda b: b.x_t,
        )]  # fmt: skip
        found.append([column[columns[0].argsort()] for column in columns])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
    assert found[0][3].any() and not found[0][3].all()


def test_latents_too_small_for_a_token_in_each_group_are_refused_in_one_line(recipe):
    """As those of a bucket may be, where the recipe's own are large enough."""
    settings = load(recipe)
    stage = replace(settings.stages[0], method=SelfFlow(mask_ratio=1e-3, student_depth=1, teacher_depth=2))
    with pytest.raises(UserError, match=r"^stage\.self_flow: latents of 2 x 2 tokens leave a group[^\n]*$"):
        batches_of(settings, stage)


def states(out: Path) -> dict[str, torch.Tensor]:
    names = ("self_flow", "sra_dual")
    found = {name: checkpoint.latest(out / name / "checkpoints", print) for name in names}
    return {f"{s}/{g}/{k}": t for s, c in found.items() for g, ts in c.groups.items() for k, t in ts.items()}


def test_interrupted_runs_of_both_resume_bit_exactly_and_learn(recipe, tmp_path, monkeypatch, signals):  # noqa: F811
    torch.set_num_threads(1)
    run(load(recipe))
    again = load(recipe, [f"--run.out={tmp_path / 'again'}"])
    for step in (3, 8):  # within the first stage, then within the second
        STOP.name = None
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Interrupted):
                run(again)
    STOP.name = None
    run(again)
    whole, resumed = states(tmp_path / "out"), states(tmp_path / "again")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[k], whole[k]) for k in whole)
    logged = tiny.records(tmp_path / "out", "train")
    for stage in ("self_flow", "sra_dual"):
        losses = [record["aux"] for record in logged if record["stage"] == stage]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("options", [
    ("--optim.accumulation=4",), ("--run.checkpointing=block",), ("--run.checkpointing=attention",),
    ("--model.modulation=one",), ("--run.supervised_rows=padded",), ("--model.qk_norm=false",),
])  # fmt: skip
def test_the_ways_to_run_a_pass_change_nothing_but_rounding(options, recipe, tmp_path):
    plain = options if options[0].startswith("--model.qk_norm") else ()
    run(load(recipe, [*plain, *(f"--stage.{name}.steps=3" for name in ("self_flow", "sra_dual"))]))
    others = [f"--run.out={tmp_path / 'other'}", *options, "--model.attention=math"]
    run(load(recipe, [*others, *(f"--stage.{name}.steps=3" for name in ("self_flow", "sra_dual"))]))
    pairs = zip(tiny.records(tmp_path / "out", "train"), tiny.records(tmp_path / "other", "train"), strict=True)
    for ours, theirs in pairs:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4)
        assert ours["aux"] == pytest.approx(theirs["aux"], rel=2e-3, abs=1e-4)


def test_a_trained_model_is_a_plain_one_without_heads(recipe, tmp_path):
    run(load(recipe, ["--stage.self_flow.steps=1", "--stage.sra_dual.steps=1"]))
    for name, head in (("self_flow", "projector"), ("sra_dual", "ap_head")):
        groups = checkpoint.latest(tmp_path / "out" / name / "checkpoints", print).groups
        plain = build(load(recipe).model, TABLE, 0).state_dict()
        assert groups["model"].keys() == groups["ema"].keys() == plain.keys()
        assert set(groups["heads"]) == {f"{head}.linear{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
