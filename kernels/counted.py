"""What the ops with matrix products cost, for torch.utils.flop_counter: it counts the operations of PyTorch only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import registry  # noqa: F401  the ops must be there

OPS = torch.ops.st_fast
Shape = tuple[int, ...]


@register_flop_formula(OPS.linear)
def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(OPS.linear_backward)
def _linear_backward(dy: Shape, x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(x) * weight[0]


@register_flop_formula(OPS.attention)
def _attention(qkv: Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(qkv) // 3 * qkv[1]  # scores and outputs


@register_flop_formula(OPS.attention_backward)
def _attention_backward(dout: Shape, qkv: Shape, *_: Any, **__: Any) -> int:
    return 10 * math.prod(dout) * dout[1]  # the scores once more, dV, dP, dQ, dK
