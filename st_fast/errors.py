"""Mistakes that a person can mend: told in one line, exit code 2, no traceback unless `--debug` asks for it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

EXIT_OK = 0
EXIT_FAILED = 1
"""The run gave up: too many bad steps, a dead rank, something unforeseen."""
EXIT_USAGE = 2
"""A recipe, argument or file is wrong; nothing was changed."""
EXIT_INTERRUPTED = 75
"""Stopped by SIGTERM or SIGINT after saving; the same command continues (75 is EX_TEMPFAIL of sysexits.h)."""

EXIT_SIGINT = 130
"""Stopped by Ctrl-C where there is nothing to save: 128 + SIGINT, as shells have it."""

MENDABLE = (
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC,
    errno.EDQUOT, errno.ENAMETOOLONG,
)  # fmt: skip
"""What is wrong with a named place, or the rights to it, which no traceback tells better."""


class UserError(Exception):
    """Something given by the user is wrong: names the file, key or record, the value and what is allowed."""

    exit_code = EXIT_USAGE


class RunFailed(UserError):
    """The run can't go on for a reason that is not a mistake in what was given."""

    exit_code = EXIT_FAILED


class Interrupted(UserError):
    """The run was asked to stop, has saved, and can be continued."""

    exit_code = EXIT_INTERRUPTED


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's `main(arguments)` and exits; UserErrors become one line on stderr and their exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        main(arguments)
    except UserError as error:
        if debug:
            raise
        print(f"st_fast: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if debug or error.errno not in MENDABLE or error.filename is None:
            raise
        print(f"st_fast: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:  # of commands that are too short to save anything in between
        if debug:
            raise
        print("st_fast: interrupted", file=sys.stderr)
        sys.exit(EXIT_SIGINT)
    sys.exit(EXIT_OK)


def need_run(folder: Path) -> None:
    """UserError unless the folder holds a run."""
    if not (folder / "recipe.toml").is_file():
        raise UserError(f"{folder}: no recipe.toml, so no run of st_fast.train")


def need_run_first(argv: Sequence[str] | None = None) -> None:
    """Ends a command `RUN [options]` whose run is not there; imports no torch, and so never waits for csrc's compiler.

    For modules that are a library as well and import it at their top. Whatever does not begin with the run is left to
    the command's own parser.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        try:
            need_run(Path(arguments[0]))
        except UserError as error:
            print(f"st_fast: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
