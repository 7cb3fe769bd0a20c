"""What standard output and standard error can take: the one rule for all that a command prints. Imports no torch.

Nothing that is printed raises. A reader that has gone (`| head`), a full disk, a closed or non-blocking descriptor:
what can't be written is dropped. Characters that the stream's encoding lacks are escaped, and so are control
characters, which text from files (class names, paths) would otherwise send to the terminal.
"""

import codecs
import errno
import io
import os
import re
import select
import sys
from contextlib import suppress
from typing import TextIO, cast

from st_fast.core.errors import RunFailed
from st_fast.core.signals import asked_to_stop, fill_standard_descriptors

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""All but tab, newline and the return of progress bars; and what turns the direction of text."""
BESIDE_BARS = re.compile(r"\x1b(?!\[A)|" + CONTROL.pattern.replace("\x0e-\x1f", "\x0e-\x1a\x1c-\x1f"))
"""The same without the step to the line above, with which progress bars stand below one another."""
NOT_FOR_TEXT = ("idna", "punycode", "undefined")
"""Python's encodings of host names, and the one that refuses everything."""
PIECE = 4_096
"""Bytes that a pipe takes at once or not at all."""
PATIENCE = 5.0
"""Seconds that a process which was asked to stop waits for a reader that does not read."""


def printable(text: str, control: re.Pattern[str] = CONTROL) -> str:
    r"""The text with every control character as `\x1b`, as Python writes it."""
    return control.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """The same with every character that begins a line."""
    return printable(text).replace("\r", "\\r").replace("\n", "\\n")


class Descriptor(io.RawIOBase):
    """An open file that takes everything. `failure` is why it has begun to drop what it is given."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.failure: OSError | None = None

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        with suppress(OSError):
            return os.isatty(self._number)
        return False

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        """How much of the bytes was taken."""
        piece, waited = bytes(cast(memoryview, data)[:PIECE]), 0.0
        while self.failure is None:
            try:
                if select.select([], [self._number], [], 0.5)[1]:
                    return os.write(self._number, piece)
                waited += 0.5 * (asked_to_stop() is not None)
                if waited >= PATIENCE:  # a stopped terminal must not keep a run from being saved
                    break
            except BlockingIOError:
                continue
            except (OSError, ValueError) as error:
                self.failure = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        return len(piece)


class Stream(io.TextIOWrapper):
    """Text to a descriptor, a line at a time on a terminal and on standard error."""

    def __init__(self, number: int, encoding: str, eager: bool) -> None:
        self.descriptor = Descriptor(number)
        self._control = BESIDE_BARS if eager else CONTROL
        eager = eager or self.descriptor.isatty()
        buffered = io.BufferedWriter(self.descriptor)
        super().__init__(buffered, encoding=encoding, errors="backslashreplace", line_buffering=eager)

    def write(self, text: str) -> int:
        """Writes what can be shown of it."""
        super().write(printable(text, self._control))
        return len(text)


def use_safe_streams() -> None:
    """Puts such streams in the place of the process's own; those of a test or another program's stay."""
    fill_standard_descriptors()
    os.environ.setdefault("NO_COLOR", "1")  # colours are control characters
    sys.stdout = _safe(1, sys.stdout, sys.__stdout__, eager=False)
    sys.stderr = _safe(2, sys.stderr, sys.__stderr__, eager=True)


def _safe(number: int, now: TextIO | None, own: TextIO | None, eager: bool) -> TextIO:
    if now is not own or isinstance(now, Stream):
        return cast(TextIO, now)
    if now is not None:
        with suppress(OSError, ValueError):
            now.flush()
    encoding = (now and now.encoding) or "utf-8"
    return Stream(number, "utf-8" if codecs.lookup(encoding).name in NOT_FOR_TEXT else encoding, eager)


def show(text: str) -> None:
    """Prints what a command was asked for. RunFailed where that can't be written, unless its reader has left."""
    print(text)
    stream = sys.stdout
    if isinstance(stream, Stream):
        stream.flush()
        failure = stream.descriptor.failure
        if failure is not None and failure.errno != errno.EPIPE:
            raise RunFailed(f"standard output: {failure.strerror}; not all could be written")
