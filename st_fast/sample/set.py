"""A set of samples in a folder, drawn batch by batch by any number of ranks.

`sample.json` holds the settings, `parts/<batch>.safetensors` the images and labels of each finished batch until
`samples.npz` (ADM's layout) holds them all; its SHA-256 is then beside the settings, so that another file in its place
is known. There also lie `grid.png` and, if asked for, `png/<number>.png`. Which samples share a batch follows from
their numbers alone and one rank draws a whole batch, so the number of ranks changes no image (and no bit where each
rank computes with as many threads).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from st_fast.core.comparison import check_same, differences, place_for, short_digest
from st_fast.core.errors import Interrupted, Stopped, UserError
from st_fast.core.files import (
    BadFile,
    make_folder,
    read_bytes,
    read_json,
    sha256_file,
    shown,
    write_atomic,
    write_json_atomic,
)
from st_fast.core.limits import Zip, npy_header
from st_fast.core.progress import bar
from st_fast.core.ranks import Ranks
from st_fast.core.writing import whole_file
from st_fast.model.vae import tensors_hash, vae_hash
from st_fast.sample.model import Sampler
from st_fast.sample.previews import GRID_IMAGES, grid, save_png

FORMAT = "st_fast.samples/1"
SETTINGS = "sample.json"
SAMPLES = "samples.npz"
SHA256 = "samples_sha256"
"""The key of SETTINGS with the SHA-256 of the finished SAMPLES; no setting, and not there in sets of older versions."""
PROMPTS_LISTED, PROMPT_LISTED = 100, 1_000
"""Prompts that stand in SETTINGS itself, and characters of each; a picture's settings have to fit into it."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date of a zip's entries, so that the same samples make the same bytes."""

Images = NDArray[np.uint8]
"""(n, H, W, 3)."""


def draw_set(sampler: Sampler, out: Path | None, pngs: bool, ranks: Ranks, say: Callable[[str], None]) -> Path:
    """Draws the set into `out`, or what is missing of it, and returns its `samples.npz`.

    Without `out` it goes where its stage's sets are, beside those of other weights or settings. With `pngs` also a
    folder of single images. Interrupted after a signal, with all finished batches kept; UserError if `out` holds
    samples drawn with other settings, or a `samples.npz` that is not the one that was drawn there.
    """
    settings = settings_of(sampler)
    sha256 = settings["model_sha256"]
    if ranks.broadcast_from_rank0(lambda: sha256) != sha256:
        raise UserError(
            f"{sampler.request.source.path}: a new checkpoint was written while the ranks started; start them again"
        )
    folder = out or ranks.broadcast_from_rank0(lambda: own_folder(sampler.request.set_folder, settings))
    found, whole = SampleSet(folder, settings), folder / SAMPLES
    ranks.broadcast_from_rank0(found.begin)
    if not ranks.broadcast_from_rank0(found.is_whole):
        try:
            _draw_missing(sampler, found, ranks)
        except Stopped as stopped:
            there = found.batches - len(found.missing())
            kept = f"{there} of {found.batches} batches are kept in {folder}"
            raise Interrupted(f"{stopped}: {kept}; the same command continues") from None
        if ranks.first:
            labels = np.concatenate([found.get(batch)[1] for batch in range(found.batches)])
            blocks = (found.get(batch)[0] for batch in range(found.batches))
            write_npz(whole, found.get(0)[0].shape[1:], blocks, labels)
            found.finish()
    else:
        say(f"{whole}: complete already")
    ranks.barrier()
    if pngs:
        for number, block in enumerate(open_npz(whole).blocks(GRID_IMAGES)):
            if number % ranks.count == ranks.rank:
                write_pngs(folder / "png", number * GRID_IMAGES, block)
    if ranks.first:
        images = next(open_npz(whole).blocks(GRID_IMAGES))
        save_png(grid(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())), folder / "grid.png")
        shutil.rmtree(folder / "parts", ignore_errors=True)
    ranks.barrier()
    return whole


def _draw_missing(sampler: Sampler, found: SampleSet, ranks: Ranks) -> None:
    """Draws this rank's share of the batches that are not there yet."""
    missing = ranks.broadcast_from_rank0(found.missing)
    kept, total = (found.batches - len(missing)) * found.batch_size, found.batches * found.batch_size
    with bar(None, "drawing", total, "image", done=kept, hidden=not ranks.first) as progress:
        for batch in missing[ranks.rank :: ranks.count]:
            found.put(batch, *sampler.images(batch * found.batch_size, found.batch_size))
            progress.update(total - len(found.missing()) * found.batch_size - progress.n)
    ranks.barrier()


def settings_of(sampler: Sampler) -> dict[str, Any]:
    """All that a set's images follow from: two sets with equal settings have equal images, on equal machines."""
    request, settings = sampler.request, asdict(sampler.request.settings)
    del settings["every"], settings["prompts"], settings["text_encoder"], settings["contrast"]
    if settings["shift"] == 1.0:
        del settings["shift"]
    if settings["guidance"] == "cfg":
        del settings["guidance"]
    if settings["internal_guidance"] == 1.0:  # as sets of older versions have it
        del settings["internal_guidance"], settings["internal_range"]
    return settings | {
        "stage": request.source.stage, "step": sampler.step, "weights": request.weights,
        "model_sha256": vae_hash(sampler.model), "vae": sampler.vae, "path": request.recipe.flow.path,
        "labels": request.labels.text, "num_classes": request.labels.num_classes, "seed": request.seed,
        "batch_size": min(settings["batch_size"], settings["num"]), "precision": request.precision,
        "compiled": sampler.compiled,
    } | _beside(sampler) | ({"latent_shape": list(sampler.shape)} if sampler.shape else {})  # fmt: skip


def _beside(sampler: Sampler) -> dict[str, Any]:
    """What else a set's images follow from: stage 1's head, where it guides, texts, and a contrast's correction."""
    head = sampler.head
    guide = {} if head is None else {"internal_block": head.block, "internal_sha256": vae_hash(head.module)}
    return guide | _texts(sampler) | _correction(sampler)


def _texts(sampler: Sampler) -> dict[str, Any]:
    """What a set's images follow from, of a network that draws from text."""
    if sampler.prompts is None:
        return {}
    texts, negative = sampler.prompts.texts, sampler.request.text.negative
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
    read = {"states": sampler.prompts.source} if sampler.prompts.source else {}
    return {
        "prompts": [text[:PROMPT_LISTED] for text in texts[:PROMPTS_LISTED]],
        "prompts_sha256": digest,
        "negative": negative,
    } | read


def _correction(sampler: Sampler) -> dict[str, Any]:
    """What a set's images follow from, of a model that was trained with a contrast."""
    made = sampler.correction
    if made is None:
        return {}
    mean = {"mean_latent_sha256": tensors_hash({"mean_latent": made.mean.cpu()})}
    return {"contrast": made.how, "contrast_weight": made.weight, "contrast_null": made.null} | mean


def own_folder(usual: Path, settings: dict[str, Any]) -> Path:
    """The folder `usual`, or where that holds anything but this set, one that names its step, weights and seed."""

    def same(folder: Path) -> bool:
        try:
            return not differences(read_settings(folder), {"format": FORMAT} | settings)
        except BadFile:
            return False

    what = f"{settings['weights']}-step{settings['step']}-seed{settings['seed']}-{short_digest(settings)}"
    return place_for(usual, usual.with_name(f"{usual.name}-{what}"), same)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a folder's samples were drawn with; `BadFile` if it holds none."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[dict[str, Any], Any]:
    """The settings, and the SHA-256 of the samples drawn with them (None: not known)."""
    found = read_json(folder / SETTINGS)
    if found.get("format") != FORMAT:
        raise BadFile(f"{folder / SETTINGS}: format is {found.get('format')!r}; this program reads {FORMAT!r}")
    sha256 = found.pop(SHA256, None)
    return found, sha256


class SampleSet:
    """The batches of a set in its folder; the last is as large as the others, and samples above `num` are not used."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.num, self.batch_size = int(settings["num"]), int(settings["batch_size"])
        self.batches = -(-self.num // self.batch_size)

    def begin(self) -> None:
        """Writes the settings, or UserError naming those in which the samples that are there differ."""
        if (self.folder / SETTINGS).exists():
            there, asked = read_settings(self.folder), {"format": FORMAT} | self.settings
            check_same(there, asked, f"{self.folder}: holds samples drawn with", "choose another --out")
            return
        killed = f"{SETTINGS}.partial-"  # before the settings had their name
        if self.folder.is_dir() and any(not path.name.startswith(killed) for path in self.folder.iterdir()):
            raise UserError(f"{self.folder}: holds other files and no {SETTINGS}; choose another --out")
        make_folder(self.folder)
        write_json_atomic(self.folder / SETTINGS, {"format": FORMAT} | self.settings)

    def is_whole(self) -> bool:
        """Whether the finished samples are there; `BadFile` if the file is not the one that was drawn here."""
        path, (settings, kept) = self.folder / SAMPLES, _read(self.folder)
        if not path.exists():
            if kept is not None:  # of a file that was removed; what is drawn now may differ in a bit
                write_json_atomic(self.folder / SETTINGS, settings)
            return False
        if kept is not None and (found := sha256_file(path)) != kept:
            raise BadFile(
                f"{path}: SHA-256 {found[:12]}…, {SETTINGS} has {shown(str(kept)[:12])}…: not the samples that were "
                "drawn here; remove it, and the same command draws it again"
            )
        return True

    def finish(self) -> None:
        """Keeps the SHA-256 of the samples, now that they are all there."""
        settings, sha256 = read_settings(self.folder), sha256_file(self.folder / SAMPLES)
        write_json_atomic(self.folder / SETTINGS, settings | {SHA256: sha256})

    def _file(self, batch: int) -> Path:
        return self.folder / "parts" / f"{batch:06d}.safetensors"

    def missing(self) -> list[int]:
        """The batches that are still to be drawn."""
        return [batch for batch in range(self.batches) if not self._file(batch).exists()]

    def put(self, batch: int, images: Tensor, labels: Tensor) -> None:
        """Keeps a batch: uint8 images (B, 1 or 3, H, W) and labels (B,); after a crash it is there or not there."""
        make_folder(self.folder / "parts")
        write_atomic(self._file(batch), save({"images": images.contiguous(), "labels": labels.contiguous()}))

    def get(self, batch: int) -> tuple[Images, NDArray[np.int64]]:
        """Images (n, H, W, 3) and labels (n,) of a batch, none above `num`; `BadFile` if it is damaged."""
        size, path = self.batch_size, self._file(batch)
        try:
            found = load(read_bytes(path))
            images, labels = found["images"], found["labels"]
        except (BadFile, SafetensorError, KeyError) as error:
            raise BadFile(f"{path}: damaged ({error}); remove it, and the same command draws it again") from None
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != size or labels.shape != (size,):
            raise BadFile(f"{path}: not a batch of {size} images; remove it, and the same command draws it again")
        count = min(size, self.num - batch * size)
        return three_channels(images[:count].numpy()), labels[:count].numpy()


def three_channels(images: NDArray[np.uint8]) -> Images:
    """uint8 (n, 1 or 3, H, W) → (n, H, W, 3): grey three times."""
    last = images.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(last if last.shape[-1] == 3 else last.repeat(3, axis=-1))


def write_npz(path: Path, shape: tuple[int, ...], blocks: Iterable[Images], labels: NDArray[np.int64]) -> None:
    """ADM's sample file: arr_0 uint8 (N, H, W, 3) and arr_1 the labels (N,), N as many as labels.

    `blocks` yields the images of shape (H, W, 3) a block at a time, so that memory stays flat. The file appears under
    its name when it is whole. ValueError if the blocks hold more or fewer than N images, RunFailed on a full disk.
    """
    done = 0
    with whole_file(path) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for block in blocks:
                    done += len(block)
                    file.write(np.ascontiguousarray(block).data)
            with archive.open(zipfile.ZipInfo("arr_1.npy", EPOCH), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, labels, allow_pickle=False)
        if done != len(labels):
            raise ValueError(f"{path}: {done} images for {len(labels)} labels")
        with partial.open("rb+") as whole:
            os.fsync(whole.fileno())


@dataclass(frozen=True)
class ImageFile:
    """The images of an ADM `.npz`, of which `blocks` holds a few at a time in memory."""

    path: Path
    count: int
    shape: tuple[int, int, int]
    labels: NDArray[np.int64] | None

    def blocks(self, size: int = 256) -> Iterator[Images]:
        """Up to `size` images (n, H, W, 3) at a time, in order; `BadFile` where the file ends early."""
        row = int(np.prod(self.shape))
        with Zip(self.path) as archive, archive.reading(archive.getinfo("arr_0.npy")) as file:
            npy_header(file, self.path)
            for first in range(0, self.count, size):
                count = min(size, self.count - first)
                data = file.read(count * row)
                if len(data) != count * row:
                    raise BadFile(f"{self.path}: arr_0 ends after {first + len(data) // row} of {self.count} images")
                yield np.frombuffer(data, np.uint8).reshape(count, *self.shape)


def open_npz(path: Path) -> ImageFile:
    """Checks a file as `write_npz` and ADM's programs write it; `BadFile` in one line if it is none."""
    with Zip(path) as archive:
        if "arr_0.npy" not in archive.NameToInfo:
            there = ", ".join(map(shown, sorted(archive.namelist())[:5])) or "nothing"
            raise BadFile(f"{path}: no arr_0 (the images) in it, only {there}")
        info = archive.getinfo("arr_0.npy")
        with archive.reading(info) as file:
            shape, dtype, start, fortran = header = npy_header(file, f"{path}: arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape or fortran:
            order = " in Fortran order" if fortran else ""
            raise BadFile(f"{path}: arr_0 is {dtype} of shape {shown(shape)}{order}; uint8 (N, H, W, 3) is needed")
        if info.file_size != start + header.size:
            raise BadFile(f"{path}: arr_0 {shown(shape)} takes {header.size} bytes, {info.file_size - start} are there")
        labels = archive.array("arr_1", 2**7 + 8 * shape[0]) if "arr_1.npy" in archive.NameToInfo else None
    if labels is not None and labels.shape != (shape[0],):
        found = shown(labels.shape)
        raise BadFile(f"{path}: arr_1 has shape {found} for {shape[0]} images; one label an image is needed")
    if labels is not None:
        labels = labels.astype(np.int64) if np.issubdtype(labels.dtype, np.integer) else None
    return ImageFile(path, shape[0], (shape[1], shape[2], shape[3]), labels)


def write_pngs(folder: Path, first: int, images: Images) -> None:
    """`folder/000123.png` for each image (n, H, W, 3) from number `first` on; those already there stay."""
    make_folder(folder)
    for number, image in enumerate(images, start=first):
        path = folder / f"{number:06d}.png"
        if not path.exists():
            with whole_file(path) as partial:
                Image.fromarray(image).save(partial, "png")
