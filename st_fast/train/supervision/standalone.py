"""Self-Transcendence's stage 2 for a training loop of somebody else's: the trainer's own code, called with tensors."""

from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from st_fast import kernels
from st_fast.core.errors import UserError
from st_fast.model import DiffusionTransformer, stored
from st_fast.model.own import OwnNetwork, tokens_of
from st_fast.model.side_stream import batched
from st_fast.recipe import methods
from st_fast.recipe.keys import build
from st_fast.recipe.methods import Mask
from st_fast.train.supervision import NoisyBatch, Parts, Rows, select_rows
from st_fast.train.supervision.self_transcendence import Head
from st_fast.train.supervision.self_transcendence import SelfTranscendence as Method


class SelfTranscendence(nn.Module):
    """λ · ℓ(q(hidden), f_∅ + ω·(f_y − f_∅)), f a block of a frozen teacher (arXiv 2601.07773), as a module.

        supervise = SelfTranscendence("runs/mine/align", student_depth=2, teacher_depth=4)
        loss = mse(velocity, noise - x) + supervise(hidden, x_t, t, y)

    t = 0 is data and t = 1 noise, x_t = (1 − t)·x + t·ε. The projection q is trained: give `supervise.parameters()` to
    the optimiser. The teacher moves with `.to(device)`, but is no part of the parameters and of the state.

    teacher: a stage or checkpoint of a run, another file or folder that st_fast reads, or a module: one of st_fast's,
    or of your own, whose blocks `tap` has named, or with `forward(x, t, y, tap) → (velocity, stream)`; it is put into
    eval mode and frozen. student_depth: only says which block's output `hidden` is. width: channels of `hidden`,
    teacher_width: of the teacher's blocks, and null_label: the label that stands for none; all are the teacher's own
    where it is st_fast's. The others are the keys of `supervision = "self_transcendence"` (docs/recipe.md). UserError
    for a value out of range.
    """

    def __init__(
        self, teacher: str | Path | nn.Module, student_depth: int = 8, teacher_depth: int = 16, *,
        cfg_scale: float = 30.0, loss: Literal["mse", "cosine", "normalized_mse"] = "mse", weight: float = 0.5,
        hidden: int = 2048, t_range: tuple[float, float] = (0.4, 0.7), mask: Mask = "sample",
        weights: Literal["raw", "ema"] = "raw", width: int | None = None, teacher_width: int | None = None,
        null_label: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        given: dict[str, Any] = dict(
            student_depth=student_depth, teacher_depth=teacher_depth, cfg_scale=cfg_scale, loss=loss, weight=weight,
            hidden=hidden, t_range=list(t_range), mask=mask,
        )  # fmt: skip
        self.settings = build(methods.SelfTranscendence, given, type(self).__name__)
        frozen = _teacher(teacher, weights, null_label, width)
        own = frozen.config.width
        table = kernels.select({}, frozen.device)
        if teacher_depth > frozen.config.depth:
            raise UserError(f"teacher_depth = {teacher_depth}: the teacher has {frozen.config.depth} blocks")
        self._width = width or own
        self.head = Head(self._width, hidden, table, teacher_width or own)
        self._method = Method(self.settings, Parts(frozen.config, table, frozen, branches=batched))
        self._method.heads = self.head

    @property
    def student_depth(self) -> int:
        """The student's block whose output `hidden` is."""
        return self.settings.student_depth

    def forward(self, hidden: Tensor, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """hidden (B, N, D) or (B, D, h, w), x_t (B, C, H, W), t (B,) in [0, 1], labels y (B,) int64 → scalar float32.

        The mean over the batch, by `mask`; samples outside `t_range` add nothing and cost no teacher. Labels are the
        true ones, not dropped. Waits for the device once, to know how many samples are inside.
        """
        selection = self.settings.selection
        index, weight = select_rows(t.detach().float().cpu(), slice(0, len(t)), selection)
        rows = Rows(index.to(t.device), weight.to(t.device))
        batch = NoisyBatch(x_t, x_t, x_t, x_t, t, y, y, index, rows)  # what the method reads of it
        target = self._method.target(batch)
        tokens = tokens_of(hidden).to(next(self.head.parameters()).dtype)
        if tokens.shape[-1] != self._width:
            raise UserError(f"hidden has {tokens.shape[-1]} channels, the projection takes {self._width} (width)")
        if len(target[0]) and tokens.shape[1] != target[0].shape[1]:
            raise UserError(
                f"hidden has {tokens.shape[1]} tokens, the teacher's block {target[0].shape[1]}; one grid is needed"
            )
        return self._method.loss(tokens, target, batch)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._method.teacher._apply(fn)
        return self


def _teacher(
    teacher: str | Path | nn.Module, weights: Literal["raw", "ema"], null_label: int | None, width: int | None
) -> DiffusionTransformer:
    """The frozen network that gives the features."""
    if isinstance(teacher, str | Path):
        return _read(Path(teacher), weights)
    if isinstance(teacher, DiffusionTransformer):
        found = teacher
    else:
        if null_label is None or width is None:
            raise UserError(
                f"teacher = {type(teacher).__name__}: a module that is not st_fast's: null_label, the label that "
                "stands for none, and width, the channels of its blocks, are needed"
            )
        found = OwnNetwork.around(teacher, null_label, width)
    return found.eval().requires_grad_(False)


def _read(path: Path, weights: Literal["raw", "ema"]) -> DiffusionTransformer:
    """A trained model, for its features."""
    origin = stored.read_model(path, print, only=weights)
    cpu = torch.device("cpu")
    return stored.frozen(
        stored.weights_of(origin, weights), origin.loaded.config, kernels.select({}, cpu), cpu, torch.float32,
        role="teacher",
    )  # fmt: skip
