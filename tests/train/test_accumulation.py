"""Accumulated gradients are the large batch's: what is exact to the bit, and what only the order of a sum changes.

Exact: what every sample sees (latents, noise, time, labels, whether and with what weight it is supervised), and the
accumulated gradient as the sum of the micro-batches' own. Not exact: a product over 8 samples' tokens adds its terms in
another order than two products over 4 and a sum of both, which float32 shows in the last bits: 1e-6 bounds it for
the whole gradient, and twice that for each tensor.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from st_fast import kernels
from st_fast.core.ranks import Ranks
from st_fast.data.loader import make_loader
from st_fast.data.shards import open_data
from st_fast.model import SiT, build
from st_fast.recipe import load
from st_fast.recipe.methods import Plain
from st_fast.recipe.schema import Recipe, Stage
from st_fast.train import supervision
from st_fast.train.batches import BatchIterator
from st_fast.train.optim import Optimizer
from st_fast.train.parallel import GradientSum
from st_fast.train.step import Step
from st_fast.train.supervision import NoisyBatch, Parts
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TABLE = kernels.select({}, CPU)
TOLERANCE = 1e-6
CANCELLED = 0.01
"""A tensor's gradient that is less than this share of all keeps the rounding of larger terms that cancelled in it: such
are those of q_norm and k_norm, and k_norm's bias, which drops out of the softmax, has nothing else."""
MASKS = ("sample", "sample_mean", "released")
CASES = [("plain", "sample"), *((stage, mask) for stage in ("align", "transcend") for mask in MASKS)]
SPLITS = (2, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "latents")


class Run:
    """A stage's step on the same weights, at one number of micro-batches; `gradients` are the last step's."""

    def __init__(self, folder: Path, data: Path, name: str, mask: str, accumulation: int) -> None:
        options = [f"--optim.accumulation={accumulation}", "--flow.time=stratified"]
        options += [f"--stage.{stage}.mask={mask}" for stage in ("align", "transcend")]
        self.recipe: Recipe = load(tiny.write_recipe(folder / "tiny.toml", data, folder / "out"), options)
        stage = Stage("plain", Plain(), 10) if name == "plain" else self.recipe.stage(name)
        shards, ranks = open_data(data, False, 8, print), Ranks(0, 1, CPU)
        teacher = filled(self.recipe, 7).eval().requires_grad_(False)
        parts = Parts(self.recipe.model, TABLE, teacher if name == "transcend" else None)
        method = supervision.create(stage, parts, 1)
        self.names: list[str] = []
        self.gradients: list[Tensor] = []
        model = filled(self.recipe, 3)
        optimizer = Optimizer(model, method.heads, self.recipe.optim, torch.float32, kernels.adamw_ema_, self.seen)
        self.names = [*optimizer.model.names, *optimizer.heads.names]
        self.step = Step(model, method, optimizer, self.recipe, ranks, print)
        loader = make_loader("resident", shards, CPU, print)
        self.batches: list[NoisyBatch] = next(BatchIterator(self.recipe, stage, loader, shards, ranks).steps(0, 1))

    def seen(self, gradients: list[Tensor]) -> Tensor:
        """The gradients' norm, as the optimiser asks for it; keeps them."""
        self.gradients = [gradient.clone() for gradient in gradients]
        return kernels.grad_norm(gradients)

    def __call__(self, batches: list[NoisyBatch]) -> tuple[float, float, float]:
        losses, norm = self.step(0, batches)
        return losses.denoise.item(), losses.aux.item(), norm.item()


def filled(recipe: Recipe, seed: int) -> SiT:
    """A model whose layers that begin as zeros are filled, so that every part has a gradient."""
    model = build(recipe.model, TABLE, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("accumulation", SPLITS)
@pytest.mark.parametrize(("name", "mask"), CASES)
def test_losses_and_every_gradient_are_the_large_batchs_to_a_millionth(name, mask, accumulation, data, tmp_path):
    whole, split = (Run(tmp_path, data, name, mask, count) for count in (1, accumulation))
    assert len(split.batches) == accumulation
    expected, found = whole(whole.batches), split(split.batches)
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert (expected[1] > 0) == (name != "plain")
    for key, ours, theirs in zip(split.names, split.gradients, whole.gradients, strict=True):
        assert (ours - theirs).norm() <= 2 * TOLERANCE * max(theirs.norm().item(), CANCELLED * expected[2]), key
    apart = torch.stack([(a - b).norm() for a, b in zip(split.gradients, whole.gradients, strict=True)]).norm()
    assert apart <= TOLERANCE * expected[2]
    assert all(gradient.norm() > 0 for gradient in whole.gradients)


@pytest.mark.parametrize("accumulation", SPLITS)
@pytest.mark.parametrize(("name", "mask"), CASES)
def test_what_every_sample_sees_is_the_same_to_the_bit(name, mask, accumulation, data, tmp_path):
    whole, split = (Run(tmp_path, data, name, mask, count) for count in (1, accumulation))
    (large,), small = whole.batches, split.batches
    for field in ("x", "x_t", "velocity", "t", "condition", "student_condition", "noise", "ordinals"):
        assert torch.equal(torch.cat([getattr(one, field) for one in small]), getattr(large, field)), field
    size = len(large.t) // accumulation
    rows = torch.cat([one.rows.index + size * number for number, one in enumerate(small)])
    assert torch.equal(rows, large.rows.index)
    assert torch.equal(torch.cat([one.rows.weight for one in small]), large.rows.weight)


@pytest.mark.parametrize(("name", "mask"), CASES)
def test_the_accumulated_gradient_is_the_sum_of_the_micro_batches_own_to_the_bit(name, mask, data, tmp_path):
    split = Run(tmp_path, data, name, mask, 4)
    split(split.batches)
    together = split.gradients
    alone = []
    for batch in split.batches:
        one = Run(tmp_path, data, name, mask, 4)
        one([batch])
        alone.append(one.gradients)
    for key, whole, parts in zip(split.names, together, zip(*alone, strict=True), strict=True):
        by_hand = ((parts[0] + parts[1]) + parts[2]) + parts[3]
        assert torch.equal(whole, by_hand), key


class Noted:
    """Stands for the sum over ranks and for the heartbeat; notes what is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.step = 0

    def expect(self) -> None:
        self.calls.append("expect")

    def finish(self) -> None:
        self.calls.append("finish")

    def beat(self, where: str) -> None:
        self.calls.append(where)


@pytest.mark.parametrize("count", [1, 4])
def test_the_sum_over_ranks_hears_of_the_last_pass_and_ends_before_the_update(count, data, tmp_path):
    run, noted = Run(tmp_path, data, "align", "sample", count), Noted()
    assert run.step.alone and isinstance(run.step.gradients, GradientSum)
    run.step.gradients = run.step.heartbeat = noted
    norm = run.step.optimizer._norm
    run.step.optimizer._norm = lambda gradients: noted.calls.append("norm") or norm(gradients)
    losses, _ = run.step(6, run.batches)
    assert not losses.denoise.requires_grad and not losses.aux.requires_grad, "what is kept for the log has no graph"
    assert noted.calls == ["step"] * count + ["expect", "finish", "norm"] and noted.step == 7


@pytest.mark.parametrize("more", [False, True], ids=["the last step", "a step before it"])
def test_looking_ahead_is_for_the_next_pass_and_then_for_the_next_step(more, data, tmp_path):
    run, noted, asked = Run(tmp_path, data, "transcend", "sample", 2), Noted(), []
    upcoming = run.batches[::-1] if more else None

    def following() -> list[NoisyBatch] | None:
        noted.step = 99  # as making them does
        return upcoming

    run.step(6, run.batches)  # not told to look ahead, it does not
    run.step.following, run.step.heartbeat, run.step.targets.looks_ahead = following, noted, True
    run.step.targets.start_ahead = lambda step, batch: asked.append((step, id(batch)))
    run.step(6, run.batches)
    assert asked == [(6, id(run.batches[1])), (7, id(run.batches[1]))][: 1 + more]
    assert noted.step == 7


def test_only_one_rank_with_whole_weights_may_keep_gradients_from_the_sum(data, tmp_path):
    run = Run(tmp_path, data, "plain", "sample", 2)
    step = run.step
    parts = step.model, step.supervision, step.optimizer, run.recipe
    for rank, count in ((0, 1), (0, 2), (1, 2), (0, 3)):
        assert Step(*parts, Ranks(rank, count, CPU), print).alone == (count == 1)


def test_a_split_that_forgets_the_global_batch_would_be_seen(data, tmp_path):
    whole, split = (Run(tmp_path, data, "align", "sample_mean", count) for count in (1, 2))
    whole(whole.batches)
    wrong = [replace(b, rows=replace(b.rows, weight=b.rows.weight * 1.001)) for b in split.batches]
    split(wrong)
    off = [(a - b).norm() / b.norm() for a, b in zip(split.gradients, whole.gradients, strict=True) if b.norm() > 1e-6]
    assert max(off) > 100 * TOLERANCE
