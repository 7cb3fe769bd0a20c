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


def tried(op: str, dtype: torch.dtype, definition: bool) -> list[Tensor]:
    """Outputs and gradients, of the same inputs at any dtype."""
    found = declared(op)
    assert found.trial is not None
    inputs = found.trial(Draw(torch.device("cpu"), dtype, 0), Size(2, 5, 20, 2))
    outs = (found.definition if definition else found.call)(*inputs.args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return [*(out.detach() for out in outs), *inputs.backward(outs)]


@pytest.mark.parametrize("op", [op for op in TABLE if op in LAUNCHERS])
def test_values_and_gradients_are_as_exact_as_eager(op: str) -> None:
    harness.LAUNCHED.clear()
    ours = tried(op, torch.float32, definition=False)
    assert op in harness.LAUNCHED
    for one, eager, truth in zip(ours, tried(op, torch.float32, True), tried(op, torch.float64, True), strict=True):
        assert error(one, truth) <= 2 * error(eager, truth) + harness.SLACK, op
