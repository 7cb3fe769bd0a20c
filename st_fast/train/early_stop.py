"""When supervision ends by itself: HASTE's trigger (arXiv 2505.16792), for methods with the key `stop_below`.

Alignment helps while its gradient goes with the denoising loss's. Before every `stop_every`th step the batch of that
step is looked at at a few fixed times: the cosine between both losses' gradients with respect to the tapped
stream, over all samples, tokens and channels of the global batch, averaged over the times. Sums over micro-batches and
ranks make it, so that it does not depend on how the batch is split. Nothing of it enters the weights' gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from st_fast.core.ranks import Ranks
from st_fast.model import DiffusionTransformer, flow
from st_fast.model.layers import Run, adaln_options
from st_fast.model.side_stream import Future
from st_fast.model.walk import of_groups
from st_fast.recipe.methods import Method
from st_fast.train import memory
from st_fast.train.log import Log
from st_fast.train.step import Step, Target
from st_fast.train.supervision import NoisyBatch, Rows, Supervision


class Ending:
    """How long a stage's supervision lasts: as its settings say or, from a step on, until its gradient stood against
    the other; the settings then say so, too, as `stop_step`."""

    def __init__(self, stage: str, supervision: Supervision, path: str, ranks: Ranks, log: Log) -> None:
        self._stage, self._supervision, self._path, self._ranks, self._log = stage, supervision, path, ranks, log
        self.stopped_at = 0
        """The steps after which it ended by itself; 0: it has not."""

    def supervises(self, step: int) -> bool:
        """Whether supervision lasts to this step, counted from 0, as far as is known now."""
        return self._supervision.settings.supervises(step)

    def comparisons(self, steps: int) -> int:
        """How often gradients have been compared by the end of this many steps."""
        method = self._supervision.settings
        if method.stop_below == "off":
            return 0
        ends = self.stopped_at or (method.stop_step - 1 if method.stop_step else steps)  # the last step that may be one
        return max(0, min(steps - 1, ends)) // method.stop_every

    def restore(self, stopped_at: int) -> None:
        """Goes on from a checkpoint that says when it ended; not where nothing is to end it any more."""
        if stopped_at and self._supervision.settings.stop_below != "off":
            self._end(stopped_at)

    def compare(self, learn: Step, step: int, batches: Sequence[NoisyBatch]) -> None:
        """Before a step, counted from 0, with this rank's batches of it: compares gradients where that is due."""
        method, name = self._supervision.settings, self._stage
        if method.stop_below == "off" or not method.compares(step):
            return
        cosine = mean_cosine(learn, method, batches, self._path, self._ranks)
        (stops,) = self._ranks.any([cosine < method.stop_below])
        self._log.write("gradients", name, step, cosine=cosine, stopped=stops)
        if stops:
            self._end(step)
            self._log.say(
                f"{name}: supervision ends after {step} steps: the cosine of its gradient and the denoising loss's is "
                f"{cosine:.4f}, below stop_below = {method.stop_below:g}"
            )

    def _end(self, step: int) -> None:
        self.stopped_at = step
        self._supervision.settings = self._supervision.settings.ending(step)


@memory.of_a_pass()
def mean_cosine(step: Step, method: Method, batches: Sequence[NoisyBatch], path: str, ranks: Ranks) -> float:
    """The cosine of both losses' gradients, averaged over `method.stop_times`; NaN where one is not finite.

    All ranks call it with their micro-batches of one global batch, and get the same bits.
    """
    products = torch.zeros(len(method.stop_times), 3, dtype=torch.float64, device=ranks.device)
    for batch in batches:
        ranks.heartbeat.beat("step")
        # What reads images alone is the same at all times.
        shared = Future(step.supervision.target(batch), None) if method.encoder_names else None
        for place, t in enumerate(method.stop_times):
            seen = at_time(batch, t, path)
            target = shared or Future(step.supervision.target(seen), None)
            products[place] += scalar_products(*gradients(step, seen, target))
    return float(cosines(ranks.sum(products)).mean())


def at_time(batch: NoisyBatch, t: float, path: str) -> NoisyBatch:
    """The same samples and noise at one time, all of them supervised alike and contrasted with none."""
    times = torch.full_like(batch.t, t)
    x_t, velocity = flow.interpolate(batch.x, batch.noise, times, path)
    everyone = torch.arange(len(times), device=times.device)
    rows = Rows(everyone, torch.full_like(times, 1 / len(times)))
    return replace(batch, x_t=x_t, velocity=velocity, t=times, rows=rows, negative=None)


def gradients(step: Step, batch: NoisyBatch, target: Target) -> tuple[Tensor, Tensor]:
    """Of the denoising loss and of the supervision's, with respect to the tapped stream: (B, N, D) each."""
    with cut_at(step.model, step.supervision.tap) as cut:
        losses = step.losses(batch, target)
    (denoise,), (aux,) = (torch.autograd.grad(loss, cut.streams) for loss in (losses.velocity, losses.aux))
    return denoise, aux


class Cut:
    """Runs blocks as `run` does, and cuts the graph behind one: what it returns no longer depends on what came before.

    Block and next normalisation are one op, of which the stream is one result and the next input another. So that the
    gradient with respect to the stream is the whole of it, the next input is made of the stream once more.
    """

    def __init__(self, run: Run, block: nn.Module, norm_modulate: Callable[..., Tensor]) -> None:
        self._run, self._block, self._norm_modulate = run, block, norm_modulate
        self.streams = list[Tensor]()
        """The stream after the block, once it has run."""

    def __call__(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, ...]:
        x, y, *others = self._run(block, *inputs)
        if block is self._block:
            x = x.detach().requires_grad_()
            given = signature(type(block).forward).bind(block, *inputs).arguments
            y = self._norm_modulate(x, given["next_shift"], given["next_scale"], **of_groups(given.get("groups")))
            self.streams.append(x)
        return x, y, *others


@contextmanager
def cut_at(model: DiffusionTransformer, tap: int | tuple[int, ...]) -> Iterator[Cut]:
    """Cuts the network's graph behind block `tap` for as long as the context lasts."""
    if not isinstance(tap, int) or tap < 1:
        raise ValueError(f"tap = {tap}: one block is needed")
    run, block = model.run_block, model.blocks[tap - 1]
    model.run_block = cut = Cut(run, block, partial(model.kernels.norm_modulate, **adaln_options(model.config)))
    try:
        yield cut
    finally:
        model.run_block = run


def scalar_products(a: Tensor, b: Tensor) -> Tensor:
    """(3,) float64: a·b, a·a and b·b over all elements."""
    return torch.stack([(x.float() * y.float()).sum(dtype=torch.float64) for x, y in ((a, b), (a, a), (b, b))])


def cosines(products: Tensor) -> Tensor:
    """(T, 3), as `scalar_products` has them, → (T,): the cosines; 0 where a vector is zero."""
    across, of_a, of_b = products.unbind(1)
    lengths = (of_a * of_b).sqrt()
    return torch.where(lengths == 0, 0.0, across / lengths)
