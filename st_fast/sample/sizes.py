"""The latents of images of a size that is asked for in pixels."""

from collections.abc import Callable

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.data.images import Size, named_size, sides
from st_fast.data.manifest import Manifest
from st_fast.recipe.schema import Model


def asked_shape(
    size: Size, model: Model, manifest: Manifest, decode: Callable[[Tensor], Tensor], device: torch.device
) -> tuple[int, int, int] | None:
    """(C, H, W) of the latents of images of `size` pixels; None where that is the model's own.

    UserError where a side is no multiple of the VAE's factor and the patch. The factor is the manifest's, else what
    the decoder makes of a latent of the model's own shape.
    """
    factor = manifest.vae.factor
    if not factor:
        height = decode(torch.zeros(1, *model.latent_shape, device=device)).shape[2]
        factor = height // model.latent_sides[0]
    unit, (height, width) = factor * model.patch, sides(size)
    if height % unit or width % unit:
        why = f"{factor} pixels a latent's x patch {model.patch}"
        raise UserError(f"--size {named_size(size)}: multiples of {unit} are needed ({why})")
    shape = (model.channels, height // factor, width // factor)
    return None if shape == model.latent_shape else shape
