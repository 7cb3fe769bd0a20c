"""Archives and arrays of other programs, opened so that no header makes the reader allocate or wait.

A file of n bytes may cost `allowance(n)` bytes of memory, and time in proportion to n. What a zip, a tar or a .npy
claims is compared with that before it is believed; the libraries that parse them see the file through `Clipped`.
Every refusal is one `BadFile` line. Imports no torch.
"""

import io
import math
import os
import struct
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from st_fast.core.errors import first_line
from st_fast.core.files import CHUNK, MAX_DIMS, BadFile, allowance, is_count, open_regular, shown

ENTRY_MEMORY = 20
"""Bytes that zipfile takes for a byte of a zip's directory, at most."""
TAR_HEADER = 2**16
"""Bytes of one name or of one member's extended header in a tar."""
NPY_HEADER = 4_096
"""Bytes of a .npy header that are believed; NumPy writes 128."""
METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
"""How a zip's members may be packed: other ways may take gigabytes to unpack a byte."""


DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError)
"""What reading a broken member raises; a password that is missing is a RuntimeError."""


class Clipped:
    """A file whose `read` never asks for more bytes than there are left, nor for more than `most` at once.

    For parsers that read as many bytes as a header claims. All reads together may cover the file a few times and take
    a time in proportion to it, so that headers which lead in circles come to an end (`ValueError`). With a `part`, its
    first byte and its bytes, nothing else of the file is seen.
    """

    def __init__(self, file: BinaryIO, most: int, part: tuple[int, int] | None = None) -> None:
        self._file, self._most = file, most
        self._start, self.size = part or (0, os.fstat(file.fileno()).st_size)
        file.seek(self._start)
        self._left = 8 * self.size + 2**20
        self._deadline = time.thread_time() + 5 + self.size / 2e6

    def free(self) -> None:
        """Lifts the limits: the headers are read."""
        self._most, self._left, self._deadline = self.size, 2**62, math.inf

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes, fewer only at the end of the file."""
        rest = max(0, self.size - self.tell())
        wanted = rest if size is None or size < 0 else min(size, rest)
        self._left -= wanted + 64
        if wanted > self._most:
            raise ValueError(f"a header claims {wanted} bytes, at most {self._most} are allowed")
        if self._left < 0 or time.thread_time() > self._deadline:
            raise ValueError("its headers lead in circles")
        pieces, missing = [], wanted
        while missing and (piece := self._file.read(missing)):
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As a file's."""
        ends = {os.SEEK_SET: self._start, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._start + self.size}
        return self._file.seek(ends[whence] + offset) - self._start

    def tell(self) -> int:
        """As a file's."""
        return self._file.tell() - self._start

    def seekable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Zip(zipfile.ZipFile):
    """A zip whose directory is bounded by the file's size; `BadFile` where it is none, or not a sound one.

    One thread at a time may read it. Members are read by `member`, which believes no claimed size.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.fp = Path(path), None
        with open_regular(self.path) as file:
            copy = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
        self._clipped = Clipped(copy, allowance(os.fstat(copy.fileno()).st_size) // ENTRY_MEMORY)
        try:
            super().__init__(self._clipped)  # type: ignore[arg-type]
        except Exception as error:  # zipfile stumbles over a broken directory in a dozen ways
            copy.close()
            raise BadFile(f"{self.path}: not a sound zip ({first_line(error)[:120]})") from None
        self._clipped.free()

    def close(self) -> None:
        """Closes the file, too."""
        super().close()
        if hasattr(self, "_clipped"):  # not where the file could not be opened
            self._clipped.close()

    def check(self, info: zipfile.ZipInfo, most: int | None = None) -> None:
        """BadFile unless the member can be unpacked, into at most `most` bytes (default: half its allowance)."""
        where, most = f"{self.path}: {shown(info.filename)}", most or allowance(self._clipped.size) // 2
        if info.flag_bits & 1:
            raise BadFile(f"{where} is encrypted")
        if info.compress_type not in METHODS:
            raise BadFile(
                f"{where}: compression method {info.compress_type}; {', '.join(METHODS.values())} can be read"
            )
        stored = info.compress_type == zipfile.ZIP_STORED
        if info.compress_size > self._clipped.size or (stored and info.file_size != info.compress_size):
            raise BadFile(f"{where} claims {info.compress_size} packed bytes, the zip has {self._clipped.size}")
        if info.file_size > most and not stored:
            raise BadFile(f"{where} would unpack to {info.file_size} bytes, at most {most} are allowed")

    @contextmanager
    def reading(self, info: zipfile.ZipInfo, most: int | None = None) -> Iterator[IO[bytes]]:
        """A member that `check` allows, open; BadFile where it turns out to be damaged while it is read."""
        self.check(info, most)
        try:
            with super().open(info) as file:
                yield file
        except DAMAGED as error:
            raise BadFile(f"{self.path}: {shown(info.filename)} is damaged ({first_line(error)[:120]})") from None

    def member(self, info: zipfile.ZipInfo, most: int | None = None) -> bytes:
        """The bytes of a member that `check` allows; BadFile also where it is damaged."""
        with self.reading(info, most) as file:
            return file.read(info.file_size)

    def read_into(self, info: zipfile.ZipInfo, into: memoryview) -> None:
        """Fills `into`, which is as long as the member; BadFile where it is damaged."""
        with self.reading(info, len(into)) as file:
            for at in range(0, len(into), CHUNK):
                into[at : at + CHUNK] = _read(file, len(into[at : at + CHUNK]))
            file.read(1)  # compares the CRC of an empty member, too

    def array(self, name: str, most: int | None = None) -> "np.ndarray[Any, Any]":
        """The array of a member `name`.npy; allocates no more than `most` bytes."""
        info = self.NameToInfo[f"{name}.npy"]
        with self.reading(info, most) as file:
            return read_npy(file, info.file_size, f"{self.path}: {name}")


class InnerTar(NamedTuple):
    """A tar that lies in another: its name there, its first byte in the file, its bytes."""

    name: str
    start: int
    size: int


def tar_members(path: Path, inner: InnerTar | None = None) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar in their order, links and folders included; no content is read.

    Those of an inner tar have places that count from its first byte. `BadFile` for a tar that ends early, also between
    members, or is damaged; its members' bytes [offset_data, offset_data + size) lie in the file. Sparse files, whose
    size may be anything, are refused by name.
    """
    place = f"{path}: {shown(inner.name)}" if inner else str(path)
    with open_regular(Path(path)) as file:
        clipped = Clipped(file, TAR_HEADER, inner and (inner.start, inner.size))
        try:
            with tarfile.open(fileobj=clipped, mode="r:") as archive:  # type: ignore[call-overload]
                before = -1
                while (member := archive.next()) is not None:
                    archive.members = []  # it would keep all of them
                    where = f"{place}: {shown(member.name)}"
                    if member.issparse():
                        raise BadFile(
                            f"{where} is a sparse file, which can't be read in place; make the tar without -S"
                        )
                    if member.size < 0 or member.offset_data <= before:
                        raise BadFile(f"{where}: its header leads back to byte {member.offset_data}")
                    before = member.offset_data
                    if member.isreg() and before + member.size > clipped.size:
                        raise BadFile(
                            f"{where} ends at byte {before + member.size}, the tar at {clipped.size}: it was cut off"
                        )
                    yield member
                clipped.seek(archive.offset)
                block = clipped.read(tarfile.BLOCKSIZE)
        except BadFile:
            raise
        except Exception as error:  # tarfile lets out whatever a broken header makes it stumble over
            raise BadFile(f"{place}: not a sound tar ({first_line(error)[:120]})") from None
        if block != bytes(tarfile.BLOCKSIZE):
            what = "the mark of its end is missing: it was cut off" if len(block) < tarfile.BLOCKSIZE else "damaged"
            raise BadFile(f"{place}: at byte {archive.offset} {what}")


class Npy(NamedTuple):
    """What a .npy says of its array; `start` is its first byte after the header."""

    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"
    start: int
    fortran: bool

    @property
    def size(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


_one_parser = threading.Lock()
"""NumPy parses headers with `ast`, whose recursion count Python 3.11 keeps for all threads together: SystemError."""


def npy_header(file: IO[bytes], where: object) -> Npy:
    """Reads the header of a .npy from its beginning; `BadFile`, which begins with `where`, if it is none.

    Parsed by NumPy, of the header only: an array of Python objects is refused and never unpickled.
    """
    start = _read(file, 8)
    version, field = tuple(start[6:8]), 2 if start[6:7] == b"\1" else 4
    length = _read(file, field)
    if not start.startswith(b"\x93NUMPY") or len(length) < field or version not in ((1, 0), (2, 0)):
        raise BadFile(f"{where}: not a sound .npy file of version 1 or 2")
    if (claimed := int.from_bytes(length, "little")) > NPY_HEADER:
        raise BadFile(f"{where}: not a sound .npy file: a header of {claimed} bytes, at most {NPY_HEADER} are read")
    text = io.BytesIO(length + _read(file, claimed))
    parse = np.lib.format.read_array_header_1_0 if field == 2 else np.lib.format.read_array_header_2_0
    try:
        with _one_parser:
            shape, fortran, dtype = parse(text)  # type: ignore[no-untyped-call]
    except Exception as error:  # NumPy's parser lets out whatever its tokenizer stumbles over
        raise BadFile(f"{where}: not a sound .npy file ({first_line(error)[:120]})") from None
    if dtype.hasobject:
        raise BadFile(f"{where}: an array of Python objects, which would have to be unpickled; refused")
    # A zero among the sizes must not hide sizes whose product overflows: strides are computed from them.
    bounds = [dtype.itemsize or 2**63, *(size for size in shape if size)]
    if len(shape) > MAX_DIMS or not all(map(is_count, shape)) or math.prod(bounds) >= 2**63:
        raise BadFile(f"{where}: {dtype} {shown(shape)} is no shape of an array")
    return Npy(shape, dtype, 8 + field + claimed, bool(fortran))


def read_npy(file: IO[bytes], size: int, where: object) -> "np.ndarray[Any, Any]":
    """The array of a .npy of `size` bytes, from its beginning; allocates nothing that the file does not hold."""
    header = npy_header(file, where)
    if header.start + header.size != size:
        raise BadFile(f"{where}: {header.dtype} {shown(header.shape)} takes {header.size} bytes, {size} are there")
    flat = np.empty(header.size, np.uint8)
    for at in range(0, header.size, CHUNK):
        piece = _read(file, min(CHUNK, header.size - at))
        flat[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        if len(piece) < min(CHUNK, header.size - at):
            raise BadFile(f"{where}: ends {header.size - at - len(piece)} bytes early")
    return flat.view(header.dtype).reshape(header.shape, order="F" if header.fortran else "C")


def _read(file: IO[bytes], size: int) -> bytes:
    """`size` bytes, fewer at the end of the file."""
    data = b""
    while len(data) < size and (piece := file.read(size - len(data))):
        data += piece
    return data
