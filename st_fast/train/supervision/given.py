"""Supervision by a module that a program gives: called with the student's tokens, it returns its loss."""

from collections.abc import Callable
from contextvars import ContextVar

from torch import Tensor, nn

from st_fast.core.errors import UserError
from st_fast.recipe import methods
from st_fast.train.supervision import NoisyBatch, Parts, Supervision

MODULE: ContextVar[Callable[[], nn.Module] | None] = ContextVar("MODULE", default=None)
"""What makes the module of the run that is under way; a recipe holds no code."""


class Given(Supervision):
    """`module(hidden, x_t, t, y)` → the mean of its loss over the samples it is given, with its own weight.

    Its parameters that require a gradient are trained, saved and dropped as any method's heads are.
    """

    settings: methods.Given

    def __init__(self, settings: methods.Given, parts: Parts) -> None:
        super().__init__(settings, parts)
        make = MODULE.get()
        if make is None:
            raise UserError('supervision = "given": a module from Python is wanted: st_fast.Trainer(…, supervision=…)')
        self.heads = make()

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        loss: Tensor = self.heads(hidden, batch.x_t, batch.t, batch.condition)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"supervision: {type(self.heads).__name__} returned {what}; a loss of one number is needed")
        return loss.float().reshape(()) * batch.rows.weight.sum()  # each weighs 1 / global batch size
