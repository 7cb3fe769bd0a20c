"""What "auto" means, by device class and op: what the whole step measured faster on that device.

"fused" on a CPU holds only where csrc is built; without it the fused op would be the reference with detours.
A device class that is not here uses the reference.
"""

from __future__ import annotations

OPS = (
    "norm_modulate",
    "gate_residual_norm_modulate",
    "gate_residual",
    "align",
    "guided_feature_loss",
    "cfg_extrapolate",
    "qk_norm",
    "linear",
    "gelu_tanh",
)
"""The ops a recipe can switch."""

DEFAULTS: dict[str, dict[str, str]] = {
    "cuda": {op: "fused" for op in OPS} | {"linear": "reference", "gelu_tanh": "reference"},  # no kernels of ours there
    "cpu": {op: "fused" for op in OPS},
}
