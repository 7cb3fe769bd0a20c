"""Mistakes that a person can mend: told in one line, exit code 2, no traceback unless `--debug` asks for it."""

import errno
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

Say = Callable[[str], None]
"""Where a line for the person at the terminal goes: `print`, or a log's `say`."""

EXIT_OK = 0
EXIT_FAILED = 1
"""The run gave up: too many bad steps, a dead rank, something unforeseen."""
EXIT_USAGE = 2
"""A recipe, argument or file is wrong; nothing was changed."""
EXIT_INTERRUPTED = 75
"""Stopped by a signal, all saved; the same command continues (75 is EX_TEMPFAIL of sysexits.h)."""

EXIT_SIGINT = 130
"""Stopped by Ctrl-C where there is nothing to save: 128 + SIGINT, as shells have it. Other signals: 128 + theirs."""


class UserError(Exception):
    """Something given by the user is wrong: names the file, key or record, the value and what is allowed."""

    exit_code = EXIT_USAGE


class BadFile(UserError):
    """A file is missing, truncated, malformed or not what it says it is: one line with the file, expected and found."""


class Unreadable(BadFile):
    """A file can't be read now, though it may be whole: an error of storage, or a lack of rights or descriptors."""


NOT_DAMAGE = frozenset({
    errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT,
    errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.ECONNABORTED, errno.EAGAIN, errno.EINTR,
})  # fmt: skip
"""Errors of the system that say nothing of a file's content."""


def unreadable(name: object, what: str, error: OSError | ValueError) -> BadFile:
    """What to raise for an error at opening or reading."""
    kind = Unreadable if getattr(error, "errno", None) in NOT_DAMAGE else BadFile
    return kind(f"{name}: cannot be {what} ({getattr(error, 'strerror', None) or error})")


class RunFailed(UserError):
    """The run can't go on for a reason that is not a mistake in what was given."""

    exit_code = EXIT_FAILED


class Interrupted(UserError):
    """The run was asked to stop, has saved, and can be continued."""

    exit_code = EXIT_INTERRUPTED
    told = True
    """False on a rank that leaves the line to the first one, which says the same."""


class Stopped(BaseException):
    """A signal, named by the text, ends work at once that has nothing to save. No Exception: no library takes it."""


def how_to_install(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml names, for a shell, wherever st_fast came from.

    From what was installed, as st_fast is on no package index; where it was not installed, in the clone.
    """
    from importlib import metadata  # where something is missing, and not for every message's sake

    try:
        wanted = [line.partition(";") for line in metadata.requires("st_fast") or ()]
    except metadata.PackageNotFoundError:
        return f"pip install -e '.[{extra}]' in the clone of st_fast"
    named = re.compile(rf"""extra\s*==\s*['"]{extra}['"]""")
    return shlex.join(["pip", "install", *(name.strip() for name, _, marker in wanted if named.search(marker))])


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says anything, or the error's type."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)[:200]


BRACKETS: dict[Any, str] = {list: "[]", tuple: "()", dict: "{}"}


def _pieces(value: Any, limit: int) -> Iterator[str]:
    """The parts of a value's text, of which no more are made than are read: it may hold itself, or be gigabytes."""
    if isinstance(value, (str, bytes)):
        yield ascii(value[:limit])
    elif brackets := BRACKETS.get(type(value)):
        yield brackets[0]
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(item, limit)
            if isinstance(value, dict):
                yield ": "
                yield from _pieces(value[item], limit)
        yield ",)" if isinstance(value, tuple) and len(value) == 1 else brackets[1]
    else:
        yield ascii(value)


def counted(count: int, what: str) -> str:
    """A number of things as one says it: 1 shard, 2 shards."""
    return f"{count} {what}{'s' * (count != 1)}"


def printable(text: object) -> str:
    """Somebody's text as one line of a terminal or a page: what would not show, or do something, becomes an escape."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in str(text))


def shown(value: object, limit: int = 80) -> str:
    """A value out of a file as one short printable line, whatever it holds."""
    text = ""
    for piece in _pieces(value, limit + 1):
        text += piece
        if len(text) > limit:
            return f"{text[:limit]}…"
    return text
