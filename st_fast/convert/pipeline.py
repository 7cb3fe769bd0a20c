"""Class-conditional sampling of a SiT as a diffusers pipeline. Noise follows from (seed, sample number), as in st_fast.

pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe([3, 8], seed=0).images
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from st_fast.core.random import Purpose
from st_fast.kernels.noise.definition import normal

LAST_SDE_TIME = 0.04
"""Where the SDE sampler, with diffusion 2t (arXiv 2401.08740), makes its last, noiseless step to t = 0."""


class SiTPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """Transformer, and a VAE where latents are not pixels. The other arguments are what `__call__` takes by default."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012  # diffusers looks for a list

    def __init__(
        self, transformer: Any, vae: Any = None, sampler: str = "heun", num_inference_steps: int = 50,
        guidance_scale: float = 1.0, guidance_low: float = 0.0, guidance_high: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(
            sampler=sampler, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            guidance_low=guidance_low, guidance_high=guidance_high,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, class_labels: Sequence[int], num_inference_steps: int | None = None, guidance_scale: float | None = None,
        sampler: str | None = None, seed: int = 0, first: int = 0, latents: Tensor | None = None,
        output_type: str = "pil", return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """Images of the classes: "pil", "np" (B, H, W, C in 0..1), "pt" (B, C, H, W) or "latent" (those, scaled).

        Sample i has number first + i; its noise, `latents` (B, C, S, S) where given, follows from (seed, number).
        `sampler` is "euler", "heun" or "sde" (Euler-Maruyama). ValueError for another one or a label out of range.
        """
        config, device = self.transformer.config, self._execution_device
        sampler, steps = sampler or self.config.sampler, num_inference_steps or self.config.num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if not all(0 <= label < config.num_classes for label in class_labels):
            raise ValueError(f"class_labels: 0..{config.num_classes - 1} are possible, got {list(class_labels)}")
        if sampler not in ("euler", "heun", "sde"):
            raise ValueError(f"sampler = {sampler!r}: one of euler, heun, sde")
        numbers = torch.arange(first, first + len(class_labels), device=device)
        shape = (config.channels, config.latent_size, config.latent_size)
        x = normal(seed, Purpose.SAMPLE_NOISE, numbers, shape) if latents is None else latents.to(device).float()
        labels = torch.tensor(list(class_labels), device=device)
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        if sampler == "sde":
            times = [*torch.linspace(1, LAST_SDE_TIME, steps, dtype=torch.float64).tolist(), 0.0]
        for number, (t, following) in enumerate(self.progress_bar(list(itertools.pairwise(times)))):
            step, slope = following - t, self.velocity(x, t, labels, scale)
            if sampler == "heun":
                slope = 0.5 * (slope + self.velocity(x + step * slope, following, labels, scale))
            if sampler == "sde":
                slope = slope - t * score(slope, x, t, config.flow)
            x = x + step * slope
            if sampler == "sde" and following > 0:
                noise = normal(seed, Purpose.SAMPLE_PATH, numbers * steps + number, x.shape[1:])
                x = x + (2 * t * -step) ** 0.5 * noise
        images = self.decoded(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def velocity(self, x: Tensor, t: float, labels: Tensor, scale: float) -> Tensor:
        """v(x, t) in float32, guided where t lies in the range: v_null + scale * (v_label - v_null)."""
        times = torch.full((len(x),), t, device=x.device)
        if scale == 1.0 or not self.config.guidance_low <= t <= self.config.guidance_high:
            return self.transformer(x, times, labels).float()
        null = torch.full_like(labels, self.transformer.config.num_classes)
        both = self.transformer(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat((labels, null))).float()
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def decoded(self, x: Tensor, output_type: str) -> Any:
        """Latents to what was asked for; without a VAE latents of 1 or 3 channels are pixels."""
        if output_type == "latent":
            return x
        z = x / (self.transformer.config.latent_scale or 1.0)
        if self.vae is not None:
            z = z + (getattr(self.vae.config, "shift_factor", None) or 0.0)
            z = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()
        elif z.shape[1] not in (1, 3):
            raise ValueError("this pipeline has no VAE: pass vae=AutoencoderKL…, or output_type='latent'")
        pixels = (z + 1).mul(127.5).round().clamp(0, 255) / 255
        if output_type == "pt":
            return pixels
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def score(v: Tensor, x: Tensor, t: float, flow: str) -> Tensor:
    """The gradient of log p_t(x) from the velocity; with alpha, sigma and their derivatives on the flow's path."""
    angle = math.pi / 2 * t
    alpha, sigma, d_alpha, d_sigma = (
        (1 - t, t, -1.0, 1.0)
        if flow == "linear"
        else (math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle))
    )
    return (alpha * v - d_alpha * x) / (d_alpha * sigma**2 - alpha * d_sigma * sigma)
