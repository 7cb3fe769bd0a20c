"""The VAE that a set is made with: a named one, or a small one trained on its images; kept beside the latents."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast.core.comparison import check_same
from st_fast.core.errors import UserError
from st_fast.core.files import inside, read_json, write_folder, write_json_atomic
from st_fast.core.machine import local_rank, rank_count
from st_fast.core.progress import bar
from st_fast.core.writing import save_pretrained
from st_fast.data.images import load_image, named_size, sides
from st_fast.data.manifest import VaeInfo
from st_fast.data.source import Source
from st_fast.model.autoencoders import VAE, autoencoder
from st_fast.model.vae import PIXELS, encode_moments, load_vae, vae_hash
from st_fast.prepare.job import own_share
from st_fast.prepare.small_vae import SmallVae, latent_scale, train_vae

VAE_FOLDER = "vae"
SMALL_FILE = "trained_with.json"
"""In a small VAE's folder: the options that it was trained with."""
WIDTHS = {2: (32, 32), 4: (16, 32, 64), 8: (16, 32, 64, 64)}
"""Channels of a small VAE's levels, by how much smaller its latents are."""
TRAINING_BYTES = 2**30
"""Pixels at most that a small VAE is trained on."""


def compute(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the precision of the VAE."""
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device that PyTorch can use; allowed: auto, cpu")
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    bf16 = args.precision == "bf16" or (args.precision == "auto" and cuda)
    return device, torch.bfloat16 if bf16 else torch.float32


def the_vae(args: argparse.Namespace, source: Source, out: Path) -> tuple[VAE, VaeInfo]:
    """The wanted VAE and its entry in the manifest.

    One that is not on the hub, trained here or from a local folder, is kept in OUT/vae, so that the set is complete.
    """
    if args.vae != "small":
        return given_vae(args)
    device, dtype = compute(args)
    if not (out / VAE_FOLDER).is_dir():
        if rank_count() > 1:
            raise UserError("--vae small: it has to be trained first, by one process: run this without torchrun once")
        odd = [side // factor_of(args) for side in sides(args.size) if side // factor_of(args) % 2]
        if odd:
            raise UserError(
                f"--size {named_size(args.size)}: latents of a small VAE would have an odd side, {odd[0]}, "
                f"which patch 2 can't divide; give a multiple of {2 * factor_of(args)}"
            )
        with write_folder(out / VAE_FOLDER) as writing:
            save_pretrained(small_vae(args, source, device), writing)
            write_json_atomic(writing / SMALL_FILE, small_settings(args))
    check_small(args, out)
    vae = load_vae(out / VAE_FOLDER, device, dtype)
    return vae, VaeInfo("small", vae_hash(vae), VAE_FOLDER, *kind_of(vae))


def given_vae(args: argparse.Namespace) -> tuple[VAE, VaeInfo]:
    """The VAE that `--vae` names and its entry in the manifest."""
    vae, local = load_vae(args.vae, *compute(args), args.vae_variant), is_local(args.vae)
    kept = local or args.vae_variant is not None  # so that what decodes is known by its name, or lies in OUT
    name = Path(args.vae).resolve().name if local else args.vae
    return vae, VaeInfo(name, vae_hash(vae), kept * VAE_FOLDER, *kind_of(vae))


def is_local(name: str) -> bool:
    """Whether `--vae NAME` names a folder or file, which comes before a hub name."""
    return name not in ("small", *PIXELS) and Path(name).exists()


def plan_variant(args: argparse.Namespace) -> dict[str, Any]:
    """What of a hub's weights is wanted, as job.json has it; those on a disk are told by their hash alone."""
    return {} if args.vae in ("small", *PIXELS) or is_local(args.vae) else {"vae_variant": args.vae_variant}


def kind_of(vae: VAE) -> tuple[str, int]:
    """The class and the factor, for the manifest."""
    return type(vae).__name__, autoencoder(vae).factor


def factor_of(args: argparse.Namespace) -> int:
    """How much smaller a small VAE's latents are: given, or by the images' size."""
    side = min(sides(args.size))
    return int(args.vae_factor or (2 if side <= 32 else 4 if side <= 64 else 8))


def small_settings(args: argparse.Namespace) -> dict[str, int]:
    """What a small VAE follows from, but for its images, by option. It is trained on squares, of the shorter side."""
    return {"--size": min(sides(args.size)), "--vae-factor": factor_of(args), "--vae-steps": args.vae_steps}


def check_small(args: argparse.Namespace, out: Path) -> None:
    """UserError where OUT's small VAE was trained with other options; folders of older versions do not tell."""
    folder = out / VAE_FOLDER
    if (folder / SMALL_FILE).is_file():
        there, remedy = read_json(folder / SMALL_FILE), "use those, or name another folder to write"
        check_same(there, small_settings(args), f"{folder}: a small VAE trained with", remedy)


def small_vae(args: argparse.Namespace, source: Source, device: torch.device) -> VAE:
    """Trains a small VAE on evenly spaced images of the source."""
    factor = factor_of(args)
    images = training_images(source, min(sides(args.size))).to(device)
    vae = train_vae(images, SmallVae(WIDTHS[factor], args.vae_steps))
    vae.register_to_config(scaling_factor=latent_scale(encode_moments(vae, images[:512]).cpu()))
    return vae


def training_images(source: Source, size: int) -> Tensor:
    """uint8 (n, 3, size, size): evenly spaced images, TRAINING_BYTES at most; those that can't be used are left out."""
    step = -(-len(source.names) * 3 * size * size // TRAINING_BYTES)
    images = []
    numbers = range(0, len(source.names), step)
    for number in bar(numbers, "reading images", len(numbers), "image"):
        try:
            images.append(torch.from_numpy(load_image(source.read(number), size, 3)))
        except (UserError, OSError):
            continue  # encoding names and counts it
    if not images:
        raise UserError(f"{source.description}: not one usable image")
    return torch.stack(images)


def copy_vae(info: VaeInfo, folder: Path, out: Path) -> None:
    """Puts a copy of the VAE that lies in a set's folder, if one does, into OUT, once."""
    if not info.path or own_share().start != 0 or not inside(folder, info.path).is_dir():
        return
    if not (out / info.path).is_dir():
        source = info.source(folder)
        with write_folder(out / info.path) as writing:
            shutil.copytree(source, writing, dirs_exist_ok=True)


def keep_vae(source: str, info: VaeInfo, out: Path, variant: str | None = None) -> None:
    """Puts a copy of the VAE `source` into OUT, once, where the manifest says so; UserError where OUT has another."""
    folder = out / VAE_FOLDER
    if not info.path or own_share().start != 0:
        return
    if not folder.is_dir():
        with write_folder(folder) as writing:
            save_pretrained(load_vae(source, variant=variant), writing)
    elif vae_hash(load_vae(folder)) != info.hash:
        raise UserError(f"{folder}: it holds another VAE than {info.name}; name another folder to write")
