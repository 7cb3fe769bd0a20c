"""One call of every registered op: positional arguments of torch.ops.st_fast.<name>.

Written out with views and odd strides, or else what the op's own trial calls it with, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from st_fast.kernels import TABLE, declared
from st_fast.kernels.common.trial import Draw, Size

DATA = ("noisy_latents",)
"""Ops without a gradient, which make data."""
DIFFERENTIABLE = (*(op for op in TABLE if op not in DATA), "attention", "attention_heads")
B, N, D, H = 3, 4, 12, 2


def _random(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


class Calls(TorchDispatchMode):
    """The last arguments of each op of ours that runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "st_fast":
            self.seen[name] = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        return func(*args, **(kwargs or {}))


def tried(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """What the trials of all ops call, in the dtype; the backward ops in float32 at the most."""
    made = {}
    for name in TABLE:
        op = declared(name)
        assert op.trial is not None
        inputs = op.trial(Draw(torch.device("cpu"), dtype, 0), Size(B, N, D, H))
        with Calls() as calls:
            inputs.backward(op.call(*inputs.args))
        made |= {called: args for called, args in calls.seen.items() if called != name} | {name: inputs.args}
    return made


def samples(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """Arguments by op name; inputs that have a gradient require it."""
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return _random(*shape, grad=True, dtype=dtype)

    def plain(*shape: int) -> Tensor:
        return _random(*shape, dtype=dtype)

    gate, shift, scale = (v.detach().requires_grad_() for v in plain(B, 6 * D).chunk(6, 1)[:3])
    x, a = leaf(B, N, D), plain(B, D, N).transpose(1, 2).requires_grad_()
    dy, dx_out = plain(B, D, N).transpose(1, 2), plain(1, 1, 1).expand(B, N, D)
    mean, rstd = _random(B, N), torch.rand(B, N)
    frozen = scale.detach(), x.detach(), a.detach(), gate.detach()
    qkv, affine = leaf(B, N, 3, H, 8), [leaf(8) for _ in range(4)]
    dqkv = [plain(B, N, H, 8).transpose(1, 2) for _ in range(3)]
    # csrc's attention takes float32 and such sizes, as the public op sees to; finite differences want few numbers.
    rows, deep, wide = (4, 12, 8) if dtype == torch.float64 else (256, 384, 352)  # oneDNN's, but in float64
    kept, tokens, head = (dtype, 3, 4) if dtype == torch.float64 else (torch.float32, 32, 32)
    packed = _random(1, tokens, 3, H, head, grad=True, dtype=kept)
    heads = [*_random(2, 1, H, tokens, head, dtype=kept), _random(1, H, tokens, dtype=kept)]
    apart = [packed.detach()[:, :, part].transpose(1, 2).requires_grad_() for part in range(3)]
    index, weight = torch.tensor([2, 0]), torch.rand(2)
    # Finite differences see no bias: it is added before, and only its gradient is taken here.
    bias = None if dtype == torch.float64 else leaf(D)
    lists = [[_random(5), _random(2, 3)] for _ in range(5)]
    lists[3] = [v.square() for v in lists[3]]
    return tried(dtype) | {
        "norm_modulate": (x, shift, scale, 1e-6),
        "norm_modulate_backward": (dy, frozen[1], frozen[0], mean, rstd),
        "gate_residual_norm_modulate": (x, a, gate, shift, scale, 1e-6, bias),
        "gate_residual_norm_modulate_backward": (dx_out, dy, frozen[1], frozen[2], frozen[3], frozen[0], mean, rstd,
                                                 plain(D)),
        "gate_residual": (x, a, gate),
        "gate_residual_backward": (dy, frozen[2], frozen[3]),
        "align": (x, plain(B, N, D), torch.rand(B)),
        "guided_feature_loss": (x, plain(2, N, D), plain(2, D, N).transpose(1, 2), weight, 30.0, "cosine", index),
        "cfg_extrapolate": (x, a, 30.0),
        "qk_norm": (qkv, *affine, 1e-6),
        "qk_norm_backward": (*dqkv, qkv.detach(), affine[0].detach(), affine[2].detach(), plain(3 * H * 8),
                             torch.rand(4, B, N, H)),
        "attention": (packed,),
        "attention_backward": (heads[0].transpose(1, 2), packed.detach(), heads[1].transpose(1, 2).contiguous(),
                               heads[2]),
        "attention_heads": tuple(apart),
        "attention_heads_backward": (heads[0].transpose(1, 2), *(v.detach() for v in apart),
                                     heads[1].transpose(1, 2).contiguous(), heads[2]),
        "linear": (leaf(1, rows, deep), leaf(wide, deep), leaf(wide)),
        "linear_backward": (plain(1, wide, rows).transpose(1, 2), plain(1, rows, deep), plain(wide, deep)),
        "gelu_tanh": (a, bias),
        "gelu_tanh_backward": (dy, frozen[2], plain(D)),
        "swiglu": (a, bias),
        "swiglu_backward": (plain(B, D // 2, N).transpose(1, 2), frozen[2], plain(D)),
        "grad_norm": (lists[0],),
        "adamw_ema_": (*lists, [v.bfloat16() for v in lists[0]], torch.zeros(()), torch.tensor(2.0), torch.tensor(1e-3),
                       0.9, 0.999, 1e-8, 0.1, 0.99, 1.0),
    }  # fmt: skip
