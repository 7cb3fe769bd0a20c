"""The correctness gate: no figure without it. Every variant's outputs and gradients against the reference in float64.

The kernel may err at most twice as much as eager PyTorch does at that dtype, in the mean square and at the worst
element; a rival that is compared with gets ten times, since only a wrong one is to be kept out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Inputs

OURS, RIVALS = 2.0, 10.0
SLACK_ULPS = 4.0
"""Rounding steps of the dtype that are always allowed: eager may by chance be exact."""


class WrongResult(AssertionError):
    """A variant that must not be timed."""


def results(call: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """The outputs of a call and the gradients to its leaves, in order."""
    outputs = call(*inputs.args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, inputs.leaves, inputs.grads[: len(outputs)])
    return [t.detach() for t in (*outputs, *grads)]


def in_float64(inputs: Inputs) -> Inputs:
    """The same values, exactly, with leaves of their own."""
    seen: dict[int, Tensor] = {}

    def up(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        return seen.setdefault(id(value), value.detach().double().requires_grad_(value.requires_grad))

    args, leaves = tuple(map(up, inputs.args)), tuple(map(up, inputs.leaves))
    return replace(inputs, args=args, leaves=leaves, grads=tuple(g.double() for g in inputs.grads))


def errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Root mean square and worst error, relative to the truth's own root mean square and largest value."""
    difference, scale = found.double() - truth, truth.abs().max().clamp_min(1e-30)
    rms = difference.square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-30)
    return float(rms), float(difference.abs().max() / scale)


def check(case: Case, variants: dict[str, Callable[..., Any]], inputs: Inputs) -> None:
    """Raises WrongResult, naming case, variant, result and both errors; "fused" is held to OURS, others to RIVALS."""
    truth = results(case.eager, in_float64(inputs))
    eager = [errors(found, true) for found, true in zip(results(case.eager, inputs), truth, strict=True)]
    slack = SLACK_ULPS * torch.finfo(case.dtype).eps
    for name, call in variants.items():
        factor = OURS if name == "fused" else RIVALS
        for i, (found, true) in enumerate(zip(results(call, inputs), truth, strict=True)):
            mine = errors(found, true)
            for kind, ours, theirs in zip(("rms", "worst"), mine, eager[i], strict=True):
                if not ours <= factor * theirs + slack:
                    raise WrongResult(
                        f"{case.key}: {name}, result {i}: {kind} error {ours:.2e}, eager's is {theirs:.2e}; "
                        f"at most {factor:g} times that + {slack:.1e} is allowed"
                    )


SAME_LOSS = {"cuda": 5e-3, "cpu": 1e-4}
"""Relative difference of losses and norms that compiling or scheduling may make: bf16's rounding, float32's."""


def worst_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The largest relative difference of two loops' scalars, step by step."""
    pairs = (pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True))
    return max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs)
