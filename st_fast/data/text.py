"""Captions beside the latents, and the states that a text encoder made of them, in shards of their own.

captions.jsonl has a line for each image, a JSON list of its captions. DATA/text/<encoder's last name>/ has the states:
row 0 is the empty caption's, which stands for no text; then come all captions, image by image. As with features, a
manifest.json names the encoder, the hash of its weights and the digest of the latents, and every row has a CRC.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, read_bytes, sha256_file, shown
from st_fast.data.ahead import RecordSet
from st_fast.data.layouts.coco import ENCODER, CocoSet, is_coco
from st_fast.data.manifest import FILE_NAME, ShardedSet, ShardEntry, parse_manifest
from st_fast.data.shards import CheckedRows

FORMAT = "st_fast.text"
FOLDER = "text"
CAPTIONS = "captions.jsonl"


@dataclass(frozen=True)
class TextManifest(ShardedSet):
    """What a folder of text states holds."""

    encoder: str
    hash: str
    """SHA-256 of the encoder's weights; "" where the states came without it."""
    shape: tuple[int, int, int]
    """(1, L, W): tokens of a caption, and the encoder's width."""
    mask: bool
    """Whether the encoder was told which tokens are padding, and their states are zero."""
    captions: str
    """SHA-256 of captions.jsonl."""
    latents: str
    """Digest of the latents' manifest."""
    count: int
    dtype: str = "float16"
    shards: tuple[ShardEntry, ...] = ()
    format: str = FORMAT
    version: int = 1

    @property
    def length(self) -> int:
        """L, tokens of a caption."""
        return self.shape[1]

    @property
    def width(self) -> int:
        """W, channels of a token's state."""
        return self.shape[2]

    def problem(self) -> str:
        """The first inconsistency, or ""."""
        return super().problem() or ("" if self.shape[0] == 1 else f"shape = {shown(self.shape)}: (1, L, W) is needed")


class TextSet(CheckedRows):
    """The states of all captions of a data folder, by row number. Open with `open_text`."""

    def __init__(self, folder: Path, manifest: TextManifest, counts: np.ndarray) -> None:
        super().__init__(folder, manifest, "states", ("crc32",))
        self.manifest = manifest
        self.counts = counts
        """(records,) int64: captions of each record."""
        self.first = 1 + np.cumsum(counts) - counts
        """(records,) int64: the row of each record's first caption."""

    @property
    def digest(self) -> str:
        """Changes with the states, the captions and the encoder."""
        return self.manifest.digest

    def rows_of(self, records: np.ndarray, share: np.ndarray) -> np.ndarray:
        """(n,) int64 rows: of each record (n,) the caption that `share` (n,) in [0, 1] picks of its captions."""
        counts = self.counts[records]
        return self.first[records] + np.minimum((share * counts).astype(np.int64), counts - 1)

    def states(self, rows: np.ndarray) -> Tensor:
        """(n, L, W) in the stored dtype: the states of rows (n,)."""
        out = torch.empty((len(rows), *self.manifest.shape), dtype=getattr(torch, self.manifest.dtype))
        self.read_into(rows, out.numpy())
        return out[:, 0]

    def null(self) -> Tensor:
        """(L, W): the states of the empty caption."""
        return self.states(np.zeros(1, np.int64))[0]

    def verify(self) -> None:
        """Compares every shard with its SHA-256; `BadFile` names the first that differs."""
        for shard in self.manifest.shards:
            if sha256_file(self.folder / shard.file) != shard.sha256:
                raise BadFile(
                    f"{self.folder / shard.file}: its SHA-256 isn't the manifest's: it was changed; remove it, and the "
                    "same prepare --text writes it again"
                )


class CocoText(TextSet):
    """The states of captions in U-ViT's layout, which lie in a file each; whole arrays, without CRCs."""

    def __init__(self, records: CocoSet, threads: int = 8) -> None:
        self.folder, self.records = records.folder, records
        self.manifest = _coco_manifest(records)
        self.counts, self.first, self.labels = records.counts, records.first, np.arange(self.manifest.count)
        self._pool = ThreadPoolExecutor(threads, "st_fast text")

    def __len__(self) -> int:
        return self.manifest.count

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads rows `indices` (n,) into out (n, 1, L, W) of the files' dtype. `BadFile` names a bad file."""
        for _ in self._pool.map(self.records.read_states, np.asarray(indices).tolist(), out[:, 0]):
            pass

    def verify(self) -> None:
        """Reads every file: shape, dtype, NaN and Inf."""
        for start in range(0, len(self), 256):
            self.states(np.arange(start, min(start + 256, len(self))))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)


def _coco_manifest(records: CocoSet) -> TextManifest:
    (length, width), dtype = records.states_layout()
    captions = hashlib.sha256(captions_bytes(records.captions())).hexdigest()
    shape, count = (1, length, width), 1 + int(records.counts.sum())
    return TextManifest(ENCODER, "", shape, False, captions, records.digest, count, dtype)


def captions_bytes(captions: Sequence[Sequence[str]]) -> bytes:
    """The content of captions.jsonl."""
    return b"".join(json.dumps(list(line), ensure_ascii=False).encode() + b"\n" for line in captions)


def read_captions(data: Path) -> tuple[list[list[str]], str]:
    """The captions of each image, and the SHA-256 of captions.jsonl. `BadFile` names the first line that is none."""
    path = data / CAPTIONS
    coco = is_coco(data)
    if not coco and data.is_file():
        raise BadFile(
            f"{data}: a data folder is needed, with {CAPTIONS}; a file with a caption a line is for --prompts"
        )
    if not coco and data.is_dir() and not path.exists():
        raise BadFile(f"{path}: missing; python -m st_fast.prepare IMAGES {data} --captions … writes it")
    content, lines = captions_bytes(CocoSet(data).captions()) if coco else read_bytes(path), []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            found = json.loads(line)
            json.dumps(found, ensure_ascii=False).encode()  # fails for half of a surrogate pair, which nothing can read
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
            raise BadFile(f"{path}: line {number}: {shown(line[:80])}: a JSON list of one caption or more is needed")
        lines.append(found)
    return lines, hashlib.sha256(content).hexdigest()


def text_folder(data: Path, encoder: str) -> Path:
    """The folder of an encoder's states, named by the last part of a hub name or by a folder's name."""
    return Path(data) / FOLDER / Path(encoder).name


def encoder_of(data: Path, encoder: str) -> str:
    """The encoder named, or with "" the only one whose states are there; UserError where there are none or several."""
    if encoder:
        return encoder
    found = sorted(path.parent.name for path in (Path(data) / FOLDER).glob(f"*/{FILE_NAME}"))
    if len(found) != 1:
        several = f"states of {', '.join(found)}: data.text must name one" if found else "no text states"
        raise UserError(
            f"{data}: {several}"
            + ("" if found else f"; write them with python -m st_fast.prepare --text ENCODER {data}")
        )
    return found[0]


def _lies_in_place(data: Path, encoder: str) -> bool:
    """Whether an encoder's states are those of U-ViT's layout."""
    return is_coco(data) and Path(encoder or ENCODER).name == Path(ENCODER).name


def read_text_manifest(data: Path, encoder: str) -> TextManifest:
    """The manifest of an encoder's states ("": of the only one); touches no shard."""
    if _lies_in_place(data, encoder):
        return _coco_manifest(CocoSet(data))
    encoder = encoder_of(data, encoder)
    folder = text_folder(data, encoder)
    if not (folder / FILE_NAME).is_file():
        raise UserError(
            f"{folder}: no complete text states of {encoder}; write them with "
            f"python -m st_fast.prepare --text {encoder} {data}"
        )
    return parse_manifest(TextManifest, folder / FILE_NAME)


def open_text(data: Path, encoder: str, records: RecordSet) -> TextSet:
    """The text states of these records by an encoder ("": by the only one).

    UserError if there are none, `BadFile` if they are of other latents or captions.
    """
    if _lies_in_place(data, encoder):
        return CocoText(records if isinstance(records, CocoSet) else CocoSet(data))
    manifest = read_text_manifest(data, encoder)
    folder = text_folder(data, encoder_of(data, encoder))
    captions, digest = read_captions(data)
    counts = np.array([len(line) for line in captions], np.int64)
    if records.manifest.flip:
        counts = counts.repeat(2)  # an image and its mirrored one share a line
    if len(counts) != len(records) or manifest.latents != records.digest:
        raise BadFile(
            f"{folder}: states of other records than the {len(records)} in {data}; remove the folder and write them "
            "again"
        )
    rows = 1 + sum(map(len, captions))
    if (manifest.captions, manifest.count) != (digest, rows):
        raise BadFile(
            f"{folder}: states of other captions than {data / CAPTIONS} has; remove the folder and write them again"
        )
    found = TextSet(folder, manifest, counts)
    if records.manifest.flip:
        found.first = (1 + np.cumsum(counts[::2]) - counts[::2]).repeat(2)
    return found
