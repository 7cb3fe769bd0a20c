"""Whatever the encoding, place and text: printing raises nothing, and what arrives is the text, with escapes."""

from __future__ import annotations

import codecs
import encodings.aliases
import io
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from st_fast.core.errors import RunFailed
from st_fast.core.streams import BESIDE_BARS, CONTROL, Stream, _safe, printable, show
from tests import tiny
from tests.fuzz import blocks, watched

AT_ONCE = 100
HOST_NAMES = {"idna", "punycode", "undefined"}
PLACES = ("file", "no reader", "/dev/full", "closed", "read only")


def text_encodings() -> list[str]:
    """Every encoding that Python takes from PYTHONIOENCODING, under the names that it knows them by."""
    names = set(encodings.aliases.aliases) | set(encodings.aliases.aliases.values()) | HOST_NAMES | {"", "UTF-16-LE"}
    return sorted(name for name in names if known(name))


def known(name: str) -> bool:
    try:
        return name == "" or codecs.lookup(name)._is_text_encoding
    except LookupError:  # of another system
        return False


def drawn_text(draw: random.Random) -> str:
    ranges = (0x20, 0x80, 0x300, 0x3000, 0x10000, 0x110000)
    sample = "".join(chr(draw.randrange(draw.choice(ranges))) for _ in range(draw.choice((0, 1, 9, 80))))
    return sample * draw.choice((1, 1, 1, 3, 500)) + draw.choice(("", "\n", "\r", "\x1b[A"))


@contextmanager
def opened(place: str) -> Iterator[int]:
    """The number of a descriptor that leads there."""
    if place == "no reader":
        reader, number = os.pipe()
        os.close(reader)
    elif place in ("closed", "read only", "/dev/full"):
        number = os.open("/dev/full" if place == "/dev/full" else os.devnull, os.O_WRONLY * (place == "/dev/full"))
    else:
        descriptor, name = tempfile.mkstemp()
        os.unlink(name)
        number = descriptor
    if place == "closed":
        os.close(number)
    try:
        yield number
    finally:
        if place != "closed":
            os.close(number)


@pytest.mark.parametrize("block", blocks(1, 10))
def test_printing_raises_nothing_and_says_what_it_was_given(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(AT_ONCE):
        draw = random.Random(seed := 10_000 * block + number)
        encoding, place, eager = draw.choice(text_encodings()), draw.choice(PLACES), draw.random() < 0.3
        texts = [drawn_text(draw) for _ in range(draw.randint(1, 4))]
        own = io.TextIOWrapper(io.BytesIO(), encoding=encoding or None) if draw.random() < 0.9 else None
        what = f"seed {seed}: {encoding} to {place}"
        with opened(place) as target, watched("stdout", sum(map(len, texts))):
            stream = _safe(target, own, own, eager)
            assert isinstance(stream, Stream)
            monkeypatch.setattr(sys, "stdout", stream)
            try:
                for text in texts:
                    print(text, end="")
                show("")
            except RunFailed as error:
                assert place in ("/dev/full", "closed", "read only") and "standard output" in str(error), what
            stream.flush()
            if place == "file":
                taken = [printable(text, BESIDE_BARS if eager else CONTROL) for text in [*texts, "\n"]]
                name = "utf-8" if own is None or stream.encoding == "utf-8" else encoding or own.encoding
                assert name != "utf-8" or own is None or codecs.lookup(own.encoding).name in HOST_NAMES | {"utf-8"}
                encoder = codecs.getincrementalencoder(name)("backslashreplace")
                if codecs.lookup(name).name in ("utf-16", "utf-32"):
                    encoder.setstate(0)  # Python marks the byte order only of what can be sought, which no pipe can
                expected = b"".join(map(encoder.encode, taken))
                os.lseek(target, 0, os.SEEK_SET)
                with os.fdopen(os.dup(target), "rb") as file:
                    assert file.read() == expected, what
            monkeypatch.undo()
            stream.detach()


@pytest.mark.parametrize(
    ("encoding", "redirection"),
    [("utf-16", ""), ("cp1252:strict", ""), ("latin-1", ">&-"), ("ascii:strict", ">/dev/full"), ("idna", ""),
     ("undefined", "2>&1"), ("utf-32-be", "> >(head -c 5 >/dev/null)"), (":surrogateescape", "<&- >&- 2>&-")],
)  # fmt: skip
@pytest.mark.parametrize("arguments", ["train --help", "train /nowhere/\u03c9.toml"])
def test_commands_in_processes_of_their_own_end_as_ever(encoding: str, redirection: str, arguments: str) -> None:
    line = f'exec "{sys.executable}" -m st_fast {arguments} {redirection}'
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, cwd=tiny.ROOT, timeout=60,
        env=os.environ | {"PYTHONPATH": str(tiny.ROOT), "PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    lost = "help" in arguments and "full" in redirection
    assert done.returncode == (1 if lost else 0 if "help" in arguments else 2), said
    assert not any(word.encode(name) in said for word in ("Traceback", "Exception") for name in ("ascii", "utf-16-le"))
