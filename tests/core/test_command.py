"""How a command's process ends."""

import ast
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

from st_fast.core.errors import how_to_install
from tests import warm
from tests.tiny import ROOT

COMMAND = """
import atexit, os, sys, threading, time
from st_fast.core.command import run_command
from st_fast.core.errors import Interrupted
from st_fast.core.ranks import process_group

class TakenDown:
    def __del__(self):  # as the interpreter's end lets go of modules
        os.abort()

taken_down = TakenDown()

def main(arguments):
    with process_group("cpu", 60.0) as ranks:
        ranks.barrier()
    atexit.register(lambda: print("handlers", flush=True))
    threading.Thread(target=lambda: (time.sleep(0.3), print("threads", flush=True))).start()
    sys.stdout.write("not flushed;")
    if arguments:
        raise Interrupted("stopped")

run_command(main)
"""


@pytest.mark.parametrize(("arguments", "code"), [((), 0), (("stop",), 75)])
def test_a_rank_ends_with_its_code_its_threads_and_handlers_and_not_with_its_interpreter(
    arguments: tuple[str, ...], code: int
) -> None:
    """Whatever would go wrong as that is taken down, as it does now and then with threads of gloo's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        said, told = rank.communicate(timeout=120)
        assert (rank.returncode, said) == (code, "not flushed;threads\nhandlers\n"), told


def not_installed(name: str) -> None:
    raise metadata.PackageNotFoundError(name)


def test_what_messages_and_pages_say_to_install_is_an_extra_of_the_clone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert how_to_install("track") == "pip install tensorboard wandb trackio"
    assert how_to_install("vae") == "pip install 'diffusers>=0.35'"
    for extra, wanted in project["optional-dependencies"].items():
        names = [shlex.quote(one.partition(";")[0].strip()) for one in wanted]
        assert how_to_install(extra) == " ".join(["pip install", *names]), extra
    with pytest.MonkeyPatch.context() as patch:  # run from a clone that nobody has installed
        patch.setattr(metadata, "distribution", not_installed)
        assert how_to_install("track") == "pip install -e '.[track]' in the clone of st_fast"
    sources = [path for path in (ROOT / "st_fast").rglob("*.py") if "kernels" not in path.parts]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    assert [path.name for path, text in texts.items() if "pip install" in text] == ["errors.py"]
    calls = [node for text in texts.values() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    named = [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "how_to_install"]
    pages = [path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))]
    for page in pages:
        assert "st_fast[" not in page  # is on no index
        named += [
            extra for extras in re.findall(r"pip install .*?-e '\.\[([\w,]+)\]'", page) for extra in extras.split(",")
        ]
    assert {"track", "hub", "vae", "repa", "ode", "fp8", "data", "dev"} <= set(named)
    assert set(named) <= set(project["optional-dependencies"])


HELP = """
import runpy, sys
from st_fast.kernels import build
build.ensure = lambda kind: sys.exit(f"{kind} would be compiled")
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "command", ["st_fast.evaluate --help", "st_fast.convert -h", "st_fast.train.doctor --help", "st_fast sample --help"]
)
def test_help_compiles_no_kernels(command: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "ST_FAST_CSRC"}
    done = warm.run("-c", HELP, *command.split(), env=clean)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr


def test_a_command_that_looks_for_its_run_first_has_a_traceback_for_debug(tmp_path) -> None:
    done = warm.run("-m", "st_fast.sample", tmp_path, "--debug")
    first, *_, last = done.stderr.splitlines()
    assert (done.returncode, first) == (2, "Traceback (most recent call last):")
    assert last == f"st_fast: {tmp_path}: no recipe.toml, so no run of st_fast.train, and no other model"


UNSAVED = """
import os, signal, sys
from importlib import metadata
from pathlib import Path
from st_fast.core.command import run_command
from st_fast.core.writing import whole_file
name, ignored, target = sys.argv[1:]
number = signal.Signals[name]
if ignored == "ignored":
    signal.signal(number, signal.SIG_IGN)
unlink = Path.unlink

def unlink_as_another_comes(path, missing_ok):
    if number != signal.SIGINT:
        os.kill(os.getpid(), number)
    unlink(path, missing_ok)

Path.unlink = unlink_as_another_comes

def main(arguments):
    with whole_file(Path(target)) as partial:
        partial.write_bytes(b"half")
        os.kill(os.getpid(), number)

run_command(main, [])
"""


@pytest.mark.parametrize("ignored", ["", "ignored"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_to_a_command_that_saves_nothing_in_between_leaves_a_line_and_nothing_partial(
    tmp_path, name: str, code: int, ignored: str
) -> None:
    target = tmp_path / "target"
    done = warm.run("-c", UNSAVED, name, ignored, target)
    assert (done.returncode, done.stderr) == ((0, "") if ignored else (code, "st_fast: interrupted\n"))
    assert list(tmp_path.iterdir()) == ([target] if ignored else [])
