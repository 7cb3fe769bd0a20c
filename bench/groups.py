"""Attention within groups of tokens, and steps of the methods without an encoder, on a CPU.

Attention is compared with that over all tokens and with the same by a mask; a method's step with a plain one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.machine import Suite, Task
from bench.measure import Effort, Row, Stopwatch, Variant, WrongResult, interleave, noise, paired, paired_ratio, total
from bench.workload import OF_ITS_OWN, ROUTES, Setup, ours
from st_fast.model.attention import Attend, attend_packed, choose
from st_fast.model.layout import Groups
from st_fast.recipe.sizes import SIZES
from st_fast.recipe.tokens import divided

SHARES = 0.25, 0.75
"""As published for SRA with dual time."""


@dataclass(frozen=True)
class Case:
    """Attention of a size's heads over so many tokens."""

    size: str
    batch: int
    tokens: int

    @property
    def lengths(self) -> tuple[int, ...]:
        return divided(self.tokens, SHARES)

    def packed(self) -> Tensor:
        """q, k and v (B, N, 3, H, d)."""
        _, width, heads = SIZES[self.size.split("/")[0]]
        return torch.randn(self.batch, self.tokens, 3, heads, width // heads).requires_grad_()


def separated(suite: Suite) -> Iterator[Task]:
    """Attention within groups at the tokens of 256 and of 512 pixels."""
    effort = suite.effort if suite.small else Effort(rounds=60, seconds=15, least=15, warmup=3)
    for case in (Case("S/2", 2, 16),) if suite.small else (Case("S/2", 8, 256), Case("S/2", 2, 1024)):
        yield f"{case.size}, batch {case.batch}, {case.tokens} tokens", partial(measure_attention, case, effort)


def measure_attention(case: Case, effort: Effort) -> Row:
    """Milliseconds of a forward and backward pass each way. WrongResult where groups are not what a mask makes."""
    cpu, qkv = torch.device("cpu"), case.packed()
    attend = choose("auto", cpu, torch.float32, qkv.shape[-1], lambda text: None, case.tokens)
    number = torch.repeat_interleave(torch.arange(len(case.lengths)), torch.tensor(case.lengths))
    same = number[:, None] == number
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "within groups": partial(_within, attend, Groups(case.lengths, separated=True)),
        "all tokens": partial(attend_packed, attend),
        "masked": partial(_masked, same),
    }
    dout = torch.randn_like(qkv[:, :, 0])
    _check(ways, qkv, dout, same)
    found = interleave({name: _variant(way, qkv, dout) for name, way in ways.items()}, cpu, effort)
    seconds = {name: total(samples) for name, samples in found.items()}
    apart = seconds["within groups"]
    return {
        "size": case.size, "batch": case.batch, "tokens": case.tokens, "groups": " + ".join(map(str, case.lengths)),
        "ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "speedup": {name: paired_ratio(values, apart) for name, values in seconds.items() if name != "within groups"},
        "scores": case.tokens**2 / sum(length**2 for length in case.lengths),
        "noise": noise(apart), "rounds": len(apart),
    }  # fmt: skip


def _within(attend: Attend, groups: Groups, qkv: Tensor) -> Tensor:
    return attend_packed(attend, qkv, groups)


def _masked(same: Tensor, qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same).transpose(1, 2)


def _variant(way: Callable[[Tensor], Tensor], qkv: Tensor, dout: Tensor) -> Variant:
    def run(number: int, watch: Stopwatch) -> None:
        with watch("forward"):
            out = way(qkv)
        with watch("backward"):
            torch.autograd.grad(out, qkv, dout)

    return run


def _check(ways: dict[str, Callable[[Tensor], Tensor]], qkv: Tensor, dout: Tensor, same: Tensor) -> None:
    """Output and gradients within groups are off from float64 by at most twice what the mask's are."""
    exact = qkv.detach().double().requires_grad_()
    out = _masked(same, exact)
    truth = out, *torch.autograd.grad(out, exact, dout.double())
    errors = {}
    for name in ("within groups", "masked"):
        out = ways[name](qkv)
        pair = zip((out, *torch.autograd.grad(out, qkv, dout)), truth, strict=True)
        errors[name] = [(found - wanted).abs().max().item() for found, wanted in pair]
    for found, allowed in zip(errors["within groups"], errors["masked"], strict=True):
        if not found <= 2 * allowed + 1e-6 or not math.isfinite(found):
            raise WrongResult(f"attention within groups is off by {found:.1e}, with a mask by {allowed:.1e}")


def methods(suite: Suite) -> Iterator[Task]:
    """Steps at S/2, batch 8; under a route 16.

    What a step does whatever its tokens, its update and modulations, is 3 % of a plain one at 8, and no route's doing.
    """
    effort = suite.effort if suite.small else Effort(rounds=40, seconds=120, least=8, warmup=1)
    sizes: dict[str, Any] = {"tokens": 16, "depth": 4} if suite.small else {}
    for stage in (*OF_ITS_OWN, *ROUTES):
        batch = 2 if suite.small else 16 if stage in ROUTES else 8
        setup = Setup("S/2", stage, batch, suite.device, **sizes)
        yield setup.label, partial(measure_method, setup, effort, stage)
    for batch in (2,) if suite.small else (8, 32):
        for name, options in MUON.items():
            setup = Setup("S/2", "plain", batch, suite.device, **sizes, options=options)
            yield f"{setup.label}, {name}", partial(measure_method, setup, effort, name)


MUON = {
    "plain, Muon": ("--optim.name=muon",),
    "plain, Muon in bf16": ("--optim.name=muon", "--optim.muon_precision=bf16"),
}


def measure_method(setup: Setup, effort: Effort, name: str) -> Row:
    """A step's time over that of a plain one in turns, and its floor: the same of their FLOPs, Muon's products among
    them."""
    with ExitStack() as loops:
        both = setup, replace(setup, stage="plain", options=())
        method, plain = (loops.enter_context(ours(one)) for one in both)
        found = paired(method, plain, "plain", setup.device, effort, block=1)
        with FlopCounterMode(display=False) as update:
            method.trainer.optimizer.update()
        flops = method.flops + update.get_total_flops()
        return {
            "size": setup.size, "stage": name, "batch": setup.batch, "tokens": setup.tokens,
            "times_plain": found["speedup"], "floor": flops / plain.flops, "ms": found["ms"],
            "noise": found["noise"], "rounds": found["rounds"],
        }  # fmt: skip
