"""torch.compile for the blocks: all share one compiled body, so a deep model compiles as fast as a shallow one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from st_fast.model.sit import Run, run_module


class CompiledBlocks:
    """Runs a block compiled (`fullgraph`); if the compiler fails, says so in one line and goes on without it.

    `dynamic` is for a batch whose size changes from step to step, as the teacher's supervised rows do.
    """

    def __init__(self, say: Callable[[str], None], dynamic: bool) -> None:
        self._say = say
        self._run: Run = torch.compile(run_module, fullgraph=True, dynamic=dynamic)

    def __call__(self, block: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self._run(block, *inputs)
        except (torch.cuda.OutOfMemoryError, KeyboardInterrupt):
            raise
        except compiler_errors() as error:
            self._say(f"torch.compile failed ({type(error).__name__}), going on without it: {first_line(error)}")
            self._run = run_module
            return self._run(block, *inputs)


def compiler_errors() -> tuple[type[BaseException], ...]:
    """What Dynamo, AOTAutograd and Inductor raise when they can't compile; not what the compiled code raises."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return (TorchDynamoException, InductorError)


def first_line(error: BaseException) -> str:
    """The error's first line that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
