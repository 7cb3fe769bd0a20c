"""Attention on the CPU, from the packed projection."""

SWITCHES: dict[str, str] = {}
"""None: `model.attention` chooses."""

OPS = ("attention",)
"""The public functions of `op.py`."""
