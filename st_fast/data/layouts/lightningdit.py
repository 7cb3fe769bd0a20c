"""LightningDiT's latents: *.safetensors with `latents`, `latents_flip` and `labels`, and latents_stats.pt beside them.

A latent was drawn once from the VAE's posterior, for the image and for the mirrored image, unscaled. The model's is
(z - mean) / std of latents_stats.pt, times a `latent_multiplier` that only its recipes say, 1 with VA-VAE (arXiv
2501.01423, extract_features.py and datasets/img_latent_dataset.py).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from st_fast.core.files import BadFile, Entry, open_regular, read_header, shown
from st_fast.core.torch_files import read_pickled
from st_fast.data.labels import MAX_CLASSES
from st_fast.data.layouts.records import (
    LATENT,
    ForeignRecords,
    check_labels,
    made_manifest,
    read_span,
    short_digest,
)
from st_fast.data.manifest import VaeInfo

STATS = "latents_stats.pt"
STATS_BYTES = 2**24
VAE, CHANNELS, FACTOR = "hustvl/vavae-imagenet256-f16d32-dinov2", 32, 16
"""The VAE of LightningDiT's recipes, which is taken to have made latents of so many channels."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
VIEWS = ("latents", "latents_flip")
NEEDED = (*VIEWS, "labels")


def is_lightningdit(folder: Path, names: list[str]) -> bool:
    """Whether a folder with these files is LightningDiT's; `BadFile` where only its statistics are missing."""
    shard = next((name for name in sorted(names) if name.endswith(".safetensors")), None)
    if shard is None:
        if STATS in names:
            raise BadFile(f"{folder}: {STATS} of LightningDiT, but no *.safetensors with latents beside it")
        return False
    found = read_header(folder / shard)
    if not {"latents", "latents_flip"} & found.keys():
        return False
    if not (folder / STATS).is_file():
        raise BadFile(
            f"{folder}: LightningDiT's latents without {STATS}, the mean and std of their channels; its "
            "extract_features.py writes that at its end, and its training where it is missing"
        )
    return True


class LightningSet(ForeignRecords):
    """The records: 2i is image i, 2i + 1 the mirrored image i, in the order of file names."""

    kind = LATENT
    scale_of = "project"
    usual = f"LightningDiT's own makes {CHANNELS}"

    def __init__(self, folder: Path, threads: int = 4) -> None:
        self.folder = Path(folder)
        self.names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        self._layouts = [self._layout(name) for name in self.names]
        shape = self._layouts[0]["latents"].shape[1:]
        if odd := [number for number, layout in enumerate(self._layouts) if layout["latents"].shape[1:] != shape]:
            found = self._layouts[odd[0]]["latents"].shape[1:]
            raise BadFile(
                f"{self.folder / self.names[odd[0]]}: latents of {shown(found)}, those of {self.names[0]} are "
                f"{shown(shape)}"
            )
        counts = [layout["labels"].shape[0] for layout in self._layouts]
        self._starts = np.cumsum([0, *counts])
        labels = np.concatenate([self._labels(number) for number in range(len(self.names))])
        self.labels = np.repeat(labels, 2)
        mean, std = self._stats(shape[0])
        digest = short_digest((f"{name} {count}\n".encode() for name, count in zip(self.names, counts, strict=True)))
        self.manifest = made_manifest(
            self.folder / STATS,
            count=len(self.labels),
            shape=(shape[0], shape[1], shape[2]),
            dtype="float32",
            scale=1.0,
            vae=VaeInfo(VAE if shape[0] == CHANNELS else "", factor=FACTOR if shape[0] == CHANNELS else 0),
            source=f"LightningDiT's layout, files and labels {short_digest([digest.encode(), labels.tobytes()])}",
            num_classes=int(labels.max()) + 1,
            flip=True,
            shift=0.0,
            latents_mean=mean,
            latents_std=std,
            posterior="mean",
        )
        self.open_files(self.folder, threads)

    def watched(self) -> list[str]:
        """The shards and the statistics."""
        return [*self.names, STATS]

    def where(self, index: int) -> str:
        """A record's file and place in it."""
        number, row = self._place(index)
        return f"{self.folder / self.names[number]}: {VIEWS[index % 2]}[{row}]"

    def read_stored(self, index: int, row: np.ndarray) -> None:
        """Reads one latent (C, H, W)."""
        number, at = self._place(index)
        entry, path = self._layouts[number][VIEWS[index % 2]], self.folder / self.names[number]
        stored = torch.empty(row.shape, dtype=FLOATS[entry.dtype])
        with open_regular(path) as file:
            size = stored.numel() * stored.element_size()
            read_span(file, entry.start + at * size, stored.view(torch.uint8).numpy(), path)
        row[:] = stored.float().numpy()

    def _place(self, index: int) -> tuple[int, int]:
        """A record's file by number, and its row there."""
        image = index // 2
        number = int(np.searchsorted(self._starts, image, side="right")) - 1
        return number, image - int(self._starts[number])

    def _layout(self, name: str) -> dict[str, Entry]:
        """The places of a file's tensors; `BadFile` where one is missing or they do not fit each other."""
        path = self.folder / name
        layout = read_header(path)
        if missing := [key for key in NEEDED if key not in layout]:
            raise BadFile(f"{path}: no {missing[0]} in it; LightningDiT's files have {', '.join(NEEDED)}")
        first, flip, labels = (layout[key] for key in NEEDED)
        shape = first.shape
        if len(shape) != 4 or not all(shape) or first.dtype not in FLOATS:
            raise BadFile(f"{path}: latents: {first.dtype} {shown(shape)}; {', '.join(FLOATS)} (N, C, H, W) is needed")
        if (flip.shape, flip.dtype) != (shape, first.dtype) or labels.shape != shape[:1] or labels.dtype != "I64":
            found = ", ".join(f"{key} {layout[key].dtype} {shown(layout[key].shape)}" for key in NEEDED)
            raise BadFile(f"{path}: {found}; these do not fit each other")
        return layout

    def _labels(self, number: int) -> np.ndarray:
        """(n,) int64 of one file."""
        entry, path = self._layouts[number]["labels"], self.folder / self.names[number]
        labels = np.empty(entry.shape, np.int64)
        with open_regular(path) as file:
            read_span(file, entry.start, labels, path)
        check_labels(labels, MAX_CLASSES, lambda row: f"{path}: labels[{row}]")
        return labels

    def _stats(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of each channel."""
        path = self.folder / STATS
        if (size := path.stat().st_size) > STATS_BYTES:
            raise BadFile(f"{path}: {size} bytes, at most {STATS_BYTES} are allowed")
        content: Any = read_pickled(path)
        found = []
        for key in ("mean", "std"):
            value = content.get(key) if isinstance(content, dict) else None
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise BadFile(f"{path}: no tensor {key} in it; mean and std (1, C, 1, 1) are needed")
            if value.numel() != channels or math.prod(value.shape) != max(value.shape):
                raise BadFile(f"{path}: {key} is {shown(tuple(value.shape))}; the latents have {channels} channels")
            found.append(tuple(value.double().flatten().tolist()))
        return found[0], found[1]
