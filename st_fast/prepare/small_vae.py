"""A small AutoencoderKL trained on the images at hand: true latents where no published VAE fits or can be had."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from st_fast.core.progress import bar
from st_fast.model.autoencoders import VAE
from st_fast.model.vae import autoencoder_class

REPORT = 20
"""Steps between two readings of the loss that the progress bar shows, beside the time left."""


@dataclass(frozen=True)
class SmallVae:
    """Architecture and training of a small VAE. Each width after the first halves the image: f = 2^(len − 1)."""

    widths: tuple[int, ...]
    steps: int
    batch_size: int = 16
    peak_lr: float = 4e-3
    kl_weight: float = 1e-3
    """Small enough for sharp reconstructions, large enough for latents that are nearly Gaussian and smooth."""
    latent_channels: int = 4


def new_vae(config: SmallVae, channels: int, size: int) -> VAE:
    """An untrained AutoencoderKL for (channels, size, size) images, without attention."""
    levels = len(config.widths)
    return autoencoder_class()(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=4,
        sample_size=size,
        mid_block_add_attention=False,
    )


def train_vae(images: Tensor, config: SmallVae) -> VAE:
    """Trains on uint8 images (n, C, S, S): squared error + weighted KL, one-cycle AdamW, fixed seed.

    Error and KL(posterior ‖ N(0, 1)) are per element (Kingma and Welling, 1312.6114). Leaves the global
    random state as it was. The result is frozen, in eval mode, on the images' device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = new_vae(config, *images.shape[1:3]).to(images.device)
        optimizer = torch.optim.AdamW(vae.parameters(), lr=config.peak_lr, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.peak_lr, total_steps=config.steps, pct_start=0.1
        )
        progress = bar(range(config.steps), "training a small VAE", config.steps, "step")
        for step in progress:
            rows = torch.randint(len(images), (config.batch_size,)).to(images.device)
            x = images[rows].float() / 127.5 - 1
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
            loss = (vae.decode(z).sample - x).square().mean() + config.kl_weight * kl
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % REPORT == 0:
                progress.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    return vae.eval().requires_grad_(False)


def latent_scale(moments: Tensor) -> float:
    """1 / std of sampled latents, from moments (n, 2C, h, w): what brings them to unit variance, as for the SD VAE."""
    mean, std = moments.double().chunk(2, dim=1)
    return float((mean.var() + std.square().mean()).rsqrt())
