"""How the step's cost grows, and one picture of it: batch, tokens, depth, and images/s of every recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from bench import step_times
from bench.results import Machine, Row
from bench.step_times import Wanted
from bench.timing import Effort
from bench.workload import STAGES, Setup
from st_fast import flops
from st_fast.recipe.load import resolve_model
from st_fast.recipe.schema import Model

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (64, 256, 1024)
DEPTHS = (3, 6, 12, 24)
SHARE_OF_MEMORY = 0.7


def points(device: torch.device) -> list[Setup]:
    """All steps of the sweeps that fit into memory by estimate, each once."""
    cuda = device.type == "cuda"
    size, batch = ("XL/2", 64) if cuda else ("S/2", 8)
    wanted = [Setup(size, "plain", b, device) for b in BATCHES]
    wanted += [Setup(size, "plain", batch, device, tokens=tokens) for tokens in TOKENS]
    wanted += [Setup(size, "plain", batch, device, depth=depth) for depth in DEPTHS]
    recipes = ("S/2", "B/2", "L/2", "XL/2") if cuda else ("S/2", "B/2", "L/2")
    wanted += [Setup(name, stage, batch, device) for name in recipes for stage in STAGES]
    return [setup for setup in dict.fromkeys(wanted) if fits(setup)]


def memory(device: torch.device) -> int:
    """Bytes of the device, or free ones of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fits(setup: Setup) -> bool:
    """Whether weights, their state (the plain loop's too) and activations stay within a share of the memory."""
    bf16 = setup.device.type == "cuda"
    model = resolve_model(Model(f"SiT-{setup.size}", latent_size=2 * int(setup.tokens**0.5)))
    depth_share = (setup.depth or model.depth) / model.depth
    state = 2 * flops.STATE_BYTES * flops.trunk_parameters(model) * depth_share
    # Eager PyTorch keeps about twice what the formula counts for st_fast's own step.
    activations = 2 * setup.batch * flops.activation_bytes(model, bf16) * depth_share
    return state + activations < SHARE_OF_MEMORY * memory(setup.device)


def measure(setup: Setup, machine: Machine) -> Row:
    """st_fast's step and the plain loop's, a few rounds."""
    effort = Effort(rounds=5, seconds=30, least=2, warmup=1)
    return step_times.measure(setup, Wanted(effort, rivals=("plain",), breakdown=False), machine)


def draw(rows: dict[str, Row], device: str, path: Path) -> None:
    """Four panels as a PNG: images/s against batch, tokens and depth, and images/s by recipe and stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (by_batch, by_tokens), (by_depth, by_recipe) = figure.subplots(2, 2)
    plain = [row for row in rows.values() if row["stage"] == "plain"]
    for axis, key in ((by_batch, "batch"), (by_tokens, "tokens"), (by_depth, "depth")):
        chosen = _series(plain, key)
        for name, label in (("ours", "st_fast"), ("plain", "published loop, plainly")):
            values = [(row[key], row["images_per_s"][name]) for row in chosen if name in row["images_per_s"]]
            if values:
                axis.plot(*zip(*values, strict=True), marker="o", label=label)
        axis.set(xlabel=key, ylabel="images/s", xscale="log", ylim=(0, None))
        axis.set_xticks([row[key] for row in chosen], [str(row[key]) for row in chosen])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    by_batch.legend()
    bars = [row for row in rows.values() if row["tokens"] == 256 and row["depth"] == _own_depth(row["size"])]
    common = _common([row["batch"] for row in bars])
    bars = [row for row in bars if row["batch"] == common]
    names = [f"{row['size']}\n{row['stage']}" for row in bars]
    by_recipe.bar(names, [row["images_per_s"]["ours"] for row in bars])
    by_recipe.set(ylabel="images/s", yscale="log", title=f"batch {common}")
    by_recipe.tick_params(axis="x", labelsize=7)
    figure.suptitle(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _own_depth(size: str) -> int:
    return resolve_model(Model(f"SiT-{size}")).depth


def _common(values: list[Any]) -> Any:
    """The most frequent of them; None of none."""
    return max(set(values), key=values.count, default=None)


def _series(rows: list[Row], key: str) -> list[Row]:
    """Rows that differ in `key` alone, ascending; what else they have is what most rows have."""
    for other in ("size", "batch", "tokens", "depth"):
        if other != key:
            common = _common([row[other] for row in rows])
            rows = [row for row in rows if row[other] == common]
    return sorted(rows, key=lambda row: row[key])
