"""One optimisation step: teacher, student, losses, backward, update. No file, no log, no host sync.

Targets are computed before the student's pass, during it on a side stream, or a step ahead (`run.teacher_placement`).
"ahead" starts the target of the micro-batch that comes next as soon as this one's backward pass is queued, so that it
overlaps the all-reduce and the memory-bound optimiser. A frozen teacher does not see the update in between, so the
target is the same.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from st_fast.core.errors import Say
from st_fast.core.ranks import Ranks
from st_fast.model import DiffusionTransformer, flow
from st_fast.model.side_stream import Future, side_stream, with_tensors
from st_fast.recipe.schema import Recipe, Run
from st_fast.train import memory
from st_fast.train.graphs import Graphs, Losses
from st_fast.train.optim import Optimizer
from st_fast.train.parallel import REDUCTION, GradientSum, ShardedSum, is_sharded
from st_fast.train.profiling import named_range
from st_fast.train.supervision import NoisyBatch, Supervision, on_same_tokens

Target = Future[tuple[Tensor, ...]]


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
        if ahead is not None and ahead[0] is batch and self._supervision.active(step):  # it may have ended since
            return ahead[1]
        with named_range("teacher"):
            if not self._supervision.active(step):
                return None
            self._side.follow()
            return self._side.start(lambda: self._supervision.target(batch), batch)

    def start_ahead(self, step: int, batch: NoisyBatch) -> None:
        """Starts the target of the micro-batch that comes next, after all that is queued so far."""
        self._ahead = (batch, self.start(step, batch))


class GradientsOfPasses:
    """The sum of the gradients of a step's passes: in a few launches a pass, where autograd adds tensor by tensor.

    Rounded as autograd does it, in the order of the passes. The second copy that this takes is there when activations
    are not.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    @torch.no_grad()
    def take(self) -> None:
        """Adds the parameters' gradients to the sum and leaves None."""
        gradients = [parameter.grad for parameter in self._parameters]
        pairs = [(a, b) for a, b in zip(self._sums, gradients, strict=True) if a is not None and b is not None]
        if pairs:
            torch._foreach_add_([a for a, _ in pairs], [b for _, b in pairs])
        self._sums = [b if a is None else a for a, b in zip(self._sums, gradients, strict=True)]
        for parameter in self._parameters:
            parameter.grad = None

    def put_back(self) -> None:
        """Makes the sum the parameters' gradients."""
        for parameter, gradient in zip(self._parameters, self._sums, strict=True):
            parameter.grad = gradient


class Step:
    """Holds what a step needs; call it with the step number and this rank's micro-batches."""

    def __init__(
        self,
        model: DiffusionTransformer,
        supervision: Supervision,
        optimizer: Optimizer,
        recipe: Recipe,
        ranks: Ranks,
        say: Say,
        direction: float = 0.0,
    ) -> None:
        self.direction = direction
        """The weight of the velocity's direction in the loss."""
        self.model, self.supervision, self.optimizer = model, supervision, optimizer
        self.recipe, self.heartbeat = recipe, ranks.heartbeat
        self.targets = Targets(supervision, recipe.run, ranks.device)
        self.following: Callable[[], Sequence[NoisyBatch] | None] = lambda: None
        """Returns the next step's micro-batches, None after the last step; called by a schedule that looks ahead."""
        self._graphs: Graphs | None = None
        self._device, self._say = ranks.device, say
        self.use_graphs(recipe.run.graphs)
        self.alone = ranks.count == 1 and not is_sharded(model)
        """Whether nothing waits for a gradient before the last pass has ended."""
        self.gradients: GradientSum | ShardedSum
        if is_sharded(model):
            self.gradients = ShardedSum((model, supervision.heads))
        else:
            self.gradients = GradientSum(optimizer.parameters(), ranks, REDUCTION[recipe.optim.reduction])

    def __call__(self, step: int, micro_batches: Sequence[NoisyBatch]) -> tuple[Losses, Tensor]:
        """Runs the step; returns the losses and the gradients' global norm, all left on the device."""
        self.heartbeat.step = step + 1
        parts, sums = [], GradientsOfPasses(self.optimizer.parameters())
        apart = self.alone and len(micro_batches) > 1
        for number, batch in enumerate(micro_batches, start=1):
            self.heartbeat.beat("step")
            if self._graphs is None:
                parts.append(self._learn(step, batch, last=number == len(micro_batches)))
                if apart:
                    sums.take()
            else:  # a graph calls no hooks, so that all gradients are summed after it
                parts.append(self._graphs(step, batch))
                self.gradients.expect()
            if self.targets.looks_ahead:
                self._look_ahead(step, micro_batches[number:])
        if apart:
            sums.put_back()
        with named_range("all-reduce"):
            self.gradients.finish()
        with named_range("optimiser"):
            norm = self.optimizer.update()
        directions = [p.direction for p in parts if p.direction is not None]
        direction = _total(directions) if directions else None
        return Losses(_total([p.denoise for p in parts]), _total([p.aux for p in parts]), direction), norm

    def use_graphs(self, used: bool) -> None:
        """Replays passes as graphs from now on, or makes ordinary ones."""
        learn, parameters = partial(self._learn, last=False), self.optimizer.parameters()
        active, device = self.supervision.active, self._device
        self._graphs = Graphs(learn, parameters, active, device, self._say) if used else None

    def forward(self, step: int, batch: NoisyBatch) -> Losses:
        """The losses of a micro-batch, with their graphs."""
        return self.losses(batch, self.targets.start(step, batch))

    @memory.of_a_pass()
    def _learn(self, step: int, batch: NoisyBatch, last: bool) -> Losses:
        """Adds a micro-batch's gradients to those there are; `last`: they are complete with it."""
        losses = self.forward(step, batch)
        if last:
            self.gradients.expect()
        with named_range("backward"):
            losses.backward()
        return with_tensors(losses, torch.detach)

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
        """The denoising loss, the supervision's with the contrast's, and the direction's: sums / global batch size."""
        with named_range("student forward"):
            inputs = batch.x_t, batch.t, batch.student_condition
            prediction, hidden = self.model(*inputs, self.supervision.tap, batch.layout)
        with named_range("loss"):
            goal = self.supervision.denoising_target(prediction, hidden, batch)
            denoise = flow.denoising_loss(prediction, goal).sum() / self.recipe.optim.batch_size
            aux = torch.zeros_like(denoise)
            if target is not None:
                compared = on_same_tokens(self.supervision.tap, hidden, target(), batch)
                aux = self.supervision.loss(*compared, batch)
            if (negative := batch.negative) is not None:  # in aux, so that denoise can be compared with any other run's
                pushed = negative.weight * flow.denoising_loss(prediction, negative.velocity)
                aux = aux - pushed.sum() / self.recipe.optim.batch_size
            direction = None
            if self.direction:
                off = flow.direction_loss(prediction, goal).sum()
                direction = self.direction * off / self.recipe.optim.batch_size
        return Losses(denoise, aux, direction)


def _total(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum()
