"""REPA's layout out of any set."""

import io
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import make_folder, write_json_atomic
from st_fast.core.writing import whole_file
from st_fast.data.ahead import RecordSet
from st_fast.data.labels import LABELS_FILE
from st_fast.data.layouts.repa import LATENTS, OURS, Origin, has_layout
from st_fast.data.manifest import FILE_NAME, Manifest
from st_fast.prepare.job import Progress


def check_target(source: Path, folder: Path) -> None:
    """UserError where REPA's layout of the set in `source` can't go: into that set, or beside what is a set already."""
    if folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{folder}: is or lies in {source}, the set to convert; name a folder outside it")
    if os.path.lexists(folder / FILE_NAME):
        raise UserError(f"{folder}: holds {FILE_NAME}, so it is a set of its own; name another folder")
    if has_layout(folder):
        raise UserError(f"{folder}: holds {LATENTS}/{LABELS_FILE} already; name another folder")


def check_moments(made: Manifest, source: Path) -> None:
    """UserError where REPA's layout has no place for a set's records: its files are (mean, std), with one scale."""
    if made.posterior == "mean":
        raise UserError(f"{source}: latents drawn once; REPA's layout has (mean, std)")
    if made.latents_mean or made.latents_std:
        raise UserError(
            f"{source}: latents with the mean and std of each channel taken off; REPA's layout has one scale"
        )


def write_repa(records: RecordSet, folder: Path, progress: Progress) -> None:
    """Writes any set in REPA's layout, float32 as REPA has it; dataset.json comes last. No images: there are none.

    dataset.json also says what the latents are of, for `RepaSet`.
    RunFailed on a full disk.
    """
    made, latents = records.manifest, Path(folder) / LATENTS
    origin = Origin(made.channels, made.scale, made.vae, made.num_classes, made.class_names)
    labels = []
    for start in range(0, records.manifest.count, 1_000):
        make_folder(latents / f"{start // 1_000:05d}")
        moments, more = records.gather(np.arange(start, min(start + 1_000, records.manifest.count)))
        for number, (row, label) in enumerate(zip(moments.float().numpy(), more.tolist(), strict=True), start):
            name = f"{start // 1_000:05d}/img-mean-std-{number:08d}.npy"
            array = io.BytesIO()
            np.save(array, row)  # into a file it would not say why a disk refused it
            with whole_file(latents / name) as partial:
                partial.write_bytes(array.getvalue())
            labels.append([name, label])
        progress(len(moments))
    write_json_atomic(latents / LABELS_FILE, {"labels": labels, OURS: asdict(origin)})
