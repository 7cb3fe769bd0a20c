"""Every op that has a Triton kernel, on the inputs that its family tries it with, under Triton's interpreter."""

from __future__ import annotations

import harness
import pytest
import torch
from csrc_cases import error
from torch import Tensor

from st_fast.kernels import TABLE, declared
from st_fast.kernels.common.registry import LAUNCHERS
from st_fast.kernels.common.trial import Draw, Size


def tried(op: str, trial: int, dtype: torch.dtype, definition: bool) -> list[Tensor]:
    """Outputs and gradients, of the same inputs at any dtype."""
    found = declared(op)
    inputs = found.trials()[trial](Draw(torch.device("cpu"), dtype, 0), Size(2, 5, 20, 2))
    outs = (found.definition if definition else found.call)(*inputs.args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return [*(out.detach() for out in outs), *inputs.backward(outs)]


TRIALS = [(op, trial) for op in TABLE if op in LAUNCHERS for trial in range(len(declared(op).trials()))]


@pytest.mark.parametrize(("op", "trial"), TRIALS)
def test_values_and_gradients_are_as_exact_as_eager(op: str, trial: int) -> None:
    harness.LAUNCHED.clear()
    ours = tried(op, trial, torch.float32, definition=False)
    assert op in harness.LAUNCHED
    plain, exact = (tried(op, trial, dtype, definition=True) for dtype in (torch.float32, torch.float64))
    for one, eager, truth in zip(ours, plain, exact, strict=True):
        assert error(one, truth) <= 2 * error(eager, truth) + harness.SLACK, op
