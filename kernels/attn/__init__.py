"""Attention on the CPU, from the packed projection or from queries, keys and values that lie apart."""

SWITCHES: dict[str, str] = {}
"""None: `model.attention` chooses."""

OPS = ("attention", "attention_heads")
"""The public functions of `op.py`."""
