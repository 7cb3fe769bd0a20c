"""A group of named tensors ↔ its safetensors files, hashed in the same pass that writes or reads them.

A group has one file, or one file a rank. Of several, each tensor is either whole in the first file ("replicate") or
split by rows over all of them ("shard(0)"): file r of n holds rows [r·c, (r + 1)·c) with c = ⌈rows / n⌉, cut off at the
end, as `torch.chunk` has it.

The safetensors library writes and maps files on its own, out of sight of fsync and of the hash; here every byte passes
through one loop, and the bytes that are loaded are the bytes that were hashed. Its files and ours are the same format.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from st_fast.core.files import (
    CHUNK,
    BadFile,
    Entry,
    durable_file,
    inside,
    is_count,
    open_regular,
    parse_header,
    read_exactly,
    sha256_file,
    shown,
    write_all,
)
from st_fast.core.ranks import rows

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
REPLICATE, BY_ROWS = "replicate", "shard(0)"
Described = Mapping[str, Mapping[str, Any]]
"""By tensor: shape, dtype and, where a group has several files, placement."""


Wanted = Callable[[str, Sequence[int]], tuple[int, int] | None]
"""Name and shape of a tensor → its rows [start, stop) that are wanted; None: all of it."""


@dataclass(frozen=True)
class GroupFile:
    """A manifest's record of a group's file: name, SHA-256, size, and {tensor: {"shape": […], "dtype": "F32"}}."""

    file: str
    sha256: str
    bytes: int
    tensors: Described


def write_group(path: Path, tensors: Mapping[str, Tensor]) -> GroupFile:
    """Writes tensors (any device, strides or aliasing: each by value) to a new file, durably; OSError on a full disk.

    Raises:
        ValueError: a dtype that safetensors has no name for, or the reserved key `__metadata__`.
    """
    # Widest items first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    shapes = {key: described(key, tensors[key]) for key in order}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for key in order:
        start, stop = stop, stop + tensors[key].numel() * tensors[key].element_size()
        header[key] = {**shapes[key], "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(prefix)
    with durable_file(path) as file:
        write_all(file, prefix)
        for key in order:
            data = bytes_of(tensors[key].detach().cpu().contiguous())
            for at in range(0, len(data), CHUNK):  # a piece is hashed and written while it is in the cache
                digest.update(data[at : at + CHUNK])
                write_all(file, data[at : at + CHUNK])
    return GroupFile(path.name, digest.hexdigest(), len(prefix) + stop, shapes)


def read_group(path: Path, record: GroupFile, verify: bool) -> dict[str, Tensor]:
    """The tensors of a group file, on the CPU, allocating no more than the file's size.

    A `BadFile` unless size, tensors and (with `verify`) hash are as recorded.
    """
    digest = hashlib.sha256()
    result = {}
    with open_regular(path) as file:
        entries, raw = _checked_header(file, path, record)
        digest.update(raw)
        for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            data = bytes_of(tensor)
            for at in range(0, len(data), CHUNK):
                read_exactly(file, data[at : at + CHUNK], path)
                digest.update(data[at : at + CHUNK])
            result[key] = tensor
    if verify:
        _same_hash(path, record, digest.hexdigest())
    for key, tensor in result.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise BadFile(f"{path}: tensor {shown(key)} is boolean, but holds bytes other than 0 and 1")
    return result


def described(key: str, tensor: Tensor) -> dict[str, object]:
    """A tensor's shape and dtype as a header has them; ValueError for what safetensors can't hold."""
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"tensor {key!r}: dtype {tensor.dtype} cannot be saved; {', '.join(DTYPES)} can")
    if key == "__metadata__":
        raise ValueError("a tensor may not be called '__metadata__'")
    return {"shape": list(tensor.shape), "dtype": DTYPE_NAMES[tensor.dtype]}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor without gradient, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checked_header(file: BinaryIO, path: Path, record: GroupFile) -> tuple[dict[str, Entry], bytes]:
    entries, raw = parse_header(file, path)
    found = {key: {"shape": list(entry.shape), "dtype": entry.dtype} for key, entry in entries.items()}
    expected = record.tensors
    if differ := sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)):
        raise BadFile(f"{path}: {len(differ)} tensors are not as the manifest says, the first is {shown(differ[0])}")
    if (size := os.fstat(file.fileno()).st_size) != record.bytes:
        raise BadFile(f"{path}: expected {record.bytes} bytes, found {size}")
    return entries, raw


def _same_hash(path: Path, record: GroupFile, found: str) -> None:
    if found != record.sha256:
        raise BadFile(f"{path}: SHA-256 expected {record.sha256[:16]}…, found {found[:16]}… (its bytes were changed)")


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
        return {
            key: pieces[0].pop(key)
            if one["placement"] == REPLICATE
            else torch.cat([piece.pop(key) for piece in pieces])
            for key, one in self.tensors.items()
        }

    def hollow(self) -> dict[str, Tensor]:
        """The tensors on the meta device: shapes and dtypes without bytes."""
        made = self.tensors.items()
        return {key: torch.empty(one["shape"], dtype=DTYPES[one["dtype"]], device="meta") for key, one in made}

    def read_rows(self, folder: Path, wanted: Wanted) -> dict[str, Tensor]:
        """`each_of` all tensors."""
        return dict(self.each_of(folder, wanted))

    def each_of(self, folder: Path, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
        """Of each tensor the rows that `wanted` names.

        No more is read and allocated; sizes and headers are checked, hashes are not (`check` does it).
        """
        with ExitStack() as opened:
            files = list[tuple[BinaryIO, Path, dict[str, Entry]]]()
            for part in self.parts:
                path = inside(folder, part.file)
                file = opened.enter_context(open_regular(path))
                files.append((file, path, _checked_header(file, path, part)[0]))
            for key, one in self.tensors.items():
                shape, rows_wanted = one["shape"], wanted(key, one["shape"])
                start, stop = (0, shape[0] if shape else 1) if rows_wanted is None else rows_wanted
                tensor = torch.empty([stop - start, *shape[1:]] if shape else [], dtype=DTYPES[one["dtype"]])
                self._fill(tensor, key, start, stop, files)
                yield key, tensor

    def _fill(
        self, into: Tensor, key: str, start: int, stop: int, files: Sequence[tuple[BinaryIO, Path, dict[str, Entry]]]
    ) -> None:
        """Reads rows [start, stop) of a tensor from the files that have them."""
        one, data = self.tensors[key], bytes_of(into)
        split = one.get("placement", REPLICATE) == BY_ROWS
        width = len(data) // max(stop - start, 1)  # bytes of a row
        for number, (file, path, entries) in enumerate(files if split else files[:1]):
            first, last = rows(one["shape"][0], number, len(files)) if split else (0, max(stop, 1))
            low, high = max(start, first), min(stop, last)
            if low < high and width:
                file.seek(entries[key].start + (low - first) * width)
                read_exactly(file, data[(low - start) * width : (high - start) * width], path)

    def check(self, folder: Path, deep: bool) -> None:
        """BadFile unless every file has the recorded size and tensors and, with `deep`, the recorded hash."""
        for part in self.parts:
            path = inside(folder, part.file)
            with open_regular(path) as file:
                _checked_header(file, path, part)
            if deep:
                _same_hash(path, part, sha256_file(path))


def file_name(group: str, part: int, count: int) -> str:
    """The name of one part's file."""
    return f"{group}.rank-{part}-of-{count}.safetensors"


def of_part(tensors: Described, part: int, count: int) -> dict[str, dict[str, object]]:
    """The tensors in one part's file: {tensor: {"shape": […], "dtype": "F32"}}."""
    found: dict[str, dict[str, object]] = {}
    for key, one in tensors.items():
        shape = list(one["shape"])
        if one["placement"] == BY_ROWS:
            start, stop = rows(shape[0], part, count)
            found[key] = {"shape": [stop - start, *shape[1:]], "dtype": one["dtype"]}
        elif part == 0:
            found[key] = {"shape": shape, "dtype": one["dtype"]}
    return found


def fields(where: str, value: object, types: Mapping[str, type]) -> dict[str, Any]:
    """`value`, which must be a JSON object with exactly these keys of these types; BadFile otherwise."""
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise BadFile(f"{where} is {shown(value)}, expected an object with {', '.join(types)}")
    for key, kind in types.items():
        if type(value[key]) is not kind:
            raise BadFile(f"{where}: {key} is {shown(value[key])}, expected {kind.__name__}")
    return value


FILE_FIELDS = {"file": str, "sha256": str, "bytes": int}


def parse_group(name: str, value: object, file: Path, version: int) -> Group:
    """A group out of a manifest's JSON; BadFile for what is not of that form. Version 1 knows one file a group."""
    where = f"{file}: group {shown(name)}"
    if version == 1:
        whole = GroupFile(**fields(where, value, FILE_FIELDS | {"tensors": dict}))
        return Group(whole.tensors, [whole])
    found = fields(where, value, {"tensors": dict, "parts": list})
    tensors, count = found["tensors"], len(found["parts"])
    if not count:
        raise BadFile(f"{where}: parts is empty, expected one file a rank")
    for key, one in tensors.items():
        here = f"{where}: tensor {shown(key)}"
        fields(here, one, {"shape": list, "dtype": str, "placement": str})
        shape, dtype, placement = one["shape"], one["dtype"], one["placement"]
        if not all(map(is_count, shape)):
            raise BadFile(f"{here}: shape {shown(shape)} is not a list of counts")
        if dtype not in DTYPES:
            raise BadFile(f"{here}: dtype {shown(dtype)} is none of {', '.join(DTYPES)}")
        if placement not in (REPLICATE, BY_ROWS) or (placement == BY_ROWS and not shape):
            expected = f"expected {REPLICATE}, {BY_ROWS}"
            raise BadFile(f"{here}: placement {shown(placement)} of shape {shown(shape)}, {expected}")
    parts = []
    for number, one in enumerate(found["parts"]):
        part, ending = fields(f"{where}: part {number}", one, FILE_FIELDS), file_name("", number, count)
        if not part["file"].endswith(ending):
            raise BadFile(f"{where}: part {number} is {shown(part['file'])}, expected …{ending}")
        parts.append(GroupFile(**part, tensors=of_part(tensors, number, count)))
    return Group(tensors, parts)
