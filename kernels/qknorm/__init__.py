"""LayerNorm of queries and keys over head_dim, from the packed projection (arXiv 2302.05442)."""

SWITCHES = {
    "qk_norm": "LayerNorm of queries and keys.",
}
"""The ops that a recipe can switch, with the sentence that explains the key."""

OPS = tuple(SWITCHES)
"""The public functions of `op.py`."""
