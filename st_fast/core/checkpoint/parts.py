"""What a manifest says of a group: which tensors it holds and in which files, one, or one a rank.

A group of several parts has each tensor either whole in the first part ("replicate") or split by rows over all parts
("shard(0)"): part r of n holds rows [r·c, (r + 1)·c) with c = ⌈rows / n⌉, cut off at the end, as `torch.chunk` has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core.checkpoint.groups import DTYPES, GroupFile, check_group, read_group
from st_fast.core.files import BadFile, inside, shown
from st_fast.core.ranks import rows

REPLICATE, BY_ROWS = "replicate", "shard(0)"
Described = Mapping[str, Mapping[str, Any]]
"""By tensor: shape, dtype and, where a group has several parts, placement."""


@dataclass(frozen=True)
class Group:
    """A group's tensors and its files, in the order of the ranks that wrote them."""

    tensors: Described
    parts: Sequence[GroupFile]

    def read(self, folder: Path, verify: bool) -> dict[str, Tensor]:
        """The whole tensors, on the CPU; allocates as much as the files' sizes, and once more for one tensor."""
        pieces = [read_group(inside(folder, part.file), part, verify) for part in self.parts]
        if len(pieces) == 1:
            return pieces[0]
        return {key: _joined(key, one["placement"], pieces) for key, one in self.tensors.items()}

    def check(self, folder: Path, deep: bool) -> None:
        """BadFile unless every file has the recorded size and tensors and, with `deep`, the recorded hash."""
        for part in self.parts:
            check_group(inside(folder, part.file), part, deep)


def _joined(key: str, placement: str, pieces: list[dict[str, Tensor]]) -> Tensor:
    if placement == REPLICATE:
        return pieces[0].pop(key)
    return torch.cat([piece.pop(key) for piece in pieces])


def file_name(group: str, part: int, count: int) -> str:
    """What the file of one part is called."""
    return f"{group}.rank-{part}-of-{count}.safetensors"


def of_part(tensors: Described, part: int, count: int) -> dict[str, dict[str, object]]:
    """What the file of one part holds: {tensor: {"shape": […], "dtype": "F32"}}."""
    found: dict[str, dict[str, object]] = {}
    for key, one in tensors.items():
        shape = list(one["shape"])
        if one["placement"] == BY_ROWS:
            start, stop = rows(shape[0], part, count)
            found[key] = {"shape": [stop - start, *shape[1:]], "dtype": one["dtype"]}
        elif part == 0:
            found[key] = {"shape": shape, "dtype": one["dtype"]}
    return found


def parse_group(name: str, value: object, file: Path) -> Group:
    """A group of several parts from a manifest's JSON; BadFile for what is not of that form."""
    where = f"{file}: group {shown(name)}"
    if not isinstance(value, dict) or value.keys() != {"tensors", "parts"}:
        raise BadFile(f"{where} is {shown(value)}, expected an object with tensors and parts")
    tensors, parts = value["tensors"], value["parts"]
    if not isinstance(tensors, dict) or not isinstance(parts, list) or not parts:
        raise BadFile(f"{where}: tensors must be an object and parts a list of one file a rank")
    for key, one in tensors.items():
        _check_tensor(f"{where}: tensor {shown(key)}", one)
    count = len(parts)
    return Group(tensors, [_parse_part(where, one, tensors, part, count) for part, one in enumerate(parts)])


def _check_tensor(where: str, value: object) -> None:
    if not isinstance(value, dict) or value.keys() != {"shape", "dtype", "placement"}:
        raise BadFile(f"{where} is {shown(value)}, expected an object with shape, dtype and placement")
    shape, dtype, placement = value["shape"], value["dtype"], value["placement"]
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise BadFile(f"{where}: shape {shown(shape)} is not a list of counts")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFile(f"{where}: dtype {shown(dtype)} is none of {', '.join(DTYPES)}")
    if placement not in (REPLICATE, BY_ROWS) or (placement == BY_ROWS and not shape):
        raise BadFile(f"{where}: placement {shown(placement)} of shape {shown(shape)}, expected {REPLICATE}, {BY_ROWS}")


def _parse_part(where: str, value: object, tensors: Described, part: int, count: int) -> GroupFile:
    types = {"file": str, "sha256": str, "bytes": int}
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise BadFile(f"{where}: part {shown(value)}, expected an object with {', '.join(types)}")
    for key, kind in types.items():
        if type(value[key]) is not kind:
            raise BadFile(f"{where}: part's {key} is {shown(value[key])}, expected {kind.__name__}")
    if not value["file"].endswith(file_name("", part, count)):
        raise BadFile(f"{where}: part {part} is {shown(value['file'])}, expected …{file_name('', part, count)}")
    return GroupFile(**value, tensors=of_part(tensors, part, count))
