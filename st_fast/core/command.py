"""What every command shares: its parser, and how it ends. A UserError is one line on stderr and an exit code."""

import argparse
import atexit
import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from st_fast.core.errors import EXIT_FAILED, EXIT_OK, EXIT_SIGINT, Interrupted, UserError
from st_fast.core.machine import lacks_memory, out_of_memory
from st_fast.core.options import Parser
from st_fast.core.signals import Ended, end_on_signals, pay_no_heed
from st_fast.core.streams import one_line, use_safe_streams

MENDABLE = (
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC,
    errno.EDQUOT, errno.ENAMETOOLONG, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENXIO,
    errno.EBUSY, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOLCK,
)  # fmt: skip
"""What is wrong with a place, the rights to it or the room in it, which no traceback tells better."""
MODEL_FILES = ("recipe.toml", "manifest.json", "config.json", "transformer/config.json")
"""One of these lies in the folder of a run, a checkpoint, a Hugging Face model or a diffusers pipeline."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def command_parser(name: str, text: str | None, epilog: str | None = None) -> Parser:
    """The parser of `python -m st_fast NAME`, which prints `text` as it is written."""
    form = argparse.RawDescriptionHelpFormatter
    return Parser(f"python -m st_fast {name}", description=text, epilog=epilog, formatter_class=form)


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's `main(arguments)` and exits; UserErrors become one line on stderr and their exit code.

    Unless `catch_signals` was called before, SIGTERM and SIGHUP unwind it as SIGINT does: nothing partial stays.
    """
    use_safe_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        end_on_signals()
        main([a for a in arguments if a != "--debug"])
        pay_no_heed()
    except UserError as error:
        if debug:
            traceback.print_exc()
        if not isinstance(error, Interrupted) or error.told:
            _tell(str(error))
        end_process(error.exit_code)
    except (MemoryError, RuntimeError, OSError) as error:
        if lacks_memory(error) and not debug:
            spec = getattr(main, "__globals__", {}).get("__spec__")
            name = spec.name.removesuffix(".__main__").rpartition(".")[2] if spec else main.__name__
            _tell(out_of_memory(error, f"running {name}"))
            end_process(EXIT_FAILED)
        if debug or not isinstance(error, OSError) or error.errno not in MENDABLE:
            raise
        _tell(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror))
        end_process(EXIT_FAILED)
    except KeyboardInterrupt as stop:  # of commands that are too short to save anything in between
        ended = isinstance(stop, Ended)
        if debug and not ended:
            raise
        if debug:
            traceback.print_exc()
        _tell("interrupted")
        end_process(128 + stop.args[0] if ended else EXIT_SIGINT)
    end_process(EXIT_OK)


def _tell(text: str) -> None:
    """The one line on what has ended a command."""
    pay_no_heed()
    print(f"st_fast: {one_line(text)}", file=sys.stderr)


def end_process(code: int) -> NoReturn:
    """sys.exit, but one of several ranks does not take its interpreter down.

    A thread of gloo's may be letting go of the last collective's tensors, for which it waits for the interpreter.
    Python before 3.14 ends such a thread as it shuts down, inside C++ that must not be left so: the rank would die of
    SIGABRT after all its work is done (CPython issue 87135).
    """
    pay_no_heed()
    if not getattr(sys.modules.get("st_fast.core.ranks"), "joined", False):
        sys.exit(code)
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more; it is closed
            stream.flush()
    os._exit(code)


def need_model(path: Path) -> None:
    """UserError unless there is a file, a folder as runs and models have it, or it may be a model's name on the hub."""
    if path.is_file() or is_hub_name(path) or any((path / name).is_file() for name in MODEL_FILES):
        return
    if not (path / "checkpoints").is_dir() and not any(path.glob("*/manifest.json")):
        raise UserError(f"{path}: no recipe.toml, so no run of st_fast.train, and no other model")


def is_hub_name(path: Path) -> bool:
    """Whether it can only be OWNER/NAME on the Hugging Face hub: neither it nor a folder OWNER is here."""
    return bool(HUB_NAME.fullmatch(str(path))) and not path.exists() and not path.parent.exists()


def need_each_once(runs: Sequence[Path]) -> list[Path]:
    """The runs' resolved paths; UserError where one is named twice."""
    resolved = [path.resolve() for path in runs]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"{path}: named twice; each run is compared once")
    return resolved


def compile_nothing_for_help() -> None:
    """Where the command line asks for --help, leaves csrc out of this process: nobody waits a minute for a text.

    For commands that import the kernels at their top; to be called before.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        os.environ.setdefault("ST_FAST_CSRC", "")


def need_model_first(argv: Sequence[str] | None = None) -> None:
    """Ends a command `MODEL [options]` whose model is not there; without torch, and so without csrc's compiler.

    For modules that are a library as well and import it at their top. Whatever does not begin with the model is left to
    the command's own parser, and so is --debug, for `run_command` shows the traceback.
    """
    compile_nothing_for_help()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-") and "--debug" not in arguments:
        try:
            need_model(Path(arguments[0]))
        except UserError as error:
            _tell(str(error))
            sys.exit(error.exit_code)
