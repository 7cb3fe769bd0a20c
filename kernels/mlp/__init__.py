"""The MLP: linear layers, on the CPU through oneDNN, GELU, both as one op, on CUDA through cuBLASLt, and SwiGLU."""

SWITCHES = {
    "linear": "Linear layers.",
    "gelu_tanh": "GELU of the MLP.",
    "swiglu": "SwiGLU between the MLP's layers.",
    "gelu_mlp": "The whole MLP, with GELU inside its matrix products on CUDA; auto times it beside its parts.",
    "bias_gradients": "Where a block's bias gradients are summed: by the op after the layer, or by the layer.",
}
"""What a recipe can switch, with the sentence that explains the key: the ops, and how they share out a task."""

OPS = ("linear", "gelu_tanh", "swiglu", "gelu_mlp")
"""The public functions of `op.py`."""
