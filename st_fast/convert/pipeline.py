"""Class-conditional sampling of a SiT as a diffusers pipeline. Noise follows from (seed, sample number), as in st_fast.

pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe([3, 8], seed=0).images
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from st_fast.convert.drawing import decoded, guided, internal_scale, solve
from st_fast.core.random import Purpose
from st_fast.kernels.noise.definition import normal


class SiTPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """Transformer, and a VAE where latents are not pixels. The other arguments are what `__call__` takes by default."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012  # diffusers looks for a list

    def __init__(
        self, transformer: Any, vae: Any = None, sampler: str = "heun", num_inference_steps: int = 50,
        guidance_scale: float = 1.0, guidance_low: float = 0.0, guidance_high: float = 1.0,
        internal_guidance: float = 1.0, internal_low: float = 0.0, internal_high: float = 1.0, shift: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(
            sampler=sampler, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            guidance_low=guidance_low, guidance_high=guidance_high, internal_guidance=internal_guidance,
            internal_low=internal_low, internal_high=internal_high, shift=shift,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, class_labels: Sequence[int], num_inference_steps: int | None = None, guidance_scale: float | None = None,
        sampler: str | None = None, seed: int = 0, first: int = 0, latents: Tensor | None = None,
        output_type: str = "pil", return_dict: bool = True, internal_guidance: float | None = None,
    ) -> Any:  # fmt: skip
        """Images of the classes: "pil", "np" (B, H, W, C in 0..1), "pt" (B, C, H, W) or "latent" (those, scaled).

        Sample i has number first + i; its noise, `latents` (B, C, H, W) where given, follows from (seed, number).
        `sampler` is "euler", "heun" or "sde" (Euler-Maruyama). ValueError for another one, a label out of range, or
        `internal_guidance` (1: none) without an internal head.
        """
        config, device = self.transformer.config, self._execution_device
        sampler, steps = sampler or self.config.sampler, num_inference_steps or self.config.num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        internal = internal_scale(self, internal_guidance)
        if not all(0 <= label < config.num_classes for label in class_labels):
            raise ValueError(f"class_labels: 0..{config.num_classes - 1} are possible, got {list(class_labels)}")
        numbers = torch.arange(first, first + len(class_labels), device=device)
        size = config.latent_size
        shape = (config.channels, *((size, size) if isinstance(size, int) else size))
        x = normal(seed, Purpose.SAMPLE_NOISE, numbers, shape) if latents is None else latents.to(device).float()
        labels = torch.tensor(list(class_labels), device=device)
        velocity = guided(self, labels, torch.full_like(labels, config.num_classes), scale, internal)
        images = decoded(self, solve(self, x, velocity, sampler, steps, seed, numbers), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
