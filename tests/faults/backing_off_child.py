"""Trains a recipe in a process that takes its own memory away before a step; arguments: STEP LEFT RECIPE …

LEFT are the bytes that stay free. The memory is really taken, in pieces, until an allocation fails.
"""

from __future__ import annotations

import sys

import torch

from st_fast import train
from st_fast.errors import run_command
from st_fast.memory import lacks_memory
from st_fast.step import Step

PIECE = 2**22


def main() -> None:
    """The trainer with a step that is preceded by the theft."""
    step, left, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    taken: list[torch.Tensor] = []
    call = Step.__call__

    def robbed(this: Step, number: int, batches):
        if number + 1 == step and not taken:
            try:
                while True:
                    taken.append(torch.empty(PIECE, dtype=torch.uint8))
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
            del taken[-(left // PIECE) :]
        return call(this, number, batches)

    Step.__call__ = robbed
    run_command(train.main, arguments)


if __name__ == "__main__":
    main()
