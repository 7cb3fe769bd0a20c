"""A loaded state → a file in one of the published layouts."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from st_fast.core.checkpoint.groups import write_group
from st_fast.core.errors import UserError
from st_fast.core.files import durable_file, fsync_path, make_folder
from st_fast.model.formats import adam, modern, official
from st_fast.model.formats.layouts import check_table, in_published_order, optimised
from st_fast.model.formats.loaded_state import NULL_CONTEXT, LoadedState, Table, heads, is_head
from st_fast.recipe.architecture import LATER, Model
from st_fast.recipe.keys import keys
from st_fast.recipe.load import to_literal
from st_fast.recipe.methods import CONVOLUTION

FIRST_KEYS = {
    "repa": {"projectors.0.0.weight", f"projectors.0.{CONVOLUTION}.weight", f"projectors.0.{CONVOLUTION}.0.weight"},
    "self-transcendence": {"projectors.0.weight"},
    "sra": {"ap_head.linear1.weight"},
    "self-flow": {"projector.linear1.weight"},
    "speedrundit": {"projectors.0.0.weight"},
}
"""The heads that mark a layout, of REPA's also iREPA's; official SiT and LightningDiT have none."""
CLASSIC: dict[str, tuple[Any, ...]] = {
    key: (keys(Model)[key].default,) for key in LATER if key not in ("internal_head", "fusion_first", "fusion_last")
} | {"qk_norm": (False, True)}
"""The values of a network's options that the code of most projects has: of one that came later its default."""
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "self-flow": CLASSIC | {"qk_norm": (False,)},
    "lightningdit": CLASSIC | {
        "norm": ("layer", "rms_affine"), "position": ("sincos", "both"), "mlp": ("gelu", "swiglu"),
    },
}  # fmt: skip
"""Those of the others."""


def export_file(loaded: LoadedState, layout: str, path: Path, weights: str) -> None:
    """Writes `.pt` (model, ema, opt, args, steps) or `.safetensors` (the chosen weights alone) durably.

    Heads of another layout are left out, for the other project could not load them; a file that came in this layout is
    written back with its own prefixes, args and entries. Self-Flow's code reads tensors alone, of `model`: there the
    average stands. UserError for a file that is there.
    """
    content = as_published(loaded, layout)
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            chosen = content.get(weights)
            write_group(partial, chosen if isinstance(chosen, Mapping) else content)
        else:
            with durable_file(partial) as descriptor, open(descriptor, "wb", closefd=False) as file:
                _save(content, file)
        if os.path.lexists(path):  # also what another process wrote meanwhile
            raise UserError(f"{path}: exists; name another file")
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(path.absolute().parent)


def _save(content: dict[str, Any], file: IO[bytes]) -> None:
    """torch.save; OSError on a full disk, over which torch raises an error about positions in its file."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def as_published(loaded: LoadedState, layout: str) -> dict[str, Any]:
    """What the other project's `torch.save` would be given; UserError for what its code has no place for."""
    height, width = loaded.config.latent_sides
    if height != width:
        raise UserError(f"latents of {height} x {width}: {layout}'s own code takes square ones only")
    _check_options(loaded, layout)
    facts = loaded.facts if loaded.layout == layout else {}
    ema = heads(loaded.model) | dict(loaded.ema)  # ours averages no heads, the published code does
    tables: dict[str, Table] = {"model": loaded.model, "ema": ema}
    tables |= {"exp_avg": loaded.exp_avg, "exp_avg_sq": loaded.exp_avg_sq}
    if FIRST_KEYS.get(layout, set()).isdisjoint(loaded.model):
        tables = {name: {k: t for k, t in table.items() if not is_head(k)} for name, table in tables.items()}
    tables = {name: {k: t for k, t in table.items() if k != NULL_CONTEXT} for name, table in tables.items()}
    if loaded.config.internal_head and layout != "repa":
        told = f"model.internal_head = {loaded.config.internal_head}"
        raise UserError(f"{told}: {layout}'s own code knows no internal head; --to repa keeps it")
    if layout in official.LAYOUTS:
        tables = dict(_official(loaded, tables, facts.get("sigma", layout != "lightningdit")))
    for name in ("model", "ema"):
        check_table(tables[name], loaded.config, layout, name)
    ordered = {name: in_published_order(table, loaded.config, layout) for name, table in tables.items()}
    if layout in modern.LAYOUTS:
        ordered = {name: modern.joined(table, _beside(loaded, layout, name), layout) for name, table in ordered.items()}
    alone = layout == "self-flow"
    if alone:
        ordered = {name: official.with_linear(table) for name, table in ordered.items()}
    prefixes, wanted = facts.get("prefixes", {}), facts.get("tables", ["model"] if alone else ["model", "ema"])
    source = {"": "model", "state_dict": "model"} | ({"model": "ema"} if alone and not facts else {})
    content: dict[str, Any] = {
        name: {prefixes.get(name, "") + key: t for key, t in ordered[source.get(name, name)].items()} for name in wanted
    }
    if wanted == [""]:
        return content[""]
    if alone:
        return content | dict(facts.get("entries", {}))
    if loaded.exp_avg and not loaded.momentum_buffer:  # AdamW's of a part of the tensors would be refused
        numbered, settings = list(optimised(ordered["model"])), facts.get("opt", {})
        content["opt"] = adam.state_dict(numbered, ordered["exp_avg"], ordered["exp_avg_sq"], loaded.updates, settings)
    if layout == "lightningdit":
        config = facts.get("config") if facts else modern.own_config(loaded.config, loaded.path)
        return content | ({} if config is None else {"config": config}) | dict(facts.get("entries", {}))
    content["args"] = argparse.Namespace(**(facts.get("args") or _args(loaded, layout)))
    counted = {"steps": loaded.step} | ({"epoch": 0} if loaded.config.internal_head else {})  # which its code reads
    entries = facts.get("entries", {} if layout == "sit" else counted)
    return content | dict(entries)


def _check_options(loaded: LoadedState, layout: str) -> None:
    """UserError for an option of the network that the layout's own code has not."""
    config = loaded.config
    if layout == "speedrundit":
        if f"model/{modern.CLASS_TOKEN[0]}" not in loaded.originals:
            raise UserError(f"{layout}'s own code needs a class token (REG), which only a model from such a file has")
        return  # and such a file's model has its options
    if config.fusion_last:
        raise UserError(f"model.fusion_last = {config.fusion_last}: {layout}'s own code has no fusion of blocks")
    options = OPTIONS.get(layout, CLASSIC)
    if layout == "lightningdit":  # one switch for the norms of tokens and of queries and keys
        options = options | {"qk_norm": (False, True if config.norm == "layer" else "rms")}
    for key, allowed in options.items():
        if (value := getattr(config, key)) not in allowed:
            named = " or ".join(map(to_literal, allowed))
            raise UserError(f"model.{key} = {to_literal(value)}: {layout}'s own code has {named} only")


def _beside(loaded: LoadedState, layout: str, name: str) -> Table:
    """What the layout has of a table, "model", "ema" or one of AdamW's means, that a network of ours has not."""
    kept = {key.partition("/")[2]: t for key, t in loaded.originals.items() if key.partition("/")[0] == name}
    if layout == "lightningdit":
        kept = {key: tensor for key, tensor in kept.items() if key in modern.ANGLES}
    weights = name not in adam.MEANS and loaded.config.rope
    return (modern.angles(loaded.config) if weights else {}) | kept


def _official(loaded: LoadedState, tables: Mapping[str, Table], sigma: bool) -> dict[str, dict[str, Tensor]]:
    """The tables in the official convention: bit by bit those that were read, as long as they are unchanged."""
    result = {}
    for name, table in tables.items():
        squares = name == "exp_avg_sq"
        result[name] = official.to_official(table, loaded.config, sigma, squares)
        kept = {key: loaded.originals[f"{name}/{key}"] for key in table if f"{name}/{key}" in loaded.originals}
        again = official.to_ours(kept, loaded.config, squares)
        result[name] |= {key: tensor for key, tensor in kept.items() if torch.equal(again[key], table[key])}
    return result


def _args(loaded: LoadedState, layout: str) -> dict[str, Any]:
    """The args that the other project reads back, for a model that did not come from it."""
    common: dict[str, Any] = {"model": loaded.config.name}
    if loaded.config.network == "sit":
        common["num_classes"] = loaded.config.num_classes
    if layout == "sit":
        path = {"linear": "Linear", "cosine": "GVP"}[loaded.path]
        return common | {"path_type": path, "prediction": "velocity", "image_size": 8 * loaded.config.latent_size}
    if loaded.config.internal_head:
        common["encoder_depth"] = loaded.config.internal_head
    return common | {
        "path_type": loaded.path, "prediction": "v", "qk_norm": loaded.config.qk_norm,
        "resolution": 8 * loaded.config.latent_size,
    }  # fmt: skip
