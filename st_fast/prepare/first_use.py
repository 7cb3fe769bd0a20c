"""What the sets that are made on first use have in common: each is made whole, once, and never over anything else."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.data.manifest import read_manifest
from st_fast.sample.previews import grid, save_png

PICTURE = "reconstructions.png"


def must_be_made(folder: Path, name: str, complete: Callable[[], bool]) -> bool:
    """Whether the set `name` is not there, or damaged. UserError for a place that holds anything else."""
    if folder.is_dir() and complete():
        return False
    if not _may_be_replaced(folder, name):
        raise UserError(
            f"data.path = {str(folder)!r}: holds something else than the {name}, which data.source = '{name}' would "
            "make there; name another folder, or data.source = 'shards' to train on what is there"
        )
    return True


def _may_be_replaced(folder: Path, name: str) -> bool:
    """Whether there is nothing, or a set of this name, damaged or not."""
    if not folder.is_dir():
        return not folder.exists()
    try:
        return read_manifest(folder).vae.name == name
    except UserError:  # a damaged one: pictures of this name are made here only
        return (folder / PICTURE).is_file() or not any(folder.iterdir())


def save_reconstructions(folder: Path, real: Tensor, again: Tensor, columns: int = 10) -> float:
    """Saves rows of uint8 images (n, C, S, S), 4 at most, above the VAE's; returns the RMS error of all, of 255."""
    rows = zip(real[: 4 * columns].split(columns), again[: 4 * columns].split(columns), strict=True)
    save_png(grid(torch.cat([torch.cat(pair) for pair in rows]), columns), folder / PICTURE)
    return float((again.float() - real.float()).square().mean().sqrt())
