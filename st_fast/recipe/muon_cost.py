"""What Muon takes: its products, of which `cost` counts a step's FLOPs, and its state. Imports no torch."""

from collections.abc import Iterator

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.schema import Optim

STEPS = 5
"""Of Newton and Schulz."""


def muon_layers(model: Model, optim: Optim) -> Iterator[Layer]:
    """The layers whose matrices Muon updates."""
    for number in range(1, model.depth + 1):
        layers = model.block_layers(ends=number == model.depth)
        yield from (layer for layer in layers if optim.muon_updates(f"blocks.{layer.name}"))
    yield from (layer for layer in model.fusion_layers if optim.muon_updates(f"{layer.name}.weight"))


def muon_parameters(model: Model, optim: Optim) -> int:
    """Parameters that Muon updates: matrices without their biases."""
    return sum(layer.inputs * layer.outputs for layer in muon_layers(model, optim))


def muon_flops(model: Model, optim: Optim) -> float:
    """FLOPs of an update as the method is defined, whatever its implementation saves; 0 with AdamW.

    A step on a matrix of short side r and long side c makes x·xᵀ, A², and their polynomial's product with x: 4·r²·c +
    2·r³ FLOPs. Compared with a training step's they grow with the width, not with the batch.
    """
    total = 0.0
    for layer in muon_layers(model, optim):
        parts = fused(layer.name, layer.inputs, layer.outputs) if optim.muon_split else 1
        short, long = sorted((layer.outputs // parts, layer.inputs))
        total += parts * STEPS * (4.0 * short**2 * long + 2.0 * short**3)
    return total


def fused(name: str, inputs: int, outputs: int) -> int:
    """How many matrices are fused, row by row, in a layer's: q, k, v; adaLN's vectors; SwiGLU's gate and value."""
    if "adaLN_modulation." in name:
        return outputs // inputs
    return 3 if "attn.qkv" in name else 2 if "mlp.w12" in name else 1
