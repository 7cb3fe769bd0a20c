"""How blocks run. Compiled: all through one body, so that a deep model compiles as fast as a shallow one.

Checkpointed (arXiv 1604.06174): activations are computed again in the backward pass instead of being kept. "block"
keeps a block's two inputs (x and y) and runs the block again; "attention" keeps everything but the inside of the
attention: qkv, q, k, v and the output before its projection. Nothing is drawn at random inside a block, so both give
the same bits as keeping everything.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from st_fast.core.errors import first_line
from st_fast.model.layers import Run, run_module
from st_fast.model.transformer import DiffusionTransformer

FORMS = 64
"""Compiled forms that the one body may have: a few for each of a run's students, teachers, averages and encoders.

Dynamo's own limit is 8, which two stages with a teacher and an average reach.
"""


def keep_compiled(folder: Path) -> None:
    """What Inductor and Triton compile is kept in `folder`, where the next start finds it.

    Called before anything is compiled; folders that the environment names come first.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute()))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder.absolute() / "triton"))


@contextmanager
def swept(folder: Path) -> Iterator[None]:
    """Removes the folder at the block's end if nothing was compiled: PyTorch makes it in any case."""
    try:
        yield
    finally:
        for one in (folder / "triton", folder):
            with suppress(OSError):  # something is in it, or it was never made
                one.rmdir()


def _run_inside(block: nn.Module, *inputs: Any) -> Any:
    return type(block).forward(block, *inputs)


class CompiledBlocks:
    """Runs a block compiled (`fullgraph`); if the compiler fails, says so in one line and goes on without it.

    `dynamic` is for a batch whose size changes from step to step, as the teacher's supervised rows do.
    """

    def __init__(self, say: Callable[[str], None], dynamic: bool) -> None:
        self._say, self._dynamic = say, dynamic
        self._use(run_module)

    def _use(self, plain: Run) -> None:
        self._plain = plain
        torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
        self._run: Run = torch.compile(plain, fullgraph=True, dynamic=self._dynamic)

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        try:
            return self._run(block, *inputs)
        except (torch.cuda.OutOfMemoryError, KeyboardInterrupt):
            raise
        except compiler_errors() as error:
            self._say(f"torch.compile failed ({type(error).__name__}), going on without it: {first_line(error)}")
            self._run = self._plain
            return self._plain(block, *inputs)

    def inside(self, blocks: Iterable[nn.Module]) -> None:
        """Compiles what these blocks do between their hooks, which gather and free a sharded block's weights.

        Hooks themselves can't be compiled. The blocks are called as usual, not through this object.
        """
        self._use(_run_inside)
        for block in blocks:
            setattr(block, "forward", partial(self, block))  # noqa: B010


def compiler_errors() -> tuple[type[BaseException], ...]:
    """What Dynamo, AOTAutograd and Inductor raise when they can't compile; not what the compiled code raises."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    return (TorchDynamoException, FailOnRecompileLimitHit, InductorError)


def recomputed(run: Run) -> Run:
    """`run`, keeping only what it is given."""

    def call(module: nn.Module, *inputs: Any) -> Any:
        return checkpoint(run, module, *inputs, use_reentrant=False, preserve_rng_state=False)

    return call


_recomputed_attention = recomputed(run_module)  # one for all blocks, so that they share a compiled body


def checkpoint_activations(model: DiffusionTransformer, what: str) -> None:
    """Sets a model that is trained to "none", "attention" or "block"; after `run_block` was set, if it is compiled.

    A compiled block is run again as a whole; the attention is run again inside the compiled block.
    """
    if what == "block":
        model.run_block = recomputed(model.run_block)
    elif what == "attention":
        model.set_run_attention(_recomputed_attention)
