"""Another project's checkpoint file → the neutral form, with every key, shape and dtype checked.

Files are not believed: nothing in a pickle is ever executed.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import is_pickle, read_header, shown
from st_fast.model.formats import adam, official
from st_fast.model.formats.layouts import check_table, detect, infer
from st_fast.model.formats.loaded_state import LoadedState

PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}
"""What args call the path of the flow, in lower case."""
PREDICTIONS = ("v", "velocity")
PREFIX = re.compile(r"(?:module\.|_orig_mod\.)+")
"""What DistributedDataParallel and torch.compile put in front of keys."""


def import_file(
    path: Path, layout: str | None = None, number_of_heads: int | None = None, heads_otherwise: int | None = None
) -> LoadedState:
    """Reads a `.pt` or safetensors file; layout and model follow from keys and shapes where they are not given.

    `heads_otherwise` is the number of heads where neither qk-norm nor a published size tells it.
    UserError in one line for whatever does not fit.
    """
    raw, where = read_file(path), str(path)
    tables = {name: _in_float32(table, f"{path} {name}".strip()) for name, table in raw.tables.items()}
    model = next(tables[name] for name in ("model", "", "state_dict", "ema") if name in tables)
    layout = layout or detect(model, raw.args, where)
    config = infer(model, raw.args, number_of_heads, where, heads_otherwise)
    for name, table in tables.items():
        check_table(table, config, layout, f"{path} {name}".strip())
    state = adam.by_key(raw.opt, model, where) if raw.opt and "model" in tables else adam.NO_STATE
    steps = raw.entries.get("steps")
    facts = {
        "tables": list(raw.tables),
        "prefixes": dict(raw.prefixes),
        "args": {key: value for key, value in raw.args.items() if adam.plain(value)},
        "entries": dict(raw.entries),
        "opt": state.settings,
    }
    loaded = LoadedState(
        config=config,
        layout=layout,
        model=model,
        ema=tables.get("ema", model),
        exp_avg=state.exp_avg,
        exp_avg_sq=state.exp_avg_sq,
        updates=state.updates,
        head_updates=state.updates,
        step=steps if isinstance(steps, int) and steps >= 0 else state.updates,
        path=_path(raw.args, path),
        facts=facts | ({"sigma": official.has_sigma(model, config)} if layout == "sit" else {}),
    )
    return _from_official(loaded) if layout == "sit" else loaded


def _from_official(loaded: LoadedState) -> LoadedState:
    """The tables turned into our convention, and the tensors that this changes kept aside."""
    tables = {name: getattr(loaded, name) for name in ("model", "ema", "exp_avg", "exp_avg_sq")}
    originals = {
        f"{name}/{key}": table[key] for name, table in tables.items() for key in official.CHANGED if key in table
    }
    ours = {name: official.to_ours(table, loaded.config, name == "exp_avg_sq") for name, table in tables.items()}
    return replace(loaded, **ours, originals=originals)  # type: ignore[arg-type]


def _in_float32(table: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Half precision widened, which loses nothing; anything else is left for the check to refuse."""
    for key, tensor in table.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {key} holds NaN or infinity")
    half = (torch.float16, torch.bfloat16)
    return {key: (t.float() if t.dtype in half else t).contiguous() for key, t in table.items()}


def _path(args: Mapping[str, Any], path: Path) -> str:
    if args.get("prediction", "v") not in PREDICTIONS:
        raise UserError(f"{path}: args.prediction = {args['prediction']!r}: only a velocity ({', '.join(PREDICTIONS)})")
    name = str(args.get("path_type", "linear"))
    if name.lower() not in PATHS:
        raise UserError(f"{path}: args.path_type = {name!r}: one of {', '.join(PATHS)} can be read")
    return PATHS[name.lower()]


@dataclass(frozen=True)
class RawFile:
    """A checkpoint file as it is: tables by their names in it ("model", "ema"; "" for a bare state dict)."""

    tables: Mapping[str, dict[str, Tensor]]
    prefixes: Mapping[str, str]
    """What was taken off the front of each table's keys."""
    opt: Mapping[str, Any]
    """The optimiser's state dict; empty where there is none, as `args`."""
    args: Mapping[str, Any]
    entries: Mapping[str, Any]
    """Other plain entries, such as `steps` and `epoch`."""


def read_file(path: Path) -> RawFile:
    """Reads a `.pt` (by torch's restricted unpickler, `argparse.Namespace` allowed) or safetensors file.

    UserError in one line for a file that is neither, is broken, or asks for anything else to be executed or built.
    """
    content: Any
    if is_pickle(path):
        content = _unpickled(path)
    else:
        read_header(path)  # checked before the library maps it
        from safetensors.torch import load_file

        content = load_file(path)
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        raise UserError(
            f"{path}: holds {type(content).__name__}, expected a dict of tensors or of model, ema, opt, args"
        )
    return _sorted_out(dict(content), path)


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can make the unpickler raise anything
        text = " ".join(str(error).split())
        wanted = re.search(
            r"Unsupported \w+: GLOBAL (\S+)|tried to use (\S+)|Trying to call reduce for unrecognized function (.+)",
            text,
        )
        if wanted:
            name = next(group for group in wanted.groups() if group)
            raise UserError(
                f"{path}: refused, nothing executed: its pickle asks for {shown(name)}; "
                "only tensors, plain values and argparse.Namespace are read"
            ) from None
        raise UserError(f"{path}: refused, nothing executed: torch.load cannot read it ({text[-200:]})") from None


def _sorted_out(content: dict[str, Any], path: Path) -> RawFile:
    if all(isinstance(value, Tensor) for value in content.values()):
        content = {"": content}
    names = [name for name in ("", "model", "ema", "state_dict") if isinstance(content.get(name), Mapping)]
    if not names:
        raise UserError(f"{path}: has {shown(list(content))}, expected model or ema, or a bare state dict")
    tables, prefixes = {}, {}
    for name in names:
        table = content[name]
        strangers = [key for key, value in table.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        if strangers:
            raise UserError(f"{path}: {name or 'state dict'} holds more than tensors: {shown(strangers)}")
        tables[name], prefixes[name] = _without_prefix(table, f"{path} {name}".strip())
    args, opt = content.get("args"), content.get("opt")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    rest = {key: value for key, value in content.items() if key not in (*names, "opt", "args")}
    entries = {key: value for key, value in rest.items() if isinstance(value, (int, float, str))}
    opt, args = (dict(value) if isinstance(value, Mapping) else {} for value in (opt, args))
    return RawFile(tables, prefixes, opt, args, entries)


def _without_prefix(table: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], str]:
    """The table with leading `module.` and `_orig_mod.` taken off, and the prefix that all keys share ("" if mixed)."""
    found: dict[str, Tensor] = {}
    prefixes = set()
    for key, tensor in table.items():
        match = PREFIX.match(key)
        prefixes.add(match[0] if match else "")
        plain = key[match.end() :] if match else key
        if plain in found:
            raise UserError(f"{where}: {shown(plain)} occurs twice, with and without a prefix")
        found[plain] = tensor
    return found, prefixes.pop() if len(prefixes) == 1 else ""
