"""Clipping by the global norm, AdamW, the weight average and low-precision copies in one pass."""

SWITCHES = {
    "adamw_ema": "AdamW, clipping, EMA and the bf16 copy in one pass.",
}
"""The ops that a recipe can switch, with the sentence that explains the key."""

OPS = ("adamw_ema_", "grad_norm")
"""The public functions of `op.py`."""
