"""NumPy arrays that lie in a pickle: where their bytes stand, found without executing anything or copying them.

np.save writes an array of Python objects as a pickle behind its header; webdataset's files may be pickles of one array.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from st_fast.core.errors import first_line
from st_fast.core.files import BadFile, is_count, shown
from st_fast.core.limits import Npy
from st_fast.core.pickled import Asked, Interpreter

BYTES = {"SHORT_BINBYTES": 2, "BINBYTES": 5, "BINBYTES8": 9}
"""Instructions that push bytes, and how many bytes stand before these."""
NUMBERS = ("f2", "f4", "f8", "i4", "i8")
MODULES = ("numpy.core.multiarray ", "numpy._core.multiarray ")


class _Span(NamedTuple):
    start: int
    size: int


@dataclass
class _Dtype:
    name: str


@dataclass
class _Array:
    """An array while its pickle is read: a place, or the list of what it holds."""

    content: Any = None


def array_places(data: bytes, where: object) -> Any:
    """The value of a pickle of arrays: an array of numbers is its place in `data`, one of objects a list of values.

    Numbers by themselves are places of the shape (). `BadFile`, which begins with `where`, for any other pickle.
    """
    try:
        return _plain(_Places(None).run(data)[0])
    except Asked as error:
        asked = shown(str(error))
        raise BadFile(
            f"{where}: refused, nothing executed: its pickle asks for {asked}; only arrays are read"
        ) from None
    except Exception as error:  # a broken pickle can make pickletools and the interpreter stumble over anything
        problem = f"{type(error).__name__}: {first_line(error)[:120]}"
        raise BadFile(f"{where}: refused, nothing executed: not a sound pickle of arrays ({problem})") from None


def _plain(value: Any) -> Any:
    """Arrays of objects as lists; they hold arrays and numbers, one level deep."""
    if not isinstance(value, _Array):
        return value
    if not isinstance(value.content, list):
        return value.content
    return [item.content if isinstance(item, _Array) else item for item in value.content]


class _Places(Interpreter):
    """The interpreter of an array's pickle; bytes are only located."""

    def step(self, code: str, argument: Any) -> None:
        if code in BYTES:
            self.stack.append(_Span(self.position + BYTES[code], len(argument)))
        else:
            super().step(code, argument)

    def called(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        name = getattr(function, "text", str(function))
        short = next((name.removeprefix(module) for module in MODULES if name.startswith(module)), name)
        if short == "_reconstruct" and getattr(arguments[0], "text", "") == "numpy ndarray":
            return _Array()
        if short == "scalar":
            dtype, span = arguments
            return _place((), dtype, False, span)
        if name == "numpy dtype":
            return _Dtype(str(arguments[0]))
        raise Asked(name)

    def instance(self, kind: Any, arguments: tuple[Any, ...]) -> Any:
        return self.called(kind, arguments)

    def build(self, value: Any, state: Any) -> None:
        if isinstance(value, _Dtype):
            if state[1] not in ("<", "|", "="):
                raise Asked(f"numbers in the byte order {state[1]}")
        elif isinstance(value, _Array) and value.content is None:
            _, shape, dtype, fortran, content = state
            value.content = content if isinstance(content, list) else _place(shape, dtype, fortran, content)
        else:
            raise Asked(f"a state of {type(value).__name__}")


def _place(shape: Any, dtype: Any, fortran: Any, span: Any) -> Npy:
    """The array's place; ValueError unless the bytes are as many as shape and dtype say."""
    if not isinstance(dtype, _Dtype) or dtype.name not in NUMBERS:
        raise Asked(f"an array of {getattr(dtype, 'name', type(dtype).__name__)}")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(map(is_count, shape)) or not isinstance(span, _Span):
        raise ValueError(f"shape {shown(shape)} of an array")
    place = Npy(shape, np.dtype(dtype.name), span.start, bool(fortran))
    if math.prod(shape) * place.dtype.itemsize != span.size:
        raise ValueError(f"{span.size} bytes for an array {place.dtype} {shown(shape)}")
    return place
