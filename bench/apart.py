"""The plain loop in a process of its own, with the C library's memory settings as they are found.

    python -m bench.apart S/2 "stage 2" 8 256 0 2 plain     (size, stage, batch, tokens, depth, threads, which)

answers every line on its standard input with one step's seconds.

st_fast keeps freed memory with its process (`st_fast.kernels.heap`), which is a setting of the whole process: a rival
measured beside it would gain from it, too. The published loop sets nothing, so on a CPU it is measured here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.timing import Stopwatch, Variant
from bench.workload import Setup, ours, plain_variant

ROOT = Path(__file__).resolve().parent.parent


class Apart:
    """The other process: `step()` has it make one step and returns its seconds."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def variant(self, block: int) -> Variant:
        """`block` steps a round, by the other process's own clock."""

        def run(number: int, watch: Stopwatch) -> None:
            watch.add("step", sum(self.step() for _ in range(block)))

        return run

    def step(self) -> float:
        """RuntimeError, with what the process said last, if it has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise RuntimeError("the plain loop's process has ended; its own message is above") from error


@contextmanager
def plain(setup: Setup, which: str) -> Iterator[Apart]:
    """Starts the process, its first step made, and ends it on leaving. which: "plain", "compile", "compile whole"."""
    command = [sys.executable, "-m", "bench.apart", setup.size, setup.stage, str(setup.batch), str(setup.tokens)]
    process = subprocess.Popen(
        [*command, str(setup.depth), str(torch.get_num_threads()), which],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        apart = Apart(process)
        apart.step()
        yield apart
    finally:
        process.kill()
        process.wait()


def main(arguments: Sequence[str]) -> None:
    """The process: one line of seconds for each line that comes."""
    size, stage, batch, tokens, depth, threads, which = arguments
    torch.set_num_threads(int(threads))
    setup = Setup(size, stage, int(batch), torch.device("cpu"), int(tokens), int(depth))
    with ours(setup) as loop:
        rival = loop.plain()
        if "compile" in which:
            rival.compile(whole="whole" in which)
        run = plain_variant(rival, setup.batch, 1)
        for number, _ in enumerate(sys.stdin):
            watch = Stopwatch(setup.device)
            run(number, watch)
            print(watch.read()["step"][0], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
