"""Files that may be broken or hostile are checked before they are believed, and written so that no crash shows half.

Reading never unpickles, and allocates nothing before a file's claimed sizes were compared with its true size. All
writes go through `os.write`, `os.fsync` and `os.rename`, so that a test can stop a process at each of them: files and
folders are written aside, fsynced and renamed, and the folder that holds the name is fsynced too. Imports no torch.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from st_fast.core.errors import BadFile as BadFile
from st_fast.core.errors import Unreadable as Unreadable
from st_fast.core.errors import UserError, unreadable
from st_fast.core.errors import printable as printable
from st_fast.core.errors import shown as shown

CHUNK = 4 * 2**20
"""Bytes read or hashed at a time."""
HEADER_LIMIT = 100 * 2**20
"""Bytes a safetensors header may have (the format's own limit)."""
JSON_LIMIT = 16 * 2**20
JSON_DEPTH = 64
FREE_BYTES = 256 * 2**20
"""Bytes of memory that reading any file may take, however small it is."""
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_DIMS = 32
PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(6)))


class Entry(NamedTuple):
    """Where a tensor lies in a safetensors file: dtype name ("F32"), shape, and its bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def allowance(size: int) -> int:
    """Bytes of memory that reading a file of `size` bytes may take."""
    return max(4 * size, FREE_BYTES)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file unbuffered for reading; a missing file, folder, pipe or device is a `BadFile`."""
    name = str(path) if str(path).isprintable() else ascii(str(path))
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to must not hang; it means nothing to a regular file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise BadFile(f"{name}: missing") from None
    except (OSError, ValueError) as error:
        raise unreadable(name, "opened", error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile(f"{name}: not a regular file")
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        try:
            yield file
        except OSError as error:
            raise unreadable(name, "read", error) from None


def read_exactly(file: BinaryIO, into: memoryview, path: Path) -> None:
    """Fills `into` (bytes) from the file's position; a `BadFile` when the file ends before."""
    done = 0
    while done < len(into):
        count = file.readinto(into[done : done + CHUNK])  # type: ignore[attr-defined]
        if not count:
            raise BadFile(f"{path}: ends {len(into) - done} bytes early (cut off while it was read?)")
        done += count


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces."""
    with open_regular(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused if absolute, containing `..`, or leading out of the folder through a symlink."""
    folder = Path(folder)
    refusal = f"{folder}: the path {shown(name)} in it must be relative and stay inside the folder"
    if not isinstance(name, str) or not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadFile(refusal)
    path = folder / name
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError):  # symlink loop, over-long or unencodable name
        raise BadFile(refusal) from None
    if target == root or not target.is_relative_to(root):
        raise BadFile(refusal)
    return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {shown(key)} occurs twice")
        result[key] = value
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is not finite")
    return value


def _whole(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**64
    if abs(value) >= 2**64:
        raise ValueError(f"the number {shown(text)} has more than 64 bits")
    return value


JSON_MEMORY = {b"{": 96, b"[": 64, b",": 44, b":": 160}
"""Bytes of an object, a list, an item and a key in CPython, with what parsing adds meanwhile."""


def too_deep(value: object) -> bool:
    """Whether lists and objects out of JSON are nested more than JSON_DEPTH levels deep."""
    level: list[Any] = [value]
    for _ in range(JSON_DEPTH):
        inner = (item.values() if type(item) is dict else item for item in level)
        level = [item for items in inner for item in items if type(item) in (dict, list)]
        if not level:
            return False
    return True


def parse_json(data: bytes, path: Path, memory: int = FREE_BYTES) -> dict[str, Any]:
    """Strict JSON object: UTF-8, finite numbers of at most 64 bits, no key twice, nested at most JSON_DEPTH levels.

    Anything else, and what could take more than `memory` bytes (or four times the text), is a `BadFile` naming `path`.
    """
    memory = max(memory, 4 * len(data))
    needed = len(data) * (2 if data.isascii() else 5) + sum(data.count(sign) * n for sign, n in JSON_MEMORY.items())
    if needed > memory:  # counted from its punctuation, before anything is parsed
        raise BadFile(f"{path}: {len(data)} bytes of JSON with {needed} bytes of items, at most {memory} are allowed")
    hooks: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite, "parse_int": _whole}
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, **hooks)
        if b"\\u" in data:  # only an escape can smuggle in half a surrogate pair, which no UTF-8 text can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise BadFile(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:  # includes JSONDecodeError, UnicodeDecodeError and over-long integers
        raise BadFile(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadFile(f"{path}: expected a JSON object, found {type(value).__name__}")
    if too_deep(value):
        raise BadFile(f"{path}: not valid JSON (nested more than {JSON_DEPTH} levels deep)")
    return value


def read_bytes(path: Path, max_bytes: float = math.inf) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes; a `BadFile` for any other, as for a pipe."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise BadFile(f"{path}: {size} bytes, at most {max_bytes} are allowed")
        data = bytearray(size)
        read_exactly(file, memoryview(data), path)
    return bytes(data)


def read_json(path: Path, max_bytes: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON object from a file of at most `max_bytes` bytes."""
    return parse_json(read_bytes(path, max_bytes), Path(path))


def is_pickle(path: Path) -> bool:
    """Whether a file starts like a pickle or like the zip that `torch.save` writes."""
    with open_regular(Path(path)) as file:
        return _starts_pickle(file.read(9) or b"")


def _starts_pickle(start: bytes) -> bool:
    """Whether the first 9 bytes are a pickle's or a zip's; those of safetensors may look so, with a header of 128 bytes
    or 256 more, but have zeros and a brace behind.
    """
    return start.startswith(PICKLE_STARTS) and start[2:9] != b"\0\0\0\0\0\0{"


def read_header(path: Path) -> dict[str, Entry]:
    """Checks the header of a safetensors file and returns {tensor name: Entry}; `BadFile` says what is wrong.

    Afterwards it holds that the tensors' bytes fill the file's data part without gap or overlap and that each span
    equals product(shape) · item size, so allocating every tensor takes no more than the file's own size.
    """
    path = Path(path)
    with open_regular(path) as file:
        return parse_header(file, path)[0]


def parse_header(file: BinaryIO, path: Path) -> tuple[dict[str, Entry], bytes]:
    """`read_header` on an open file at position 0; also returns the header's raw bytes, with the length in front."""
    size = os.fstat(file.fileno()).st_size
    start = bytearray(9)
    if size < len(start):
        raise BadFile(f"{path}: {size} bytes, too short for a safetensors file")
    read_exactly(file, memoryview(start), path)
    length = int.from_bytes(start[:8], "little")
    limit = min(size - 8, HEADER_LIMIT)
    if length > limit or start[8:] != b"{":
        if start.startswith(PICKLE_STARTS):
            raise BadFile(f"{path}: a pickle or zip file (torch.save), which is never opened; safetensors expected")
        if length > limit:
            raise BadFile(f"{path}: the header claims {length} bytes, at most {limit} are possible")
        raise BadFile(f"{path}: not a safetensors file (the header does not start with '{{')")
    raw = bytearray(8 + length)
    raw[:9] = start
    read_exactly(file, memoryview(raw)[9:], path)
    header = parse_json(bytes(raw[8:]), path, allowance(size))
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise BadFile(f"{path}: __metadata__ is {shown(notes)}, expected an object of strings")
    entries = {name: _entry(name, value, path, 8 + length) for name, value in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            problem = "overlaps the one before" if entry.start < position else "leaves a gap before it"
            raise BadFile(f"{path}: tensor {shown(name)} starts at byte {entry.start} and {problem} ({position})")
        position = entry.stop
    if position != size:
        raise BadFile(f"{path}: expected {position} bytes, found {size}")
    return entries, bytes(raw)


def is_count(value: object) -> bool:
    """Whether a value out of JSON is a size or an offset."""
    return type(value) is int and 0 <= value < 2**63


def _entry(name: str, value: object, path: Path, base: int) -> Entry:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise BadFile(f"{where}: expected dtype, shape and data_offsets, found {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BadFile(f"{where}: dtype {shown(dtype)} is none of {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(is_count, shape)):
        raise BadFile(f"{where}: shape {shown(shape)} is not a list of at most {MAX_DIMS} counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise BadFile(f"{where}: data_offsets {shown(offsets)} are not two counts")
    # A zero among the sizes must not hide sizes whose product overflows: strides are computed from them.
    if math.prod(size for size in shape if size) * ITEM_BYTES[dtype] >= 2**63:
        raise BadFile(f"{where}: shape {shown(shape)} is too large")
    expected, span = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if span != expected:
        raise BadFile(f"{where}: {dtype} {shown(shape)} takes {expected} bytes, data_offsets span {span}")
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def write_all(descriptor: int, data: memoryview | bytes) -> None:
    """Writes all bytes, in pieces that the file system may split."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view[:CHUNK]) :]


def fsync_path(path: Path) -> None:
    """Makes a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, durably."""
    path = Path(path).absolute()
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


@contextmanager
def durable_file(path: Path) -> Iterator[int]:
    """A new file's descriptor for `write_all`; fsynced at the end. An OSError names the file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a descriptor has none
        raise
    finally:
        os.close(descriptor)


def json_bytes(obj: object) -> bytes:
    """Readable JSON in UTF-8; NaN, infinities and halves of surrogate pairs are a ValueError."""
    return (json.dumps(obj, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def keep_special(path: Path) -> None:
    """FileExistsError where a pipe, socket or device has the name: a rename would remove it, even /dev/null."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # nothing is there, or writing will tell
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FileExistsError(errno.EEXIST, "a pipe, socket or device is there, which is never replaced", str(path))


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that the old or the new one is there after a crash, never a mixture; OSError on a full disk."""
    path = Path(path)
    keep_special(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with durable_file(partial) as descriptor:
            write_all(descriptor, data)
        os.rename(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
    fsync_path(path.parent)


def write_json_atomic(path: Path, obj: object) -> None:
    """Writes JSON by `write_atomic`."""
    write_atomic(path, json_bytes(obj))


@contextmanager
def write_folder(target: Path, replace: bool = False, keep_replaced: bool = False) -> Iterator[Path]:
    """Fill the folder that it gives with files; at the end it appears as `target`, whole and durable.

    On an exception the partial folder is removed and nothing has changed. A target that exists is a UserError; with
    `replace` it is set aside as `<target>.aside-<n>` just before the rename, and deleted unless `keep_replaced`.
    """
    target = Path(target)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")

    def refuse_existing() -> None:
        if not replace and os.path.lexists(target):
            raise UserError(f"{target}: exists already; remove it or name another folder")

    refuse_existing()
    make_folder(target.parent)
    if partial.exists():  # of a killed process that had our id
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        for folder, _, names in os.walk(partial, topdown=False):
            for name in names:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
        refuse_existing()
        aside: Path | None = None
        if os.path.lexists(target):
            numbered = (target.with_name(f"{target.name}.aside-{n}") for n in itertools.count(1))
            aside = next(path for path in numbered if not os.path.lexists(path))
            os.rename(target, aside)
        try:
            os.rename(partial, target)
        except OSError:
            if aside:
                os.rename(aside, target)
            raise
        fsync_path(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if aside and not keep_replaced:
        shutil.rmtree(aside, ignore_errors=True)
