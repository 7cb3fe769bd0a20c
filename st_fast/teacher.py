"""Frozen teachers: a finished stage's model, loaded strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from st_fast import checkpoint
from st_fast.errors import UserError
from st_fast.kernels import KernelTable
from st_fast.model import SiT, build
from st_fast.model.attention import BACKENDS, Attend
from st_fast.recipe.schema import Model, Recipe

ARCHITECTURE = ("depth", "width", "heads", "patch", "channels", "latent_size", "num_classes", "mlp_ratio", "qk_norm")
"""What must agree between a teacher and the recipe's model."""


def architecture(config: Model) -> dict[str, int | float | bool]:
    """The fields that a checkpoint's weights depend on, for its manifest."""
    return {name: getattr(config, name) for name in ARCHITECTURE}


def checkpoint_root(recipe: Recipe, teacher: str) -> Path:
    """Where the teacher's checkpoints lie: a stage of this run, or a path to a stage folder of another."""
    if any(stage.name == teacher for stage in recipe.stages):
        return Path(recipe.run.out) / teacher / "checkpoints"
    path = Path(teacher)
    if not path.is_dir():
        raise UserError(f"teacher = {teacher!r}: neither a stage of this recipe nor a folder")
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def load_frozen(
    root: Path, config: Model, weights: Literal["raw", "ema"], kernels: KernelTable, place: torch.device,
    dtype: torch.dtype,
    attend: Attend = BACKENDS["sdpa"].attend,
) -> SiT:  # fmt: skip
    """The newest sound checkpoint under `root` as a frozen model in eval mode.

    UserError, in one line, if there is none, if its architecture differs from `config`, or if any key of the trunk
    is missing, unknown or of another shape.
    """
    found = checkpoint.latest(root, lambda text: print(text, flush=True), groups=(group(weights),))
    if found is None:
        raise UserError(f"teacher: no sound checkpoint under {root}")
    theirs, ours = found.meta.get("architecture", {}), architecture(config)
    differing = [f"{k} {theirs.get(k)} (this recipe: {v})" for k, v in ours.items() if theirs.get(k) != v]
    if differing:
        raise UserError(f"teacher {found.path}: another architecture: {', '.join(differing)}")
    model = build(config, kernels, seed=0, attend=attend)
    tensors = found.groups[group(weights)]
    checkpoint.match_strictly(model.state_dict(), tensors, f"teacher {found.path}")
    model.load_state_dict(tensors)
    return model.to(place, dtype).eval().requires_grad_(False)


def group(weights: Literal["raw", "ema"]) -> str:
    """The checkpoint group that holds the raw or the averaged weights."""
    return "model" if weights == "raw" else "ema"
