"""The optimiser: AdamW with clipping and a weight average (EMA), on float32 master weights, in one op over all tensors.
With Muon (`muon.py`) over all but the blocks' matrices, which have the same clipping, average and copies.

In float32 the masters are the model's own parameters. In bf16 the model holds bf16 copies, written in the same pass.
All state of a sharded module (`parallel.py`) is sharded, and the op works on this rank's parts.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from st_fast.core.ranks import Ranks
from st_fast.model import DiffusionTransformer
from st_fast.model.stored import average_group
from st_fast.recipe.schema import Optim
from st_fast.train.adamw import NormOp, UpdateOp, ema_weight
from st_fast.train.muon import Muon, updated
from st_fast.train.parallel import is_sharded, local, locals_of, norm_of_all


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


class Slots:
    """The tensors of one module, in the order of its trainable parameters, which are cast to `dtype`.

    matrices: the names of those that Muon updates, which have no moments of AdamW.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, with_ema: bool, ema_decays: Sequence[float] = (),
        matrices: Collection[str] = (),
    ) -> None:  # fmt: skip
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
        places = range(len(self.names))
        self.adam = [place for place in places if self.names[place] not in matrices]
        """Where in these lists the parameters are that AdamW updates; `matrices`: those of Muon."""
        self.matrices = [place for place in places if self.names[place] in matrices]
        first, second = ([torch.zeros_like(masters[place].detach()) for place in self.adam] for _ in range(2))
        self.exp_avgs, self.exp_avg_sqs = first, second
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
        """What an update by AdamW changes, this rank's part of each: masters, moments, EMA and copies.

        Unsharded tensors stay where they are, so that they are listed once.
        """
        if self._state is None or self.sharded:
            masters, emas, copies = self.of(self.adam)
            self._state = masters, locals_of(self.exp_avgs), locals_of(self.exp_avg_sqs), emas, copies
        return self._state

    def of(self, places: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Masters, EMA and copies of these parameters, this rank's part of each; none where there are none."""
        masters, emas, copies = self.masters, self.emas, self.copies
        return (
            [local(masters[place].detach()) for place in places],
            [local(emas[place]) for place in places if emas],
            [copies[place] for place in places if copies],
        )

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
            for name, tensor in zip([self.names[place] for place in self.adam], tensors, strict=True)
        }
        return named | {f"{prefix}.step": self.step}


class Optimizer:
    """Trains a model (with EMA) and a method's heads (without). `dtype` is that of the parameters in use.

    ranks: among which Muon shares its work, where they have whole weights.
    """

    def __init__(
        self, model: nn.Module, heads: nn.Module, settings: Optim, dtype: torch.dtype, update: UpdateOp, norm: NormOp,
        steps: int = 1, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.settings, self._update, self._norm = settings, update, norm
        matrices = updated(model, settings)
        self.model = Slots(model, dtype, True, settings.ema_decays, matrices)
        self.heads = Slots(heads, dtype, with_ema=False)
        self.muon: Muon | None = None
        if matrices:
            masters = [self.model.masters[place] for place in self.model.matrices]
            self.muon = Muon(matrices, masters, settings, ranks)
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
                masters, [group[place] for place in slots.adam], *state, slots.step, norm, self._lr,
                beta1=settings.betas[0], beta2=settings.betas[1], eps=settings.eps,
                weight_decay=settings.weight_decay, ema_decay=settings.ema_decay, max_norm=settings.grad_clip,
                ema_warmup=settings.ema_warmup,
            )  # fmt: skip
        if self.muon is not None:
            masters, emas, copies = self.model.of(self.model.matrices)
            grads, buffers = [gradients[0][at] for at in self.model.matrices], locals_of(self.muon.momentum_buffers)
            rate = self._lr * (settings.muon_lr / settings.lr)  # the same warm-up and schedule
            self.muon.update(masters, grads, buffers, emas, copies, self.updates, norm, rate)
        for slots in self._groups:
            for decay, emas in slots.other_emas.items():  # a pass each; weights on the device allow no foreach lerp
                apart = torch._foreach_sub([local(m.detach()) for m in slots.masters], averages := locals_of(emas))
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
        if self.muon is not None:
            named = zip(self.muon.names, self.muon.momentum_buffers, strict=True)
            groups["optim"] |= {f"model.momentum_buffer.{name}": buffer for name, buffer in named}
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
