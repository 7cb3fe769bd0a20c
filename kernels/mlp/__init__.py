"""The MLP: linear layers, on the CPU through oneDNN, and GELU."""

SWITCHES = {
    "linear": "Linear layers.",
    "gelu_tanh": "GELU of the MLP.",
}
"""The ops that a recipe can switch, with the sentence that explains the key."""

OPS = tuple(SWITCHES)
"""The public functions of `op.py`."""
