"""Latents in webdataset's tars: KEY.npy, KEY.latent.npy, KEY.moments.npy or KEY.latent beside KEY.cls or .json.

Nothing in a tar says which VAE made them, or how they are scaled, so they are only read to be converted. MaskDiT's
(Anima-Lab/MaskDiT, lmdb2wds.py) are an exception: a KEY.latent is a pickled array of (mean, log-variance) of Stable
Diffusion's VAE, and the model's latent 0.18215 times the sample. Its pickle is never executed.
"""

import io
import itertools
from pathlib import Path

import numpy as np

from st_fast.core.files import BadFile, shown
from st_fast.core.limits import Npy, npy_header, read_npy, tar_members
from st_fast.core.pickled_arrays import array_places
from st_fast.data.archives import Files, open_tars
from st_fast.data.labels import NULL_LABEL, by_cls, by_json, sibling
from st_fast.data.layouts.records import (
    CONVERT,
    LATENT,
    SD_SCALE,
    STD,
    ForeignRecords,
    fill,
    floats_of,
    made_manifest,
    short_digest,
)
from st_fast.data.layouts.uvit import taken
from st_fast.data.manifest import Manifest, VaeInfo

MASKDIT, MOMENTS, DRAWN, EITHER = "latent", "moments.npy", "latent.npy", "npy"
KINDS = (MASKDIT, MOMENTS, DRAWN, EITHER)
"""What a latent's name has after its key; EITHER may hold the one or the other."""
VAE, CHANNELS, FACTOR = "sd-vae-ft-ema", 4, 8
LOOKED_AT = 64
"""Members of the first tar that are looked at to see whether it holds latents."""


def is_webdataset(path: Path, names: list[str]) -> bool:
    """Whether a tar, or a folder of tars, holds latents."""
    tars = [path] if path.is_file() else [path / name for name in sorted(names) if name.endswith(".tar")]
    if not tars or not tars[0].name.endswith(".tar"):
        return False
    members = itertools.islice(tar_members(tars[0]), LOOKED_AT)
    return any(kind_of_name(member.name) in KINDS for member in members if member.isreg())


def kind_of_name(name: str) -> str:
    """What stands after a file's key, which ends at the first dot."""
    return name.rpartition("/")[2].partition(".")[2]


class WebdatasetSet(ForeignRecords):
    """The records in the order of tars and members."""

    def __init__(self, path: Path, threads: int = 4) -> None:
        self.folder = path = Path(path)
        tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
        self._archive: Files = open_tars(path, tars)  # closes them when it is dropped
        self._tars = [tar.name for tar in tars]
        found = [(name, kind_of_name(name)) for name in self._archive.names]
        kinds = sorted({kind for _, kind in found} & set(KINDS))
        if len(kinds) != 1:
            raise BadFile(f"{path}: {' and '.join(f'KEY.{kind}' for kind in kinds)}: one kind of latents is needed")
        self.form = kinds[0]
        """Which of KINDS the latents are."""
        self.names = [name for name, kind in found if kind == self.form]
        self.labels, names = self._labels()
        self.open_files(path.parent if path.is_file() else path, threads)
        place = self._find(self._archive.read(self.names[0]), self.where(0))[0]
        moments = self.form in (MASKDIT, MOMENTS)
        shape = floats_of(place, place.start + place.size, self.where(0), "(2C, H, W)" if moments else "(C, H, W)")
        known = self.form == MASKDIT and shape[0] == 2 * CHANNELS
        listed = (f"{name!r} {label}\n".encode() for name, label in zip(self.names, self.labels.tolist(), strict=True))
        self.manifest: Manifest = made_manifest(
            path,
            count=len(self.names),
            shape=shape,
            dtype="float32",
            scale=SD_SCALE if known else 1.0,
            vae=VaeInfo(VAE if known else "", factor=FACTOR if known else 0),
            source=f"webdataset, names and labels {short_digest(listed)}",
            num_classes=len(names) or int(self.labels.max()) + 1,
            class_names=names,
            shift=0.0,
            posterior="sample" if moments else "mean",
        )
        self.scale_of = "project" if known else "vae"
        self.kind = STD if moments else LATENT
        if moments:
            self.settle_kind()

    def refuse_unknown(self) -> None:
        """`BadFile` where nothing says which VAE made the latents."""
        if self.unknown():
            raise BadFile(
                f"{self.folder}: KEY.{self.form} of {shown(self.manifest.shape)}, and nothing says by which VAE: "
                f"{CONVERT} {self.folder} OUT --vae VAE names it, --scale S a scale that is not its own"
            )

    def take_channels(self, channels: int) -> None:
        """Says how many channels the VAE's latents have: twice as many in KEY.npy are moments."""
        made = self.manifest
        if self.form == EITHER and made.shape[0] == 2 * channels:
            said = {name: getattr(made, name) for name in made.__dataclass_fields__} | {"posterior": "sample"}
            self.manifest, self.kind = made_manifest(self.folder, **said), STD
            self.settle_kind()

    def watched(self) -> list[str]:
        """The tars."""
        return self._tars

    def where(self, index: int) -> str:
        """A record's tar and name."""
        return f"{self.folder}: {shown(self.names[index])}"

    def read_stored(self, index: int, row: np.ndarray) -> None:
        """Reads one record into row (*shape)."""
        where = self.where(index)
        try:
            data = self._archive.read(self.names[index])
        except OSError as error:
            raise BadFile(f"{where}: can't be read ({error.strerror or error})") from None
        array = self._find(data, where)[1]
        fill(row, array[0] if array.ndim == 4 and len(array) == 1 else array, where)

    def _find(self, data: bytes, where: str) -> tuple[Npy, np.ndarray]:
        """An array's header and content."""
        if self.form != MASKDIT:
            return npy_header(io.BytesIO(data), where), read_npy(io.BytesIO(data), len(data), where)
        place = array_places(data, where)
        if not isinstance(place, Npy):
            raise BadFile(f"{where}: a pickle, but not of one array")
        return place, taken(data, place)

    def _labels(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """(n,) int64, and the names of classes; BadFile where a latent has none."""
        known, latents = set(self._archive.names), list(self.names)
        for kind in ("cls", "json"):
            if sibling(self.names[0], kind) in known:
                break
        else:
            raise BadFile(f"{self.folder}: {shown(self.names[0])} has no KEY.cls or KEY.json with its label beside it")
        if kind == "cls":
            labels, names = by_cls(self._archive, known, latents)
        elif missing := next((name for name in self.names if sibling(name, kind) not in known), None):
            raise BadFile(f"{self.folder}: {shown(missing)} has no KEY.json with its label beside it")
        else:
            found = by_json(self._archive, latents, "", False)
            if found is None:
                raise BadFile(f"{self.folder}: {shown(sibling(self.names[0], kind))} has no label in it")
            labels, names = found
            if null := next((name for name, label in zip(latents, labels, strict=True) if label < 0), None):
                raise BadFile(f"{self.folder}: {shown(sibling(null, kind))}: {NULL_LABEL}; every latent needs one")
        return np.array(labels, np.int64), names
