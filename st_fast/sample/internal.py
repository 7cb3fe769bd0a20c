"""What Internal Guidance leads away from: the network's internal head or, without one, stage 1's head.

The latter belongs to training, so a run's checkpoint has it beside the trunk: its raw weights only, no average.
"""

from dataclasses import dataclass, replace

import torch

from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.kernels import KernelTable
from st_fast.model.finite import check_finite
from st_fast.model.stored import Weights
from st_fast.model.velocity_head import Head
from st_fast.recipe.methods import InternalGuidance, VelocityHead
from st_fast.recipe.schema import Sample, Stage
from st_fast.sample.source import Source


@dataclass(frozen=True)
class EarlyHead:
    """Stage 1's head, which reads the stream after a block and predicts the velocity."""

    module: Head
    block: int


def _method(source: Source) -> VelocityHead | None:
    """The settings of the source's stage, where it is a stage 1."""
    methods = [stage.method for stage in source.recipe.stages if stage.name == source.stage]
    return methods[0] if methods and isinstance(methods[0], VelocityHead) else None


def _has_head(stage: Stage) -> bool:
    """Whether samples of the stage can be guided by a head."""
    method = stage.method
    return isinstance(method, InternalGuidance) or (isinstance(method, VelocityHead) and method.target == "velocity")


def fitted(settings: Sample, source: Source) -> tuple[Sample, Source]:
    """The settings, with Internal Guidance only at times for which the head was trained; then the source says so.

    UserError where the model has no head that predicts the velocity, or none that was trained at any of these times.
    """
    scale, (low, high) = settings.internal_guidance, settings.internal_range
    if scale == 1.0 or source.recipe.model.internal_head:
        return settings, source
    method, asked = _method(source), f"--internal-guidance {scale:g}"
    if method is None:
        raise UserError(
            f'{asked}: {source.named} has no internal head; supervision = "internal_guidance" trains one, and '
            f'"velocity_head" one that serves{source.others_with(_has_head)}'
        )
    if method.target != "velocity":
        raise UserError(f"{asked}: the head of {source.stage} predicts the clean latent (target = {method.target!r})")
    first, last = method.t_range
    if max(low, first) >= min(high, last):
        what = f"the head of {source.stage} was trained at times {first:g} to {last:g} (t_range)"
        raise UserError(f"--internal-range {low:g} {high:g}: {what}")
    inside = (max(low, first), min(high, last))
    line = (
        f"internal guidance by the head of block {method.depth}, raw weights, at times {inside[0]:g} to {inside[1]:g}"
    )
    return replace(settings, internal_range=inside), replace(source, remarks=(*source.remarks, line))


def early_head(
    source: Source, found: Weights, kernels: KernelTable, device: torch.device, dtype: torch.dtype
) -> EarlyHead | None:
    """Stage 1's head of the model whose weights were `found`; None where the network has an internal head itself.

    UserError where its checkpoint lacks the head, or that is not what the recipe says.
    """
    method, where = _method(source), f"{found.path}: heads"
    if source.recipe.model.internal_head or method is None:
        return None
    tensors = found.heads
    if tensors is None:
        tensors = checkpoint.load(found.path, ("heads",)).groups["heads"]
    module = Head(source.recipe.model, method.hidden, kernels)
    checkpoint.match_strictly(module.state_dict(), tensors, where)
    check_finite(tensors, where)
    module.load_state_dict(tensors)
    return EarlyHead(module.to(device, dtype), method.depth)
