"""Text to image with an MMDiT as a diffusers pipeline. Noise follows from (seed, sample number), as in st_fast.

pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe(["a red bus", "two dogs"], seed=0).images
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from st_fast.convert.drawing import decoded, guided, internal_scale, solve
from st_fast.core.random import Purpose
from st_fast.kernels.noise.definition import normal


class MMDiTPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """Transformer, text encoder with its tokenizer, and a VAE where latents are not pixels.

    The other arguments are what `__call__` takes by default.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer", "vae"]  # noqa: RUF012  # diffusers looks for a list

    def __init__(
        self, transformer: Any, text_encoder: Any = None, tokenizer: Any = None, vae: Any = None, sampler: str = "heun",
        num_inference_steps: int = 50, guidance_scale: float = 1.0, guidance_low: float = 0.0,
        guidance_high: float = 1.0, internal_guidance: float = 1.0, internal_low: float = 0.0,
        internal_high: float = 1.0, shift: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae)
        self.register_to_config(
            sampler=sampler, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            guidance_low=guidance_low, guidance_high=guidance_high, internal_guidance=internal_guidance,
            internal_low=internal_low, internal_high=internal_high, shift=shift,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str] | None = None, negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None, sampler: str | None = None,
        seed: int = 0, first: int = 0, latents: Tensor | None = None, prompt_embeds: Tensor | None = None,
        output_type: str = "pil", return_dict: bool = True, internal_guidance: float | None = None,
    ) -> Any:  # fmt: skip
        """Images of the prompts: "pil", "np" (B, H, W, C in 0..1), "pt" (B, C, H, W) or "latent" (those, scaled).

        Sample i has number first + i; its noise, `latents` (B, C, H, W) where given, follows from (seed, number).
        `prompt_embeds` (B, L, W), the encoder's states, may stand for the prompts. Guidance leads away from the empty
        caption, or from `negative_prompt`, one for all or one each. `sampler` is "euler", "heun" or "sde"
        (Euler-Maruyama).

        ValueError for another one, for prompts without a text encoder, for states of other shapes, and for
        `internal_guidance` (1: none) without an internal head.
        """
        config, device = self.transformer.config, self._execution_device
        sampler, steps = sampler or self.config.sampler, num_inference_steps or self.config.num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        internal = internal_scale(self, internal_guidance)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if bool(prompts) == (prompt_embeds is not None):
            raise ValueError("either prompt or prompt_embeds is needed")
        states = self.states(prompts) if prompt_embeds is None else prompt_embeds.to(device).float()
        null = self.transformer.null_context
        if negative_prompt is not None:
            null = self.states([negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt))
        wanted = null.shape[1:]
        if states.shape[1:] != wanted or len(null) not in (1, len(states)):
            found = f"{tuple(states.shape)} with {len(null)} negative ones"
            raise ValueError(f"states {found}: (B, {wanted[0]}, {wanted[1]}) are needed, and 1 or B negative ones")
        numbers = torch.arange(first, first + len(states), device=device)
        size = config.latent_size
        shape = (config.channels, *((size, size) if isinstance(size, int) else size))
        x = normal(seed, Purpose.SAMPLE_NOISE, numbers, shape) if latents is None else latents.to(device).float()
        velocity = guided(self, states, null.to(states).expand_as(states), scale, internal)
        images = decoded(self, solve(self, x, velocity, sampler, steps, seed, numbers), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def states(self, texts: list[str]) -> Tensor:
        """(B, L, W) float32: the last hidden states of the texts' tokens, as those that the model was trained on.

        Texts of more than L tokens are cut, with a warning.
        """
        config, device = self.transformer.config, self._execution_device
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder: pass text_encoder=… and tokenizer=…, or prompt_embeds")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        tokens = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        if cut := sum(count > config.text_length for count in tokens):
            warnings.warn(f"{cut} of {len(texts)} texts have more than {config.text_length} tokens, cut", stacklevel=3)
        found = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=config.text_length, return_tensors="pt",
            padding_side="right",
        ).to(device)  # fmt: skip
        ids, mask = found["input_ids"], found["attention_mask"]
        if not config.text_mask:
            return self.text_encoder(input_ids=ids).last_hidden_state.float()  # type: ignore[no-any-return]
        states = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return states * mask[..., None]  # type: ignore[no-any-return]
