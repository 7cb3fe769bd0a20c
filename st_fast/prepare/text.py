"""States of captions, written beside the latents that they describe."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from st_fast.core.errors import Say, UserError, counted
from st_fast.core.files import make_folder, read_bytes, read_json, write_atomic
from st_fast.data.ahead import RecordSet
from st_fast.data.manifest import write_manifest
from st_fast.data.shards import read_any_manifest
from st_fast.data.text import CAPTIONS, TextManifest, captions_bytes, read_captions, text_folder
from st_fast.model.text_encoders import TextEncoder
from st_fast.prepare.job import SKIPPED_FILE, Progress, check_begun
from st_fast.prepare.writing import all_finished, finished, record_crcs, write_noted

SHARD_BYTES = 2**27


def write_captions(data: Path, captions: Sequence[Sequence[str]]) -> None:
    """Writes captions.jsonl: a line for each image of the latents, in their order. UserError where others are there."""
    path, content = data / CAPTIONS, captions_bytes(captions)
    if not path.is_file():
        write_atomic(path, content)
    elif read_bytes(path) != content:
        raise UserError(f"{path}: other captions than those found now; remove it to write them anew")


def keep_captions(
    data: Path, names: Sequence[str], captions: Sequence[Sequence[str]], parts: Sequence[str] = ()
) -> None:
    """Writes captions.jsonl of a finished set: those of a source's images of these names, but for skipped images.

    `parts`: the folders of its buckets, where it has any; images are in their order.
    UserError where the set has other captions, or was made of another number of images.
    """
    skipped = dict[str, str]()
    for folder in (data / name for name in (parts or [""])):
        skipped |= read_json(folder / SKIPPED_FILE) if (folder / SKIPPED_FILE).is_file() else {}
    kept = [line for name, line in zip(names, captions, strict=True) if name not in skipped]
    made = read_any_manifest(data)
    if (images := made.count // (1 + made.flip)) != len(kept):
        raise UserError(f"{data}: latents of {images} images, captions of {len(kept)}")
    write_captions(data, kept)


def check_words(data: Path, captions: Sequence[Sequence[str]]) -> None:
    """UserError where no caption has a word, as in U-ViT's layout without .txt files: nothing is there to encode."""
    if not any(map(any, captions)):
        raise UserError(f"{data}: captions without their words, only states of an encoder: others can't be made")


def template(encoder: TextEncoder, records: RecordSet, digest: str, rows: int) -> TextManifest:
    """The manifest without its shards."""
    shape = (1, encoder.length, encoder.width)
    return TextManifest(encoder.name, encoder.hash, shape, encoder.mask, digest, records.digest, rows)


def write_text(
    data: Path, records: RecordSet, encoder: TextEncoder, say: Say, batch: int = 32, share: slice = slice(None),
    progress: Progress = lambda rows: None,
) -> None:  # fmt: skip
    """Writes the missing ones of this process's shards of all captions' states, and the manifest once all are there.

    Captions of more tokens than the encoder is given are counted in a line, and cut. UserError where the folder was
    begun with another encoder or for other latents or captions, or for states that float16 can't hold.
    """
    captions, digest = read_captions(data)
    if (images := len(records) // (1 + records.manifest.flip)) != len(captions):
        raise UserError(f"{data / CAPTIONS}: captions of {len(captions)} images, the latents are of {images}")
    texts = ["", *(text for line in captions for text in line)]
    cut = 0

    def encode(rows: np.ndarray) -> Tensor:
        nonlocal cut
        some = [texts[row] for row in rows]
        cut += sum(tokens > encoder.length for tokens in encoder.tokens(some))
        return encoder(some)

    write_states(data, template(encoder, records, digest, len(texts)), encode, batch, share, progress)
    if cut:
        say(f"{counted(cut, 'caption')} of more than {encoder.length} tokens, cut")


def write_states(
    data: Path, planned: TextManifest, states_of: Callable[[np.ndarray], Tensor], batch: int = 32,
    share: slice = slice(None), progress: Progress = lambda rows: None,
) -> None:  # fmt: skip
    """`write_text` for states (n, L, W) of rows (n,) that come from anywhere."""
    folder = text_folder(data, planned.encoder)
    make_folder(folder)
    job = asdict(planned) | {"shape": list(planned.shape), "shards": []}
    check_begun(folder, job, "remove the folder to write them anew")
    rows = max(1, SHARD_BYTES // planned.record_bytes)
    parts = [np.arange(start, min(start + rows, planned.count)) for start in range(0, planned.count, rows)]
    notes = [folder / f"text-{number:05d}.json" for number in range(len(parts))]
    for part, note in list(zip(parts, notes, strict=True))[share]:
        if finished(note):
            progress(len(part))
            continue
        found = []
        for start in range(0, len(part), batch):
            found.append(states_of(part[start : start + batch]).cpu().half().numpy())
            if not np.isfinite(found[-1]).all():
                raise UserError(f"encoder {planned.encoder}: states that float16 can't hold (NaN, Inf or above 65504)")
            progress(len(found[-1]))
        states = np.concatenate(found)[:, None]
        tensors = {"states": states, "crc32": record_crcs(states, part)}
        write_noted(note, tensors)
    if entries := all_finished(notes):
        write_manifest(folder, replace(planned, shards=entries))
