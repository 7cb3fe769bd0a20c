"""The adaLN of DiT (arXiv 2212.09748): LayerNorm or RMSNorm with shift and scale, the gated residual, and both in one
pass."""

SWITCHES = {
    "norm_modulate": "LayerNorm or RMSNorm with adaLN's shift and scale.",
    "gate_residual_norm_modulate": "Gated residual, then LayerNorm or RMSNorm with shift and scale.",
    "gate_residual": "Gated residual.",
}
"""The ops that a recipe can switch, with the sentence that explains the key."""

OPS = tuple(SWITCHES)
"""The public functions of `op.py`."""
