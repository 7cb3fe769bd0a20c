"""The digits set: scikit-learn's 1,797 real handwritten digits with a small true VAE, made once in about a minute.

`prepare_digits` leaves a folder with latents of the training split as shards, the VAE (`vae/`, diffusers' layout),
the images themselves (`images.safetensors`, for the classifier) and a picture of reconstructions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save as to_safetensors
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import FolderWrite
from st_fast.data.manifest import Manifest, VaeInfo, read_manifest
from st_fast.data.shards import open_shards
from st_fast.model.vae import VAE, decode, encode_moments, vae_hash
from st_fast.prepare.small_vae import SmallVae, latent_scale, train_vae
from st_fast.prepare.writing import write_shards

SIZE = 32
TEST = 360
VAE_CONFIG = SmallVae(widths=(8, 16, 32), steps=400)
"""f = 4, so 32×32 images have 4×8×8 latents; 0.16 M parameters."""
PICTURE = "reconstructions.png"

Say = Callable[[str], None]


def load_images() -> dict[str, np.ndarray]:
    """The digits at 32×32: uint8 "train" (1437, 32, 32) and "test" (360, 32, 32), int64 "…_labels".

    The split is stratified and fixed.
    """
    from sklearn.datasets import load_digits  # here, since it takes a second and most runs need no digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    small = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    resized = [Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for one in small]
    images = np.stack([np.asarray(one) for one in resized])
    train, test, train_labels, test_labels = train_test_split(
        images, labels.astype(np.int64), test_size=TEST, stratify=labels, random_state=0
    )
    return {"train": train, "train_labels": train_labels, "test": test, "test_labels": test_labels}


def prepare_digits(folder: Path, say: Say) -> None:
    """Makes the digits folder unless a complete one is there; a damaged or half-made one is built anew.

    Written aside and renamed, so no reader ever sees half of it. UserError for a place that holds anything else.
    """
    folder = Path(folder).resolve()  # what a link leads to is replaced, never the link
    if _complete(folder):
        return
    if not _may_be_replaced(folder):
        raise UserError(
            f"data.path = {str(folder)!r}: holds something else than the digits, which data.source = 'digits' would "
            "make there; name another folder, or data.source = 'shards' to train on what is there"
        )
    say(f"digits: training a small VAE and encoding 1,437 digits into {folder} (once, about a minute)")
    images = load_images()
    train = torch.from_numpy(images["train"])[:, None]
    vae = train_vae(train, VAE_CONFIG)
    with FolderWrite(folder, replace=True) as write:
        error = _write(write.path, images, vae)
    if write.aside:
        shutil.rmtree(write.aside)
    say(f"digits: done; reconstruction error on held-out digits {error:.1f} of 255 (root mean square)")


def _write(folder: Path, images: dict[str, np.ndarray], vae: VAE) -> float:
    """Fills the folder; returns the reconstruction error on the test split."""
    train, test = (torch.from_numpy(images[name])[:, None] for name in ("train", "test"))
    moments = encode_moments(vae, train)
    scale = latent_scale(moments)
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(folder / "vae", safe_serialization=True)
    (folder / "images.safetensors").write_bytes(to_safetensors(images))
    again = decode(vae, encode_moments(vae, test).chunk(2, dim=1)[0] * scale, scale)
    _picture(test[:40], again[:40]).save(folder / PICTURE)
    manifest = Manifest(
        count=0,
        shape=(8, SIZE // 4, SIZE // 4),
        dtype="float16",
        scale=scale,
        vae=VaeInfo("digits", vae_hash(vae), "vae"),
        source="scikit-learn load_digits, training split, 32×32",
        num_classes=10,
        class_names=tuple("0123456789"),
    )
    write_shards(folder, [(moments, torch.from_numpy(images["train_labels"]))], manifest)
    return float((again.float() - test.float()).square().mean().sqrt())


def _picture(images: Tensor, again: Tensor) -> Image.Image:
    """Rows of ten: images (n, 1, H, W) above their reconstructions."""
    rows = [row for pair in zip(images.split(10), again.split(10), strict=True) for row in pair]
    strips = [torch.cat(list(row[:, 0]), dim=1) for row in rows]
    return Image.fromarray(torch.cat(strips).numpy())


def _may_be_replaced(folder: Path) -> bool:
    """Whether there is nothing, or a digits folder, damaged or not."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    try:
        return read_manifest(folder).vae.name == "digits"
    except UserError:  # a damaged one: pictures of this name are made here only
        return (folder / PICTURE).is_file() or not any(folder.iterdir())


def _complete(folder: Path) -> bool:
    """Whether the folder holds everything and every byte of the latents is as written."""
    if not (folder / "images.safetensors").is_file() or not (folder / "vae" / "config.json").is_file():
        return False
    try:
        open_shards(folder, verify=True).close()
        return read_manifest(folder).vae.name == "digits"
    except UserError:
        return False
