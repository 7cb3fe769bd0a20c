"""manifest.json: what a folder of latents holds, how it was made, and the hash of every shard. Imports no torch."""

import hashlib
import math
import re
from dataclasses import Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import JSON_LIMIT, BadFile, inside, json_bytes, parse_json, read_json, shown, write_json_atomic
from st_fast.core.latents import LatentSpace, Normalisation
from st_fast.core.records import record_from

FORMAT = "st_fast.latents"
FILE_NAME = "manifest.json"
INDEX_NAME = "buckets.json"
"""Of a folder with latents of several shapes, each in a folder of its own (`data/buckets.py`)."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
MOST_CLASSES = 2**24
GIVEN = "given from Python"
"""The source of latents that are in no folder."""
DTYPES = {"float16": ("F16", 2), "float32": ("F32", 4)}
"""dtype → (its name in safetensors, bytes)."""
LIMIT = 1e4
"""Largest plausible |mean| and std of an unscaled latent; SD's are below 100."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file name in the folder, number of records, bytes, SHA-256 of the file."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class VaeInfo:
    """The VAE that made the latents: hub name or preset, hash of its weights, its folder inside this one or ""."""

    name: str
    hash: str = ""
    path: str = ""
    kind: str = ""
    """Its class, such as AutoencoderKL; "" in older sets."""
    factor: int = 0
    """Pixels of an image's side for each of its latents'; 0: unknown."""
    black: float = -1.0
    """The value of black pixels that it encodes; white is 1. EDM2 encodes images from 0 to 1."""

    def source(self, folder: Path) -> str:
        """Where to load it from, for the set in `folder`: its folder inside, of a bucket beside it, or its hub name.

        `BadFile` for a path that leads out of the folder, also in place of a name: a manifest may be somebody else's;
        and for a folder that is gone, whose path the hub would be asked for as a name.
        """
        if self.path:
            kept = folder
            if not inside(folder, self.path).is_dir() and (folder.absolute().parent / INDEX_NAME).is_file():
                kept = folder.absolute().parent
            place = inside(kept, self.path)
            if not place.is_dir():
                raise BadFile(f"{place}: missing; the VAE {shown(self.name)}, which encoded {folder}, was kept there")
            return str(place)
        if not HUB_NAME.fullmatch(self.name) or ".." in self.name:
            raise BadFile(f"{folder / FILE_NAME}: vae.name = {shown(self.name)}: no name that the hub could have")
        return self.name


LATER = {
    "Manifest": ("shift", "latents_mean", "latents_std", "posterior"),
    "VaeInfo": ("kind", "factor", "black"),
}
"""By dataclass, the fields that version 1's first manifests do not have."""


def _without_defaults(told: dict[str, Any], record: Any) -> dict[str, Any]:
    """`asdict` of a dataclass without the fields of LATER that have their defaults, also within it."""
    usual = {
        field.name: field.default for field in fields(record) if field.name in LATER.get(type(record).__name__, ())
    }
    kept = {name: value for name, value in told.items() if name not in usual or getattr(record, name) != usual[name]}
    return kept | {
        name: _without_defaults(kept[name], value) for name in kept if is_dataclass(value := getattr(record, name))
    }


class ShardedSet:
    """Base of every manifest of shards, each a dataclass: records of one shape and dtype."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    shape: tuple[int, int, int]
    dtype: str
    count: int
    shards: tuple[ShardEntry, ...]
    format: str
    version: int

    def __post_init__(self) -> None:
        if problem := self.problem():
            raise BadFile(problem)

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's content: it changes with every change of any shard's hash."""
        return hashlib.sha256(json_bytes(self.as_json())).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The content of manifest.json. Fields that older versions do not have are there where they say anything, so
        that a set's digest stays what it was.
        """
        return _without_defaults(asdict(self), self)

    def problem(self) -> str:
        """The first inconsistency, or ""."""
        if len(self.shape) != 3 or any(n < 1 for n in self.shape):
            return f"shape = {shown(self.shape)}: three positive whole numbers are needed"
        if self.dtype not in DTYPES:
            return f"dtype = {shown(self.dtype)}: one of {', '.join(DTYPES)}"
        files = [shard.file for shard in self.shards]
        if len(set(files)) < len(files):
            return f"shards: {shown(max(files, key=files.count))} is listed twice"
        return ""


@dataclass(frozen=True)
class Manifest(ShardedSet):
    """What a folder of latents holds. `shape` is that of one record, (2C, H, W) = concat(mean, std) of its moments.

    The diffusion model's latents are x = scale · (z − shift − latents_mean) / latents_std for the VAE's z, with the
    names that diffusers' configurations have. Shift, mean and std are taken off what is stored; the scale is not. With
    `flip` the set has every image twice: record 2i as it is and record 2i + 1 mirrored. `class_names` is empty when
    unknown.
    """

    count: int
    shape: tuple[int, int, int]
    dtype: str
    scale: float
    vae: VaeInfo
    source: str
    num_classes: int
    flip: bool = False
    class_names: tuple[str, ...] = ()
    shards: tuple[ShardEntry, ...] = ()
    format: str = FORMAT
    version: int = 1
    shift: float | None = None
    """None, in older sets: what the VAE's own configuration says."""
    latents_mean: tuple[float, ...] = ()
    """(C,), or empty: zeros."""
    latents_std: tuple[float, ...] = ()
    """(C,), or empty: ones."""
    posterior: Literal["sample", "mean"] = "sample"
    """Whether each step draws from (mean, std), or a record is the latent itself, (C, H, W)."""

    @property
    def channels(self) -> int:
        """C of the latents: half of the moments' channels."""
        return self.shape[0] if self.posterior == "mean" else self.shape[0] // 2

    @property
    def normalisation(self) -> Normalisation:
        """What leads from the VAE's latents to the diffusion model's."""
        return Normalisation(self.scale, self.shift, self.latents_mean, self.latents_std)

    @property
    def space(self) -> LatentSpace:
        """What the diffusion model's latents are of."""
        return LatentSpace(self.vae.name, self.vae.hash, self.normalisation)

    def name_of(self, label: int) -> str:
        """The name of a class; its number where there are no names."""
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def problem(self) -> str:
        """The first inconsistency, or ""."""
        if problem := super().problem():
            return problem
        if self.posterior not in ("sample", "mean"):
            return f"posterior = {shown(self.posterior)}: sample or mean is needed"
        if self.shape[0] % 2 and self.posterior == "sample":
            return f"shape = {shown(self.shape)}: (2C, H, W) is needed"
        if problem := self.normalisation.problem(self.channels):
            return problem
        if not -1 <= self.vae.black <= 0:
            return f"vae.black = {shown(self.vae.black)}: -1 to 0 is needed"
        if not 1 <= self.num_classes <= MOST_CLASSES:
            return f"num_classes = {shown(self.num_classes)}: 1 to {MOST_CLASSES} are possible"
        if self.class_names and len(self.class_names) != self.num_classes:
            return f"class_names has {len(self.class_names)} names, num_classes = {self.num_classes}"
        return ""


UPRIGHT = "upright, "
"""Stands before the crop in `source` where images were turned as their EXIF says; older versions did not do that."""


def crop_of(source: str) -> int | tuple[int, int] | None:
    """The side of the latents' centre crop, or its height and width, where the `source` of their manifest states it."""
    found = re.search(r"centre crop (\d{1,9})(?:x(\d{1,9}))?$", source)
    if found is None:
        return None
    return (int(found[1]), int(found[2])) if found[2] else int(found[1])


def is_upright(source: str) -> bool:
    """Whether the latents are of images turned as their EXIF orientation says."""
    return re.search(rf"{UPRIGHT}centre crop \d+(x\d+)?$", source) is not None


Set = TypeVar("Set", bound=ShardedSet)


def parse_manifest(kind: type[Set], path: Path) -> Set:
    """Reads a manifest.json as that kind of set; touches no shard. Raises `BadFile` in one line."""
    raw = read_json(path)
    if raw.get("format") != kind.format:
        raise BadFile(f"{path}: format = {shown(raw.get('format'))}: {kind.format!r} is needed")
    if type(raw.get("version")) is not int or raw["version"] > kind.version:
        raise BadFile(f"{path}: version = {shown(raw.get('version'))}: at most {kind.version} is known here")
    manifest = record_from(kind, raw, str(path))
    total = sum(shard.count for shard in manifest.shards)
    if total != manifest.count:
        raise BadFile(
            f"{path}: count = {shown(manifest.count)}, but its {len(manifest.shards)} shards hold {total} records"
        )
    return manifest


def write_manifest(folder: Path, manifest: ShardedSet) -> None:
    """Writes folder/manifest.json, old or new after a crash; UserError for one that could not be read again."""
    check_readable(manifest, Path(folder) / FILE_NAME)
    write_json_atomic(Path(folder) / FILE_NAME, manifest.as_json())


def check_readable(manifest: ShardedSet, path: Path) -> None:
    """UserError unless `read_manifest` would read it: the names of very many classes may be too long."""
    data = json_bytes(manifest.as_json())
    if len(data) > JSON_LIMIT:
        names = sum(map(len, getattr(manifest, "class_names", ())))
        raise UserError(
            f"{path}: it would have {len(data):,} bytes, of which {names:,} are the names of classes and the rest the "
            f"list of {len(manifest.shards):,} shards; at most {JSON_LIMIT:,} can be read: shorter names or larger "
            "shards are needed"
        )
    parse_json(data, path)


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks folder/manifest.json; touches no shard. Raises `BadFile` in one line."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        if (path.parent / INDEX_NAME).is_file():
            raise BadFile(f"{path.parent}: latents of several shapes, where one is needed: name one of its folders")
        what = "no manifest.json in it" if path.parent.is_dir() else "no such folder"
        raise BadFile(f"data.path = {str(path.parent)!r}: {what}; make the set with python -m st_fast.prepare")
    return parse_manifest(Manifest, path)


def check_same_data(saved_digest: str, saved_where: str, manifest: Manifest, folder: Path) -> None:
    """Raises UserError where a run was started on other data than `folder` holds now (the digests differ)."""
    if saved_digest != manifest.digest:
        where = "data" if manifest.source == GIVEN else f"data.path = {str(folder)!r}"
        raise UserError(
            f"{where}: the data changed since {saved_where} was written "
            f"(digest {saved_digest[:12]} then, {manifest.digest[:12]} now); restore it, or start a new run"
        )


def moments_problem(moments: np.ndarray, posterior: str = "sample") -> tuple[int, str] | None:
    """The first bad record of (n, 2C, H, W) float16 or float32 moments as (its index, what is wrong), or None.

    Where the posterior is "mean" records are latents (n, C, H, W), which have no std.

    Bad are NaN, Inf, |mean| or std above LIMIT, and a negative std. The bits are compared, so that one comparison
    catches all of it: IEEE floats of one sign sort like their bits, with Inf and NaN above every number.
    """
    bits: type[np.unsignedinteger] = np.uint16 if moments.itemsize == 2 else np.uint32
    words = np.ascontiguousarray(moments).view(bits)
    sign = bits(1 << (8 * moments.itemsize - 1))
    bad = (words & ~sign) > moments.dtype.type(LIMIT).view(bits)
    channels = moments.shape[1] if posterior == "mean" else moments.shape[1] // 2
    negative = words[:, channels:] > sign  # -0 equals `sign` and does no harm
    if not bad.any() and not negative.any():
        return None
    record = int(np.flatnonzero(bad.any((1, 2, 3)) | negative.any((1, 2, 3)))[0])
    values = moments[record].astype(np.float64)
    if not np.isfinite(values).all():
        return record, "NaN or Inf"
    if bad[record].any():
        return record, f"|value| up to {np.abs(values).max():.3g}, at most {LIMIT:.0e} is plausible"
    return record, f"std {values[channels:].min():.3g}, which can't be negative (log-variance in place of std?)"


def labels_problem(labels: np.ndarray, num_classes: int) -> tuple[int, str] | None:
    """The first label outside [0, num_classes) as (its index, what is wrong), or None."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if not len(wrong):
        return None
    return int(wrong[0]), f"label {labels[wrong[0]]}, allowed are 0 … {num_classes - 1}"
