"""Any diffusers AutoencoderKL as two functions: images → moments, latents → images.

Moments are concat(mean, std) over the channels, unscaled, as REPA's preprocessing writes them (arXiv 2410.06940).
A latent of the diffusion model is x = scale · (mean + std · ξ). A VAE whose configuration has a `shift_factor` (SD 3,
Flux) has it taken off the mean here and put back by `decode`, so that no caller needs to know about it.
"""

import hashlib
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from st_fast.core.errors import UserError, first_line, how_to_install
from st_fast.core.files import read_header, read_json, shown
from st_fast.model.finite import check_finite

PRESETS = {"sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse", "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema"}
"""Short names for the VAEs of the published runs; REPA's latents come from the first."""

ATTEMPTS, PATIENCE = 2, 5.0
"""How often the hub is asked whether it can be reached, and for how many seconds each time."""

VAE = Any
"""A diffusers AutoencoderKL, or `Pixels` in its place; diffusers is imported only when one is wanted."""


class Pixels(nn.Module):
    """Pixels as latents, behind the interface of an AutoencoderKL: mean = the image in [-1, 1], std = 0.

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

    def encode(self, images: Tensor) -> SimpleNamespace:
        """The images as their own mean."""
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=images, std=torch.zeros_like(images)))

    def decode(self, z: Tensor) -> SimpleNamespace:
        """The latents as they are."""
        return SimpleNamespace(sample=z)


PIXELS = {"pixels": 3, "pixels-gray": 1}
"""Names under which `load_vae` gives `Pixels`, and how many channels."""


def autoencoder_class() -> Any:
    """diffusers' AutoencoderKL; UserError in one line where the extra is missing."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"VAE: diffusers can't be imported ({error}): {how_to_install('vae')}") from error
    return AutoencoderKL


def load_vae(folder_or_name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """A frozen AutoencoderKL in eval mode, from a local folder, a preset or a hub name; or `Pixels`. Never unpickles.

    Raises UserError naming what was asked for when it can't be had.
    """
    name = str(folder_or_name)
    if name in PIXELS:
        return Pixels(PIXELS[name]).to(device, dtype).eval()
    source = name if Path(name).is_dir() else PRESETS.get(name, name)
    refusal = (
        f"{source} can't be had from the hub; without a network name a folder that holds it, or small or pixels"
        if name in PRESETS
        else "neither a folder with an AutoencoderKL in safetensors, nor one of "
        f"{', '.join((*PRESETS, *PIXELS))}, nor a hub name that can be reached"
    )
    cls = autoencoder_class()
    if Path(source).is_dir():
        _check_folder(Path(source), cls)
    with from_hub(f"vae = {name!r}: {refusal}", source):
        # low_cpu_mem_usage=False: it would ask for one more package and saves nothing at a VAE's size.
        vae = cls.from_pretrained(source, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False)
    check_finite(vae.state_dict(), f"vae = {name!r}")
    if dtype != torch.float32:
        vae.stored_hash = vae_hash(vae)
    return vae.to(device, dtype).eval().requires_grad_(False)


def _check_folder(folder: Path, cls: Any) -> None:
    """UserError unless the network that config.json describes is as large as the weights beside it, before it is built.

    Where either is missing, loading says so.
    """
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    if not (weights.is_file() and config.is_file()):
        return
    held, said = read_header(weights), read_json(config)
    levels = said.get("block_out_channels", [])
    counts = [len(levels) if isinstance(levels, list) else len(held) + 1, said.get("layers_per_block", 1)]
    if not all(type(count) is int and 0 <= count <= len(held) for count in counts):
        raise UserError(f"{config}: {counts[0]} levels of {shown(counts[1])} layers, for {len(held)} tensors beside it")
    with from_hub(f"{config}: describes no AutoencoderKL"), torch.device("meta"):
        described = sum(tensor.numel() for tensor in cls.from_config(said).state_dict().values())
    if described > 2 * (there := sum(math.prod(entry.shape) for entry in held.values())):
        raise UserError(f"{config}: describes {described} weights, {weights.name} holds {there}")


@contextmanager
def from_hub(refusal: str, name: str = "") -> Iterator[None]:
    """Reading from the hub or its cache without the hub's lines and warnings on every attempt that failed.

    Where the hub has to be asked for `name` a line says so, and whether it answers is known within seconds.
    UserError, `refusal` with the reason, for whatever goes wrong.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):  # of diffusers about its own way of asking the hub
            if name and not Path(name).is_dir():
                _reach(name)
            yield
    except Exception as error:  # diffusers, transformers and the hub raise a dozen kinds; all mean that it can't be had
        raise UserError(f"{refusal} ({first_line(error)})") from None
    finally:
        logger.setLevel(level)


def _reach(name: str) -> None:
    """Says that the hub is asked for what is not in its cache; ConnectionError where no attempt gets an answer.

    The hub's own library asks six times with pauses of 23 s in all, and has no setting for that.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except ValueError:  # no name that the hub could have
        return
    if os.environ.get("RANK", "0") == "0":
        print(f"asking the hub for {name}", file=sys.stderr, flush=True)
    for attempt in range(ATTEMPTS):
        try:
            answers(constants.ENDPOINT)
        except Exception as error:
            if attempt == ATTEMPTS - 1:
                raise ConnectionError(f"no answer from {constants.ENDPOINT}: {first_line(error)}") from None
            time.sleep(1)
        else:
            return


def answers(address: str) -> None:
    """Asks the hub once for anything, as its own library would; an error of that library's if it does not answer."""
    from huggingface_hub import get_session

    get_session().head(address, timeout=PATIENCE)


def vae_hash(vae: VAE) -> str:
    """SHA-256 over names, shapes and float32 values of the weights: the same on any device and file layout.

    Of one that was loaded in half precision, those of the file's weights.
    """
    stored: str = getattr(vae, "stored_hash", "")
    return stored or tensors_hash(vae.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def vae_scale(vae: VAE) -> float:
    """The factor between the VAE's latents and the diffusion model's: 0.18215 for the SD VAEs."""
    return _number(vae, "scaling_factor", positive=True)


def vae_shift(vae: VAE) -> float:
    """What is taken off the VAE's mean before it is scaled; 0 for most."""
    return _number(vae, "shift_factor")


def _number(vae: VAE, name: str, positive: bool = False) -> float:
    value: Any = getattr(vae.config, name, None)
    value = 0.0 if value is None and not positive else value
    if type(value) not in (int, float) or not math.isfinite(value) or (positive and value <= 0):
        raise UserError(f"VAE: {name} = {shown(value)} in its config; a number{' above 0' * positive} is needed")
    return float(value)


def refuse_normalised(vae: VAE, where: str) -> None:
    """UserError for a VAE whose config normalises each channel of the latents: only scaling and shift are done here."""
    for name, neutral in (("latents_mean", 0.0), ("latents_std", 1.0)):
        values = getattr(vae.config, name, None)
        if values is not None and any(value != neutral for value in (values if isinstance(values, list) else [values])):
            raise UserError(
                f"{where}: its config has {name} = {shown(values)}, by which each channel would have to be normalised; "
                "only scaling_factor and shift_factor are supported"
            )


def to_unit(images: Tensor, vae: VAE) -> Tensor:
    """uint8 (n, 1 or 3, H, W) in 0..255 → the VAE's dtype and device in [-1, 1]."""
    return images.to(vae.device).to(vae.dtype).div_(127.5).sub_(1.0)


@torch.no_grad()
def encode_moments(vae: VAE, images: Tensor) -> Tensor:
    """uint8 images (n, 1 or 3, H, W) → float32 moments (n, 2C, h, w) = concat(mean, std) on the VAE's device."""
    posterior = vae.encode(to_unit(images, vae)).latent_dist
    return torch.cat((posterior.mean.float() - vae_shift(vae), posterior.std.float()), dim=1)


@torch.no_grad()
def decode(vae: VAE, latents: Tensor, scale: float) -> Tensor:
    """The diffusion model's latents (n, C, h, w) = scale · z → uint8 images (n, 1 or 3, H, W) on the host."""
    z = latents.to(vae.device).float() / scale + vae_shift(vae)
    pixels: Tensor = vae.decode(z.to(vae.dtype)).sample.float()
    return pixels.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).cpu()


def latent_shape(vae: VAE, size: int) -> tuple[int, int, int]:
    """(C, h, w) of an image's latents, size × size pixels; UserError where the VAE's factor doesn't divide `size`."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % factor:
        raise UserError(f"size = {size}: the VAE reduces by {factor}; a multiple of it is needed")
    return int(vae.config.latent_channels), size // factor, size // factor
