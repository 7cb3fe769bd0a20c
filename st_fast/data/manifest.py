"""manifest.json: what a folder of latents holds, how it was made, and the hash of every shard. Imports no torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, json_bytes, read_json, shown, write_json_atomic

FORMAT = "st_fast.latents"
VERSION = 1
FILE_NAME = "manifest.json"
DTYPES = {"float16": ("F16", 2), "float32": ("F32", 4)}
"""dtype → (its name in safetensors, bytes)."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file name in the folder, how many records, how many bytes, SHA-256 of the file."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class VaeInfo:
    """Which VAE made the latents: hub name or preset, hash of its weights, its folder inside this one or ""."""

    name: str
    hash: str = ""
    path: str = ""


class ShardedSet:
    """What every manifest of shards, a dataclass, has: records of one shape and dtype, and a digest of all it says."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    shape: tuple[int, int, int]
    dtype: str

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's content: it changes with every change of any shard's hash."""
        return hashlib.sha256(json_bytes(asdict(self))).hexdigest()


@dataclass(frozen=True)
class Manifest(ShardedSet):
    """What a folder of latents holds. `shape` is that of one record's moments, (2C, H, W) = concat(mean, std).

    `scale` leads from unscaled moments to the diffusion model's latents. With `flip` the set has every image twice:
    record 2i as it is and record 2i + 1 mirrored. `class_names` is empty when unknown.
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
    format: str = field(default=FORMAT)
    version: int = VERSION

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise BadFile(problem)

    @property
    def channels(self) -> int:
        """C of the latents: half of the moments' channels."""
        return self.shape[0] // 2


def _problem(manifest: Manifest) -> str:
    """What is wrong inside a manifest, or ""."""
    shape = manifest.shape
    if len(shape) != 3 or any(type(n) is not int or n < 1 for n in shape) or shape[0] % 2:
        return f"shape = {shown(shape)}: (2C, H, W) with positive whole numbers is needed"
    if manifest.dtype not in DTYPES:
        return f"dtype = {shown(manifest.dtype)}: one of {', '.join(DTYPES)}"
    if not (isinstance(manifest.scale, float | int) and math.isfinite(manifest.scale) and manifest.scale > 0):
        return f"scale = {shown(manifest.scale)}: a positive number is needed"
    if type(manifest.num_classes) is not int or manifest.num_classes < 1:
        return f"num_classes = {shown(manifest.num_classes)}: at least 1"
    if manifest.class_names and len(manifest.class_names) != manifest.num_classes:
        return f"class_names has {len(manifest.class_names)} names, num_classes = {manifest.num_classes}"
    total = sum(shard.count for shard in manifest.shards)
    if manifest.shards and total != manifest.count:
        return f"count = {manifest.count}, but its {len(manifest.shards)} shards hold {total} records"
    return ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes folder/manifest.json, old or new after a crash."""
    write_json_atomic(Path(folder) / FILE_NAME, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks folder/manifest.json; touches no shard. Raises `BadFile` in one line."""
    folder = Path(folder)
    path = folder / FILE_NAME
    if not path.is_file():
        what = "no manifest.json in it" if folder.is_dir() else "no such folder"
        raise BadFile(f"data.path = {str(folder)!r}: {what}; make the set with python -m st_fast.prepare")
    raw = read_json(path)
    if raw.get("format") != FORMAT:
        raise BadFile(f"{path}: format = {shown(raw.get('format'))}: {FORMAT!r} is needed")
    if type(raw.get("version")) is not int or raw["version"] > VERSION:
        raise BadFile(f"{path}: version = {shown(raw.get('version'))}: at most {VERSION} is known here")
    try:
        manifest = _from_json(raw)
    except BadFile as error:
        raise BadFile(f"{path}: {error}") from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise BadFile(f"{path}: a field is missing, unknown or of the wrong type ({error})") from None
    return manifest


def _from_json(raw: Mapping[str, Any]) -> Manifest:
    shards = tuple(ShardEntry(**shard) for shard in raw["shards"])
    for shard in shards:
        if type(shard.count) is not int or type(shard.bytes) is not int or shard.count < 0 or shard.bytes < 0:
            raise BadFile(f"shard {shown(shard.file)}: count and bytes must be whole numbers that are not negative")
    names = tuple(str(name) for name in raw["class_names"])
    lists: dict[str, Any] = {"shape": tuple(raw["shape"]), "class_names": names, "shards": shards}
    return Manifest(**{**raw, **lists, "vae": VaeInfo(**raw["vae"])})


def check_same_data(saved_digest: str, saved_where: str, manifest: Manifest, folder: Path) -> None:
    """Raises UserError where a run was started on other data than `folder` holds now (the digests differ)."""
    if saved_digest != manifest.digest:
        raise UserError(
            f"data.path = {str(folder)!r}: the data changed since {saved_where} was written "
            f"(digest {saved_digest[:12]} then, {manifest.digest[:12]} now); restore it, or start a new run"
        )
