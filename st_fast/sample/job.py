"""A model ready to draw, and a set of samples that any number of ranks draw together, batch by whole batch.

Which samples share a batch follows from their numbers alone, and every batch is drawn by one rank, so the number of
ranks changes no image. (Nor does it change a bit as long as each rank computes with as many threads.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from st_fast.core import checkpoint
from st_fast.core.errors import Interrupted, UserError
from st_fast.core.progress import bar
from st_fast.core.ranks import Ranks
from st_fast.core.signals import StopRequest
from st_fast.data.shards import read_any_manifest
from st_fast.model import SiT, teacher
from st_fast.model.attention import choose
from st_fast.model.compiling import CompiledBlocks
from st_fast.model.smoke_test import validated_kernels
from st_fast.model.vae import vae_hash
from st_fast.recipe.schema import Recipe, Sample
from st_fast.sample import pictures
from st_fast.sample.draw import Labels, draw_of
from st_fast.sample.files import open_npz, write_npz, write_pngs
from st_fast.sample.guided import sample
from st_fast.sample.parts import Parts, Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRID_IMAGES, GRID_COLUMNS = 100, 10


@dataclass(frozen=True)
class Wanted:
    """Which model is to draw, and how."""

    run: Path
    recipe: Recipe
    stage: str
    weights: Literal["raw", "ema"]
    settings: Sample
    labels: Labels
    seed: int
    precision: str = "fp32"
    compile: str = "auto"


@dataclass(frozen=True)
class Artist:
    """A frozen model with its decoder."""

    wanted: Wanted
    model: SiT
    step: int
    decode: pictures.Decode
    vae: str
    compiled: bool

    def draw(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples number first … first + count − 1 as uint8 images (count, 1 or 3, H, W), and labels, on the CPU."""
        draw = draw_of(self.wanted.labels, self.wanted.seed, first, count, self.model.pos_embed.device)
        latents = sample(self.model, draw, self.wanted.settings, self.wanted.recipe.flow.path)
        return self.decode(latents).cpu(), draw.labels.cpu()

    def settings(self) -> Settings:
        """What a set of this model's samples follows from."""
        wanted, drawn = self.wanted, self.wanted.settings
        return Settings(
            stage=wanted.stage, step=self.step, weights=wanted.weights, model_sha256=vae_hash(self.model),
            vae=self.vae, path=wanted.recipe.flow.path, sampler=drawn.sampler, steps=drawn.steps,
            cfg_scale=drawn.cfg_scale, cfg_range=drawn.cfg_range, labels=wanted.labels.text,
            num_classes=wanted.labels.num_classes, seed=wanted.seed, num=drawn.num,
            batch_size=min(drawn.batch_size, drawn.num), precision=wanted.precision, compiled=self.compiled,
        )  # fmt: skip


def load_artist(wanted: Wanted, ranks: Ranks, say: Callable[[str], None]) -> Artist:
    """The stage's newest weights on every rank, with kernels and attention that work here; UserError without any."""
    recipe, device, dtype = wanted.recipe, ranks.device, DTYPES[wanted.precision]
    root = wanted.run / wanted.stage / "checkpoints"
    table = validated_kernels(vars(recipe.kernels), recipe.model, ranks, dtype, say)
    attend = choose(recipe.model.attention, device, dtype, recipe.model.width // recipe.model.heads, say)
    model = teacher.load_frozen(root, recipe.model, wanted.weights, table, device, dtype, attend)
    newest = checkpoint.latest(root, say, groups=())
    compiled = wanted.compile == "on" or (wanted.compile == "auto" and device.type == "cuda")
    if compiled:
        model.run_block = CompiledBlocks(say, dynamic=False)
    data = Path(recipe.data.path)
    manifest = read_any_manifest(data)
    decode = pictures.decoder(data, manifest, device)
    vae = f"{manifest.vae.name} {manifest.vae.hash[:16]}".strip()
    return Artist(wanted, model, newest.step if newest else 0, decode, vae, compiled)


def draw_set(
    artist: Artist, folder: Path, pngs: bool, ranks: Ranks, stop: StopRequest, say: Callable[[str], None]
) -> Path:
    """Draws the set into `folder`, or what is missing of it, and returns its `samples.npz`.

    With `pngs` also a folder of single images. Interrupted after a signal, with all finished batches kept; UserError
    if the folder holds samples drawn with other settings.
    """
    parts, whole = Parts(folder, artist.settings()), folder / "samples.npz"
    if ranks.broadcast_from_rank0(lambda: parts.settings.model_sha256) != parts.settings.model_sha256:
        raise UserError(f"{artist.wanted.run}: a new checkpoint was written while the ranks started; start them again")
    ranks.broadcast_from_rank0(parts.begin)
    if not ranks.broadcast_from_rank0(whole.exists):
        _draw_missing(artist, parts, ranks, stop)
        if pngs:
            for batch in range(ranks.rank, parts.settings.batches, ranks.count):
                write_pngs(folder / "png", batch * parts.settings.batch_size, parts.get(batch)[0])
        ranks.barrier()
        if ranks.first:
            first = parts.get(0)[0]
            shape = (first.shape[1], first.shape[2], first.shape[3])
            write_npz(whole, shape, parts.blocks(), parts.all_labels())
    elif ranks.first:
        say(f"{whole}: complete already")
        if pngs:
            number = 0
            for block in open_npz(whole).blocks():
                write_pngs(folder / "png", number, block)
                number += len(block)
    if ranks.first:
        save_grid(next(open_npz(whole).blocks(GRID_IMAGES)), folder / "grid.png")
        parts.drop()
    ranks.barrier()
    return whole


def save_grid(images: np.ndarray, path: Path) -> None:
    """A picture of images (n, H, W, 3)."""
    pictures.save_png(pictures.grid(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), GRID_COLUMNS), path)


def _draw_missing(artist: Artist, parts: Parts, ranks: Ranks, stop: StopRequest) -> None:
    """Draws this rank's share of the batches that are not there yet."""
    settings = parts.settings
    missing = ranks.broadcast_from_rank0(parts.missing)
    kept = (settings.batches - len(missing)) * settings.batch_size
    total = settings.batches * settings.batch_size
    with bar(None, "drawing", total, "image", done=kept, hidden=not ranks.first) as progress:
        for batch in missing[ranks.rank :: ranks.count]:
            parts.put(batch, *artist.draw(batch * settings.batch_size, settings.batch_size))
            progress.update(total - len(parts.missing()) * settings.batch_size - progress.n)
            if stop:
                left = len(parts.missing())
                kept_batches = f"{settings.batches - left} of {settings.batches} batches are kept in {parts.folder}"
                raise Interrupted(f"{stop.name}: {kept_batches}; the same command continues")
    ranks.barrier()


def with_sampling(recipe: Recipe, chosen: dict[str, object]) -> Sample:
    """The recipe's sampling settings with those chosen instead; UserError for values that can't be."""
    settings = replace(recipe.sample, **{key: value for key, value in chosen.items() if value is not None})  # type: ignore[arg-type]
    for key in ("num", "batch_size", "steps"):
        if getattr(settings, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} {getattr(settings, key)}: at least 1")
    low, high = settings.cfg_range
    if not 0 <= low <= high <= 1:
        raise UserError(f"--cfg-range {low} {high}: 0 ≤ LOW ≤ HIGH ≤ 1")
    if settings.cfg_scale != 1.0 and recipe.model.class_dropout == 0:
        raise UserError(f"--cfg-scale {settings.cfg_scale}: the model has no null class (model.class_dropout = 0)")
    return settings
