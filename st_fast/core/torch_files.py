"""What `torch.save` wrote, read without executing anything or believing any size.

Zip files (torch 1.6 and later) and the older single stream are read. Storages are read once each, only where the file
holds as many bytes as are claimed, and only those that are asked for.
"""

import os
import zipfile
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core.errors import UserError, first_line
from st_fast.core.files import FREE_BYTES, BadFile, open_regular, read_exactly, shown
from st_fast.core.limits import Zip
from st_fast.core.pickled import Asked, Interpreter

PICKLE_BYTES = 16 * 2**20
"""Of the pickle in a file, without the storages: XL's with the optimiser's state has one."""
HOLDERS = (Mapping, list, tuple, Namespace)
"""What of a pickle's values may hold tensors."""
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

Choice = Callable[[dict[Any, Any]], Collection[str]]
"""A file's content, whose tensors have shapes but no values yet → the keys whose values are not needed."""


def read_pickled(path: Path, unread: Choice | None = None) -> Any:
    """The content of a `torch.save` file; tensors on the CPU. UserError in one line for whatever can't be read.

    A checkpoint has several tables, each of gigabytes: under a key that `unread` names the tensors of a table become
    meta ones, which take no memory, and whatever else may hold tensors there becomes None.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            zipped = file.read(2) == b"PK"
        return (_zipped if zipped else _streamed)(path, unread or (lambda content: ()))
    except Asked as error:
        raise UserError(
            f"{path}: refused, nothing executed: its pickle asks for {shown(str(error))}; only tensors, plain values, "
            "paths and namespaces are read"
        ) from None
    except BadFile as error:
        raise BadFile(f"{path}: refused, nothing executed: {str(error).removeprefix(f'{path}: ')}") from None
    except Exception as error:  # a broken pickle can make pickletools and the interpreter stumble over anything
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: refused, nothing executed: not a sound torch.save file ({problem})") from None


def _zipped(path: Path, unread: Choice) -> Any:
    with Zip(path) as archive:
        names = archive.NameToInfo
        found = [name for name in names if name.endswith("data.pkl")]
        if len(found) != 1:
            raise BadFile(f"{path}: {len(found)} data.pkl in it, 1 is needed")
        root = found[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in names:
            raise BadFile(f"{path}: a TorchScript archive, whose code would have to be run")
        order = archive.member(names[f"{root}byteorder"], 16) if f"{root}byteorder" in names else b"little"
        if order != b"little":
            raise BadFile(f"{path}: byteorder is {shown(order)}, little is needed")
        left = max(path.stat().st_size, FREE_BYTES // 4)
        members: list[tuple[zipfile.ZipInfo, Tensor]] = []

        def load(key: str, size: int) -> Tensor:
            nonlocal left
            info = names.get(f"{root}data/{key}")
            if info is None or info.file_size != size:
                there = "none" if info is None else str(info.file_size)
                raise BadFile(f"{path}: storage {shown(key)} claims {size} bytes, {there} are there")
            archive.check(info)
            left -= size
            if left < 0:
                raise BadFile(f"{path}: its storages claim more bytes than the file has")
            members.append((info, torch.empty(size, dtype=torch.uint8)))
            return members[-1][1]

        pickle = archive.member(names[found[0]], PICKLE_BYTES)
        content = _without(Interpreter(load).run(pickle)[0], unread)
        needed = _storages(content)
        for info, data in members:
            if data.data_ptr() in needed:
                archive.read_into(info, data.numpy().data)
        return content


def _streamed(path: Path, unread: Choice) -> Any:
    """The form before torch 1.6: five pickles, then each storage with its number of elements in front."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = bytearray(min(size, PICKLE_BYTES))
        read_exactly(file, memoryview(head), path)
        storages: dict[str, Tensor] = {}
        left = size

        def load(key: str, size: int) -> Tensor:
            nonlocal left
            left -= size
            if left < 0:
                raise BadFile(f"{path}: its storages claim more bytes than the file has")
            storages[key] = torch.empty(size, dtype=torch.uint8)
            return storages[key]

        position, read = 0, []
        for number in range(5):
            interpreter = Interpreter(load if number == 3 else None)
            value, used = interpreter.run(bytes(head[position:]))
            if number == 3:
                sizes = {key: storage.dtype.itemsize for key, storage in interpreter.storages.items()}
            read.append(value)
            position += used
            if number == 1 and read != [MAGIC, PROTOCOL]:
                raise BadFile(f"{path}: a pickle, and none of torch.save's")
        content, keys = _without(read[3], unread), read[4]
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
            raise BadFile(f"{path}: lists the storages {shown(keys)}, its tensors need {shown(sorted(storages))}")
        needed = _storages(content)
        file.seek(position)
        for key in keys:
            count = bytearray(8)
            read_exactly(file, memoryview(count), path)
            data = storages[key]
            if int.from_bytes(count, "little") * sizes[key] != len(data):
                raise BadFile(f"{path}: storage {shown(key)} has another size than its tensors need")
            if data.data_ptr() in needed:
                read_exactly(file, data.numpy().data, path)
            elif file.seek(len(data), os.SEEK_CUR) > size:
                raise BadFile(f"{path}: storage {shown(key)} ends at byte {file.tell()}, the file at {size}")
        return content


def _without(content: Any, unread: Choice) -> Any:
    """The content without what holds tensors under the keys that are not needed."""
    for key in unread(content) if isinstance(content, dict) else ():
        kept = content[key] if isinstance(content[key], Mapping) else {}
        content[key] = {name: _emptied(item) for name, item in kept.items()}
    return content


def _emptied(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.to("meta")
    return None if isinstance(item, HOLDERS) else item


def _storages(content: Any) -> set[int]:
    """The addresses of the storages whose tensors are anywhere in the content. It may hold itself, or a list often."""
    found, seen, left = set[int](), set[int](), [content]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            found |= {value.untyped_storage().data_ptr()} if not value.is_meta else set()
        elif isinstance(value, HOLDERS) and id(value) not in seen:
            seen.add(id(value))
            inside = vars(value) if isinstance(value, Namespace) else value
            left += inside.values() if isinstance(inside, Mapping) else inside
    return found
