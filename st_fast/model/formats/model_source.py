"""A model by its path, whatever lies there: another project's file, or a run, stage or checkpoint of ours."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from st_fast.core import checkpoint
from st_fast.core.checkpoint import Checkpoint
from st_fast.core.errors import UserError
from st_fast.core.files import shown
from st_fast.model.formats.importing import import_file
from st_fast.model.formats.layouts import check_table, detect, infer
from st_fast.model.formats.loaded_state import LoadedState, head_name
from st_fast.model.load import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS, read_config
from st_fast.recipe import load_run
from st_fast.recipe.schema import Recipe

Say = Callable[[str], None]

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
        updates=_count(optim, "model"),
        head_updates=_count(optim, "heads"),
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


def _count(optim: Mapping[str, Tensor], part: str) -> int:
    return int(optim[f"{part}.step"]) if f"{part}.step" in optim else 0


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
