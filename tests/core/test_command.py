"""How a command's process ends."""

import os
import socket
import subprocess
import sys

import pytest

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
