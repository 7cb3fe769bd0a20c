"""How the step's cost grows with batch, tokens and depth, and images/s of every recipe; pictures are drawn of it.

    python -m bench.sweeps                  for at most four minutes: S/2 and B/2 at small batches on a CPU
    python -m bench.sweeps --seconds 900    longer; run again, it goes on where it stopped
    python -m bench.sweeps --draw           only the pictures, from what was measured before

`pytest bench/ --full` and `python -m bench.gpu_day` measure all points, batch 1 to 256, with the published loop beside.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import machine as results
from bench import op_times, pictures
from bench import step as step_times
from bench.machine import Machine, Row, Store
from bench.measure import Effort
from bench.step import Wanted
from bench.workload import STAGES, Setup
from st_fast.core.machine import free_memory
from st_fast.recipe import cost
from st_fast.recipe.architecture import resolve_model
from st_fast.recipe.schema import Model

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (64, 256, 1024)
DEPTHS = (3, 6, 12, 24)
SHARE_OF_MEMORY = 0.7


def points(device: torch.device) -> list[Setup]:
    """All steps of the sweeps that fit into memory by estimate, each once."""
    cuda = device.type == "cuda"
    size, batch = ("XL/2", 64) if cuda else ("S/2", 8)
    recipes = ("S/2", "B/2", "L/2", "XL/2") if cuda else ("S/2", "B/2", "L/2")
    return _axes(device, size, batch, BATCHES, recipes)


def few_points(device: torch.device) -> list[Setup]:
    """Those that take minutes, the ones that say most first."""
    if device.type == "cuda":
        return points(device)
    return sorted(_axes(device, "S/2", 4, BATCHES[:5], ("S/2", "B/2")), key=_work)


def _axes(device: torch.device, size: str, batch: int, batches: Sequence[int], recipes: Sequence[str]) -> list[Setup]:
    wanted = [Setup(name, stage, batch, device) for name in recipes for stage in STAGES]
    wanted += [Setup(size, "plain", b, device) for b in batches]
    wanted += [Setup(size, "plain", batch, device, tokens=tokens) for tokens in TOKENS if tokens != 256]
    own = resolve_model(Model(f"SiT-{size}")).depth
    wanted += [Setup(size, "plain", batch, device, depth=depth) for depth in DEPTHS if depth != own]
    return [setup for setup in dict.fromkeys(wanted) if fits(setup)]


def _work(setup: Setup) -> float:
    """Multiply-adds of a step's forward, roughly."""
    model = _model(setup)
    return setup.batch * cost.trunk_macs(model) * (setup.depth or model.depth) / model.depth


def _model(setup: Setup) -> Model:
    return resolve_model(Model(f"SiT-{setup.size}", latent_size=2 * int(setup.tokens**0.5)))


def memory(device: torch.device) -> int:
    """Bytes of the device, or free ones of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_memory(device)


def fits(setup: Setup) -> bool:
    """Whether weights, their state (the plain loop's too) and activations stay within a share of the memory."""
    bf16 = setup.device.type == "cuda"
    model = _model(setup)
    depth_share = (setup.depth or model.depth) / model.depth
    state = 2 * cost.STATE_BYTES * model.parameters * depth_share
    # Eager PyTorch keeps about twice what the formula counts for st_fast's own step.
    activations = 2 * setup.batch * cost.activation_bytes(model, bf16) * depth_share
    return state + activations < SHARE_OF_MEMORY * memory(setup.device)


def measure(setup: Setup, machine: Machine) -> Row:
    """st_fast's step and the plain loop's, a few rounds."""
    effort = Effort(rounds=5, seconds=30, least=2, warmup=1)
    return step_times.measure(setup, Wanted(effort, rivals=("plain",), breakdown=False), machine)


def measure_alone(setup: Setup, machine: Machine) -> Row:
    """st_fast's step by itself, in seconds."""
    effort = Effort(rounds=5, seconds=4, least=2, warmup=1)
    return step_times.measure(setup, Wanted(effort, rivals=(), breakdown=False), machine)


def run(
    store: Store, setups: Sequence[Setup], seconds: float, measured: Callable[[Setup, Machine], Row] = measure_alone
) -> int:
    """Measures what this code has not measured yet until the time is up; returns how many points are left."""
    start, left = time.monotonic(), 0
    for setup in setups:
        if store.rows("sweep").get(setup.label, {}).get("code") == store.machine.code:
            continue
        if time.monotonic() - start > seconds:
            left += 1
            continue
        row = measured(setup, store.machine)
        store.put("sweep", setup.label, row | {"code": store.machine.code})
        print(f"{setup.label}: {row['images_per_s']['ours']:.3g} images/s", flush=True)
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweeps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=220.0, help="after so long no further point is begun")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the JSON files")
    settings = parser.parse_args(arguments)
    if not settings.draw:
        device = op_times.default_device()
        left = run(Store(settings.results, results.measure_machine(device)), few_points(device), settings.seconds)
        if left:
            print(f"{left} points are left; run the same command again")
    for file in results.files(settings.results):
        for picture in pictures.draw(file):
            print(picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
