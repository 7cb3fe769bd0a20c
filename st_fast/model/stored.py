"""Models by their path: another project's file, a run, stage or checkpoint of ours, and frozen teachers from these."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core import checkpoint
from st_fast.core.checkpoint import Checkpoint, match_strictly
from st_fast.core.errors import Say, UserError
from st_fast.core.files import shown
from st_fast.core.latents import LatentSpace
from st_fast.core.machine import naming_lack_of_memory
from st_fast.core.records import record_from
from st_fast.kernels import KernelTable
from st_fast.model import DiffusionTransformer, unfilled
from st_fast.model.attention import BACKENDS, Attend
from st_fast.model.finite import check_finite
from st_fast.model.formats import adam
from st_fast.model.formats.importing import Which, import_file
from st_fast.model.formats.layouts import CLIP_TOKENS, detect, expected_trunk, infer
from st_fast.model.formats.loaded_state import INTERNAL_PREFIX, NULL_CONTEXT, LoadedState, head_name, heads, trunk
from st_fast.model.load import (
    CONFIG,
    DIFFUSERS_WEIGHTS,
    EVERY_KEY,
    FLOWS,
    UNKNOWN_TEXT,
    WEIGHTS,
    Published,
    TextStates,
    check_size,
    read_config,
)
from st_fast.model.own import not_here
from st_fast.model.vae import tensors_hash
from st_fast.recipe import RecipeError, load_run
from st_fast.recipe.architecture import LATER, check_shapes
from st_fast.recipe.document import parse_toml
from st_fast.recipe.keys import build
from st_fast.recipe.schema import Model, Recipe

ALIKE = 0.1
"""How far apart states may be that one encoder made, as a share of their norm: deep ones in bf16 differ by percents,
another encoder's by about 1.
"""
CLIP, CLIP_WIDTH = "openai/clip-vit-large-patch14", 768
"""The text encoder of the published models, without an attention mask."""
MEAN_LATENTS = "mean_latents"
"""The group of a checkpoint with the data's mean latents, by shape: of stages with a contrast."""
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
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Of a checkpoint of ours: what its manifest says."""
    published: Published | None = None
    """Of a Hugging Face or diffusers folder: what config.json says."""


def read_model(
    path: Path, say: Say, stage: str | None = None, layout: str | None = None, number_of_heads: int | None = None,
    num_classes: int | None = None, otherwise: Model | None = None, only: Which | None = None,
    internal_head: int | None = None,
) -> ModelSource:  # fmt: skip
    """Reads the model at `path`; layout, heads, classes, internal head are for files that don't tell (`import_file`).

    With `only`, no more of another project's file is read than one set of weights needs.

    Of a run the last trained stage, or `stage`, and of a stage the newest sound checkpoint. UserError in one line
    for whatever is not there or does not fit.
    """
    if path.is_file():
        found = import_file(path, layout, number_of_heads, num_classes, otherwise, only, internal_head)
        return ModelSource(found, path)
    for folder in (path, path / "transformer"):
        if (folder / CONFIG).is_file():
            published = read_config(folder)
            return ModelSource(_published(folder, published), path, published=published)
    if (path / "recipe.toml").is_file():
        path = path / newest_stage(path, load_run(path), stage)
    if (path / "manifest.json").is_file():
        saved, root = checkpoint.load(path), path.parent
    else:
        root = _root(path)
        newest = checkpoint.latest(root, say) if path.is_dir() else None
        if newest is None:
            what = "no sound checkpoint in it" if path.is_dir() else "there is nothing"
            raise UserError(f"{path}: {what}; {KINDS} can be read")
        saved = newest
    run = next((p for p in root.absolute().parents if (p / "recipe.toml").is_file()), None)
    return ModelSource(from_checkpoint(saved), saved.path, run, root.absolute().parent.name if run else "", saved.meta)


def newest_stage(run: Path, recipe: Recipe, wanted: str | None) -> str:
    """The stage asked for, or the last one that has checkpoints; UserError where there is none."""
    names = [stage.name for stage in recipe.stages]
    if wanted is not None and wanted not in names:
        raise UserError(f"--stage {wanted}: the run has {', '.join(names)}")
    trained = trained_stages(run, names)
    if not trained or (wanted is not None and wanted not in trained):
        raise UserError(f"{run}: no checkpoints of {wanted or 'any stage'} yet")
    return wanted or trained[-1]


def trained_stages(run: Path, names: Iterable[str]) -> list[str]:
    """Those stages of a run that have checkpoints; UserError where they lie somewhere that is not there."""
    return [name for name in names if checkpoint.candidates(run / name / "checkpoints")]


def average_group(decay: float) -> str:
    """The group of a checkpoint with a further average, of `optim.ema_decays`."""
    return f"ema-{decay!r}"


def _root(path: Path) -> Path:
    """Where the checkpoints of a stage's folder are, or of a folder of checkpoints."""
    return path / "checkpoints" if os.path.lexists(path / "checkpoints") else path


def from_checkpoint(found: Checkpoint) -> LoadedState:
    """A checkpoint of ours in the neutral form; UserError if its manifest does not describe its tensors."""
    where, said = str(found.path), found.meta.get("architecture")
    if isinstance(said, dict) and said.get("network") == "own":
        raise not_here(where)
    count = said.get("heads") if isinstance(said, dict) else None
    if said is None or type(count) is not int or count < 1 or "model" not in found.groups:
        raise UserError(f"{where}: architecture = {shown(said)}: no checkpoint of a stage")
    trained = found.groups.get("heads", {})
    model = dict(found.groups["model"]) | {head_name(key): tensor for key, tensor in trained.items()}
    config, optim = infer(model, said, count, where), found.groups.get("optim", {})
    try:  # what no weight's name or shape tells
        later = {key: said[key] for key in LATER if key in said}
        config = replace(config, **{key: getattr(build(Model, later, "architecture"), key) for key in later})
        check_shapes(config)
    except RecipeError as error:
        raise UserError(f"{where}: {error}") from None
    groups = [name for name in ("model", "ema") if name in found.groups]
    for group in groups:
        expected = expected_trunk(config, null=NULL_CONTEXT in found.groups[group])  # as in a published file
        match_strictly(expected, found.groups[group], f"{where}: {group}")
    others = [group for group in found.groups if group.startswith("ema-")]
    means = {kind: _means(optim, kind) for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer")}
    for kind, table in means.items():
        same = means["exp_avg"] if kind == "exp_avg_sq" else table
        match_strictly({key: model[key] for key in same if key in model}, table, f"{where}: {kind}")
    return LoadedState(
        config=config,
        layout=detect(model, {"prediction": "v"}, where),
        model=model,
        ema=dict(found.groups[groups[-1]]),
        exp_avg=means["exp_avg"],
        exp_avg_sq=means["exp_avg_sq"],
        momentum_buffer=means["momentum_buffer"],
        updates=adam.updates(optim.get("model.step", 0), f"{where}: optim"),
        head_updates=adam.updates(optim.get("heads.step", 0), f"{where}: optim of the heads"),
        step=found.step,
        path=flow_path(found.meta, where),
        latents=latent_space(found.meta, where),
        mean_latents=found.groups.get(MEAN_LATENTS, {}),
        remarks=(f"further averages are left out: {', '.join(sorted(others))}",) * bool(others),
    )


def latent_space(meta: Mapping[str, Any], where: str) -> LatentSpace | None:
    """What the latents of a checkpoint's model are of; None where it does not tell."""
    said = meta.get("latents")
    return None if said is None else record_from(LatentSpace, said, f"{where}: latents", strict=False)


def _means(optim: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """One of AdamW's or Muon's running means, of the trunk and the heads."""
    names: dict[str, Callable[[str], str]] = {f"model.{kind}.": str, f"heads.{kind}.": head_name}
    return {
        name(key.removeprefix(start)): tensor
        for start, name in names.items()
        for key, tensor in optim.items()
        if key.startswith(start)
    }


def flow_path(meta: Mapping[str, Any], where: str) -> str:
    """The path of the flow that a checkpoint's model was trained on; UserError for none that is known."""
    flow = meta.get("flow")
    if flow is None:
        try:
            table = parse_toml(str(meta.get("recipe", "")), where).get("flow", {})
        except RecipeError as error:
            raise UserError(f"{where}: its recipe can't be read ({error})") from None
        flow = table.get("path", "linear") if isinstance(table, dict) else table
    if flow not in FLOWS:
        raise UserError(f"{where}: flow = {shown(flow)}: one of {', '.join(FLOWS)}")
    return str(flow)


def _published(folder: Path, config: Published) -> LoadedState:
    """A folder that `save_pretrained` wrote, whose config.json says `config`."""
    file = folder / DIFFUSERS_WEIGHTS if (folder / DIFFUSERS_WEIGHTS).is_file() else folder / WEIGHTS
    check_size(config.model, file)
    loaded = import_file(file, "repa", config.model.heads, config.model.num_classes, config.model)
    match_strictly(expected_trunk(config.model), loaded.model, f"{file}, of what {CONFIG} says", EVERY_KEY)
    return replace(loaded, config=config.model, path=config.flow, step=config.step, latents=config.latents)


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
    return _root(path)


@dataclass(frozen=True)
class Weights:
    """The trunk of a frozen model, and what is known of it."""

    architecture: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    path: Path
    flow: str
    step: int
    averaged: bool
    latents: LatentSpace | None = None
    mean_latents: Mapping[str, Tensor] = field(default_factory=dict)
    """(C, H, W) by shape, of a model that was trained with a contrast."""
    heads: Mapping[str, Tensor] | None = None
    """The method's heads, raw; None where they were not read: a checkpoint has them as a group."""


def load_frozen(
    root: Path, config: Model, weights: Which, kernels: KernelTable, place: torch.device,
    dtype: torch.dtype,
    attend: Attend = BACKENDS["sdpa"].attend, flow: str | None = None,
    record: Callable[[dict[str, Any]], None] | None = None, null: Tensor | None = None,
    latents: LatentSpace | None = None,
) -> DiffusionTransformer:  # fmt: skip
    """The newest sound checkpoint under `root`, or the model that is there, as a teacher: frozen, in eval mode.

    `null`, the empty caption's states (L, W), is for a model of text that lacks them, as published ones do; one that
    has others was trained on another encoder's states.
    `record` is given what tells this model from others: path, step, weights and their SHA-256.
    UserError, in one line, if there is none, if its architecture differs from `config`, if it was trained on another
    path than `flow` or on other `latents` (where given), if any key of the trunk is missing, unknown or of another
    shape, or not finite.
    """
    found = read_weights(root, config, weights)
    return frozen(found, config, kernels, place, dtype, attend, flow, record, null, latents, "teacher")


def frozen(
    found: Weights, config: Model, kernels: KernelTable, place: torch.device, dtype: torch.dtype,
    attend: Attend = BACKENDS["sdpa"].attend, flow: str | None = None,
    record: Callable[[dict[str, Any]], None] | None = None, null: Tensor | None = None,
    latents: LatentSpace | None = None, role: str = "",
) -> DiffusionTransformer:  # fmt: skip
    """`load_frozen` of weights that were read already; messages call the model by its `role` and path."""
    where = f"{role} {found.path}".lstrip()
    if flow is not None and found.flow != flow:
        raise UserError(f"{where}: trained on the {found.flow} path, flow.path = {flow!r}")
    if latents and found.latents and (differing := found.latents.differences(latents)):
        raise UserError(f"{where}: trained on other latents than the data's: {', '.join(differing)}")
    said, tensors = found.architecture, dict(found.tensors)
    if not config.internal_head:
        said, tensors = without_internal_head(said, tensors)
    if differing := config.differences(said):
        raise UserError(f"{where}: another architecture: {', '.join(differing)}")
    own = config.network == "own"  # which is built once, with its buffers
    model = unfilled(config, kernels, place if own else torch.device("meta"), torch.float32, attend)
    if null is not None and NULL_CONTEXT in model.state_dict():
        tensors.setdefault(NULL_CONTEXT, null[None].float())
    checkpoint.match_strictly(model.state_dict(), tensors, where)
    check_finite(tensors, where)
    if null is not None and NULL_CONTEXT in tensors and not alike(tensors[NULL_CONTEXT][0], null):
        raise UserError(
            f"{where}: its states of the empty caption are not those of the data: it was trained on "
            "another text encoder's, or with padding masked otherwise"
        )
    if record is not None:
        digest = tensors_hash(found.tensors)
        which = "ema" if found.averaged else "raw"
        record({"path": str(found.path), "step": found.step, "weights": which, "sha256": digest})
    with naming_lack_of_memory(f"loading {found.path}"):
        if not own:
            model.to(dtype).to_empty(device=place)
        model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def without_internal_head(
    architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """What describes a network and its weights, for one that does without the internal head."""
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(INTERNAL_PREFIX)}
    return {key: value for key, value in architecture.items() if key != "internal_head"}, kept


def text_states(origin: ModelSource) -> TextStates:
    """Whose states of captions a model was trained on, as its folder says or as of the published models."""
    config = origin.loaded.config
    if origin.published is not None:
        return origin.published.text
    published = config.network == "mmdit" and (config.text_length, config.text_width) == (CLIP_TOKENS, CLIP_WIDTH)
    return TextStates(CLIP) if published else UNKNOWN_TEXT


def alike(states: Tensor, others: Tensor) -> bool:
    """Whether one encoder made both, in whatever precision and version: states (L, W) of the same text."""
    return bool((states.float() - others.float()).norm() <= ALIKE * others.float().norm())


def read_weights(root: Path, config: Model, weights: str) -> Weights:
    """What `load_frozen` reads of a model: "raw", "ema" or, of a run, a further average by its group.

    Of a checkpoint, or of the newest under `root`, only one group is read.
    """
    say = partial(print, flush=True)
    with naming_lack_of_memory(f"loading {root}"):
        if root.is_file() or (root / CONFIG).is_file() or (root / "transformer" / CONFIG).is_file():
            which: Which = "raw" if weights == "raw" else "ema"
            origin = read_model(root, say, otherwise=config, only=which)
            for remark in origin.loaded.remarks:
                say(f"{origin.path}: {remark}")
            return weights_of(origin, which)
        group = "model" if weights == "raw" else weights
        if (root / "manifest.json").is_file():
            found: Checkpoint | None = checkpoint.load(root, (group,), optional=(MEAN_LATENTS,))
        else:
            found = checkpoint.latest(root, say, groups=(group,), optional=(MEAN_LATENTS,))
    if found is None:
        raise UserError(f"no sound checkpoint under {root}")
    where = str(found.path)
    return Weights(
        found.meta.get("architecture", {}), found.groups[group], found.path, flow_path(found.meta, where), found.step,
        weights != "raw", latent_space(found.meta, where), found.groups.get(MEAN_LATENTS, {}),
    )  # fmt: skip


def weights_of(origin: ModelSource, weights: Which) -> Weights:
    """One set of the weights of a model that was read."""
    loaded = origin.loaded
    return Weights(
        loaded.config.architecture(), trunk(loaded.model if weights == "raw" else loaded.ema), origin.path, loaded.path,
        loaded.step, weights == "ema", loaded.latents, loaded.mean_latents, heads(loaded.model),
    )  # fmt: skip
