"""LayerNorm of queries and keys over head_dim, from the packed projection (arXiv 2302.05442)."""

SWITCHES = {
    "qk_norm": 'LayerNorm of queries and keys; "heads": fused, and q, k, v are contiguous for the attention.',
}
"""The ops that a recipe can switch, with the sentence that explains the key."""

FORMS = {"qk_norm": ("heads",)}
"""Further values of a key: other fused forms, which `op.py` declares."""

OPS = tuple(SWITCHES)
"""The public functions of `op.py`."""
