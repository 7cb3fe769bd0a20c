"""Names for the stretches of a step, as a profiler shows them; without a profiler they cost nothing.

    with named("teacher"):
        ...

`showing` decides who sees them: NVTX (nsys) or torch.profiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

STEP = "step"
"""One whole step; the others lie within it."""
NAMES = ("data", "noise", "teacher", "student forward", "loss", "backward", "all-reduce", "optimiser")
"""The stretches of a step, in the order of the plain schedule."""

Opener = Callable[[str], AbstractContextManager[object]]

_NOTHING: AbstractContextManager[None] = nullcontext()
_opener: Opener | None = None


def named(name: str) -> AbstractContextManager[object]:
    """The block as a stretch of that name; never inside compiled code."""
    return _NOTHING if _opener is None else _opener(name)


@contextmanager
def showing(opener: Opener) -> Iterator[None]:
    """Within the block, stretches are opened by `opener`: `torch.cuda.nvtx.range`, `torch.profiler.record_function`."""
    global _opener
    before, _opener = _opener, opener
    try:
        yield
    finally:
        _opener = before
