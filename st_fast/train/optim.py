"""AdamW with clipping and a weight average (EMA), on float32 master weights, as one op over all tensors.

In float32 the masters are the model's own parameters. In bf16 the model holds bf16 copies that the same pass writes.
Of a sharded module (`sharding.py`) all of it is sharded, and the op works on this rank's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from st_fast.recipe.schema import Optim
from st_fast.train.sharding import local, locals_of, norm_of_all, put

UpdateOp = Callable[..., None]
NormOp = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Slots:
    """The tensors of one module, in the order of its trainable parameters."""

    names: list[str]
    parameters: list[nn.Parameter]
    masters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[Tensor]
    untrained: dict[str, Tensor]
    """Parameters that are not trained (the positions), as the module uses them."""
    frozen: dict[str, Tensor]
    """The same in float32."""
    step: Tensor

    @property
    def copies(self) -> list[Tensor]:
        """The low-precision parameters that follow the masters; empty where the masters are the parameters."""
        low = bool(self.parameters) and self.masters[0] is not self.parameters[0]
        return [local(p.data) for p in self.parameters] if low else []


def _slots(module: nn.Module, dtype: torch.dtype, with_ema: bool) -> Slots:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    untrained: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in untrained.items()}
    low = dtype != torch.float32
    masters: list[Tensor] = [p.detach().clone() if low else p for p in trained.values()]
    if low:
        module.to(dtype)  # which makes new parameters where they are sharded
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device if parameters else torch.device("cpu")
    return Slots(
        names=list(trained),
        parameters=parameters,
        masters=masters,
        exp_avgs=[torch.zeros_like(m, requires_grad=False) for m in masters],
        exp_avg_sqs=[torch.zeros_like(m, requires_grad=False) for m in masters],
        emas=[m.detach().clone() for m in masters] if with_ema else [],
        untrained=untrained,
        frozen=frozen,
        step=torch.zeros((), dtype=torch.float32, device=device),
    )


class Optimizer:
    """Trains a model (with EMA) and a method's heads (without). `dtype` is that of the parameters in use."""

    def __init__(
        self, model: nn.Module, heads: nn.Module, settings: Optim, dtype: torch.dtype, update: UpdateOp, norm: NormOp
    ) -> None:
        self.settings, self._update, self._norm = settings, update, norm
        self.model, self.heads = _slots(model, dtype, with_ema=True), _slots(heads, dtype, with_ema=False)
        self._groups = [slots for slots in (self.model, self.heads) if slots.parameters]
        self._lr = torch.zeros((), dtype=torch.float32, device=self.model.step.device)

    def gradients(self) -> list[Tensor]:
        """All gradients, in a fixed order; a parameter that got none has zeros."""
        return [gradient for slots in self._groups for gradient in _gradients(slots)]

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, in a fixed order: the model's, then the heads'."""
        return [parameter for slots in self._groups for parameter in slots.parameters]

    def learning_rate(self) -> Tensor:
        """The next step's rate (0-dim float64, on the device): linear warm-up over updates made, then constant.

        A step that was skipped does not count, so it leaves the schedule where it was.
        """
        warmup = max(self.settings.warmup_steps, 1)
        return self.settings.lr * ((self.model.step.double() + 1) / warmup).clamp_max(1.0)

    @torch.no_grad()
    def update(self) -> Tensor:
        """One step from the gradients, which are then cleared; returns their global L2 norm (0-dim, on the device).

        A norm that is not finite leaves weights, moments, EMA and step counts untouched.
        """
        settings = self.settings
        norm = norm_of_all(self._norm(locals_of(self.gradients())), self.model.parameters[0])
        self._lr.copy_(self.learning_rate())
        for slots in self._groups:
            self._update(
                [local(m.detach()) for m in slots.masters], [local(g) for g in _gradients(slots)],
                locals_of(slots.exp_avgs), locals_of(slots.exp_avg_sqs), locals_of(slots.emas), slots.copies,
                slots.step, norm, self._lr,
                beta1=settings.betas[0], beta2=settings.betas[1], eps=settings.eps,
                weight_decay=settings.weight_decay, ema_decay=settings.ema_decay, max_norm=settings.grad_clip,
            )  # fmt: skip
            for parameter in slots.parameters:
                parameter.grad = None
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The checkpoint's groups: "model" and "ema" by the published keys, "heads", and "optim" with the moments."""
        model, heads = self.model, self.heads
        groups = {
            "model": dict(zip(model.names, model.masters, strict=True)) | model.frozen,
            "ema": dict(zip(model.names, model.emas, strict=True)) | model.frozen,
            "optim": _moments("model", model) | _moments("heads", heads),
        }
        if heads.names:
            groups["heads"] = dict(zip(heads.names, heads.masters, strict=True))
        return {group: {name: t.detach() for name, t in tensors.items()} for group, tensors in groups.items()}

    @torch.no_grad()
    def load(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over a state whose keys, shapes and dtypes are those of `state()` (checked by the caller)."""
        for group, tensors in self.state().items():
            for name, tensor in tensors.items():
                put(groups[group][name], tensor)
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Brings the parameters in use up to the masters, after something else than `update` changed these."""
        for slots in self._groups:
            for copy, master in zip(slots.copies, slots.masters, strict=False):
                copy.copy_(local(master))
            for name, value in slots.frozen.items():
                slots.untrained[name].copy_(value)


def _gradients(slots: Slots) -> list[Tensor]:
    found = []
    for parameter in slots.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


def _moments(prefix: str, slots: Slots) -> dict[str, Tensor]:
    named = {f"{prefix}.exp_avg.{n}": t for n, t in zip(slots.names, slots.exp_avgs, strict=True)}
    named |= {f"{prefix}.exp_avg_sq.{n}": t for n, t in zip(slots.names, slots.exp_avg_sqs, strict=True)}
    return named | {f"{prefix}.step": slots.step}
