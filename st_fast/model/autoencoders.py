"""One class for each kind of autoencoder: how it encodes, decodes and normalises. `model.vae` loads and uses them.

Shapes: B images of side S, channels C and side s of their latents z, factor f = S / s. Images are in [-1, 1].
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from st_fast.core.errors import UserError
from st_fast.core.files import shown
from st_fast.core.latents import Normalisation

VAE = Any
"""A diffusers autoencoder, or `Pixels` in its place; diffusers is imported only when one is wanted."""
Posterior = Literal["sample", "mean"]


class Autoencoder:
    """diffusers' AutoencoderKL: SD, SDXL, SD 3, FLUX.1, E2E exports, INVAE; what other kinds differ in is overridden.

    Its posterior is a Gaussian around a mean. Configurations may have `scaling_factor`, `shift_factor`,
    `latents_mean` and `latents_std`.
    """

    posteriors: ClassVar[tuple[Posterior, ...]] = ("sample", "mean")
    """What records may hold; the first is the default."""
    normalises: ClassVar[bool] = False
    """Whether what it encodes is normalised already."""

    def __init__(self, vae: VAE) -> None:
        self.vae, self.config = vae, vae.config

    @property
    def in_channels(self) -> int:
        """Channels of an image, 3 or 1."""
        return int(self.config.in_channels)

    @property
    def channels(self) -> int:
        """C, as the diffusion model sees it."""
        return int(self.config.latent_channels)

    @property
    def factor(self) -> int:
        """f."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    @property
    def normalisation(self) -> Normalisation:
        """What its configuration says; UserError for what is no number, or of another length than C."""
        mean, std = (_numbers(self.config, name) for name in ("latents_mean", "latents_std"))
        neutral = not any(mean) and all(value == 1 for value in std)
        found = Normalisation(
            _number(self.config, "scaling_factor"), _number(self.config, "shift_factor", 0.0),
            () if neutral else mean, () if neutral else std,
        )  # fmt: skip
        if problem := found.problem(self.channels):
            raise UserError(f"VAE: {problem.replace('scale =', 'scaling_factor =')} in its config")
        return found

    def check_size(self, size: int) -> None:
        """UserError for a side of images that it can't encode."""
        if size % self.factor:
            raise UserError(f"size = {size}: the VAE reduces by {self.factor}; a multiple of it is needed")

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3 or 1, S, S) → mean and std (B, C, s, s) of z, not normalised."""
        found = self.vae.encode(images).latent_dist
        return found.mean, found.std

    def pixels(self, z: Tensor) -> Tensor:
        """z (B, C, s, s) → images."""
        images: Tensor = self.vae.decode(z).sample
        return images


class Flux2(Autoencoder):
    """AutoencoderKLFlux2: squares of latents go to channels (C = 4·32), which a batch norm's statistics normalise."""

    posteriors = ("mean", "sample")

    @property
    def _patch(self) -> tuple[int, int]:
        rows, columns = self.config.patch_size
        return int(rows), int(columns)

    @property
    def channels(self) -> int:
        return super().channels * math.prod(self._patch)

    @property
    def factor(self) -> int:
        return super().factor * self._patch[0]

    @property
    def normalisation(self) -> Normalisation:
        norm = self.vae.bn
        std = (norm.running_var.double() + float(self.config.batch_norm_eps)).sqrt()
        found = Normalisation(1.0, 0.0, tuple(norm.running_mean.double().tolist()), tuple(std.tolist()))
        if problem := found.problem(self.channels):
            raise UserError(f"VAE: statistics of its batch norm: {problem}")
        return found

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().moments(images)
        return self._to_channels(mean), self._to_channels(std)

    def pixels(self, z: Tensor) -> Tensor:
        # (B, c·p·p, s, s) → (B, c, s·p, s·p)
        grid = z.unflatten(1, (-1, *self._patch)).permute(0, 1, 4, 2, 5, 3)
        return super().pixels(grid.flatten(4, 5).flatten(2, 3))

    def _to_channels(self, z: Tensor) -> Tensor:
        """(B, c, s·p, s·p) → (B, c·p·p, s, s), the channel first, then row and column within a square."""
        rows, columns = self._patch
        grid = z.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
        return grid.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


class DeepCompression(Autoencoder):
    """AutoencoderDC: deterministic, f = 32 or 64."""

    posteriors = ("mean",)

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.config.encoder_block_out_channels) - 1))

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.vae.encode(images).latent
        return mean, torch.zeros_like(mean)


class Representation(Autoencoder):
    """AutoencoderRAE: a frozen vision transformer encodes, a ViT decodes, for images of one size (arXiv 2510.11690).

    It normalises by the statistics among its own weights, which may be one a position, and wants images in [0, 1].
    """

    posteriors, normalises = ("mean",), True

    @property
    def in_channels(self) -> int:
        return int(self.config.num_channels)

    @property
    def channels(self) -> int:
        return int(self.config.encoder_hidden_size)

    @property
    def factor(self) -> int:
        return int(self.config.patch_size)

    @property
    def normalisation(self) -> Normalisation:
        std = self.vae._latents_std
        if not bool((std > 0).all()):
            raise UserError(f"VAE: latents_std = {shown(float(std.min()))} among its weights; it must be above 0")
        return Normalisation(1.0, 0.0)

    def check_size(self, size: int) -> None:
        if size != (own := int(self.vae.decoder_image_size)):
            raise UserError(f"size = {size}: this autoencoder is for images of {own} × {own}")

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.vae.encode((images + 1) / 2).latent
        return mean, torch.zeros_like(mean)

    def pixels(self, z: Tensor) -> Tensor:
        return super().pixels(z) * 2 - 1


class Pixels(nn.Module):
    """Pixels as latents, where an autoencoder is expected: the image in [-1, 1].

    The scaling factor 2 brings natural images, whose std is about 0.5, to about unit variance.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            in_channels=channels, latent_channels=channels, block_out_channels=(channels,), scaling_factor=2.0
        )
        self._place: Tensor
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where images are brought to."""
        return self._place.device

    @property
    def dtype(self) -> torch.dtype:
        """What images are turned into."""
        return self._place.dtype


class PixelLatents(Autoencoder):
    """No autoencoder: z is the image."""

    posteriors = ("mean",)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.zeros_like(images)

    def pixels(self, z: Tensor) -> Tensor:
        return z


KINDS: Mapping[str, type[Autoencoder]] = {
    "AutoencoderKL": Autoencoder,
    "AutoencoderKLFlux2": Flux2,
    "AutoencoderDC": DeepCompression,
    "AutoencoderRAE": Representation,
    "Pixels": PixelLatents,
}
"""By the name of the class in diffusers, as its config.json has it under `_class_name`."""


def autoencoder(vae: VAE) -> Autoencoder:
    """What is known of a loaded one, by its class."""
    return KINDS.get(type(vae).__name__, Autoencoder)(vae)


def _number(config: Any, name: str, usual: float | None = None) -> float:
    value: Any = getattr(config, name, None)
    value = usual if value is None else value
    if type(value) not in (int, float) or not math.isfinite(value) or (usual is None and value <= 0):
        raise UserError(f"VAE: {name} = {shown(value)} in its config; a number{' above 0' * (usual is None)} is needed")
    return float(value)


def _numbers(config: Any, name: str) -> tuple[float, ...]:
    """A list of numbers, which may be nested as the tensor (1, C, 1, 1) that it stands for; a number is one a channel.

    Empty where there is none.
    """
    value: Any = getattr(config, name, None)
    if value is None:
        return ()
    if type(value) in (int, float):
        value = [value] * int(config.latent_channels)
    try:
        return tuple(np.asarray(value, np.float64).reshape(-1).tolist())
    except (TypeError, ValueError):
        raise UserError(f"VAE: {name} = {shown(value)} in its config; a list of numbers is needed") from None
