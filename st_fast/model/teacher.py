"""Frozen teachers: a finished stage's model, loaded strictly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.kernels import KernelTable
from st_fast.model import SiT, unfilled
from st_fast.model.attention import BACKENDS, Attend
from st_fast.model.formats.loaded_state import trunk
from st_fast.model.formats.model_source import flow_path, read_model
from st_fast.model.load import CONFIG
from st_fast.recipe import load_run
from st_fast.recipe.schema import Model, Recipe


def checkpoint_root(recipe: Recipe, teacher: str) -> Path:
    """Where the teacher lies: the checkpoints of a stage of this run or another, or what else `read_model` reads."""
    if any(stage.name == teacher for stage in recipe.stages):
        return Path(recipe.run.out) / teacher / "checkpoints"
    path = Path(teacher)
    if not path.exists():
        raise UserError(f"teacher = {teacher!r}: neither a stage of this recipe nor a folder or file")
    if (path / "recipe.toml").is_file():
        names = ", ".join(str(path / stage.name) for stage in load_run(path).stages)
        raise UserError(f"teacher = {teacher!r}: a run; name one of its stages: {names}")
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def load_frozen(
    root: Path, config: Model, weights: Literal["raw", "ema"], kernels: KernelTable, place: torch.device,
    dtype: torch.dtype,
    attend: Attend = BACKENDS["sdpa"].attend, flow: str | None = None,
) -> SiT:  # fmt: skip
    """The newest sound checkpoint under `root`, or the model that is there, frozen and in eval mode.

    UserError, in one line, if there is none, if its architecture differs from `config`, if it was trained on another
    path than `flow` (where given), or if any key of the trunk is missing, unknown or of another shape.
    """
    theirs, tensors, path, its_flow = _read(root, config, weights)
    if flow is not None and its_flow != flow:
        raise UserError(f"teacher {path}: trained on the {its_flow} path, flow.path = {flow!r}")
    if differing := config.differences(theirs):
        raise UserError(f"teacher {path}: another architecture: {', '.join(differing)}")
    model = unfilled(config, kernels, torch.device("meta"), torch.float32, attend)
    checkpoint.match_strictly(model.state_dict(), tensors, f"teacher {path}")
    model.to(dtype).to_empty(device=place).load_state_dict(dict(tensors))
    return model.eval().requires_grad_(False)


def _read(
    root: Path, config: Model, weights: Literal["raw", "ema"]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor], Path, str]:
    """Architecture, weights, where they lie and the path of their flow; of a checkpoint only one group is read."""
    if root.is_file() or (root / CONFIG).is_file() or (root / "transformer" / CONFIG).is_file():
        loaded = read_model(root, _say, heads_otherwise=config.heads).loaded
        tensors = trunk(loaded.model if weights == "raw" else loaded.ema)
        return loaded.config.architecture(), tensors, root, loaded.path
    found = checkpoint.latest(root, _say, groups=(group(weights),))
    if found is None:
        raise UserError(f"teacher: no sound checkpoint under {root}")
    return found.meta.get("architecture", {}), found.groups[group(weights)], found.path, flow_path(found.meta)


def _say(text: str) -> None:
    print(text, flush=True)


def group(weights: Literal["raw", "ema"]) -> str:
    """The checkpoint group that holds the raw or the averaged weights."""
    return "model" if weights == "raw" else "ema"
