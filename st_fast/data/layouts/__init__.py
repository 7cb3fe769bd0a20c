"""Other projects' cached latents, one file a format: recognised by names, read in place or converted.

`recognise` says what a folder or file is; what almost is one of these is refused with what it lacks.
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from st_fast.core.files import BadFile, shown
from st_fast.data.layouts import coco, edm, fast_dit, lightningdit, mar, repa, uvit, webdataset
from st_fast.data.layouts.records import ForeignRecords
from st_fast.data.manifest import FILE_NAME


@dataclass(frozen=True)
class Layout:
    """A format of latents."""

    name: str
    """Whose it is, for messages."""
    looks: str
    """What lies there, in a few words."""
    found: Callable[[Path, list[str]], bool]
    """Whether a folder with such files, or a file, is of this format; `BadFile` says what one lacks that almost is."""
    open: Callable[[Path], ForeignRecords]


LAYOUTS: tuple[Layout, ...] = (
    Layout("REPA", "vae-sd/dataset.json", lambda path, _: repa.has_layout(path), repa.RepaSet),
    Layout("U-ViT's COCO", "0.npy and 0_0.npy", lambda path, _: coco.is_coco(path), coco.CocoSet),
    Layout("EDM2 and SpeedrunDiT", "dataset.json with .npy, also zipped", edm.is_edm, edm.EdmSet),
    Layout("fast-DiT", "NAME_features and NAME_labels", fast_dit.is_fast_dit, fast_dit.FastDitSet),
    Layout("U-ViT's ImageNet", "0.npy of moments and label", uvit.is_uvit, uvit.UvitSet),
    Layout(
        "LightningDiT", "*.safetensors and latents_stats.pt", lightningdit.is_lightningdit, lightningdit.LightningSet
    ),
    Layout("MAR", "CLASS/*.npz", mar.is_mar, mar.MarSet),
    Layout("webdataset", "KEY.npy and KEY.cls in *.tar", webdataset.is_webdataset, webdataset.WebdatasetSet),
)
READABLE = "; ".join(f"{layout.name} ({layout.looks})" for layout in LAYOUTS)
GLANCE = 1_000
"""Entries of a folder that are looked at; a layout with more has those names that count, or all alike."""
UNREADABLE = (
    (
        "data.mdb",
        "an LMDB, as MaskDiT's extract_latent.py writes it: its lmdb2wds.py makes webdataset's tars of that, which are "
        "read",
    ),
    (
        ".h5",
        "HDF5, as REPA-E's cache_latents.py writes it, can't be read here: write its arrays img-mean-std-*.npy and its "
        "dataset.json into a folder named vae-sd with h5py",
    ),
)
"""The end of a file's name, and what is to be done about it."""


def recognise(path: Path) -> Layout | None:
    """The format of a folder or file of another project's latents; None for a set of ours, and whatever is none.

    Looks at names and at the beginning of one file. `BadFile` where it almost is one, or one that can't be read here.
    """
    path = Path(path)
    if not path.exists() or os.path.lexists(path / FILE_NAME):
        return None
    names = glance(path)
    for layout in LAYOUTS:
        if layout.found(path, names):
            return layout
    splits = [f"{name}/data.mdb" for name in ("train", "val") if (path / name / "data.mdb").is_file()]
    for ending, remedy in UNREADABLE:
        found = next((name for name in [*splits, *names] if name.endswith(ending)), None)
        if found is not None:
            raise BadFile(f"{path}: {shown(found)} is {remedy}")
    return None


def glance(folder: Path) -> list[str]:
    """Some names in a folder that are not hidden; none for a file."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries)
        return [name for name in itertools.islice(names, GLANCE) if not name.startswith(".")]
