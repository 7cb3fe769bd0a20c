"""The optimiser's step: clip, AdamW, weight average, and the low-precision copy on CUDA, against PyTorch's own.

The rival is what PyTorch offers for it: `clip_grad_norm_`, `AdamW(fused=True)`, `_foreach_lerp_`, `_foreach_copy_`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bench.machine import Suite, Task
from bench.measure import (
    Copy,
    Effort,
    Row,
    Stopwatch,
    Variant,
    WrongResult,
    interleave,
    noise,
    paired_ratio,
    ratios,
    spread,
)
from st_fast import kernels
from st_fast.kernels import reference
from st_fast.kernels.common.trial import Draw
from st_fast.model import SiT
from st_fast.recipe.architecture import resolve_model
from st_fast.recipe.schema import Model

LR, BETAS, EPS, DECAY, EMA, CLIP = 1e-4, (0.9, 0.999), 1e-8, 0.0, 0.9999, 1.0
GATE_STEPS = 3
TOLERANCE = 1e-6
"""Of a parameter's or average's change by a step, relative to the parameter's own size: issue 3's."""


@dataclass(frozen=True)
class OptimiserCase:
    """The trainable tensors of one model."""

    name: str
    device: torch.device
    shapes: tuple[torch.Size, ...] = field(repr=False)

    @property
    def key(self) -> str:
        return f"adamw_ema | {self.name}"

    @property
    def low(self) -> torch.dtype | None:
        """The dtype of gradients and copies where it is not float32."""
        return torch.bfloat16 if self.device.type == "cuda" else None

    @property
    def parameters(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    @property
    def moved(self) -> int:
        """Bytes: p, m, v and EMA read and written, g read twice (for the norm, for the step), the copy written."""
        gradient, copy = (2, 2) if self.low else (4, 0)
        return self.parameters * (4 * 8 + 2 * gradient + copy)


def cases(device: torch.device, full: bool) -> list[OptimiserCase]:
    """Models whose optimiser is measured on such a device."""
    names = ["SiT-B/2", "SiT-XL/2"] if device.type == "cuda" else ["SiT-S/2", *(["SiT-B/2"] if full else [])]
    return [OptimiserCase(name, device, model_shapes(name)) for name in names]


def model_shapes(name: str) -> tuple[torch.Size, ...]:
    """Shapes of the trainable tensors of a named model."""
    with torch.device("meta"):
        model = SiT(resolve_model(Model(name)), kernels.select({}, torch.device("cpu")))
    return tuple(p.shape for p in model.parameters() if p.requires_grad)


@dataclass
class State:
    """Everything a step reads and writes."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[Tensor]
    copies: list[Tensor]
    step: Tensor
    lr: Tensor


def fresh(case: OptimiserCase, shapes: tuple[torch.Size, ...]) -> State:
    """A new state over `shapes`: weights of a model's size, gradients whose norm the clip cuts."""
    draw = Draw(case.device, torch.float32, 0)
    params = [0.02 * draw(*shape) for shape in shapes]
    return State(
        params=params,
        grads=[draw(*shape, dtype=case.low) for shape in shapes],
        exp_avgs=[torch.zeros_like(p) for p in params],
        exp_avg_sqs=[torch.zeros_like(p) for p in params],
        emas=[p.clone() for p in params],
        copies=[p.to(case.low) for p in params] if case.low else [],
        step=torch.zeros((), device=case.device),
        lr=torch.full((), LR, device=case.device),
    )


def fused_step(state: State) -> None:
    """The norm and the one-pass op, as `st_fast.train.optim` calls them."""
    norm = kernels.grad_norm(state.grads)
    lists = (state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, state.emas, state.copies)
    kernels.adamw_ema_(*lists, state.step, norm, state.lr, *BETAS, EPS, DECAY, EMA, CLIP)


def ours(case: OptimiserCase) -> Variant:
    """The fused step, on a state of its own."""
    state = fresh(case, case.shapes)

    def run(number: int, watch: Stopwatch) -> None:
        with watch("step"):
            fused_step(state)

    return run


def torch_step(case: OptimiserCase) -> Variant:
    """The same with PyTorch's own fused pieces."""
    state = fresh(case, case.shapes)
    parameters = [torch.nn.Parameter(p) for p in state.params]
    for parameter, gradient in zip(parameters, state.grads, strict=True):
        parameter.grad = gradient.float()
    optimiser = torch.optim.AdamW(parameters, LR, BETAS, EPS, DECAY, fused=True)

    def run(number: int, watch: Stopwatch) -> None:
        with watch("step"), torch.no_grad():
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimiser.step()
            torch._foreach_lerp_(state.emas, list(parameters), 1 - EMA)
            if state.copies:
                torch._foreach_copy_(state.copies, list(parameters))

    return run


def check(case: OptimiserCase) -> None:
    """Raises WrongResult unless a few steps on a few tensors agree with the reference."""
    few = tuple(sorted(case.shapes, key=lambda shape: shape.numel())[:12])
    mine, theirs = fresh(case, few), fresh(case, few)
    for _ in range(GATE_STEPS):
        fused_step(mine)
        lists = (theirs.params, theirs.grads, theirs.exp_avgs, theirs.exp_avg_sqs, theirs.emas, theirs.copies)
        norm = reference.grad_norm(theirs.grads)
        reference.adamw_ema_(*lists, theirs.step, norm, theirs.lr, *BETAS, EPS, DECAY, EMA, CLIP)
    for what in ("params", "emas", "exp_avgs", "exp_avg_sqs"):
        for i, (a, b) in enumerate(zip(getattr(mine, what), getattr(theirs, what), strict=True)):
            worst = float((a - b).abs().max() / b.abs().max())
            if not worst <= TOLERANCE:
                raise WrongResult(f"{case.key}: {what}[{i}] differs from the reference by {worst:.1e}, not {TOLERANCE}")


def measure(case: OptimiserCase, effort: Effort) -> Row:
    """The row of one case. Raises WrongResult before anything is timed."""
    check(case)
    copy = Copy(case.device)
    variants: dict[str, Variant] = {"fused": ours(case), "torch": torch_step(case), "copy": copy}
    samples = interleave(variants, case.device, effort)
    rate = copy.moved / statistics.median(samples["copy"]["copy"])
    steps = {name: s["step"] for name, s in samples.items() if name != "copy"}
    seconds = statistics.median(steps["fused"])
    figures = {
        "ms": {name: 1e3 * statistics.median(values) for name, values in steps.items()},
        "speedup": {"torch": paired_ratio(steps["torch"], steps["fused"])},
        "gb_per_s": case.moved / seconds / 1e9,
        "of_copy_rate": case.moved / seconds / rate,
        "of_floor": case.moved / seconds / rate,
        "noise": noise(steps["fused"]),
        "noise_of": {
            "torch": noise(ratios(steps["torch"], steps["fused"])),
            **dict.fromkeys(("of_copy_rate", "of_floor"), noise(ratios(samples["copy"]["copy"], steps["fused"]))),
        },
    }
    row: Row = {"op": "adamw_ema", "size": case.name, "dtype": str(case.low or torch.float32).removeprefix("torch.")}
    return row | {
        "rounds": len(steps["fused"]),
        "copy_rate": rate,
        "both": figures,
        "spread_ms": spread(steps["fused"]),
    }


def optimisers(suite: Suite) -> Iterator[Task]:
    """The optimiser's step of every model."""
    for setting in cases(suite.device, suite.full):
        yield setting.key, partial(measure, setting, suite.effort)
