"""The convention of official SiT, Self-Flow and LightningDiT ↔ ours, inside the weights.

There t = 1 is data, the velocity is x − ε. With u the official model, ours is v(x_t, t) = −u(x_t, 1 − t): the output
rows change sign, and the first layer of the time embedding absorbs the reflection of time, since for a frequency f

    cos((1−t)f) = cos f · cos tf + sin f · sin tf,    sin((1−t)f) = sin f · cos tf − cos f · sin tf.

That map of (cos, sin) columns is its own inverse. `learn_sigma` doubles the outputs; only the first C are a velocity.
Self-Flow's released model is such a network with a linear layer in place of the patches' convolution.
"""

import math

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.model.formats.loaded_state import Table
from st_fast.recipe.schema import Model

TIME, OUTPUT = "t_embedder.mlp.0.weight", ("final_layer.linear.weight", "final_layer.linear.bias")
CHANGED = (TIME, *OUTPUT)
"""The keys that the conventions differ in."""
LAYOUTS = ("sit", "self-flow", "lightningdit")
"""Those in this convention."""
PATCHES = "x_embedder.proj.weight"
CHANNELS = 4
"""Of the latents of Self-Flow's released model, which its linear layer does not tell."""


def with_convolution(table: Table, otherwise: Model | None, where: str) -> dict[str, Tensor]:
    """A table of Self-Flow, whose patches (C, p, p) are rows of a linear layer, as one with a convolution.

    C and p are `otherwise`'s where its patches have as many numbers. UserError for another shape.
    """
    weight = table.get(PATCHES)
    if weight is None or weight.ndim != 2:
        found = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
        raise UserError(f"{where}: {PATCHES} {found}; self-flow's is a linear layer's, (D, C·p·p)")
    values = weight.shape[1]
    channels, patch = CHANNELS, math.isqrt(values // CHANNELS)
    if otherwise is not None and otherwise.patch_values == values:
        channels, patch = otherwise.channels, otherwise.patch
    if values == 0 or channels * patch**2 != values:
        raise UserError(f"{where}: {PATCHES} has patches of {values} numbers: {CHANNELS} channels of squares are known")
    return {**table, PATCHES: weight.reshape(len(weight), channels, patch, patch)}


def with_linear(table: Table) -> dict[str, Tensor]:
    """The inverse of `with_convolution`."""
    return {**table, PATCHES: table[PATCHES].flatten(1)} if PATCHES in table else dict(table)


def to_ours(table: Table, config: Model, squares: bool = False) -> dict[str, Tensor]:
    """A table in the official convention → in ours. `squares`: of AdamW's exp_avg_sq, which has no sign.

    That of the time layer can't be mapped exactly, for the correlation of a column pair is not in it; the columns are
    taken as uncorrelated.
    """
    result = dict(table)
    for key in set(OUTPUT) & set(result):
        # (p·p·C or p·p·2C, …) → (p·p·C, …): channels come last within a patch position.
        kept = result[key].unflatten(0, (config.patch**2, -1))[:, : config.channels].flatten(0, 1)
        result[key] = kept if squares else -kept
    if TIME in result:
        result[TIME] = _reflected(result[TIME], squares)
    return result


def to_official(table: Table, config: Model, sigma: bool, squares: bool = False) -> dict[str, Tensor]:
    """The inverse of `to_ours` up to rounding; with `sigma` the unread outputs are zeros."""
    result = to_ours(table, config, squares)
    if sigma:
        for key in set(OUTPUT) & set(result):
            groups = result[key].unflatten(0, (config.patch**2, config.channels))
            result[key] = torch.cat((groups, torch.zeros_like(groups)), dim=1).flatten(0, 1)
    return result


def _reflected(weight: Tensor, squares: bool) -> Tensor:
    half = weight.shape[1] // 2
    # The frequencies as the model has them, in float32; the products in float64.
    steps = torch.arange(half, dtype=torch.float32, device=weight.device)
    frequencies = torch.exp(steps * (-math.log(10_000) / half)).double()
    cos, sin = frequencies.cos(), frequencies.sin()
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    if squares:
        mixed = cos**2 * of_cos + sin**2 * of_sin, sin**2 * of_cos + cos**2 * of_sin
    else:
        mixed = cos * of_cos + sin * of_sin, sin * of_cos - cos * of_sin
    return torch.cat(mixed, dim=1).float()
