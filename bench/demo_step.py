"""`make demo`'s own step, stage 2 of recipes/digits.toml, with the ops that "auto" chooses and with the reference's."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import fields

import torch

from bench.machine import Row
from bench.measure import Effort, interleave, noise, paired_ratio
from bench.workload import Setup, our_variant, ours
from st_fast.recipe.schema import Kernels

REFERENCE = (*(f"--kernels.{field.name}=reference" for field in fields(Kernels)), "--model.attention=sdpa")
OPTIONS: dict[str, tuple[str, ...]] = {"auto": (), "reference": REFERENCE}
EFFORT = Effort(rounds=100, seconds=20, least=20, warmup=3)


def setup(kernels: str, device: torch.device) -> Setup:
    """The demo's step as its recipe has it, but for random latents and stratified t."""
    return Setup("digits", "stage 2", 64, device, options=OPTIONS[kernels])


def measure(device: torch.device, effort: Effort = EFFORT) -> Row:
    """Milliseconds a step with either, in turns."""
    with ExitStack() as loops:
        variants = {kernels: our_variant(loops.enter_context(ours(setup(kernels, device))), 1) for kernels in OPTIONS}
        samples = {name: found["step"] for name, found in interleave(variants, device, effort).items()}
    return {
        "recipe": "digits", "stage": "stage 2", "batch": 64, "rounds": len(samples["auto"]),
        "ms": {name: 1e3 * statistics.median(values) for name, values in samples.items()},
        "speedup": {"reference": paired_ratio(samples["reference"], samples["auto"])},
        "noise": noise(samples["auto"]),
    }  # fmt: skip
