"""Other projects' latents, read by number on threads: what all their layouts have in common.

A record is given as `Manifest` says it: (mean, std), or the latent itself, with shift, mean and std of each channel
taken off and the scale not applied. A log-variance becomes a std here.
"""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from st_fast.core.files import BadFile, read_exactly, shown
from st_fast.core.limits import Npy
from st_fast.data.ahead import FilesIdentity, RecordSet, nothing
from st_fast.data.manifest import DTYPES, Manifest, moments_problem

STD, LOG_VARIANCE, LATENT = "std", "log-variance", "latent"
"""What files have beside the mean; or the latent alone."""
LOWEST, HIGHEST = -100.0, 50.0
"""What a log-variance may be before it is clamped; outside of it the second half is neither."""
CLAMP = (-30.0, 20.0)
"""The bounds of a log-variance in Stable Diffusion's VAE, MAR's and VA-VAE."""
SAMPLED = 64
"""Files of which all must be of one kind when a folder is opened; later each is looked at when it is read."""
BLOCK = 1_024
"""Records that are verified at once."""
SD_SCALE = 0.18215
CONVERT = "python -m st_fast.prepare --from-latents"


class ForeignRecords(RecordSet):
    """Records in another project's files. A layout sets `folder`, `names`, `labels`, `manifest`, calls `open_files`."""

    folder: Path
    """What was named: a folder, or the file itself."""
    root: Path
    """Where the files lie."""
    names: Sequence[str]
    """The files below `root`; by default one a record, in their order."""
    origin: Any = None
    """What made the latents, where the folder says so."""
    scale_of: Literal["files", "project", "vae"] = "vae"
    """Who says the scale: the files, so that no other can be right; the project's code; or whatever VAE made them."""
    kind: str = STD
    """What the files have: STD, LOG_VARIANCE or LATENT."""
    usual: str = ""
    """Which VAE's latents are known without being told, in words."""

    def open_files(self, root: Path, threads: int) -> None:
        """Starts the threads."""
        self.root, self._pool = root, ThreadPoolExecutor(threads, "st_fast latents")
        self._files: FilesIdentity | None = None

    @property
    def files(self) -> FilesIdentity:
        """Sizes and times of the files, taken when first asked for; `BadFile` names one that can't be found."""
        if self._files is None:
            self._files = FilesIdentity(self._stat(self.watched()))
        return self._files

    def watched(self) -> Sequence[str]:
        """The files whose change is noticed: those of the records, and what a layout has beside them."""
        return self.names

    def where(self, index: int) -> str:
        """A record's file, in words."""
        return str(self.root / self.names[index])

    def unknown(self) -> bool:
        """Whether nothing says which VAE made the latents."""
        return not self.manifest.vae.name

    def refuse_unknown(self) -> None:
        """`BadFile`, with the command that names it, where nothing says which VAE made the latents."""
        if self.unknown():
            raise BadFile(
                f"{self.folder}: latents of {self.manifest.channels} channels, and it doesn't say by which VAE; "
                f"{self.usual}: {CONVERT} {self.folder} OUT --vae VAE names it"
            )

    def refuse_in_place(self) -> None:
        """`BadFile`, with the command that converts, where the records can't be trained on as they lie."""
        self.refuse_unknown()

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads records `indices` (n,) into out (n, *shape) of the set's dtype. `BadFile` names a bad file."""
        for _ in self._pool.map(self._read_one, np.asarray(indices).tolist(), out):
            pass

    def verify(self, beat: Callable[[], None] = nothing) -> None:
        """Reads every file: shape, dtype, NaN, Inf and absurd values; `files` then has the content's hash."""
        content = hashlib.sha256()
        every = np.arange(len(self))
        for start in range(0, len(self), BLOCK):
            beat()
            moments = self.gather(every[start : start + BLOCK])[0].numpy()
            if problem := moments_problem(moments, self.manifest.posterior):
                raise BadFile(f"{self.where(start + problem[0])}: {problem[1]}")
            content.update(moments.tobytes())
        self._files = FilesIdentity(self.files.stat, content.hexdigest())

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    @abstractmethod
    def read_stored(self, index: int, row: np.ndarray) -> None:
        """Reads one record as its file has it into row (*shape) of the set's dtype; `BadFile` names a bad file."""

    def settle_kind(self) -> None:
        """Sees from some files, evenly spaced, what all have beside the mean; `BadFile` where they are of two kinds."""
        row = np.empty(self.manifest.shape, self.manifest.dtype)
        sample = np.unique(np.linspace(0, len(self) - 1, min(len(self), SAMPLED)).astype(int)).tolist()
        for index in sample:
            self.read_stored(index, row)
            if index == sample[0]:
                self.kind = kind_of(row, self.where(index))
            self.check_kind(index, row)

    def check_kind(self, index: int, row: np.ndarray) -> None:
        """`BadFile` where the second half of a record is not what that of the others is."""
        if (kind := kind_of(row, self.where(index))) != self.kind:
            raise BadFile(
                f"{self.where(index)}: (mean, {kind}), but {Path(self.where(0)).name} is (mean, {self.kind}): files of "
                "two kinds in one folder"
            )

    def _read_one(self, index: int, row: np.ndarray) -> None:
        """Reads one record into row (*shape), as the manifest says it."""
        self.read_stored(index, row)
        if self.kind != LATENT:
            self.check_kind(index, row)
        if self.kind == LOG_VARIANCE:
            half = row[len(row) // 2 :]
            half[:] = np.exp(0.5 * np.clip(half.astype(np.float32), *CLAMP))
        normalise(row, self.manifest)

    def _stat(self, names: Iterable[str]) -> str:
        """SHA-256 of the files' names, sizes and times."""
        found = hashlib.sha256()

        def look(name: str) -> tuple[int, int]:
            try:
                status = (self.root / name).stat()
            except OSError as error:
                raise BadFile(f"{self.root / name}: {error.strerror}") from None
            return status.st_size, status.st_mtime_ns

        for name, status in zip(names, self._pool.map(look, names), strict=True):
            found.update(f"{name!r} {status}\n".encode())
        return found.hexdigest()


def kind_of(moments: np.ndarray, where: object) -> str:
    """STD or LOG_VARIANCE, by sign and range of the second half of (2C, H, W); `BadFile` where it can be neither."""
    second = moments[len(moments) // 2 :]
    low, high = float(second.min()), float(second.max())
    if not math.isfinite(low + high):
        raise BadFile(f"{where}: NaN or Inf")
    if low >= 0:
        return STD
    if low >= LOWEST and high <= HIGHEST:
        return LOG_VARIANCE
    raise BadFile(f"{where}: beside the mean it has {low:.3g} to {high:.3g}: neither std (0 or more) nor log-variance")


def normalise(row: np.ndarray, manifest: Manifest) -> None:
    """Takes shift, mean and std of each channel off (2C, H, W) moments or (C, H, W) latents, in place."""
    channels, mean, std = manifest.channels, manifest.latents_mean, manifest.latents_std
    if mean or manifest.shift:
        off = np.array(mean or (0.0,) * channels, np.float32) + np.float32(manifest.shift or 0)
        row[:channels] -= off[:, None, None]
    if std:
        repeated = np.array(std * (len(row) // channels), np.float32)
        row /= repeated[:, None, None]


def made_manifest(where: object, **said: Any) -> Manifest:
    """The manifest of a set of another project's; a `BadFile` about it names the file that says so."""
    try:
        return Manifest(**said)
    except BadFile as error:
        raise BadFile(f"{where}: {error}") from None


def fill(row: np.ndarray, array: np.ndarray, where: object) -> None:
    """Puts an array of a file into row (*shape); `BadFile` where it has another shape than the first, or no floats."""
    if array.dtype.name not in DTYPES or array.shape != row.shape:
        raise BadFile(
            f"{where}: {array.dtype} {shown(array.shape)}; the first of the set has {shown(row.shape)}, of float16 or "
            "float32"
        )
    row[:] = array


def floats_of(place: Npy, size: int, where: object, needed: str = "(2C, H, W)") -> tuple[int, int, int]:
    """The shape of an array of float16 or float32 (C, H, W) in a file of `size` bytes; `BadFile` for any other.

    A batch of one is passed over; the manifest refuses odd channels of moments and sides of 0. What is allocated for
    the records follows from this shape, so the file must hold it.
    """
    shape = place.shape[1:] if len(place.shape) == 4 and place.shape[0] == 1 else place.shape
    if place.dtype.name not in DTYPES or place.dtype.byteorder == ">" or len(shape) != 3:
        raise BadFile(f"{where}: {place.dtype} {shown(place.shape)}; float16 or float32 {needed} is needed")
    if place.start + place.size != size:
        raise BadFile(f"{where}: {size} bytes, {place.start + place.size} expected: it was cut off or has a tail")
    return (shape[0], shape[1], shape[2])


def check_labels(labels: np.ndarray, most: int, name: Callable[[int], object]) -> None:
    """`BadFile` that names the first label of (n,) outside of 0 … most - 1; `name` says where it stands."""
    wrong = np.flatnonzero((labels < 0) | (labels >= most))
    if len(wrong):
        raise BadFile(f"{name(int(wrong[0]))}: label {labels[wrong[0]]}; a class number (0 … {most - 1}) is needed")


def read_span(file: Any, start: int, into: np.ndarray, path: Path) -> None:
    """Fills an array from byte `start` of an open file."""
    file.seek(start)
    read_exactly(file, into.reshape(-1).view(np.uint8).data, path)


def short_digest(pieces: Iterable[bytes]) -> str:
    """SHA-256 over pieces of bytes, for a manifest's `source`."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()
