"""Autoencoders as two functions: images → moments, latents → images. What kinds differ in is in `autoencoders`.

Moments are concat(mean, std) over the channels, as REPA's preprocessing writes them (arXiv 2410.06940), with shift,
mean and std of the normalisation taken off and its scale not. A latent of the diffusion model is
x = scale · (mean + std · ξ).
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
from typing import Any

import torch
from torch import Tensor, nn

from st_fast.core.command import is_hub_name
from st_fast.core.errors import UserError, first_line, how_to_install
from st_fast.core.files import read_header, read_json, shown
from st_fast.core.latents import Normalisation
from st_fast.model.autoencoders import KINDS, VAE, Autoencoder, Pixels, Posterior, autoencoder
from st_fast.model.finite import check_finite
from st_fast.model.ldm_vae import read_ldm_vae

PRESETS = {"sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse", "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema"}
"""Short names for the VAEs of the published runs; REPA's latents come from the first."""
PIXELS = {"pixels": 3, "pixels-gray": 1}
"""Names under which `load_vae` gives `Pixels`, and how many channels."""
WEIGHTS, CONFIG = "diffusion_pytorch_model", "config.json"
NO_NORMALISATION = Normalisation(1.0, 0.0)
LOADED = tuple(name for name in KINDS if name != Pixels.__name__)
"""The classes of diffusers that are known."""
INSIDE = "vae"
"""Where a diffusers pipeline has its autoencoder."""

QUIET = {"huggingface_hub": logging.ERROR, "diffusers": logging.CRITICAL}
"""The least that these say while something is read: an error comes as an exception, too."""
ATTEMPTS, PATIENCE = 2, 5.0
"""How often the hub is asked whether it can be reached, and for how many seconds each time."""


def autoencoder_class(name: str = "AutoencoderKL") -> Any:
    """diffusers' class of that name; UserError in one line where the extra is missing, or too old for it."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"VAE: diffusers can't be imported ({error}): {how_to_install('vae')}") from error
    if not hasattr(diffusers, name):
        raise UserError(f"VAE: diffusers {diffusers.__version__} has no {name}; a newer one is needed")
    return getattr(diffusers, name)


def load_vae(
    folder_or_name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> VAE:  # fmt: skip
    """A frozen autoencoder of any of KINDS in eval mode, from a local folder, a preset or a hub name; or an
    AutoencoderKL from one file in latent diffusion's layout. Never unpickles.

    Folder or hub repository may be a pipeline's, whose `vae/` is read. variant: of the weights' file, such as fp16;
    a folder's only file is taken without. Raises UserError naming what was asked for when it can't be had.
    """
    name = str(folder_or_name)
    if name in PIXELS:
        return Pixels(PIXELS[name]).to(device, dtype).eval()
    vae = read_ldm_vae(Path(name), autoencoder_class()) if Path(name).is_file() else _pretrained(name, variant)
    check_finite(vae.state_dict(), f"vae = {name!r}")
    if dtype != torch.float32:
        vae.stored_hash = vae_hash(vae)
    # Not its own `to`, which warns of modules that have to stay in float32 and names none.
    return nn.Module.to(vae, device, dtype).eval().requires_grad_(False)


def _pretrained(name: str, variant: str | None) -> VAE:
    """Of a folder, a preset or a hub name, in float32."""
    source = name if Path(name).is_dir() else PRESETS.get(name, name)
    refusal = (
        f"{source} can't be had from the hub; without a network name a folder or file that holds it "
        "(to prepare images, small or pixels)"
        if name in PRESETS or is_hub_name(Path(name))
        else f"neither a folder with an autoencoder ({', '.join(LOADED)}) in safetensors, nor a file in latent "
        f"diffusion's layout, nor one of {', '.join((*PRESETS, *PIXELS))}, nor a hub name"
    )
    autoencoder_class()  # whether diffusers is there at all
    where, inner = f"vae = {name!r}", ""
    if Path(source).is_dir():
        source = str(local_folder(Path(source)))
        variant = variant or _only_variant(Path(source), name)
        said = read_json(Path(source) / CONFIG) if (Path(source) / CONFIG).is_file() else {}
    else:
        with from_hub(f"{where}: {refusal}", source):
            said, inner = _hub_config(source)
    kind = said.get("_class_name", "AutoencoderKL")
    if kind not in LOADED:
        raise UserError(f"{where}: its config has _class_name = {shown(kind)}; known are {', '.join(LOADED)}")
    cls = autoencoder_class(kind)
    if Path(source).is_dir():
        _check_folder(Path(source), cls, variant)
    with from_hub(f"{where}: {refusal}"):
        # low_cpu_mem_usage=False: it would ask for one more package and saves nothing at a VAE's size.
        return cls.from_pretrained(
            source, subfolder=inner or None, variant=variant, torch_dtype=torch.float32, use_safetensors=True,
            low_cpu_mem_usage=False,
        )  # fmt: skip


def local_folder(folder: Path) -> Path:
    """Where a local folder's autoencoder lies: there, or in its `vae/` where it is a pipeline's."""
    return folder / INSIDE if not (folder / CONFIG).is_file() and (folder / INSIDE / CONFIG).is_file() else folder


def _only_variant(folder: Path, name: str) -> str | None:
    """The variant of a folder's weights where there are none without; UserError where there are several."""
    found = sorted(path.name.split(".")[1] for path in folder.glob(f"{WEIGHTS}.*.safetensors"))
    if not found or (folder / f"{WEIGHTS}.safetensors").is_file():
        return None
    if len(found) > 1:
        raise UserError(
            f"vae = {name!r}: it has the variants {', '.join(map(shown, found))}: choose one (--vae-variant)"
        )
    return found[0]


def _hub_config(name: str) -> tuple[dict[str, Any], str]:
    """The configuration of a hub repository's autoencoder and the folder in it where that lies, "" or `vae`."""
    cls = autoencoder_class()
    try:
        return cls.load_config(name), ""
    except OSError:
        return cls.load_config(name, subfolder=INSIDE), INSIDE


def _check_folder(folder: Path, cls: Any, variant: str | None) -> None:
    """UserError unless the network that config.json describes is as large as the weights beside it, before it is built.

    Where either is missing, loading says so.
    """
    weights, config = folder / f"{WEIGHTS}{f'.{variant}' * bool(variant)}.safetensors", folder / CONFIG
    if not (weights.is_file() and config.is_file()):
        return
    held, said = read_header(weights), read_json(config)
    for key, value in said.items():
        if not any(word in key for word in ("layers", "block_out_channels", "block_types")):
            continue
        values = value if isinstance(value, list) else [value]
        counts = [len(values), *(v for v in values if "layers" in key and v is not None)]
        if not all(type(count) is int and 0 <= count <= len(held) for count in counts):
            raise UserError(f"{config}: {key} = {shown(value)}, for {len(held)} tensors beside it")
    with from_hub(f"{config}: describes no {cls.__name__}"), torch.device("meta"):
        described = sum(tensor.numel() for tensor in cls.from_config(said).state_dict().values())
    if described > 2 * (there := sum(math.prod(entry.shape) for entry in held.values())):
        raise UserError(f"{config}: describes {described} weights, {weights.name} holds {there}")


@contextmanager
def from_hub(refusal: str, name: str = "") -> Iterator[None]:
    """Reading from the hub or its cache without the lines and warnings of the hub and diffusers on what failed.

    Where the hub has to be asked for `name` a line says so, and whether it answers is known within seconds.
    UserError, `refusal` with the reason, for whatever goes wrong.
    """
    levels = {library: logging.getLogger(library).level for library in QUIET}
    for library, least in QUIET.items():
        logging.getLogger(library).setLevel(least)
    try:
        with warnings.catch_warnings(action="ignore"):  # of diffusers about its own way of asking the hub
            if name and not Path(name).is_dir():
                _reach(name)
            yield
    except Exception as error:  # diffusers, transformers and the hub raise a dozen kinds; all mean that it can't be had
        raise UserError(f"{refusal} ({first_line(error)})") from None
    finally:
        for library, level in levels.items():
            logging.getLogger(library).setLevel(level)


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


def has_hash(vae: VAE, known: str) -> bool:
    """Whether a hash is that of the VAE's weights; older sets have that of weights rounded to bf16."""
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in vae.state_dict().items()}
    return known == vae_hash(vae) or known == tensors_hash(rounded)


def to_unit(images: Tensor, vae: VAE, black: float = -1.0) -> Tensor:
    """uint8 (n, 1 or 3, H, W) in 0..255 → the VAE's dtype and device in [black, 1]."""
    return images.to(vae.device).to(vae.dtype).div_(255 / (1 - black)).add_(black)


@torch.no_grad()
def encode_moments(
    vae: VAE, images: Tensor, posterior: Posterior = "sample", normalisation: Normalisation | None = None,
    black: float = -1.0,
) -> Tensor:  # fmt: skip
    """uint8 images (n, 1 or 3, H, W) → float32 moments (n, 2C, h, w) = concat(mean, std) on the VAE's device.

    Where the posterior is "mean" that alone, (n, C, h, w). normalisation: other than the VAE's own. black: the value
    of black pixels that the VAE is given; white is 1.
    """
    kind = autoencoder(vae)
    mean, std = (part.float() for part in kind.moments(to_unit(images, vae, black)))
    how = normalisation or kind.normalisation
    mean = mean - _shift(kind, how)
    if how.latents_mean:
        mean = mean - _by_channel(how.latents_mean, mean)
    if how.latents_std:
        by = _by_channel(how.latents_std, mean)
        mean, std = mean / by, std / by
    return mean if posterior == "mean" else torch.cat((mean, std), dim=1)


@torch.no_grad()
def decode(vae: VAE, latents: Tensor, normalisation: Normalisation, black: float = -1.0) -> Tensor:
    """The diffusion model's latents (n, C, h, w) → uint8 images (n, 1 or 3, H, W) on the host.

    black: the value of black pixels in the images that were encoded; white is 1.
    """
    kind, how = autoencoder(vae), normalisation
    z = latents.to(vae.device).float() / how.scale
    if how.latents_std:
        z = z * _by_channel(how.latents_std, z)
    if how.latents_mean:
        z = z + _by_channel(how.latents_mean, z)
    z = z + _shift(kind, how)
    pixels = kind.pixels(z.to(vae.dtype)).float()
    return pixels.sub(black).mul_(255 / (1 - black)).round_().clamp_(0, 255).to(torch.uint8).cpu()


def _shift(kind: Autoencoder, how: Normalisation) -> float:
    """The shift, or the VAE's own where it is not told."""
    return (kind.normalisation.shift or 0.0) if how.shift is None else how.shift


def _by_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    """(C,) → (1, C, 1, 1) on the tensor's device."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[None, :, None, None]


def latent_shape(vae: VAE, size: int) -> tuple[int, int, int]:
    """(C, h, w) of an image's latents, size × size pixels; UserError where the VAE's factor doesn't divide `size`."""
    kind = autoencoder(vae)
    kind.check_size(size)
    return kind.channels, size // kind.factor, size // kind.factor
