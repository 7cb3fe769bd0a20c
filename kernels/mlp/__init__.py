"""The MLP: linear layers, on the CPU through oneDNN, GELU, and both as one op, on CUDA through cuBLASLt."""

SWITCHES = {
    "linear": "Linear layers.",
    "gelu_tanh": "GELU of the MLP.",
    "gelu_mlp": "The whole MLP, with GELU inside its matrix products on CUDA; auto times it beside its parts.",
}
"""The ops that a recipe can switch, with the sentence that explains the key."""

OPS = tuple(SWITCHES)
"""The public functions of `op.py`."""
