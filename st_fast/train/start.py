"""What a stage's weights start from where its recipe says `init`: read once, matched strictly, told in one line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast import kernels
from st_fast.core.checkpoint import match_strictly
from st_fast.core.checkpoint.meta import Init
from st_fast.core.errors import Say, UserError
from st_fast.model import network
from st_fast.model.finite import check_finite
from st_fast.model.formats.loaded_state import (
    FUSION,
    INTERNAL_PREFIX,
    NULL_CONTEXT,
    LoadedState,
    head_name,
    heads,
    trunk,
)
from st_fast.model.stored import KINDS, read_model, without_internal_head
from st_fast.model.vae import tensors_hash
from st_fast.recipe.architecture import PARTS
from st_fast.recipe.schema import Recipe, Stage
from st_fast.train import supervision
from st_fast.train.optim import EmaModel
from st_fast.train.parallel import Groups
from st_fast.train.supervision import Parts


def taken_over(recipe: Recipe, stage: Stage, drawn: Groups, say: Say) -> tuple[Groups, Init]:
    """The state that a stage begins with, from what `stage.start` names and, for what is fresh, from what was drawn.

    `drawn` is the optimiser's state before the first step. Also returns what to record of the start: path, layout,
    step, hash and what was taken. UserError, in one line, listing everything that does not match.
    """
    start = stage.start
    loaded = _fitting(recipe, stage, drawn, say)
    for remark in loaded.remarks:
        say(f"{start.init}: {remark}")
    state = {group: dict(tensors) for group, tensors in drawn.items()}
    raw, averaged = {"ema": (loaded.ema, loaded.ema), "raw": (loaded.model, loaded.model)}.get(
        start.init_weights, (loaded.model, loaded.ema)
    )
    kept = _kept(drawn["model"], start.init_fresh)
    state["model"] |= {key: raw[key] for key in kept}
    for group in filter(lambda name: name.startswith("ema"), state):  # further averages, which a file has not, too
        state[group] |= {key: averaged[key] for key in kept}
    with_heads = start.init_heads == "match"
    if with_heads:
        state["heads"] = {key: loaded.model[head_name(key)] for key in drawn.get("heads", {})}
    if start.init_weights == "state":
        state["optim"] |= _moments(loaded, drawn["optim"], kept, list(state["heads"]) if with_heads else None)
    return state, Init(
        path=start.init,
        layout=loaded.layout,
        step=loaded.step,
        sha256=tensors_hash(loaded.ema if start.init_weights == "ema" else loaded.model),
        weights=start.init_weights,
        heads=start.init_heads,
        fresh=tuple(start.init_fresh),
        updates=int(state["optim"]["model.step"]) if start.init_weights == "state" else 0,
    )


def _fitting(recipe: Recipe, stage: Stage, drawn: Groups, say: Say) -> LoadedState:
    """The model that the stage starts from; UserError listing every way in which it can't."""
    start, name, config = stage.start, stage.start.init, recipe.for_stage(stage).model
    of_this_run = any(other.name == name for other in recipe.stages)
    path = Path(recipe.run.out) / name if of_this_run else Path(name)
    where = f"stage.{stage.name}.init = {name!r}"
    if not path.exists():
        raise UserError(f"{where}: there is nothing; {KINDS} can be read")
    only = None if start.init_weights == "state" or start.init_heads == "match" else start.init_weights
    loaded = read_model(path, say, otherwise=config, only=only).loaded
    theirs: Mapping[str, Any] = loaded.config.architecture()
    for prefix in start.init_fresh:
        if not any(key.startswith(prefix) for key in drawn["model"]):
            raise UserError(f"stage.{stage.name}.init_fresh: no key of the model begins with {prefix!r}")
    if loaded.path != recipe.flow.path:
        raise UserError(f"{where}: trained on the {loaded.path} path, flow.path = {recipe.flow.path!r}")
    kept = _kept(drawn["model"], start.init_fresh)
    known = {key for key in drawn["model"] if key not in kept}
    found = {key: tensor for key, tensor in trunk(loaded.model).items() if key not in known}
    if not config.internal_head:  # one that the model has stays behind
        theirs, found = without_internal_head(theirs, found)
    differing = config.differences(theirs)
    every = (loaded.model, loaded.ema, loaded.exp_avg, loaded.exp_avg_sq, loaded.momentum_buffer)
    for tensors in every if only is None else (loaded.model if only == "raw" else loaded.ema,):
        check_finite(tensors, where)
    named = f"{where}: another architecture: {', '.join(differing)}" if differing else where
    match_strictly(kept, found, named + _fresh_hint(kept, found))
    # No weight's shape tells how many heads there are, for one. A key that speaks of weights that are drawn anew may
    # differ.
    fresh = {key for key, part in PARTS.items() if not any(name.startswith(part) for name in kept)}
    if config.differences(theirs, but=fresh):
        raise UserError(named)
    if start.init_heads == "match":
        wanted = {head_name(key): tensor for key, tensor in drawn.get("heads", {}).items()}
        match_strictly(wanted, heads(loaded.model), f"{where}, init_heads = 'match'")
    if start.init_weights == "state" and not loaded.exp_avg:
        why = f" that can be taken over ({loaded.left_out})" if loaded.left_out else ""
        raise UserError(f"{where}: it has no optimiser state{why}; allowed: init_weights = 'ema' or 'raw'")
    if start.init_weights == "state":
        optim, found_here = recipe.optim, {key for key in loaded.momentum_buffer if key in kept}
        wanted_here = {key for key, tensor in kept.items() if tensor.ndim == 2 and optim.muon_updates(key)}
        if found_here != wanted_here:
            told = f"Muon has updated {len(found_here)} of its matrices, and would update {len(wanted_here)} here"
            keys = f"optim.name = {optim.name!r}, optim.muon_adaln = {str(optim.muon_adaln).lower()}"
            raise UserError(f"{where}: {told} ({keys}); allowed: init_weights = 'ema' or 'raw'")
        warmup = max(optim.warmup_steps - loaded.updates, 0)  # what is left of it, which the recipe alone can't tell
        if optim.schedule != "constant" and stage.steps < (least := warmup + max(optim.decay_steps, 1)):
            told = f"after its {loaded.updates} updates {warmup} steps of warm-up are left, and at least "
            told += f"{max(optim.decay_steps, 1)} of decay follow (optim.schedule = {optim.schedule!r})"
            raise UserError(f"{where}: {told}; stage.{stage.name}.steps = {stage.steps}, at least {least} are needed")
    return loaded


def check(recipe: Recipe, stage: Stage, feature_widths: tuple[int, ...], say: Say) -> None:
    """UserError for a start that is not there or does not fit, before anything is built in earnest."""
    drawn: dict[str, Mapping[str, Tensor]] = {}
    config = recipe.for_stage(stage).model
    with torch.device("meta"):
        table = kernels.select({}, torch.device("cpu"))
        model = network(config, table)
        drawn["model"] = model.state_dict()
        if stage.start.init_heads == "match":
            parts = Parts(config, table, model, EmaModel(model), feature_widths, recipe.flow.path)
            drawn["heads"] = supervision.create(stage, parts, 0).heads.state_dict()
    _fitting(recipe, stage, drawn, say)


def _fresh_hint(kept: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How to start all the same where only parts outside the blocks have other shapes, such as the classes' table.

    So where only the internal head or a fusion is missing.
    """
    differing = [key for key in kept if key in found and kept[key].shape != found[key].shape]
    differing += [key for key in kept if key not in found and key.startswith((INTERNAL_PREFIX, *FUSION))]
    parts = sorted({f"{key.partition('.')[0]}." if "." in key else key for key in differing})
    if not parts or {"blocks.", "joint_blocks."} & {*parts}:
        return ""
    return f" (init_fresh = {json.dumps(parts)} draws these parts anew)"


def _kept(drawn: Mapping[str, Tensor], fresh: tuple[str, ...]) -> dict[str, Tensor]:
    """The trunk without the parts that stay as they were drawn, and without the empty caption's states: the data's."""
    return {key: tensor for key, tensor in drawn.items() if not key.startswith((NULL_CONTEXT, *fresh))}


def _moments(
    loaded: LoadedState, drawn: Mapping[str, Tensor], kept: Iterable[str], trained_heads: Iterable[str] | None
) -> dict[str, Tensor]:
    """AdamW's and Muon's state of the trunk that is kept and, where there are any, of the heads that are."""
    taken = {"model": {key: key for key in kept}}
    if trained_heads is not None:
        taken["heads"] = {key: head_name(key) for key in trained_heads}
    updates = {"model": loaded.updates, "heads": loaded.head_updates}
    found: dict[str, Tensor] = {}
    for part, names in taken.items():
        for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            table: Mapping[str, Tensor] = getattr(loaded, kind)
            found |= {f"{part}.{kind}.{key}": table[name] for key, name in names.items() if name in table}
        found[f"{part}.step"] = torch.full_like(drawn[f"{part}.step"], updates[part])
    return found
