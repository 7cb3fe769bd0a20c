"""Two of st_fast's loops in turn, in the same rounds: how many times faster is the other one?"""

from __future__ import annotations

import statistics

import torch

from bench.results import Row
from bench.timing import Effort, Stopwatch, Variant, interleave, noise, paired_ratio
from bench.workload import Ours


def beside(default: Ours, other: Ours, name: str, effort: Effort, block: int) -> Row:
    """Milliseconds a step of both, the ratio of medians in pairs and the default's noise; `block` steps a round.

    A round ends when the device is idle, so that work started for the step to come is paid for by who started it.
    """
    variants = {"default": _variant(default, block), name: _variant(other, block)}
    device = default.iterator.ranks.device
    steps = {key: samples["step"] for key, samples in interleave(variants, device, effort).items()}
    return {
        "ms": {key: 1e3 * statistics.median(values) / block for key, values in steps.items()},
        "speedup": paired_ratio(steps["default"], steps[name]),
        "noise": noise(steps["default"]),
        "rounds": len(steps["default"]),
    }


def _variant(loop: Ours, block: int) -> Variant:
    device = loop.iterator.ranks.device

    def run(number: int, watch: Stopwatch) -> None:
        with watch("step"):
            for _ in range(block):
                loop()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    return run
