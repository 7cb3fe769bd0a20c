"""Tiny untrained autoencoders of every kind, as the folders and files in which public ones come, and what they encode.

Each has the normalisation that belongs to these images, planted where its kind keeps it: of them alone it is known what
a normalised latent looks like.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIDE, COUNT = 32, 24


def write_images(folder: Path, count: int = COUNT, side: int = SIDE, seed: int = 0) -> Tensor:
    """Smooth random pictures of two classes as PNG files; uint8 (count, 3, side, side) in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    fine = torch.rand(count, 3, side, side, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=side, mode="bicubic", align_corners=False).clamp(0, 1)
    images = ((0.8 * smooth + 0.2 * fine) * 255).round().to(torch.uint8)
    for number, image in enumerate(images.numpy()):
        path = folder / ("a" if number < count // 2 else "b") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(path)
    return images


@dataclass(frozen=True)
class Kind:
    """An autoencoder to prepare with: what writes it for some images, and what the command is told besides."""

    name: str
    write: Callable[[Path, Tensor], Path | str]
    """Folder to write to, images → what `--vae` is given."""
    options: Callable[[Path], list[object]] = lambda folder: []
    channels: int = 4
    factor: int = 4
    patch: int = 2
    posterior: str = "sample"
    per_channel: bool = False
    prediction: str = "velocity"


def _spread(vae: nn.Module, images: Tensor, mean_of: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """(2, C) mean and std of the latents that are drawn of these images."""
    with torch.no_grad():
        mean, std = (part.double() for part in mean_of(vae.eval(), images.float() / 127.5 - 1))
    centre = mean.mean((0, 2, 3))
    square = (mean**2 + std**2).mean((0, 2, 3)) - centre**2
    return torch.stack((centre, square.sqrt()))


def _posterior(vae: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    found = vae.encode(x).latent_dist
    return found.mean, found.std


def _deterministic(vae: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    found = vae.encode(x).latent
    return found, torch.zeros_like(found)


def _kl(channels: int, **more: object) -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        sample_size=SIDE, **more,
    )  # fmt: skip


def sd(folder: Path, images: Tensor) -> Path:
    """SD's: 4 channels, a scaling factor, in the `vae/` of a pipeline, as a variant in half precision."""
    vae = _kl(4)
    whole = _spread(vae, images, _posterior)
    deviation = float((whole[1] ** 2 + whole[0] ** 2).mean().sub(whole[0].mean() ** 2).sqrt())
    vae.register_to_config(scaling_factor=1 / deviation)
    vae.half().save_pretrained(folder / "vae", variant="fp16")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


def flux1(folder: Path, images: Tensor) -> Path:
    """SD 3's and FLUX.1's: 16 channels, a scaling factor and a shift, no quant_conv."""
    vae = _kl(16, use_quant_conv=False, use_post_quant_conv=False)
    centre, deviation = _spread(vae, images, _posterior)
    middle = float(centre.mean())
    whole = float((deviation**2 + centre**2).mean().sub(middle**2).sqrt())
    vae.register_to_config(scaling_factor=1 / whole, shift_factor=middle)
    vae.save_pretrained(folder)
    return folder


def flux2(folder: Path, images: Tensor) -> Path:
    """FLUX.2's: squares of latents in the channels, and the statistics of a batch norm."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(2)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=3, norm_num_groups=4, sample_size=SIDE,
    )  # fmt: skip

    def patched(vae: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = vae.encode(x).latent_dist.mean
        return nn.functional.pixel_unshuffle(mean, 2), torch.zeros(1)  # channel, row, column

    centre, deviation = _spread(vae, images, patched)
    vae.bn.running_mean.copy_(centre)
    vae.bn.running_var.copy_(deviation**2 - vae.config.batch_norm_eps)
    vae.save_pretrained(folder)
    return folder


def dc_ae(folder: Path, images: Tensor) -> Path:
    """DC-AE: deterministic, with a scaling factor."""
    from diffusers import AutoencoderDC

    torch.manual_seed(3)
    vae = AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16), encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
    )  # fmt: skip
    centre, deviation = _spread(vae, images, _deterministic)
    whole = float((deviation**2 + centre**2).mean().sub(centre.mean() ** 2).sqrt())
    vae.register_to_config(scaling_factor=1 / whole)
    vae.save_pretrained(folder)
    return folder


def ldm_table(seed: int = 4, channels: int = 6) -> dict[str, Tensor]:
    """Random weights of a VAE under latent diffusion's names: two levels, the lower one with attention."""
    generator = torch.Generator().manual_seed(seed)
    table: dict[str, Tensor] = {}

    def conv(name: str, inputs: int, outputs: int, side: int) -> None:
        bound = 1.5 / (inputs * side * side) ** 0.5
        table[f"{name}.weight"] = (torch.rand(outputs, inputs, side, side, generator=generator) * 2 - 1) * bound
        table[f"{name}.bias"] = torch.rand(outputs, generator=generator) * 0.2 - 0.1

    def norm(name: str, width: int) -> None:
        table[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        table[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    conv("encoder.conv_in", 3, 32, 3)
    block("encoder.down.0.block.0", 32, 32)
    conv("encoder.down.0.downsample.conv", 32, 32, 3)
    block("encoder.down.1.block.0", 32, 64)
    attention("encoder.down.1.attn.0", 64)
    conv("decoder.conv_in", channels, 64, 3)
    for level, widths in ((1, (64, 64)), (0, (64, 32))):
        for number in range(2):
            block(f"decoder.up.{level}.block.{number}", widths[bool(number)], widths[1])
            if level == 1:
                attention(f"decoder.up.{level}.attn.{number}", widths[1])
        if level:
            conv(f"decoder.up.{level}.upsample.conv", widths[1], widths[1], 3)
    for part, width in (("encoder", 64), ("decoder", 64)):
        block(f"{part}.mid.block_1", width, width)
        attention(f"{part}.mid.attn_1", width)
        block(f"{part}.mid.block_2", width, width)
    norm("encoder.norm_out", 64)
    conv("encoder.conv_out", 64, 2 * channels, 3)
    norm("decoder.norm_out", 32)
    conv("decoder.conv_out", 32, 3, 3)
    conv("quant_conv", 2 * channels, 2 * channels, 1)
    conv("post_quant_conv", channels, channels, 1)
    return table


def ldm_conv(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return nn.functional.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def ldm_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return nn.functional.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def ldm_block(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    h = ldm_conv(w, f"{name}.conv1", nn.functional.silu(ldm_norm(w, f"{name}.norm1", x)))
    h = ldm_conv(w, f"{name}.conv2", nn.functional.silu(ldm_norm(w, f"{name}.norm2", h)))
    return h + (ldm_conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def ldm_attention(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    h = ldm_norm(w, f"{name}.norm", x)
    q, k, v = (ldm_conv(w, f"{name}.{part}", h).flatten(2) for part in ("q", "k", "v"))
    weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
    return x + ldm_conv(w, f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))


def ldm_encode(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] → mean and std, as latent diffusion's code computes them, with plain functions."""
    down = "encoder.down.0.downsample.conv"
    x = ldm_block(w, "encoder.down.0.block.0", ldm_conv(w, "encoder.conv_in", x))
    x = nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), w[f"{down}.weight"], w[f"{down}.bias"], stride=2)
    x = ldm_attention(w, "encoder.down.1.attn.0", ldm_block(w, "encoder.down.1.block.0", x))
    x = ldm_block(w, "encoder.mid.block_1", x)
    x = ldm_block(w, "encoder.mid.block_2", ldm_attention(w, "encoder.mid.attn_1", x))
    x = ldm_conv(w, "encoder.conv_out", nn.functional.silu(ldm_norm(w, "encoder.norm_out", x)))
    mean, log_variance = ldm_conv(w, "quant_conv", x).chunk(2, dim=1)
    return mean, (0.5 * log_variance.clamp(-30, 20)).exp()


def ldm_decode(w: dict[str, Tensor], z: Tensor) -> Tensor:
    """The way back, to images."""
    x = ldm_conv(w, "decoder.conv_in", ldm_conv(w, "post_quant_conv", z))
    x = ldm_block(w, "decoder.mid.block_1", x)
    x = ldm_block(w, "decoder.mid.block_2", ldm_attention(w, "decoder.mid.attn_1", x))
    for number in range(2):
        x = ldm_attention(w, f"decoder.up.1.attn.{number}", ldm_block(w, f"decoder.up.1.block.{number}", x))
    x = ldm_conv(w, "decoder.up.1.upsample.conv", nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    for number in range(2):
        x = ldm_block(w, f"decoder.up.0.block.{number}", x)
    return ldm_conv(w, "decoder.conv_out", nn.functional.silu(ldm_norm(w, "decoder.norm_out", x)))


def va_vae(folder: Path, images: Tensor) -> Path:
    """VA-VAE's: one file in latent diffusion's layout, the statistics in another."""
    table = ldm_table()
    with torch.no_grad():
        mean, std = (part.double() for part in ldm_encode(table, images.float() / 127.5 - 1))
    centre = mean.mean((0, 2, 3), keepdim=True)
    deviation = ((mean**2 + std**2).mean((0, 2, 3), keepdim=True) - centre**2).sqrt()
    folder.mkdir(parents=True, exist_ok=True)
    extra = {"loss.logvar": torch.zeros(()), "foundation_model.x": torch.zeros(2)}
    beside = {"epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}
    torch.save({"state_dict": table | extra, **beside}, folder / "vavae.pt")
    torch.save({"mean": centre.float(), "std": deviation.float()}, folder / "latents_stats.pt")
    return folder / "vavae.pt"


def e2e(folder: Path, images: Tensor) -> Path:
    """INVAE's and REPA-E's exports: an AutoencoderKL with mean and std of each channel in its configuration."""
    vae = _kl(6)
    centre, deviation = _spread(vae, images, _posterior)
    vae.register_to_config(
        scaling_factor=1.0,
        latents_mean=centre.view(1, -1, 1, 1).tolist(),
        latents_std=deviation.view(1, -1, 1, 1).tolist(),
    )
    vae.save_pretrained(folder)
    return folder


def rae(folder: Path, images: Tensor) -> Path:
    """RAE: a vision transformer with registers, statistics of each dimension, a ViT decoder."""
    from diffusers import AutoencoderRAE

    torch.manual_seed(5)
    make = {
        "encoder_type": "dinov2", "encoder_hidden_size": 64, "encoder_patch_size": 7, "encoder_num_hidden_layers": 1,
        "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 48, "patch_size": 8, "encoder_input_size": 28,
    }  # fmt: skip
    vae = AutoencoderRAE(**make)
    with torch.no_grad():
        latent = vae.eval().encode(images.float() / 255).latent  # in [0, 1], not normalised yet
    vae._latents_mean = latent.mean(0)
    vae._latents_std = latent.std(0, unbiased=False)
    vae.register_to_config(latents_mean=latent.mean(0).tolist(), latents_std=latent.std(0, unbiased=False).tolist())
    vae.save_pretrained(folder)
    return folder


def pixels(folder: Path, images: Tensor) -> str:
    """No autoencoder."""
    return "pixels"


def own_reconstruction(kind: str, place: Path | str, images: Tensor) -> Tensor:
    """Images in [-1, 1], encoded to the mean and decoded by the autoencoder's own functions alone."""
    import diffusers

    x = images.float() / 127.5 - 1
    if kind == "pixels":
        return x
    if kind == "va-vae":
        table = {key: part for key, part in torch.load(place)["state_dict"].items()}
        return ldm_decode(table, ldm_encode(table, x)[0])
    if kind == "sd":
        vae = diffusers.AutoencoderKL.from_pretrained(place, subfolder="vae", variant="fp16", torch_dtype=torch.float32)
        return vae.decode(vae.encode(x).latent_dist.mean).sample
    classes = {"flux2": "AutoencoderKLFlux2", "dc-ae": "AutoencoderDC", "rae": "AutoencoderRAE"}
    vae = getattr(diffusers, classes.get(kind, "AutoencoderKL")).from_pretrained(place)
    if kind == "rae":
        return vae((x + 1) / 2).sample * 2 - 1
    found = vae.encode(x)
    return vae.decode(found.latent if kind == "dc-ae" else found.latent_dist.mean).sample


KINDS = (
    Kind("sd", sd),
    Kind("flux1", flux1, channels=16),
    Kind("flux2", flux2, channels=12, posterior="mean", per_channel=True),
    Kind("dc-ae", dc_ae, channels=8, posterior="mean", patch=1),
    Kind("va-vae", va_vae, lambda folder: ["--latents-stats", folder / "latents_stats.pt"], 6, 2, 4, per_channel=True),
    Kind("e2e", e2e, channels=6, per_channel=True),
    Kind("rae", rae, channels=64, factor=8, patch=1, posterior="mean", per_channel=True),
    Kind("pixels", pixels, channels=3, factor=1, patch=16, posterior="mean", prediction="x"),
)
"""The eight families."""
