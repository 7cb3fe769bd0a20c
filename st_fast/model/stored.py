"""Models by their path: another project's file, a run, stage or checkpoint of ours, and frozen teachers from these."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from st_fast.core import checkpoint
from st_fast.core.checkpoint import Checkpoint
from st_fast.core.errors import Say, UserError
from st_fast.core.files import shown
from st_fast.kernels import KernelTable
from st_fast.model import SiT, unfilled
from st_fast.model.attention import BACKENDS, Attend
from st_fast.model.formats.importing import import_file
from st_fast.model.formats.layouts import check_table, detect, infer
from st_fast.model.formats.loaded_state import LoadedState, head_name, trunk
from st_fast.model.load import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS, read_config
from st_fast.recipe import load_run
from st_fast.recipe.schema import Model, Recipe

KINDS = "a .pt or .safetensors file, a run, stage or checkpoint folder, or a folder with config.json"


@dataclass(frozen=True)
class ModelSource:
    """A model that was read, and where it lay."""

    loaded: LoadedState
    path: Path
    """The file or checkpoint folder in the end."""
    run: Path | None = None
    """The run folder that it belongs to, with its recipe and log, where there is one."""
    stage: str = ""


def read_model(
    path: Path, say: Say, stage: str | None = None, layout: str | None = None, number_of_heads: int | None = None,
    heads_otherwise: int | None = None,
) -> ModelSource:  # fmt: skip
    """Reads the model at `path`; layout and heads are for files that don't tell (see `import_file`).

    Of a run the last trained stage, or `stage`, and of a stage the newest sound checkpoint. UserError in one line
    for whatever is not there or does not fit.
    """
    if path.is_file():
        return ModelSource(import_file(path, layout, number_of_heads, heads_otherwise), path)
    if (path / CONFIG).is_file():
        return ModelSource(_published(path), path)
    if (path / "transformer" / CONFIG).is_file():
        return ModelSource(_published(path / "transformer"), path)
    if (path / "recipe.toml").is_file():
        path = path / newest_stage(path, load_run(path), stage)
    if (path / "manifest.json").is_file():
        found, root = checkpoint.load(path), path.parent
    else:
        root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        newest = checkpoint.latest(root, say) if root.is_dir() else None
        if newest is None:
            what = "no sound checkpoint in it" if path.is_dir() else "there is nothing"
            raise UserError(f"{path}: {what}; {KINDS} can be read")
        found = newest
    run = next((p for p in root.absolute().parents if (p / "recipe.toml").is_file()), None)
    return ModelSource(from_checkpoint(found), found.path, run, root.absolute().parent.name if run else "")


def newest_stage(run: Path, recipe: Recipe, wanted: str | None) -> str:
    """The stage asked for, or the last one that has checkpoints; UserError where there is none."""
    names = [stage.name for stage in recipe.stages]
    if wanted is not None and wanted not in names:
        raise UserError(f"--stage {wanted}: the run has {', '.join(names)}")
    trained = [name for name in names if (run / name / "checkpoints").is_dir()]
    if not trained or (wanted is not None and wanted not in trained):
        raise UserError(f"{run}: no checkpoints of {wanted or 'any stage'} yet")
    return wanted or trained[-1]


def from_checkpoint(found: Checkpoint) -> LoadedState:
    """A checkpoint of ours in the neutral form; UserError if its manifest does not describe its tensors."""
    where, said = str(found.path), found.meta.get("architecture")
    count = said.get("heads") if isinstance(said, dict) else None
    if said is None or type(count) is not int or count < 1 or "model" not in found.groups:
        raise UserError(f"{where}: architecture = {shown(said)}: no checkpoint of a stage")
    trained = found.groups.get("heads", {})
    model = dict(found.groups["model"]) | {head_name(key): tensor for key, tensor in trained.items()}
    optim = found.groups.get("optim", {})
    return LoadedState(
        config=infer(model, {"num_classes": said.get("num_classes")}, count, where),
        layout=detect(model, {"prediction": "v"}, where),
        model=model,
        ema=dict(found.groups.get("ema", found.groups["model"])),
        exp_avg=_adam(optim, "exp_avg"),
        exp_avg_sq=_adam(optim, "exp_avg_sq"),
        updates=int(optim.get("model.step", 0)),
        head_updates=int(optim.get("heads.step", 0)),
        step=found.step,
        path=flow_path(found.meta),
    )


def _adam(optim: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """One of AdamW's running means, of the trunk and the heads."""
    names: dict[str, Callable[[str], str]] = {f"model.{kind}.": str, f"heads.{kind}.": head_name}
    return {
        name(key.removeprefix(start)): tensor
        for start, name in names.items()
        for key, tensor in optim.items()
        if key.startswith(start)
    }


def flow_path(meta: Mapping[str, Any]) -> str:
    """The path of the flow that a checkpoint's model was trained on."""
    said = tomllib.loads(str(meta.get("recipe", ""))).get("flow", {}).get("path", "linear")
    return str(meta.get("flow", said))


def _published(folder: Path) -> LoadedState:
    """A folder that `save_pretrained` wrote."""
    config = read_config(folder)
    file = folder / DIFFUSERS_WEIGHTS if (folder / DIFFUSERS_WEIGHTS).is_file() else folder / WEIGHTS
    loaded = import_file(file, "repa", config.model.heads)
    check_table(loaded.model, config.model, "repa", f"{file}, of what {CONFIG} says,")
    return replace(loaded, config=config.model, path=config.flow, step=config.step)


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
    theirs, tensors, path, its_flow = _weights(root, config, weights)
    if flow is not None and its_flow != flow:
        raise UserError(f"teacher {path}: trained on the {its_flow} path, flow.path = {flow!r}")
    if differing := config.differences(theirs):
        raise UserError(f"teacher {path}: another architecture: {', '.join(differing)}")
    model = unfilled(config, kernels, torch.device("meta"), torch.float32, attend)
    checkpoint.match_strictly(model.state_dict(), tensors, f"teacher {path}")
    model.to(dtype).to_empty(device=place).load_state_dict(dict(tensors))
    return model.eval().requires_grad_(False)


def _weights(
    root: Path, config: Model, weights: Literal["raw", "ema"]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor], Path, str]:
    """Architecture, weights, where they lie and the path of their flow; of a checkpoint only one group is read."""
    say = partial(print, flush=True)
    if root.is_file() or (root / CONFIG).is_file() or (root / "transformer" / CONFIG).is_file():
        loaded = read_model(root, say, heads_otherwise=config.heads).loaded
        tensors = trunk(loaded.model if weights == "raw" else loaded.ema)
        return loaded.config.architecture(), tensors, root, loaded.path
    group = "model" if weights == "raw" else "ema"
    found = checkpoint.latest(root, say, groups=(group,))
    if found is None:
        raise UserError(f"teacher: no sound checkpoint under {root}")
    return found.meta.get("architecture", {}), found.groups[group], found.path, flow_path(found.meta)
