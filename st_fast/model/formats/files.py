"""Opens other projects' files without believing them: nothing in a pickle is ever executed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import is_pickle, read_header, shown

PREFIX = re.compile(r"(?:module\.|_orig_mod\.)+")
"""What DistributedDataParallel and torch.compile put in front of keys."""


@dataclass(frozen=True)
class RawFile:
    """A checkpoint file as it is: tables by their names in it ("model", "ema"; "" for a bare state dict)."""

    tables: Mapping[str, dict[str, Tensor]]
    prefixes: Mapping[str, str]
    """What was taken off the front of each table's keys."""
    opt: Mapping[str, Any] | None
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
    args = content.get("args")
    rest = {key: value for key, value in content.items() if key not in (*names, "opt", "args")}
    opt = content.get("opt")
    return RawFile(
        tables,
        prefixes,
        opt if isinstance(opt, Mapping) else None,
        vars(args) if isinstance(args, argparse.Namespace) else dict(args) if isinstance(args, Mapping) else {},
        {key: value for key, value in rest.items() if isinstance(value, (int, float, str))},
    )


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
