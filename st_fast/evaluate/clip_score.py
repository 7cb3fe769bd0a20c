"""CLIP score (arXiv 2104.08718): how well images fit the texts that they were drawn from, by a CLIP of one's choice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from st_fast.core.errors import UserError, how_to_install
from st_fast.model.encoders import CLIP, check_folder, preprocess, quiet_transformers
from st_fast.model.finite import check_finite
from st_fast.model.vae import from_hub, tensors_hash

BATCH = 64


class ClipScorer:
    """A CLIP with its tokenizer. `hash` is the SHA-256 of its weights; scores of different ones don't compare."""

    def __init__(self, name: str, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.name, self.hash, self.device = name, tensors_hash(model.state_dict()), device
        self._model, self._tokenizer = model.to(device).eval().requires_grad_(False), tokenizer
        self._side = int(model.config.vision_config.image_size)

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(n,) float32: 100 · max(cos, 0) of each uint8 image (n, 1 or 3, S, S) and its text, cut where it is long."""
        parts = range(0, len(texts), BATCH)
        return torch.cat([self._some(images[i : i + BATCH], texts[i : i + BATCH]) for i in parts])

    def _some(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        pixels = preprocess(images.to(self.device), self._side, statistics=CLIP)
        most = self._model.config.text_config.max_position_embeddings
        words = self._tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        words = {
            name: value.to(self.device) for name, value in words.items() if name in ("input_ids", "attention_mask")
        }
        out = self._model(pixel_values=pixels, **words)
        cosines = F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
        return 100 * cosines.clamp_min(0).cpu()


def load_clip(name: str, device: torch.device) -> ClipScorer:
    """A CLIP from a folder or the hub, in float32; one line of UserError where it can't be had."""
    transformers = quiet_transformers(name, how_to_install("text"))
    if Path(name).is_dir():
        check_folder(Path(name))
    with from_hub(f"--clip {name!r}: neither a folder with a CLIP in safetensors nor a hub name in reach", name):
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        if kind != "clip":
            raise UserError(f"its model_type is {kind!r}, 'clip' is needed")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="right")
        model, told = transformers.CLIPModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
    if missing := sorted(key for key in told["missing_keys"] if "position_ids" not in key):
        raise UserError(f"--clip {name!r}: {len(missing)} weights are missing: {missing[0]}, …")
    check_finite(model.state_dict(), f"--clip {name!r}")
    return ClipScorer(Path(name).resolve().name if Path(name).is_dir() else name, model.float(), tokenizer, device)
