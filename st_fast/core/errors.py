"""Mistakes that a person can mend: told in one line, exit code 2, no traceback unless `--debug` asks for it."""

from collections.abc import Callable

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
"""Stopped by Ctrl-C where there is nothing to save: 128 + SIGINT, as shells have it."""


class UserError(Exception):
    """Something given by the user is wrong: names the file, key or record, the value and what is allowed."""

    exit_code = EXIT_USAGE


class RunFailed(UserError):
    """The run can't go on for a reason that is not a mistake in what was given."""

    exit_code = EXIT_FAILED


class Interrupted(UserError):
    """The run was asked to stop, has saved, and can be continued."""

    exit_code = EXIT_INTERRUPTED


class Stopped(BaseException):
    """A signal, named by the text, ends work at once that has nothing to save. No Exception: no library takes it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says anything, or the error's type."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)[:200]
