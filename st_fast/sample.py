"""Draws samples: ODE (Euler, Heun) and SDE (Euler–Maruyama) from noise at t = 1 to data at t = 0, with guidance.

Every sample's noise follows from (seed, sample number), so neither batch size nor rank count changes an image.

    python -m st_fast.sample runs/digits
    python -m st_fast.sample runs/digits --stage transcend --num 100 --sampler heun --steps 50 --cfg-scale 2
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from st_fast import flow, kernels, pictures, streams, teacher
from st_fast.data.manifest import read_manifest
from st_fast.errors import UserError, run_command
from st_fast.model import SiT
from st_fast.recipe import load
from st_fast.recipe.schema import Recipe, Sample
from st_fast.streams import Purpose

Velocity = Callable[[Tensor, float], Tensor]
"""(x (B, C, S, S), t) → dx/dt (B, C, S, S)."""

LAST_SDE_TIME = 0.04
"""Where REPA's SDE sampler makes its last, noiseless step to t = 0."""


@dataclass(frozen=True)
class Draw:
    """Which samples to draw: the counters of their noise and their labels."""

    ordinals: Tensor
    """(B,) int64."""
    labels: Tensor
    """(B,) int64."""
    seed: int


def balanced(seed: int, first: int, count: int, num_classes: int, device: torch.device) -> Draw:
    """Samples number first … first + count − 1; sample i has label i mod num_classes."""
    ordinals = torch.arange(first, first + count, device=device)
    return Draw(ordinals, ordinals % num_classes, seed)


def guided_velocity(model: SiT, labels: Tensor, settings: Sample) -> Velocity:
    """v̂ with classifier-free guidance (arXiv 2207.12598) where t lies in `cfg_range`, both branches as one batch.

    v = v_∅ + ω·(v_y − v_∅); outside the range, or with ω = 1, just v_y.
    """
    low, high = settings.cfg_range
    null = torch.full_like(labels, model.null_label)

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        if settings.cfg_scale == 1.0 or not low <= t <= high:
            return model(x, times, labels)[0].float()
        both = model(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat((labels, null)))[0].float()
        conditional, unconditional = both.chunk(2)
        return unconditional + settings.cfg_scale * (conditional - unconditional)

    return velocity


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Euler's method in equal steps from t = 1 to 0."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, following in itertools.pairwise(times):
        x = x + (following - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Heun's second-order method in equal steps; two evaluations a step."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, following in itertools.pairwise(times):
        slope = velocity(x, t)
        ahead = velocity(x + (following - t) * slope, following)
        x = x + (following - t) * 0.5 * (slope + ahead)
    return x


def euler_maruyama(velocity: Velocity, x: Tensor, steps: int, path: str, draw: Draw) -> Tensor:
    """The reverse SDE with diffusion 2t of SiT (arXiv 2401.08740), REPA's times: 1 → 0.04, then a noiseless step to 0.

    With s the score, dx = (v − t·s)·dt + √(2t)·dW; s follows from v and the path.
    """
    times = [*torch.linspace(1, LAST_SDE_TIME, steps, dtype=torch.float64).tolist(), 0.0]
    for number, (t, following) in enumerate(itertools.pairwise(times)):
        step = following - t
        v = velocity(x, t)
        x = x + step * (v - t * score(v, x, t, path))
        if following > 0:
            ordinals = draw.ordinals * steps + number
            noise = streams.normal(draw.seed, Purpose.SAMPLE_PATH, ordinals, x.shape[1:])
            x = x + (2 * t * -step) ** 0.5 * noise
    return x


def score(v: Tensor, x: Tensor, t: float, path: str) -> Tensor:
    """∇ log p_t(x) from the velocity: (α/α'·v − x) / (σ² − α/α'·σ'·σ); −ε̂/σ in other words."""
    alpha, sigma, d_alpha, d_sigma = (float(c) for c in flow.coefficients(torch.tensor(t, dtype=torch.float64), path))
    # α/α' diverges nowhere on (0, 1] but α' → 0 at t = 0 on the cosine path; both sides are multiplied by α'.
    return (alpha * v - d_alpha * x) / (d_alpha * sigma**2 - alpha * d_sigma * sigma)


@torch.no_grad()
def sample(model: SiT, draw: Draw, settings: Sample, path: str) -> Tensor:
    """(B, C, S, S) float32 scaled latents for the draw. The model must be in eval mode."""
    config = model.config
    shape = (config.channels, config.latent_size, config.latent_size)
    x = streams.normal(draw.seed, Purpose.SAMPLE_NOISE, draw.ordinals, shape)
    velocity = guided_velocity(model, draw.labels, settings)
    if settings.sampler == "euler":
        return euler(velocity, x, settings.steps)
    if settings.sampler == "heun":
        return heun(velocity, x, settings.steps)
    return euler_maruyama(velocity, x, settings.steps, path, draw)


def sample_batches(model: SiT, seed: int, count: int, settings: Sample, path: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents and labels of samples 0 … count − 1, `settings.batch_size` at a time."""
    device = model.pos_embed.device
    for first in range(0, count, settings.batch_size):
        size = min(settings.batch_size, count - first)
        draw = balanced(seed, first, size, model.config.num_classes, device)
        yield sample(model, draw, settings, path), draw.labels


@dataclass(frozen=True)
class Request:
    """What `python -m st_fast.sample` was asked for."""

    run: Path
    stage: str | None
    out: Path | None
    weights: Literal["raw", "ema"]
    settings: Sample


def parse(arguments: Sequence[str]) -> tuple[Request, Recipe]:
    """The command line over the run's own recipe. UserError for a folder without a run, SystemExit(2) for bad flags."""
    parser = argparse.ArgumentParser(
        prog="python -m st_fast.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder, such as runs/digits")
    parser.add_argument("--stage", help="the stage whose model draws (default: the last one that was trained)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--num", type=int, help="how many samples; number i has label i mod classes")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--sampler", choices=("euler", "heun", "sde"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cfg-scale", type=float, help="guidance ω; 1 is none")
    parser.add_argument("--cfg-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times t with guidance")
    parser.add_argument("--out", type=Path, help="the picture to write (default: RUN/STAGE/samples/manual.png)")
    given = parser.parse_args(arguments)
    if not (given.run / "recipe.toml").is_file():
        raise UserError(f"{given.run}: no recipe.toml, so no run of st_fast.train")
    recipe = load(given.run / "recipe.toml")
    chosen = {
        "num": given.num,
        "batch_size": given.batch_size,
        "sampler": given.sampler,
        "steps": given.steps,
        "cfg_scale": given.cfg_scale,
        "cfg_range": tuple(given.cfg_range) if given.cfg_range else None,
    }
    settings = replace(recipe.sample, **{key: value for key, value in chosen.items() if value is not None})
    for key in ("num", "batch_size", "steps"):
        if getattr(settings, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} {getattr(settings, key)}: at least 1")
    if settings.cfg_scale != 1.0 and recipe.model.class_dropout == 0:
        raise UserError(f"--cfg-scale {settings.cfg_scale}: the model has no null class (model.class_dropout = 0)")
    return Request(given.run, given.stage, given.out, given.weights, settings), recipe


def newest_stage(run: Path, recipe: Recipe, wanted: str | None) -> str:
    """The stage asked for, or the last one that has checkpoints; UserError where there is none."""
    names = [stage.name for stage in recipe.stages]
    if wanted is not None and wanted not in names:
        raise UserError(f"--stage {wanted}: the run has {', '.join(names)}")
    trained = [name for name in names if (run / name / "checkpoints").is_dir()]
    if not trained or (wanted is not None and wanted not in trained):
        raise UserError(f"{run}: no checkpoints of {wanted or 'any stage'} yet")
    return wanted or trained[-1]


def main(arguments: Sequence[str]) -> None:
    """Writes a grid of samples of a run."""
    request, recipe = parse(arguments)
    stage = newest_stage(request.run, recipe, request.stage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = kernels.select({}, device)
    root = request.run / stage / "checkpoints"
    model = teacher.load_frozen(root, recipe.model, request.weights, table, device, torch.float32)
    decode = pictures.decoder(Path(recipe.data.path), read_manifest(Path(recipe.data.path)), device)
    images = []
    with tqdm(total=request.settings.num, unit="image") as progress:
        for latents, _ in sample_batches(
            model, recipe.run.seed, request.settings.num, request.settings, recipe.flow.path
        ):
            images.append(decode(latents).cpu())
            progress.update(len(latents))
    path = request.out or request.run / stage / "samples" / "manual.png"
    pictures.save_png(pictures.grid(torch.cat(images), columns=10), path)
    print(path)


if __name__ == "__main__":
    run_command(main)
