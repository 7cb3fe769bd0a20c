"""One optimisation step: noise, teacher, student, losses, backward, update. No file, no log, no host sync."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from st_fast.core import random
from st_fast.core.random import Purpose
from st_fast.core.ranks import Ranks
from st_fast.model import SiT, flow
from st_fast.recipe.schema import Recipe
from st_fast.train import memory
from st_fast.train.batches import Batch
from st_fast.train.graphs import Graphs
from st_fast.train.optim import Optimizer
from st_fast.train.ranges import named
from st_fast.train.reduction import REDUCTION, GradientSum
from st_fast.train.sharding import ShardedSum, is_sharded
from st_fast.train.supervision import Noised, Supervision
from st_fast.train.targets import Target, Targets

Following = Callable[[], Sequence[Batch] | None]


@dataclass(frozen=True)
class Losses:
    """Scalars on the device, over this rank's part of the global batch; sums over ranks are the global means."""

    denoise: Tensor
    aux: Tensor


class Step:
    """Holds what a step needs; call it with the step number and this rank's micro-batches."""

    def __init__(
        self, model: SiT, supervision: Supervision, optimizer: Optimizer, recipe: Recipe, scale: float, ranks: Ranks
    ) -> None:
        self.model, self.supervision, self.optimizer = model, supervision, optimizer
        self.recipe, self.scale, self.place = recipe, scale, ranks.place
        self.targets = Targets(self.noised, supervision, recipe.run, ranks.device)
        self.following: Following = lambda: None
        """Gives the next step's micro-batches, None after the last step; a schedule that looks ahead asks it."""
        self._graphs: Graphs[Losses] | None = None
        if recipe.run.cuda_graphs:
            learn = partial(self._learn, last=False)
            self._graphs = Graphs(learn, optimizer.parameters(), supervision.active, ranks.device)
        self.gradients: GradientSum | ShardedSum
        if is_sharded(model):
            self.gradients = ShardedSum((model, supervision.heads))
        else:
            self.gradients = GradientSum(optimizer.parameters(), ranks, REDUCTION[recipe.optim.reduction])

    def __call__(self, step: int, micro_batches: Sequence[Batch]) -> tuple[Losses, Tensor]:
        """Runs the step; returns the losses and the gradients' global norm, all left on the device."""
        self.place.step = step + 1
        parts = []
        for number, batch in enumerate(micro_batches, start=1):
            self.place.mark("step")
            if self._graphs is None:
                parts.append(self._learn(step, batch, last=number == len(micro_batches)))
            else:  # a graph calls no hooks, so that all gradients are exchanged after it
                parts.append(self._graphs(step, batch))
                self.gradients.expect()
            if self.targets.looks_ahead:
                self._look_ahead(step, micro_batches[number:])
        with named("exchange"):
            self.gradients.finish()
        with named("optimiser"):
            norm = self.optimizer.update()
        return Losses(_total([p.denoise for p in parts]), _total([p.aux for p in parts])), norm

    @memory.of_a_pass()
    def _learn(self, step: int, batch: Batch, last: bool) -> Losses:
        """Adds a micro-batch's gradients to those there are; `last`: they are complete with it."""
        lesson = self.targets.lesson(step, batch)
        losses = self.losses(lesson.noised, lesson.target)
        if last:
            self.gradients.expect()
        with named("backward"):
            (losses.denoise + losses.aux).backward()
        return Losses(losses.denoise.detach(), losses.aux.detach())

    def _look_ahead(self, step: int, rest: Sequence[Batch]) -> None:
        """Starts the lesson of the next micro-batch, of this step or the next one."""
        if rest:
            self.targets.start_ahead(step, rest[0])
            return
        upcoming = self.following()
        self.place.step = step + 1  # whoever made the upcoming batches stood at their step
        if upcoming:
            self.targets.start_ahead(step + 1, upcoming[0])

    def noised(self, batch: Batch) -> Noised:
        """Draws latents from their moments and noises them: x = scale·(μ + σ·ξ), x_t on the recipe's path."""
        seed, shape = self.recipe.run.seed, batch.moments[0].chunk(2)[0].shape
        mean, std = batch.moments.float().chunk(2, dim=1)
        x = self.scale * (mean + std * random.normal(seed, Purpose.POSTERIOR, batch.ordinals, shape))
        noise = random.normal(seed, Purpose.NOISE, batch.ordinals, shape)
        x_t, velocity = flow.interpolate(x, noise, batch.t, self.recipe.flow.path)
        return Noised(
            x, x_t, velocity, batch.t, batch.labels, batch.student_labels, noise, batch.ordinals, batch.rows,
            batch.features, batch.images,
        )  # fmt: skip

    def losses(self, noised: Noised, target: Target | None) -> Losses:
        """The denoising loss and the supervision's, each a sum over samples weighted by 1 / global batch size."""
        with named("student forward"):
            prediction, hidden = self.model(noised.x_t, noised.t, noised.student_labels, self.supervision.tap)
        with named("loss"):
            denoise = flow.denoising_loss(prediction, noised.velocity).sum() / self.recipe.optim.batch_size
            aux = self.supervision.loss(hidden, target(), noised) if target else torch.zeros_like(denoise)
        return Losses(denoise, aux)


def _total(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum()
