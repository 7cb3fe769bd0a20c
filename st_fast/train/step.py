"""One optimisation step: teacher, student, losses, backward, update. No file, no log, no host sync.

Targets are computed before the student's pass, during it on a side stream, or a step ahead (`run.teacher_placement`).
"ahead" starts the target of the micro-batch that comes next as soon as this one's backward pass is queued, so that it
overlaps the all-reduce and the memory-bound optimiser. A frozen teacher does not see the update in between, so the
target is the same.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from st_fast.core.ranks import Ranks
from st_fast.model import SiT, flow
from st_fast.model.side_stream import Future, SideStream, side_stream, tensors, with_tensors
from st_fast.recipe.schema import Recipe, Run
from st_fast.train import memory
from st_fast.train.optim import Optimizer
from st_fast.train.parallel import REDUCTION, GradientSum, ShardedSum, is_sharded
from st_fast.train.profiling import named_range
from st_fast.train.supervision import NoisyBatch, Supervision

Target = Future[tuple[Tensor, ...]]

WARM_UP = 3
"""Passes before one is captured as a graph: they compile, tune, and make the libraries' workspaces."""


@dataclass(frozen=True)
class Losses:
    """Scalars on the device, over this rank's part of the global batch; sums over ranks are the global means."""

    denoise: Tensor
    aux: Tensor


class Targets:
    """Starts the method's targets, by `run.teacher_placement`."""

    def __init__(self, supervision: Supervision, run: Run, device: torch.device) -> None:
        self._supervision = supervision
        self.looks_ahead = run.teacher_placement == "ahead"
        self._side = side_stream(run, device, wanted=run.teacher_placement != "before")
        self._ahead: tuple[NoisyBatch, Target | None] | None = None

    def start(self, step: int, batch: NoisyBatch) -> Target | None:
        """The target of this micro-batch, started now unless it was started ahead; None if nothing is supervised."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is batch:
            return ahead[1]
        with named_range("teacher"):
            if not self._supervision.active(step):
                return None
            self._side.follow()
            return self._side.start(lambda: self._supervision.target(batch), batch)

    def start_ahead(self, step: int, batch: NoisyBatch) -> None:
        """Starts the target of the micro-batch that comes next, after all that is queued so far."""
        self._ahead = (batch, self.start(step, batch))


class Graphs:
    """CUDA graphs of a micro-batch's whole pass: runs `learn(step, batch)`, which leaves gradients at the parameters.

    The whole pass rather than `torch.compile(mode="reduce-overhead")` of its blocks: at small batches every launch
    counts, also those of the heads and the loss, which no block holds; the blocks share one compiled function, whose
    graph would be recorded again for each block's weights; and a graph tree overwrites its outputs, among which are the
    tapped streams. The optimiser stays outside, so that skipped steps, rollbacks and checkpoints are as ever.

    `kind` tells passes of a step number apart that run other work on the same shapes. Gradients must be None before
    every call. The first passes of each kind and shape are ordinary ones, on the stream that capturing takes.
    """

    def __init__(
        self,
        learn: Callable[[int, NoisyBatch], Losses],
        parameters: Sequence[nn.Parameter],
        kind: Callable[[int], Hashable],
        device: torch.device,
    ) -> None:
        self._learn, self._parameters, self._kind = learn, parameters, kind
        self._stream = torch.cuda.Stream(device)
        self._side = SideStream(self._stream)
        self._seen: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, Callable[[NoisyBatch], Losses]] = {}
        self._pool: Any = None

    def __call__(self, step: int, batch: NoisyBatch) -> Losses:
        key = (self._kind(step), tuple(tensor.shape for tensor in tensors(batch)))
        if key not in self._replays:
            self._seen[key] += 1
            if self._seen[key] <= WARM_UP:
                self._side.follow()
                return self._side.start(lambda: (self._learn(step, batch), self._gradients()), batch)()[0]
            self._replays[key] = self._capture(step, batch)
        return self._replays[key](batch)

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self._parameters]

    def _capture(self, step: int, batch: NoisyBatch) -> Callable[[NoisyBatch], Losses]:
        """Records the pass without running it; returns what runs it for another batch.

        Graphs share one pool: they never run at the same time.
        """
        graph, static = torch.cuda.CUDAGraph(), with_tensors(batch, torch.clone)
        # Other threads, which read data and save checkpoints, may go on using CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = self._learn(step, static)
        self._pool, gradients = graph.pool(), self._gradients()

        def replay(batch: NoisyBatch) -> Losses:
            for mine, tensor in zip(tensors(static), tensors(batch), strict=True):
                mine.copy_(tensor)
            graph.replay()
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            return with_tensors(result, torch.clone)

        return replay


class Step:
    """Holds what a step needs; call it with the step number and this rank's micro-batches."""

    def __init__(
        self, model: SiT, supervision: Supervision, optimizer: Optimizer, recipe: Recipe, ranks: Ranks
    ) -> None:
        self.model, self.supervision, self.optimizer = model, supervision, optimizer
        self.recipe, self.heartbeat = recipe, ranks.heartbeat
        self.targets = Targets(supervision, recipe.run, ranks.device)
        self.following: Callable[[], Sequence[NoisyBatch] | None] = lambda: None
        """Returns the next step's micro-batches, None after the last step; called by a schedule that looks ahead."""
        self._graphs: Graphs | None = None
        if recipe.run.cuda_graphs:
            learn = partial(self._learn, last=False)
            self._graphs = Graphs(learn, optimizer.parameters(), supervision.active, ranks.device)
        self.gradients: GradientSum | ShardedSum
        if is_sharded(model):
            self.gradients = ShardedSum((model, supervision.heads))
        else:
            self.gradients = GradientSum(optimizer.parameters(), ranks, REDUCTION[recipe.optim.reduction])

    def __call__(self, step: int, micro_batches: Sequence[NoisyBatch]) -> tuple[Losses, Tensor]:
        """Runs the step; returns the losses and the gradients' global norm, all left on the device."""
        self.heartbeat.step = step + 1
        parts = []
        for number, batch in enumerate(micro_batches, start=1):
            self.heartbeat.beat("step")
            if self._graphs is None:
                parts.append(self._learn(step, batch, last=number == len(micro_batches)))
            else:  # a graph calls no hooks, so that all gradients are summed after it
                parts.append(self._graphs(step, batch))
                self.gradients.expect()
            if self.targets.looks_ahead:
                self._look_ahead(step, micro_batches[number:])
        with named_range("all-reduce"):
            self.gradients.finish()
        with named_range("optimiser"):
            norm = self.optimizer.update()
        return Losses(_total([p.denoise for p in parts]), _total([p.aux for p in parts])), norm

    @memory.of_a_pass()
    def _learn(self, step: int, batch: NoisyBatch, last: bool) -> Losses:
        """Adds a micro-batch's gradients to those there are; `last`: they are complete with it."""
        losses = self.losses(batch, self.targets.start(step, batch))
        if last:
            self.gradients.expect()
        with named_range("backward"):
            (losses.denoise + losses.aux).backward()
        return Losses(losses.denoise.detach(), losses.aux.detach())

    def _look_ahead(self, step: int, rest: Sequence[NoisyBatch]) -> None:
        """Starts the target of the next micro-batch, of this step or the next one."""
        if rest:
            self.targets.start_ahead(step, rest[0])
            return
        upcoming = self.following()
        self.heartbeat.step = step + 1  # making the upcoming batches has set it to theirs
        if upcoming:
            self.targets.start_ahead(step + 1, upcoming[0])

    def losses(self, batch: NoisyBatch, target: Target | None) -> Losses:
        """The denoising loss and the supervision's, each a sum over samples weighted by 1 / global batch size."""
        with named_range("student forward"):
            prediction, hidden = self.model(batch.x_t, batch.t, batch.student_labels, self.supervision.tap)
        with named_range("loss"):
            denoise = flow.denoising_loss(prediction, batch.velocity).sum() / self.recipe.optim.batch_size
            aux = self.supervision.loss(hidden, target(), batch) if target else torch.zeros_like(denoise)
        return Losses(denoise, aux)


def _total(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum()
