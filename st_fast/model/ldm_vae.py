"""A VAE in one file as latent diffusion's code writes it (arXiv 2112.10752) → diffusers' AutoencoderKL.

So are VA-VAE's checkpoints (arXiv 2501.01423), MAR's KL-16, INVAE and Stable Diffusion's first stage: a state dict,
alone or under `state_dict` or `model`, whose keys may begin with `first_stage_model.`. Everything but the VAE in it is
passed over. Nothing is unpickled.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from st_fast.core.checkpoint import match_strictly
from st_fast.core.errors import UserError
from st_fast.core.files import is_pickle, read_header, shown
from st_fast.core.torch_files import read_pickled

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
PREFIX = re.compile(r"^(?:module\.|_orig_mod\.|first_stage_model\.|vae\.)+")
TABLES = ("state_dict", "model", "ema")
GROUPS = 32
"""Of every group norm in latent diffusion's code; no tensor tells."""
MOST_LEVELS, MOST_LAYERS = 16, 64
RENAMED = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""Latent diffusion's names → diffusers', in this order; levels of the decoder are counted the other way."""


def read_ldm_vae(path: Path, cls: Any) -> Any:
    """The VAE in a .pt, .ckpt or .safetensors file as `cls`, diffusers' AutoencoderKL.

    UserError in one line for a file that holds none, or whose tensors aren't those of the network that they describe.
    """
    table = _vae_tensors(path)
    config = _described(table, path)
    levels = len(config["block_out_channels"])
    found: dict[str, Tensor] = {}
    for key, tensor in table.items():
        name = re.sub(r"\.up\.(\d{1,3})\.", lambda match: f".up.{levels - 1 - int(match[1])}.", key)
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        squeezed = tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor
        found[name] = squeezed.float().contiguous()
    vae = cls.from_config(config)
    match_strictly(vae.state_dict(), found, str(path))
    vae.load_state_dict(found)
    return vae


def _beside_tables(content: Mapping[Any, Any]) -> list[str]:
    """The keys of what a training program keeps beside the weights, such as the optimisers' states."""
    return [key for key, value in content.items() if key not in TABLES and isinstance(value, (Mapping, list))]


def _vae_tensors(path: Path) -> dict[str, Tensor]:
    """The VAE's part of what the file holds, without prefixes."""
    if is_pickle(path):
        content = read_pickled(path, _beside_tables)
    else:
        read_header(path)
        content = load_file(path)
    content = content if isinstance(content, Mapping) else {}
    tables = [content, *(content[name] for name in TABLES if isinstance(content.get(name), Mapping))]
    for table in tables:
        plain = {PREFIX.sub("", key): tensor for key, tensor in table.items() if isinstance(key, str)}
        found = {key: t for key, t in plain.items() if key.startswith(PARTS) and isinstance(t, Tensor)}
        if "encoder.conv_in.weight" in found and "decoder.conv_in.weight" in found:
            return found
    raise UserError(
        f"{path}: no VAE of latent diffusion's layout in it (encoder.conv_in, encoder.down.0.block.0.…); it has "
        f"{shown(list(content))}"
    )


def _described(table: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The configuration of the AutoencoderKL whose tensors these are."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in table or table[key].ndim != 4:
            raise UserError(f"{path}: {key} is missing, or no convolution's weight")
        return tuple(table[key].shape)

    def count(pattern: str, most: int) -> int:
        numbers = {int(match[1]) for key in table if (match := re.match(pattern, key))}
        if not 0 < len(numbers) <= most or numbers != set(range(len(numbers))):
            raise UserError(f"{path}: its keys number {shown(sorted(numbers)[:8])} of {pattern}; 0, 1, … are needed")
        return len(numbers)

    levels = count(r"encoder\.down\.(\d{1,3})\.block\.", MOST_LEVELS)
    widths = tuple(shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels))
    latent = shape("decoder.conv_in.weight")[1]
    quantised = "quant_conv.weight" in table
    if quantised and shape("quant_conv.weight")[0] != 2 * latent:
        raise UserError(
            f"{path}: quant_conv gives {shape('quant_conv.weight')[0]} channels, the decoder takes {latent}"
        )
    if any(width % GROUPS for width in widths):
        raise UserError(f"{path}: levels of {shown(widths)} channels; multiples of {GROUPS} are needed")
    down, up = (
        [f"{part}.{level}.attn.0.q.weight" in table for level in range(levels)]
        for part in ("encoder.down", "decoder.up")
    )
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "down_block_types": [f"{'Attn' * attn}DownEncoderBlock2D" for attn in down],
        "up_block_types": [f"{'Attn' * attn}UpDecoderBlock2D" for attn in reversed(up)],
        "block_out_channels": list(widths),
        "layers_per_block": count(r"encoder\.down\.0\.block\.(\d{1,3})\.", MOST_LAYERS),
        "latent_channels": latent,
        "norm_num_groups": GROUPS,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in table,
        "use_quant_conv": quantised,
        "use_post_quant_conv": quantised,
        "scaling_factor": 1.0,
    }
