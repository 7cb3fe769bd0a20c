"""What a choice of the recipe costs or saves: the step with it beside the step as it is, in turns, and its memory.

    python -m bench.choices --size S/2 --batch 8            here, all choices; prints milliseconds, ratio and noise

The loss of the first step must be the default's before anything is timed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.machine import Row, notices
from bench.measure import Effort, paired
from bench.op_times import default_device
from bench.step import tidy
from bench.workload import ROOT, STAGES, Ours, Setup, make_recipe, ours
from st_fast.core.errors import UserError
from st_fast.kernels.table import auto
from st_fast.model.attention import AUTO_ORDER, BACKENDS
from st_fast.model.fp8 import check_fp8

TRUNK_OPS = ("norm_modulate", "gate_residual_norm_modulate", "qk_norm", "gelu_tanh")
"""Ops of the plain step."""
CHOICES = {
    **{f"{op} {how}": (f"--kernels.{op}={how}",) for op in TRUNK_OPS for how in ("reference", "fused")},
    "compile off": ("--run.compile=off",),
    "compile on": ("--run.compile=on",),
    **{f"attention {name}": (f"--model.attention={name}",) for name in BACKENDS},
    "modulation one": ("--model.modulation=one",),
    "checkpointing block": ("--run.checkpointing=block",),
    "checkpointing attention": ("--run.checkpointing=attention",),
    "fp8 tensorwise": ("--run.fp8=tensorwise",),
    "optimiser torch": ("--optim.implementation=torch",),
    "optimiser apex": ("--optim.implementation=apex",),
}
"""What may decide a default first."""
SOME = ("modulation one", "checkpointing block", "optimiser torch", "fp8 tensorwise", "compile off", "attention math")
"""One of each kind, for a rehearsal."""
SAME_LOSS = {"cuda": 5e-3, "cpu": 1e-5}
"""Relative difference of the first step's loss that a choice may make: bf16's rounding, float32's."""
FP8_LOSS = 5e-2


def others(device: torch.device) -> list[str]:
    """The choices that are not the default on such a device."""
    kind = device.type
    default = {f"{op} {auto(op, device)}" for op in TRUNK_OPS}
    default |= {f"attention {AUTO_ORDER[kind][0]}", "compile on" if kind == "cuda" else "compile off"}
    return [name for name in CHOICES if name not in default]


def measure(setup: Setup, name: str, effort: Effort, block: int) -> Row:
    """The row of one choice; "left_out" where it can't be had here. `block` steps a round."""
    chosen = replace(setup, options=(*setup.options, *CHOICES[name]))
    try:
        with TemporaryDirectory(prefix="st_fast-bench-") as folder:
            check_fp8(make_recipe(chosen, Path(folder)), setup.device)
        with ours(setup) as default, tidy(setup.device):
            peaks = {"default": _peak(default, setup.device, beside=0)}
            beside = torch.cuda.memory_allocated(setup.device) if setup.device.type == "cuda" else 0
            with ours(chosen) as other:
                peaks[name] = _peak(other, setup.device, beside)
                row = _row({"default": default, name: other}, setup, effort, block) | {"peak_gib": peaks}
                return row | notices(default.log.said + other.log.said)
    except UserError as error:
        return {"ok": True, "left_out": str(error).replace(f"{ROOT}/", "")}


def _row(loops: dict[str, Ours], setup: Setup, effort: Effort, block: int) -> Row:
    name = list(loops)[1]
    allowed = FP8_LOSS if name.startswith("fp8") else SAME_LOSS[setup.device.type]
    losses = [float(loop()[0]) for loop in loops.values()]
    off = abs(losses[1] / losses[0] - 1)
    if not off <= allowed:
        return {"ok": False, "wrong": f"the loss is off by {off:.1e} (allowed: {allowed:.0e})"}
    return {"ok": True, "loss_off": off} | paired(loops["default"], loops[name], name, setup.device, effort, block)


def _peak(loop: Ours, device: torch.device, beside: int) -> float | None:
    """GiB at the peak of one step, without the bytes that lay `beside`; None on a CPU. It warms the step up, too."""
    if device.type != "cuda":
        loop()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    loop()
    return (torch.cuda.max_memory_allocated(device) - beside) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.choices")
    parser.add_argument("--size", default="S/2")
    parser.add_argument("--stage", default="plain", choices=STAGES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=0, help="blocks (0: the size's own)")
    parser.add_argument("--only", default="", help=f"of {', '.join(CHOICES)}")
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    setup = Setup(given.size, given.stage, given.batch, default_device(), depth=given.depth)
    for name in [given.only] if given.only else CHOICES:
        row = measure(setup, name, Effort(rounds=given.rounds, seconds=120, least=4, warmup=1), block=1)
        print(f"{setup.label}: {name}: {row}", flush=True)


if __name__ == "__main__":
    main()
