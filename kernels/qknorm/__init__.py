"""Queries and keys normalised over head_dim (arXiv 2302.05442) and rotated by position (RoPE, arXiv 2104.09864), read
from the packed projection."""

SWITCHES = {
    "qk_norm": 'Norm and rotation of queries and keys; "heads": fused, and q, k, v are contiguous for the attention.',
}
"""The ops that a recipe can switch, with the sentence that explains the key."""

FORMS = {"qk_norm": ("heads",)}
"""Further values of a key: other fused forms, which `op.py` declares."""

OPS = tuple(SWITCHES)
"""The public functions of `op.py`."""
