"""The optimiser: AdamW with clipping and a weight average (EMA), on float32 master weights, in one op over all tensors.

In float32 the masters are the model's own parameters. In bf16 the model holds bf16 copies, written in the same pass.
All state of a sharded module (`parallel.py`) is sharded, and the op works on this rank's parts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from st_fast.model import DiffusionTransformer
from st_fast.model.stored import average_group
from st_fast.recipe.schema import Optim
from st_fast.train.parallel import is_sharded, local, locals_of, norm_of_all

UpdateOp = Callable[..., None]
NormOp = Callable[[list[Tensor]], Tensor]


def learning_rate(settings: Optim, update: Tensor, steps: int = 1, taken_over: int = 0) -> Tensor:
    """The rates of updates, counted from 1 (float64, the shape of `update`): linear warm-up, then `settings.schedule`.

    steps: the stage's, which a schedule spans; taken_over: the updates made before the stage, with its state. These
    count for the warm-up, as for AdamW, and not for the decay. As of PyTorch's schedulers the first update of a decay
    has the whole rate, and `lr_end` would be that of the update after the last.
    """
    factor = (update.double() / max(settings.warmup_steps, 1)).clamp_max_(1.0)
    if settings.schedule != "constant":
        length = settings.decay_steps or steps - max(settings.warmup_steps - taken_over, 0)
        progress = ((update.double() - (taken_over + steps - length + 1)) / length).clamp_(0.0, 1.0)
        fallen = (1 - (math.pi * progress).cos()) / 2 if settings.schedule == "cosine" else progress
        factor *= 1 - (1 - settings.lr_end) * fallen
    return factor.mul_(settings.lr)


def ema_weight(step: Tensor, grad_norm: Tensor, decay: float, warmup: bool) -> Tensor:
    """What an average moves by towards the weights after their update `step`: 0 if it was skipped, else 1 − decay.

    warmup: the decay after n updates is at most (1 + n)/(10 + n). 0-dim float32, on the device.
    """
    taken = torch.isfinite(grad_norm).float()
    return taken * ((9 / (9 + step)).clamp_min(1 - decay) if warmup else 1 - decay)


class Slots:
    """The tensors of one module, in the order of its trainable parameters, which are cast to `dtype`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, with_ema: bool, ema_decays: Sequence[float] = ()) -> None:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.untrained = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        """Parameters that are not trained (the positions), as the module uses them."""
        self.frozen = {name: p.detach().clone() for name, p in self.untrained.items()}
        """The same in float32."""
        low = dtype != torch.float32
        masters = self.masters = [p.detach().clone() if low else p for p in trained.values()]
        if low:
            module.to(dtype)  # this makes new parameters if they are sharded
        self.names, self.parameters = list(trained), [p for p in module.parameters() if p.requires_grad]
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(m.detach()) for m in masters] for _ in range(2))
        self.emas = [m.detach().clone() for m in masters] if with_ema else []
        self.other_emas = {decay: [m.detach().clone() for m in masters] for decay in ema_decays}
        """Further averages, by their decays."""
        self.step = torch.zeros((), device=self.parameters[0].device if self.parameters else "cpu")
        """0-dim float32: the number of updates made."""
        self.sharded = is_sharded(module)
        self._state: tuple[list[Tensor], ...] | None = None

    @property
    def copies(self) -> list[Tensor]:
        """The low-precision parameters that follow the masters; empty where the masters are the parameters."""
        low = bool(self.parameters) and self.masters[0] is not self.parameters[0]
        return [local(p.data) for p in self.parameters] if low else []

    def state(self) -> tuple[list[Tensor], ...]:
        """What an update changes, this rank's part of each: masters, moments, EMA and copies.

        Unsharded tensors stay where they are, so that they are listed once.
        """
        if self._state is None or self.sharded:
            kinds = self.masters, self.exp_avgs, self.exp_avg_sqs, self.emas
            self._state = *([local(tensor.detach()) for tensor in kind] for kind in kinds), self.copies
        return self._state

    def gradients(self) -> list[Tensor]:
        """The gradients; a parameter that got none has zeros."""
        found = [parameter.grad for parameter in self.parameters]
        for position, gradient in enumerate(found):
            if gradient is None:
                parameter = self.parameters[position]
                found[position] = parameter.grad = torch.zeros_like(parameter)
        return cast(list[Tensor], found)

    def moments(self, prefix: str) -> dict[str, Tensor]:
        """AdamW's state by the names that a checkpoint gives it."""
        kinds = {"exp_avg": self.exp_avgs, "exp_avg_sq": self.exp_avg_sqs}
        named = {
            f"{prefix}.{kind}.{name}": tensor
            for kind, tensors in kinds.items()
            for name, tensor in zip(self.names, tensors, strict=True)
        }
        return named | {f"{prefix}.step": self.step}


class Optimizer:
    """Trains a model (with EMA) and a method's heads (without). `dtype` is that of the parameters in use."""

    def __init__(
        self, model: nn.Module, heads: nn.Module, settings: Optim, dtype: torch.dtype, update: UpdateOp, norm: NormOp,
        steps: int = 1,
    ) -> None:  # fmt: skip
        self.settings, self._update, self._norm = settings, update, norm
        self.model, self.heads = Slots(model, dtype, True, settings.ema_decays), Slots(heads, dtype, with_ema=False)
        self._groups = [slots for slots in (self.model, self.heads) if slots.parameters]
        self._steps = steps
        self.begin(taken_over=0)

    def begin(self, taken_over: int) -> None:
        """Lays out the rates of a stage of `steps` updates that begins when so many have been made."""
        settings, self._taken_over = self.settings, taken_over
        constant = settings.schedule == "constant"
        first, count = (0, max(settings.warmup_steps, 1)) if constant else (taken_over, self._steps)
        numbers = torch.arange(first + 1, first + count + 1, dtype=torch.float32)
        self._rates = self.rate(numbers).to(self.model.step.device, torch.float32)
        """(warmup_steps,), with a schedule (steps,), float32: the rates up to the last that differs from the next."""
        self._numbers = numbers[:-1].to(self._rates.device)
        self._lr = self._rates[0].clone()
        """0-dim float32: the rate of the next update."""

    def rate(self, update: Tensor) -> Tensor:
        """The learning rates of updates, counted from 1, in float64."""
        return learning_rate(self.settings, update, self._steps, self._taken_over)

    @property
    def updates(self) -> Tensor:
        """The number of updates made (0-dim float32, on the device). Skipped steps do not count."""
        return self.model.step

    def gradients(self) -> list[Tensor]:
        """All gradients, in a fixed order; a parameter that got none has zeros."""
        return [gradient for slots in self._groups for gradient in slots.gradients()]

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, in a fixed order: the model's, then the heads'."""
        return [parameter for slots in self._groups for parameter in slots.parameters]

    @torch.no_grad()
    def update(self) -> Tensor:
        """One step from the gradients, which are then cleared; returns their global L2 norm (0-dim, on the device).

        A norm that is not finite leaves weights, moments, EMA and the number of updates as they were.
        """
        settings = self.settings
        gradients = [locals_of(slots.gradients()) for slots in self._groups]
        norm = norm_of_all(self._norm([g for group in gradients for g in group]), self.model.parameters[0])
        if len(self._rates) > 1:  # two launches, as the number is on the device: how many of 1, 2, … it has reached
            torch.take(self._rates, torch.bucketize(self.updates, self._numbers, right=True), out=self._lr)
        for slots, group in zip(self._groups, gradients, strict=True):
            masters, *state = slots.state()
            self._update(
                masters, group, *state, slots.step, norm, self._lr,
                beta1=settings.betas[0], beta2=settings.betas[1], eps=settings.eps,
                weight_decay=settings.weight_decay, ema_decay=settings.ema_decay, max_norm=settings.grad_clip,
                ema_warmup=settings.ema_warmup,
            )  # fmt: skip
            for decay, emas in slots.other_emas.items():  # a pass each; weights on the device allow no foreach lerp
                apart = torch._foreach_sub(masters, averages := locals_of(emas))
                torch._foreach_mul_(apart, ema_weight(slots.step, norm, decay, settings.ema_warmup))
                torch._foreach_add_(averages, apart)
            for parameter in slots.parameters:
                parameter.grad = None
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The checkpoint's groups: "model" and "ema" by the published keys, "heads", and "optim" with the moments.

        Of further averages a group each, by `average_group`.
        """
        model, heads = self.model, self.heads
        groups = {
            "model": dict(zip(model.names, model.masters, strict=True)) | model.frozen,
            "ema": dict(zip(model.names, model.emas, strict=True)) | model.frozen,
            "optim": model.moments("model") | heads.moments("heads"),
        }
        for decay, emas in model.other_emas.items():
            groups[average_group(decay)] = dict(zip(model.names, emas, strict=True)) | model.frozen
        if heads.names:
            groups["heads"] = dict(zip(heads.names, heads.masters, strict=True))
        return {group: {name: t.detach() for name, t in tensors.items()} for group, tensors in groups.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Copies the masters into the parameters in use, after something other than `update` changed the masters."""
        for slots in self._groups:
            for copy, master in zip(slots.copies, slots.masters, strict=False):
                copy.copy_(local(master))
            for name, value in slots.frozen.items():
                slots.untrained[name].copy_(value)


class EmaModel:
    """The student's weight average as a frozen model, for methods in which the student teaches itself.

    In float32 its parameters are the optimiser's EMA tensors themselves, without memory or copies of their own. In a
    lower precision, or in shards, they are copies that each call updates in one pass over the EMA (6 bytes of traffic
    a parameter, little compared with a forward pass). Autocast would move as much for each use, and the fused ops,
    which need one dtype throughout, would not run under it.
    """

    def __init__(self, model: DiffusionTransformer) -> None:
        self._model = model.eval().requires_grad_(False)
        self._sources: list[Tensor] = []
        self._copies: list[Tensor] = []

    def follow(self, emas: Mapping[str, Tensor]) -> None:
        """Follows these tensors, all of the model's by name, from now on. They must be updated in place."""
        sharded = is_sharded(self._model)
        for name, parameter in self._model.named_parameters():
            if parameter.dtype == emas[name].dtype and not sharded:
                parameter.data = emas[name]
            else:
                self._sources.append(local(emas[name]))
                self._copies.append(local(parameter.data))

    @torch.no_grad()
    def __call__(self) -> DiffusionTransformer:
        """The model, up to date. It keeps no state of its own, so there is nothing to save or to restore."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._sources)
        return self._model
