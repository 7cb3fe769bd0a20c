"""A foreign checkpoint file → the neutral form, with every key, shape and dtype checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.model.formats import adam, official
from st_fast.model.formats.adam import Moments
from st_fast.model.formats.files import RawFile, read_file
from st_fast.model.formats.layouts import check_table, detect, infer
from st_fast.model.formats.loaded_state import LoadedState
from st_fast.recipe.schema import Model

PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}
"""What args call the path of the flow, in lower case."""
PREDICTIONS = ("v", "velocity")


def import_file(
    path: Path, layout: str | None = None, number_of_heads: int | None = None, heads_otherwise: int | None = None
) -> LoadedState:
    """Reads a `.pt` or safetensors file; layout and model follow from keys and shapes where they are not given.

    `heads_otherwise` is the number of heads where neither qk-norm nor a published size tells it.
    UserError in one line for whatever does not fit.
    """
    raw = read_file(path)
    tables = {name: _in_float32(table, f"{path} {name}".strip()) for name, table in raw.tables.items()}
    model = next(tables[name] for name in ("model", "", "state_dict", "ema") if name in tables)
    ema = tables.get("ema", model)
    layout = layout or detect(model, raw.args, str(path))
    config = infer(model, raw.args, number_of_heads, str(path), heads_otherwise)
    for name, table in tables.items():
        check_table(table, config, layout, f"{path} {name}".strip())
    moments = adam.by_key(raw.opt, model, str(path)) if raw.opt is not None and "model" in tables else None
    facts = _facts(raw, model, config, layout, moments)
    bundle = LoadedState(
        config=config,
        layout=layout,
        model=model,
        ema=ema,
        exp_avg=moments.exp_avg if moments else {},
        exp_avg_sq=moments.exp_avg_sq if moments else {},
        updates=moments.updates if moments else 0,
        head_updates=moments.updates if moments else 0,
        step=_steps(raw, moments),
        path=_path(raw.args, path),
        facts=facts,
    )
    return _from_official(bundle) if layout == "sit" else bundle


def _from_official(bundle: LoadedState) -> LoadedState:
    """The bundle with its tables turned into our convention, and the tensors that this changes kept aside."""
    config = bundle.config
    tables = {"model": bundle.model, "ema": bundle.ema, "exp_avg": bundle.exp_avg, "exp_avg_sq": bundle.exp_avg_sq}
    originals = {
        f"{name}/{key}": table[key] for name, table in tables.items() for key in official.CHANGED if key in table
    }
    ours = {name: official.to_ours(table, config, name == "exp_avg_sq") for name, table in tables.items()}
    return replace(
        bundle, model=ours["model"], ema=ours["ema"], exp_avg=ours["exp_avg"], exp_avg_sq=ours["exp_avg_sq"],
        originals=originals,
    )  # fmt: skip


def _in_float32(table: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Half precision widened, which loses nothing; anything else is left for the check to refuse."""
    for key, tensor in table.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {key} holds NaN or infinity")
    half = (torch.float16, torch.bfloat16)
    return {key: (t.float() if t.dtype in half else t).contiguous() for key, t in table.items()}


def _facts(
    raw: RawFile, model: Mapping[str, Tensor], config: Model, layout: str, moments: Moments | None
) -> dict[str, Any]:
    return {
        "tables": list(raw.tables),
        "prefixes": dict(raw.prefixes),
        "args": {key: value for key, value in raw.args.items() if adam.plain(value)},
        "entries": dict(raw.entries),
        "opt": moments.settings if moments else {},
    } | ({"sigma": official.has_sigma(model, config)} if layout == "sit" else {})


def _steps(raw: RawFile, moments: Moments | None) -> int:
    steps = raw.entries.get("steps")
    return steps if isinstance(steps, int) and steps >= 0 else moments.updates if moments else 0


def _path(args: Mapping[str, Any], path: Path) -> str:
    if args.get("prediction", "v") not in PREDICTIONS:
        raise UserError(f"{path}: args.prediction = {args['prediction']!r}: only a velocity ({', '.join(PREDICTIONS)})")
    name = str(args.get("path_type", "linear"))
    if name.lower() not in PATHS:
        raise UserError(f"{path}: args.path_type = {name!r}: one of {', '.join(PATHS)} can be read")
    return PATHS[name.lower()]
