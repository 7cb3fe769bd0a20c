"""Drawing samples: st_fast's sampler against the same sampler written plainly, images a second.

The plain one takes Heun's steps as a paper writes them: an eager network in float32, and both branches of the guidance
at every time as two forwards, their difference multiplied by ω inside the interval and by one outside of it; "skipping"
is the same without the second forward outside of it. The same noise must come out as the same latents, or nothing is
timed. "bf16" is st_fast's with --precision bf16, whose error is told beside it.

Beside it, what guidance costs: the same network with an internal head, unguided, with Internal Guidance at all times
(one pass), and with classifier-free guidance at all times (two).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.machine import Suite, Task
from bench.measure import (
    Effort,
    Row,
    Stopwatch,
    Variant,
    WrongResult,
    errors,
    interleave,
    noise,
    paired_ratio,
    spread,
)  # fmt: skip
from bench.plain import PlainSiT
from bench.workload import ROOT
from st_fast import kernels
from st_fast.model import DiffusionTransformer, build
from st_fast.model.attention import choose
from st_fast.model.compiling import CompiledBlocks
from st_fast.recipe import load
from st_fast.recipe.schema import Model, Sample
from st_fast.sample.draw import Draw, balanced, starting_noise
from st_fast.sample.guided import sample

TOLERANCE = 1e-3
"""Largest error of the latents, relative to the largest latent: float32 over all steps."""
PUBLISHED_RANGE = (0.0, 0.65)
"""The published interval of guidance."""


def filled(config: Model, device: torch.device, dtype: torch.dtype) -> DiffusionTransformer:
    """A model whose weights are all random, with the ops and the attention that a run would choose."""
    attend = choose("auto", device, dtype, config.width // config.heads, print)
    model = build(config, kernels.select({}, device), 0, attend)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.to(device, dtype).eval().requires_grad_(False)


@torch.no_grad()
def plain_heun(model: PlainSiT, x: Tensor, labels: Tensor, settings: Sample, skipping: bool) -> Tensor:
    """Latents (B, C, S, S) for noise x (B, C, S, S); `skipping` leaves out what the interval makes needless."""
    null = torch.full_like(labels, model.config.num_classes)

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        conditional = model(x, times, labels)[0]
        scale = settings.cfg_scale if settings.cfg_range[0] <= t <= settings.cfg_range[1] else 1.0
        if skipping and scale == 1.0:
            return conditional
        unconditional = model(x, times, null)[0]
        return unconditional + scale * (conditional - unconditional)

    for t, following in itertools.pairwise(torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64).tolist()):
        slope = velocity(x, t)
        ahead = velocity(x + (following - t) * slope, following)
        x = x + (following - t) / 2 * (slope + ahead)
    return x


def measure(device: torch.device, size: str, batch: int, steps: int, effort: Effort, depth: int = 0) -> Row:
    """The row of one size (its depth where 0); WrongResult if they don't draw the same."""
    config = load(ROOT / "recipes" / f"sit_{size}.toml", ["--data.path=none", "--run.out=none"]).model
    config = replace(config, depth=depth or config.depth)
    model, low = (filled(config, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    draw, plain = balanced(0, 0, batch, config.num_classes, device), PlainSiT(config).to(device).eval()
    plain.load_state_dict(model.state_dict())
    if device.type == "cuda":
        model.run_block = low.run_block = CompiledBlocks(print, dynamic=False)
    settings = Sample(sampler="heun", steps=steps, cfg_scale=1.9, cfg_range=PUBLISHED_RANGE)
    noise_of = partial(starting_noise, draw, config)
    draws: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: sample(model, draw, settings, "linear"),
        "bf16": lambda: sample(low, draw, settings, "linear"),
        "plain": lambda: plain_heun(plain, noise_of(), draw.labels, settings, skipping=False),
        "skipping": lambda: plain_heun(plain, noise_of(), draw.labels, settings, skipping=True),
    }
    truth = draws["plain"]().double()
    worst = {name: errors(call(), truth)[1] for name, call in draws.items()}
    for name in ("ours", "skipping"):
        if not worst[name] <= TOLERANCE:
            raise WrongResult(
                f"{config.name}: {name}: off by {worst[name]:.1e} of the largest; {TOLERANCE:.0e} is allowed"
            )
    found = interleave({name: _variant(call) for name, call in draws.items()}, device, effort)
    seconds = {name: samples["draw"] for name, samples in found.items()}
    return {
        "size": config.name.removeprefix("SiT-"), "sampler": "heun", "steps": steps, "batch": batch, "cfg_scale": 1.9,
        "guided_share": _guided_share(settings),
        "depth": config.depth,
        "images_per_s": {name: batch / statistics.median(values) for name, values in seconds.items()},
        "speedup": {name: paired_ratio(seconds[name], seconds["ours"]) for name in ("plain", "skipping")},
        "bf16_speedup": paired_ratio(seconds["plain"], seconds["bf16"]), "worst_error": worst,
        "rounds": len(seconds["ours"]), "noise": noise(seconds["ours"]), "spread_ms": spread(seconds["ours"]),
    }  # fmt: skip


def guidances(device: torch.device, size: str, batch: int, steps: int, effort: Effort, depth: int = 0) -> Row:
    """What the two guidances take of the time of drawing without any, the same number of steps."""
    config = load(ROOT / "recipes" / f"sit_{size}.toml", ["--data.path=none", "--run.out=none"]).model
    config = replace(config, depth=depth or config.depth)
    config = replace(config, internal_head=max(1, config.depth // 3))
    model, draw = filled(config, device, torch.float32), balanced(0, 0, batch, config.num_classes, device)
    if device.type == "cuda":
        model.run_block = CompiledBlocks(print, dynamic=False)
    usual = Sample(sampler="heun", steps=steps, cfg_scale=1.0, cfg_range=(0.0, 1.0))
    asked = {
        "unguided": usual,
        "internal": replace(usual, internal_guidance=1.4),
        "cfg": replace(usual, cfg_scale=1.9),
    }
    found = interleave(
        {name: _variant(partial(_drawn, model, draw, how)) for name, how in asked.items()}, device, effort
    )
    seconds = {name: samples["draw"] for name, samples in found.items()}
    return {
        "size": config.name.removeprefix("SiT-"), "sampler": "guidance, heun", "steps": steps, "batch": batch,
        "depth": config.depth, "images_per_s": {"ours": batch / statistics.median(seconds["unguided"])},
        "of_unguided": {name: paired_ratio(seconds[name], seconds["unguided"]) for name in ("internal", "cfg")},
        "rounds": len(seconds["unguided"]), "noise": noise(seconds["unguided"]),
        "spread_ms": spread(seconds["unguided"]),
    }  # fmt: skip


def _drawn(model: DiffusionTransformer, draw: Draw, settings: Sample) -> Tensor:
    return sample(model, draw, settings, "linear")


def _guided_share(settings: Sample) -> float:
    """Share of the velocity's evaluations that need both branches."""
    times = torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64).tolist()
    looked = [*times[:-1], *times[1:]]
    return sum(settings.cfg_range[0] <= t <= settings.cfg_range[1] for t in looked) / len(looked)


def _variant(call: Callable[[], Tensor]) -> Variant:
    def run(number: int, watch: Stopwatch) -> None:
        with watch("draw"):
            call()

    return run


def samplers(suite: Suite) -> Iterator[Task]:
    """One size, whose sampler says what all do."""
    size, batch, steps = ("xl", 64, 20) if suite.device.type == "cuda" else ("s", 2, 5)
    effort = Effort(rounds=5, seconds=20, least=3, warmup=0)
    if suite.small:
        size, batch, steps, effort = "s", 1, 2, suite.effort
    task = partial(measure, suite.device, size, batch, steps, effort, depth=1 if suite.small else 0)
    yield f"{size.upper()}/2, heun, {steps} steps, batch {batch}", task
    cost = partial(guidances, suite.device, size, batch, steps, effort, depth=1 if suite.small else 0)
    yield f"{size.upper()}/2, guidance, {steps} steps, batch {batch}", cost
