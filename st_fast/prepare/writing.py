"""Writes latents as shards: each is complete or absent, and remembers a CRC of every record."""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save as to_safetensors
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import make_folder, read_json, write_atomic, write_json_atomic
from st_fast.core.records import record_from
from st_fast.data.manifest import Manifest, ShardEntry, labels_problem, moments_problem, write_manifest

SHARD_SIZE = 8_192
"""Records a shard: 134 MB at 8×32×32 in fp16."""


def record_crcs(moments: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) uint32: CRC-32 of each record's bytes, started from its label so that this is covered too."""
    rows = np.ascontiguousarray(moments).reshape(len(moments), -1).view(np.uint8)
    starts = (labels & 0xFFFFFFFF).tolist()
    return np.array([zlib.crc32(row.data, start) for row, start in zip(rows, starts, strict=True)], np.uint32)


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"latents-{number:05d}.safetensors"


def write_shard(path: Path, moments: np.ndarray, labels: np.ndarray, manifest: Manifest) -> ShardEntry:
    """Writes one shard of a set aside, fsyncs and renames it. UserError for content that no reader would accept.

    moments (n, *manifest.shape) float16 or float32; labels (n,) int64. OSError on a full disk, with nothing left
    behind.
    """
    for problem in (moments_problem(moments, manifest.posterior), labels_problem(labels, manifest.num_classes)):
        if problem:
            why = "; float16 holds 65,504 at most: are they divided by too small a std?"
            told = problem[1] + (why if manifest.dtype == "float16" and "Inf" in problem[1] else "")
            raise UserError(f"{path.name}: record {problem[0]} of this shard: {told}")
    return write_tensors(path, {"moments": moments, "labels": labels, "crc32": record_crcs(moments, labels)})


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> ShardEntry:
    """Writes tensors with one row a record as a safetensors file, complete or absent. OSError on a full disk."""
    data = to_safetensors({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    write_atomic(path, data)
    return ShardEntry(path.name, len(tensors["crc32"]), len(data), hashlib.sha256(data).hexdigest())


def write_noted(note: Path, tensors: dict[str, np.ndarray]) -> None:
    """`write_tensors` beside a note of its content, by which `finished` knows it. OSError on a full disk."""
    write_json_atomic(note, asdict(write_tensors(note.with_suffix(".safetensors"), tensors)))


def finished(note: Path) -> ShardEntry | None:
    """The shard that a note describes, where it is there and of its size; None where it is to be made, or again."""
    if not note.is_file():
        return None
    entry, shard = record_from(ShardEntry, read_json(note), str(note)), note.with_suffix(".safetensors")
    return entry if shard.is_file() and shard.stat().st_size == entry.bytes else None


def all_finished(notes: Sequence[Path]) -> tuple[ShardEntry, ...]:
    """The shards of all notes; none while one of them is to be made."""
    entries = tuple(entry for note in notes if (entry := finished(note)))
    return entries if len(entries) == len(notes) else ()


def write_shards(
    folder: Path, batches: Iterable[tuple[Tensor, Tensor]], manifest: Manifest, shard_size: int = SHARD_SIZE
) -> Manifest:
    """Writes batches of (moments (n, 2C, H, W), labels (n,)) as shards plus manifest.json; returns the full manifest.

    `manifest` says shape, dtype, scale, VAE, source and classes; its count and shards are filled in here.
    """
    make_folder(folder)
    entries = [
        write_shard(folder / shard_name(number), moments, labels, manifest)
        for number, (moments, labels) in enumerate(_regrouped(batches, manifest, shard_size))
    ]
    full = replace(manifest, count=sum(entry.count for entry in entries), shards=tuple(entries))
    write_manifest(folder, full)
    return full


def _regrouped(
    batches: Iterable[tuple[Tensor, Tensor]], manifest: Manifest, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of any size → arrays of exactly `size` records, the last one shorter."""
    dtype = getattr(torch, manifest.dtype)
    moments, labels = torch.empty(0, *manifest.shape, dtype=dtype), torch.empty(0, dtype=torch.int64)
    for more_moments, more_labels in batches:
        moments = torch.cat((moments, more_moments.detach().cpu().to(dtype)))
        labels = torch.cat((labels, more_labels.cpu().to(torch.int64)))
        while len(moments) >= size:
            yield moments[:size].numpy(), labels[:size].numpy()
            moments, labels = moments[size:], labels[size:]
    if len(moments):
        yield moments.numpy(), labels.numpy()
