"""A small interpreter of pickles, which executes nothing of them and believes no size.

It knows tensors, plain values, NumPy's scalars, paths, argparse.Namespace and SimpleNamespace. An instance of any other
class becomes an `Unread` that holds nothing but the class's name; whatever else a pickle wants called is refused by its
name. Tensors are views of storages, and must lie inside. `torch_files.py` reads torch.save's files with it,
`pickled_arrays.py` finds NumPy's arrays.
"""

import argparse
import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from st_fast.core.files import is_count, shown

STEPS = 500_000
"""Instructions of a pickle; XL's checkpoint with its optimiser's state has 60,000."""
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
DTYPES = {f"torch {str(t).removeprefix('torch.')}": t for t in vars(torch).values() if isinstance(t, torch.dtype)}
REBUILT = "torch._utils _rebuild_"
NAMESPACES = ("argparse Namespace", "types SimpleNamespace")
NUMPY_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
"""Of scalars that are read, as NumPy's pickles name them."""
SCALARS = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")
PATHS = tuple(f"{module} {name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath"))
PATH_PARTS, PATH_BYTES = 256, 4_096
"""Of a path at most; a pickle could repeat one long part without end."""


class Storage(NamedTuple):
    """The bytes of a storage, and what its elements are."""

    data: Tensor
    dtype: torch.dtype


class Name(NamedTuple):
    """A global that a pickle names: "module name". It stands for itself until it is called."""

    text: str


class NumpyType(NamedTuple):
    """The type of NumPy's scalars, one of NUMPY_TYPES."""

    text: str


class Unread(NamedTuple):
    """Stands for an instance of a class that is not known here: what it holds is left out."""

    kind: str


class Asked(Exception):
    """A pickle asks for something that is not read; the text says what."""


Load = Callable[[str, int], Tensor]
"""Key and bytes of a storage → its bytes as uint8."""
MARK = object()


class Interpreter:
    """Runs a pickle's instructions on a stack; `load` gives storages (none are allowed without)."""

    def __init__(self, load: Load | None) -> None:
        self.load, self.storages = load, dict[str, Storage]()
        self.position = 0
        """The byte of the pickle at which the instruction that is executed stands."""
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> tuple[Any, int]:
        """The value, and how many bytes the pickle has. Raises `Asked`, or anything at all for a broken one."""
        for number, (code, argument, position) in enumerate(pickletools.genops(data)):
            if number > STEPS:
                raise ValueError(f"more than {STEPS} instructions")
            if code.name == "STOP":
                return self.stack.pop(), (position or 0) + 1
            self.position = position or 0
            self.step(code.name, argument)
        raise ValueError("no end")

    def step(self, code: str, argument: Any) -> None:
        """Executes one instruction."""
        push, pop = self.stack.append, self.stack.pop
        if code in VALUES:
            push(_plain(argument))
        elif code in CONSTANTS:
            push(CONSTANTS[code]())
        elif code in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if code == "MEMOIZE" else argument] = self.stack[-1]
        elif code in ("BINGET", "LONG_BINGET", "GET"):
            push(self.memo[argument])
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [pop() for _ in range(int(code[-1]))]
            push(tuple(reversed(items)))
        elif code in ("TUPLE", "LIST"):
            push((tuple if code == "TUPLE" else list)(self.marked()))
        elif code in ("APPEND", "APPENDS"):
            items = [pop()] if code == "APPEND" else self.marked()
            if not isinstance(self.stack[-1], Unread):
                _of(list, self.stack[-1]).extend(items)
        elif code in ("SETITEM", "SETITEMS", "DICT"):
            items = [pop(), pop()][::-1] if code == "SETITEM" else self.marked()
            if code == "DICT":
                push({})
            if not isinstance(self.stack[-1], Unread):
                _of(dict, self.stack[-1]).update(_pairs(items))
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            name = argument if code == "GLOBAL" else " ".join([_of(str, pop()), _of(str, pop())][::-1])
            push(DTYPES.get(name) or Name(name))
        elif code in ("REDUCE", "NEWOBJ"):
            arguments, function = _of(tuple, pop()), pop()
            # NEWOBJ makes an instance without calling anything of its class, REDUCE calls whatever is named.
            push(self.called(function, arguments) if code == "REDUCE" else self.instance(function, arguments))
        elif code == "BUILD":
            state = pop()
            self.build(self.stack[-1], state)
        elif code == "BINPERSID":
            push(self.storage(_of(tuple, pop())))
        elif code not in ("PROTO", "FRAME"):
            raise Asked(code)

    def called(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """What a pickle's call gives, of the few functions that are known."""
        name = function.text if isinstance(function, Name) else type(function).__name__
        if name in NAMESPACES and not arguments:
            return argparse.Namespace()
        if name == "collections defaultdict" and all(isinstance(argument, Name) for argument in arguments):
            return {}
        if name in PATHS:
            return _path(arguments)
        if name in ("numpy dtype", *SCALARS, "_codecs encode"):
            return _numpy(name, arguments)
        if name == "collections OrderedDict":
            items = [part for pair in (_of(list, arguments[0]) if arguments else []) for part in pair]
            return OrderedDict(_pairs(items))
        if name == "torch Size":
            return tuple(_of(tuple, arguments[0]))
        if name == "torch device" and all(isinstance(argument, (str, int)) for argument in arguments[:2]):
            return ":".join(map(str, arguments[:2]))
        if name == REBUILT + "parameter":
            return _of(Tensor, arguments[0])
        if name in (REBUILT + "tensor", REBUILT + "tensor_v2", REBUILT + "tensor_v3"):
            storage, offset, size, stride, *rest = arguments
            dtype = _of(Storage, storage).dtype
            if name.endswith("3"):
                dtype = _of(torch.dtype, rest[2])
            if any(isinstance(part, Mapping) and part for part in rest):
                raise Asked("a tensor with hooks or a conjugate or negative view")
            return _view(storage.data, dtype, offset, size, stride)
        raise Asked(name)

    def instance(self, kind: Any, arguments: tuple[Any, ...]) -> Any:
        """A new instance of a class that a pickle names."""
        if not isinstance(kind, Name):
            raise Asked(f"an instance of {type(kind).__name__}")
        return self.called(kind, arguments) if kind.text in KNOWN else Unread(kind.text)

    def build(self, value: Any, state: Any) -> None:
        """Gives a value the state that its pickle says: to a number's type nothing but its order of bytes."""
        if isinstance(value, argparse.Namespace):
            vars(value).update((_of(str, key), item) for key, item in _of(dict, state).items())
        elif isinstance(value, NumpyType):
            if len(_of(tuple, state)) < 2 or state[1] not in ("<", "|", "="):
                raise Asked(f"numbers in the order {shown(state)}")
        elif not isinstance(value, (OrderedDict, Unread)):  # the _metadata of the one are of no use here
            raise Asked(f"a state of {type(value).__name__}")

    def marked(self) -> list[Any]:
        """The values above the last mark."""
        at = next(i for i in reversed(range(len(self.stack))) if self.stack[i] is MARK)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def storage(self, said: tuple[Any, ...]) -> Storage:
        """The storage that a persistent id ("storage", type, key, place, elements) stands for."""
        kind, of, key, _, count, *view = said
        if kind != "storage" or not isinstance(of, Name) or any(part is not None for part in view) or not self.load:
            raise Asked(f"the persistent id {shown(said)}")
        dtype = STORAGES.get(of.text.split(" ")[-1]) if of.text.startswith(("torch ", "torch.storage ")) else None
        if dtype is None:
            raise Asked(of.text)
        if not isinstance(key, str) or not is_count(count) or count * dtype.itemsize >= 2**63:
            raise ValueError(f"storage {shown(key)} has {shown(count)} elements")
        if key not in self.storages:
            self.storages[key] = Storage(self.load(key, count * dtype.itemsize), dtype)
        if (found := self.storages[key]).dtype != dtype or len(found.data) != count * dtype.itemsize:
            raise ValueError(f"storage {shown(key)} is claimed with two sizes")
        return found


VALUES = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
)  # fmt: skip
KNOWN = (*NAMESPACES, "collections OrderedDict", "collections defaultdict", "torch Size", "torch device")
"""Classes whose instances are read."""
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
    "EMPTY_DICT": dict, "MARK": lambda: MARK,
}  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        value.encode()  # half a surrogate pair could not be written anywhere
    if isinstance(value, int) and value.bit_length() > 80:
        raise ValueError(f"a number of {value.bit_length()} bits")
    return value


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} where {kind.__name__} is needed")
    return value


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Keys with their values; a tuple as a key could take forever to hash."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int, float)) and key is not None:
            raise Asked(f"a {type(key).__name__} as a key")
        yield key, value


def _path(parts: tuple[Any, ...]) -> str:
    """A path as text."""
    if len(parts) > PATH_PARTS or sum(len(_of(str, part)) for part in parts) > PATH_BYTES:
        raise ValueError(f"a path of {len(parts)} parts, longer than {PATH_BYTES} characters")
    return str(PurePosixPath(*parts))


def _numpy(name: str, arguments: tuple[Any, ...]) -> Any:
    """A number that NumPy pickled, as a plain one; the type of one, or its bytes, as protocol 2 has them."""
    if name == "numpy dtype":
        if arguments[0] not in NUMPY_TYPES:
            raise Asked(f"numpy dtype {shown(arguments[0])}")
        return NumpyType(arguments[0])
    if name == "_codecs encode":
        text, encoding = arguments
        if encoding != "latin1" or len(_of(str, text)) > 8:
            raise Asked(f"{name} of {shown(encoding)}")
        return text.encode("latin1")
    kind, data = arguments
    dtype = np.dtype(f"<{_of(NumpyType, kind).text}")
    if len(_of(bytes, data)) != dtype.itemsize:
        raise ValueError(f"a number of {len(data)} bytes as {dtype}")
    return np.frombuffer(data, dtype)[0].item()


def _view(data: Tensor, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
    """The tensor of these sizes and strides in a storage; ValueError unless every element lies inside."""
    sizes, strides = _of(tuple, size), _of(tuple, stride)
    counts = (offset, *sizes, *strides)
    if len(sizes) != len(strides) or len(sizes) > 32 or not all(map(is_count, counts)) or len(data) % dtype.itemsize:
        raise ValueError(f"size {shown(size)}, stride {shown(stride)}, offset {shown(offset)} of a tensor")
    flat = data.view(dtype)
    # A zero among the sizes must not hide sizes whose product overflows: strides are computed from them.
    if math.prod(n for n in sizes if n) * dtype.itemsize >= 2**63:
        raise ValueError(f"size {shown(size)} of a tensor")
    if 0 in sizes:
        return flat.new_empty(sizes)
    if (last := offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))) >= len(flat):
        raise ValueError(f"a tensor of size {shown(size)} ends at element {last}, its storage at {len(flat)}")
    return flat.as_strided(sizes, strides, offset)
