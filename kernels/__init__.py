"""st_fast's kernels: ops that are one name on every device, and the choice, per op, between them and the reference.

    from st_fast import kernels
    table = kernels.select({"norm_modulate": "auto"}, torch.device("cuda"))
    y = table.norm_modulate(x, shift, scale, 1e-6)

`reference.py` defines what every op computes; `ops.py` has the same functions over `torch.ops.st_fast.*`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "CHOICES",
    "KernelTable",
    "adamw_ema_",
    "align",
    "attention",
    "cfg_extrapolate",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gelu_tanh",
    "grad_norm",
    "guided_feature_loss",
    "linear",
    "native",
    "norm_modulate",
    "qk_norm",
    "reference",
    "select",
]

if __name__ == "kernels" and (Path(__file__).parent.parent / "st_fast").is_dir():
    # Found through the current folder by something that looks for the Hugging Face package of this name. Ops may be
    # registered once only, and that is done as st_fast.kernels.
    from .namesake import stand_aside

    stand_aside()
else:
    from . import native, reference
    from .ops import (
        adamw_ema_,
        align,
        attention,
        cfg_extrapolate,
        gate_residual,
        gate_residual_norm_modulate,
        gelu_tanh,
        grad_norm,
        guided_feature_loss,
        linear,
        norm_modulate,
        qk_norm,
    )
    from .table import CHOICES, KernelTable, select
