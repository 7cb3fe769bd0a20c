"""U-ViT's folders of COCO, read in place: moments and the states of captions as numbered .npy files.

`{i}.npy` holds the moments (2C, H, W) of image i, `{i}_{k}.npy` the states (L, W) of its caption k by CLIP, line k of
`{i}.txt` that caption, where there are such files, and empty_context.npy, in the folder or above it, the states of the
empty caption (arXiv 2209.12152, scripts/extract_*). REPA's and Self-Transcendence's scripts write the same names, but
U-ViT's and REPA's moments are (mean, log-variance), Self-Transcendence's (mean, std): the sign tells them apart.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from st_fast.core.files import BadFile, open_regular, read_bytes, shown
from st_fast.core.limits import npy_header
from st_fast.data.ahead import FilesIdentity, nothing
from st_fast.data.captions import cleaned, text_lines
from st_fast.data.layouts.npy import NpyRecords, read_npy_header, read_npy_into
from st_fast.data.layouts.records import CONVERT, LOG_VARIANCE, SD_SCALE
from st_fast.data.manifest import DTYPES, FILE_NAME, Manifest, VaeInfo

ENCODER = "openai/clip-vit-large-patch14"
"""Whose states these are, with all 77 tokens and without attention mask."""
VAE = "sd-vae-ft-ema"
"""What REPA and Self-Transcendence decode these latents with, scaled by 0.18215; U-ViT's own scale is 0.23010."""
EMPTY = "empty_context.npy"


def is_coco(folder: Path) -> bool:
    """Whether a folder of latents is read as U-ViT's layout; a manifest of ours beside it is what counts."""
    return all((Path(folder) / f"{name}.npy").is_file() for name in ("0", "0_0")) and not os.path.lexists(
        Path(folder) / FILE_NAME
    )


class CocoSet(NpyRecords):
    """The records of a folder in U-ViT's layout, by number, always as (mean, std). They are of one class.

    The digest covers the numbers of images and captions; `files` the moments' and the states' files.
    """

    def __init__(self, folder: Path, threads: int = 8) -> None:
        self.folder = Path(folder)
        self.counts = self._counts()
        """(records,) int64: captions of each image."""
        self.first = 1 + np.cumsum(self.counts) - self.counts
        """(records,) int64: the row of each image's first caption; row 0 is the empty caption."""
        self.names, self.labels = [f"{i}.npy" for i in range(len(self.counts))], np.zeros(len(self.counts), np.int64)
        shape, dtype = read_npy_header(self.folder / "0.npy")[:2]
        digest = hashlib.sha256(self.counts.tobytes()).hexdigest()
        self.manifest = Manifest(
            len(self.counts), shape, dtype, SD_SCALE, VaeInfo(VAE), f"U-ViT's layout, captions' numbers {digest}", 1
        )
        self.open_files(self.folder, threads)
        self.settle_kind()

    def _counts(self) -> np.ndarray:
        """(records,) captions of each image; `BadFile` names the first file that is missing in the numbering."""
        found: dict[int, set[int]] = {}
        images = set[int]()
        for name in os.listdir(self.folder):
            if match := re.fullmatch(r"(0|[1-9]\d{0,8})(?:_(0|[1-9]\d{0,4}))?\.npy", name):
                image = int(match[1])
                if match[2] is None:
                    images.add(image)
                else:
                    found.setdefault(image, set()).add(int(match[2]))
        count = 1 + max(images | set(found), default=-1)
        for image in range(count):
            captions = found.get(image, set())
            if image not in images:
                raise BadFile(f"{self.folder / f'{image}.npy'}: missing, with {len(images)} images in the folder")
            if len(captions) != 1 + max(captions, default=0):
                lacks = next(k for k in range(len(captions) + 1) if k not in captions)
                raise BadFile(
                    f"{self.folder / f'{image}_{lacks}.npy'}: missing, the states of a caption of {image}.npy"
                )
        return np.array([len(found[image]) for image in range(count)], np.int64)

    def watched(self) -> list[str]:
        """The moments' files, and those of the states."""
        states = (f"{image}_{k}.npy" for image, count in enumerate(self.counts.tolist()) for k in range(count))
        return [*self.names, os.path.relpath(self.state_file(0), self.folder), *states]

    def verify(self, beat: Callable[[], None] = nothing) -> None:
        """As of every layout of single files, the states' among them."""
        super().verify(beat)
        content, (layout, dtype) = hashlib.sha256(self.files.content.encode()), self.states_layout()
        for start in range(0, rows := 1 + int(self.counts.sum()), 256):
            beat()
            block = np.empty((min(256, rows - start), *layout), dtype)
            for _ in self._pool.map(self.read_states, range(start, start + len(block)), block):
                pass
            content.update(block.tobytes())
        self._files = FilesIdentity(self.files.stat, content.hexdigest())

    def refuse_in_place(self) -> None:
        """`BadFile`, with the remedy, where the files have the log-variance."""
        if self.kind == LOG_VARIANCE:
            raise BadFile(
                f"{self.folder}: (mean, log-variance) found, as U-ViT's and REPA's scripts write it; (mean, std) is "
                f"needed: {CONVERT} {self.folder} OUT converts it"
            )

    def captions(self) -> list[list[str]]:
        """The captions of each image; empty ones where there are no .txt files. `BadFile` where one lacks lines."""
        if not (self.folder / "0.txt").is_file():
            return [[""] * count for count in self.counts.tolist()]
        lines = []
        for image, count in enumerate(self.counts.tolist()):
            content = text_lines(read_bytes(path := self.folder / f"{image}.txt"))
            if len(content) != count:
                raise BadFile(f"{path}: {len(content)} lines, but there are states of {count} captions")
            lines.append([" ".join(cleaned(line)) for line in content])
        return lines

    def state_file(self, row: int) -> Path:
        """Where the states of caption number `row` lie."""
        if not row:
            return self.folder / EMPTY if (self.folder / EMPTY).is_file() else self.folder.parent / EMPTY
        image = int(np.searchsorted(self.first, row, side="right")) - 1
        return self.folder / f"{image}_{row - int(self.first[image])}.npy"

    def states_layout(self) -> tuple[tuple[int, int], str]:
        """((L, W), dtype) of the empty caption's states; `BadFile` where these are missing, or no such array."""
        path = self.state_file(0)
        with open_regular(path) as file:
            found = npy_header(file, path)
        if found.dtype.name not in DTYPES or len(found.shape) != 2 or not all(found.shape):
            raise BadFile(f"{path}: {found.dtype} {shown(found.shape)}; float16 or float32 (L, W) is needed")
        return (found.shape[0], found.shape[1]), found.dtype.name

    def read_states(self, row: int, out: np.ndarray) -> None:
        """Reads the states of caption number `row` into out (L, W); `BadFile` names a bad file."""
        read_npy_into(path := self.state_file(row), out.shape, out.dtype.name, out)
        if not np.isfinite(out).all():
            raise BadFile(f"{path}: NaN or Inf")
