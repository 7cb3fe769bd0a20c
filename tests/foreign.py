"""Checkpoints as other projects write them, tiny and made on the spot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast import kernels
from st_fast.model import build
from st_fast.model.formats.layouts import published_order
from st_fast.model.velocity_head import projector
from st_fast.recipe.schema import Model

TINY = Model(depth=3, width=32, heads=2, patch=2, channels=4, latent_size=4, num_classes=5)
"""The network of `tests.tiny`."""
TINY_TEXT = Model(
    depth=3, width=96, heads=3, patch=2, channels=4, latent_size=4, network="mmdit", text_width=6, text_length=77,
    qk_norm=False,
)  # fmt: skip
"""An MMDiT whose width and heads follow from its depth, as those of the published ones do."""


def trunk(config: Model, seed: int) -> dict[str, Tensor]:
    """A model none of whose weights is zero, with the keys and in the order of the published code."""
    model = build(config, kernels.select({}, torch.device("cpu")), seed)
    generator = torch.Generator().manual_seed(seed)
    found = {k: t if k == "pos_embed" else t + 0.05 * torch.randn(t.shape, generator=generator)
             for k, t in model.state_dict().items() if k != "null_context"}  # fmt: skip
    return {key: found[key] for key in published_order(found)}


def repa_weights(config: Model, seed: int, encoder_width: int = 24) -> dict[str, Tensor]:
    """Trunk and one projector, as REPA has them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = projector(config.width, 16, encoder_width, kernels.select({}, torch.device("cpu"))).state_dict()
    found = trunk(config, seed) | {f"projectors.0.{key}": tensor for key, tensor in head.items()}
    return {key: found[key] for key in published_order(found)}


def adamw_state(weights: dict[str, Tensor], updates: int) -> dict[str, Any]:
    """What torch's own AdamW keeps of these parameters after some updates; an MMDiT's positions are a buffer."""
    weights = {key: t for key, t in weights.items() if key != "pos_embed" or "context_embedder.bias" not in weights}
    parameters = [torch.nn.Parameter(t.clone(), requires_grad=key != "pos_embed") for key, t in weights.items()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(9)
    for _ in range(updates):
        for p in parameters:
            p.grad = 0.1 * torch.randn(p.shape, generator=generator) if p.requires_grad else None
        optimizer.step()
    return optimizer.state_dict()


def repa_checkpoint(path: Path, config: Model = TINY, seed: int = 1, steps: int = 3) -> dict[str, Any]:
    """Writes REPA's training checkpoint (model, ema, opt, args, steps) and returns its content."""
    weights = repa_weights(config, seed)
    content = {
        "model": weights,
        "ema": repa_weights(config, seed + 1),
        "opt": adamw_state(weights, steps),
        "args": argparse.Namespace(model="SiT-XL/2", num_classes=config.num_classes, prediction="v", path_type="linear",
                                   qk_norm=config.qk_norm, enc_type="dinov2-vit-b", proj_coeff=0.5),
        "steps": steps,
    }  # fmt: skip
    torch.save(content, path)
    return content
