"""Where images come from: a folder, a zip, a tar, webdataset tars, a Hugging Face dataset on disk, REPA's images/.

A source knows its images by number; reading one gives the file's bytes. What is an image, its label and its order are
decided from names alone, so the same input gives the same set on any machine.
"""

import hashlib
import json
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, shown
from st_fast.core.machine import allow_open_files
from st_fast.data.images import SUFFIXES

SPLITS = ("train", "training", "test", "val", "valid", "validation")
LABELS_FILE = "dataset.json"
"""Labels by file name as EDM and REPA write them: {"labels": [["00000/img00000000.png", 3], …]}."""


@dataclass(frozen=True)
class Source:
    """Numbered images with labels. `read(i)` → the bytes of image i's file; may be called from many threads."""

    description: str
    names: Sequence[str]
    labels: np.ndarray
    """(n,) int64."""
    num_classes: int
    class_names: tuple[str, ...]
    read: Callable[[int], bytes]

    def digest(self) -> str:
        """SHA-256 over names and labels: interrupted work continues only on the same images."""
        digest = hashlib.sha256(self.labels.tobytes())
        for name in self.names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()


@dataclass(frozen=True)
class Files:
    """Named blobs: the files of a folder or the members of an archive. Names use "/"; `read` is thread-safe."""

    where: Path
    names: list[str]
    read: Callable[[str], bytes]


def open_source(path: Path, subset: str = "") -> Source:
    """The images at `path`; `subset` keeps what lies in that folder of it. UserError says what was expected."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"source {str(path)!r}: no such file or folder")
    if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return open_hub_dataset(path, subset)
    tars = sorted(path.glob("*.tar")) if path.is_dir() else []
    if path.is_dir() and not tars:
        return _from_files(_folder(path), subset)
    if path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UserError(f"source {str(path)!r}: a compressed tar can't be read at random; decompress it first")
    if path.is_dir() or tarfile.is_tarfile(path):
        return _from_tars(path, tars or [path], subset)
    if zipfile.is_zipfile(path):
        return _from_files(_zip(path), subset)
    raise UserError(
        f"source {str(path)!r}: a folder, .zip, .tar, a folder of webdataset .tar files or a Hugging Face "
        "dataset folder is needed"
    )


def _folder(path: Path) -> Files:
    """All files below `path`, found without following links that lead to folders."""

    def refuse(error: OSError) -> None:
        raise error

    names = []
    for folder, _, files in os.walk(path, onerror=refuse):
        prefix = "" if folder == str(path) else f"{Path(folder).relative_to(path).as_posix()}/"
        names += [prefix + name for name in files]
    return Files(path, names, lambda name: (path / name).read_bytes())


def _zip(path: Path) -> Files:
    # A ZipFile may be read by several threads, but each thread waits for the others: one a thread instead.
    local = threading.local()

    def read(name: str) -> bytes:
        if not hasattr(local, "archive"):
            local.archive = zipfile.ZipFile(path)
        try:
            return local.archive.read(name)
        except Exception as error:  # zipfile's own, zlib's, and others for encryption and unknown compression
            raise OSError(f"damaged in the zip: {error}") from error

    with zipfile.ZipFile(path) as archive:
        return Files(path, [info.filename for info in archive.infolist() if not info.is_dir()], read)


def _from_tars(where: Path, tars: list[Path], subset: str) -> Source:
    """One tar, or several; in several, a file that lies in no folder belongs to a folder named like its tar."""
    allow_open_files(len(tars))
    places: dict[str, tuple[int, int, int]] = {}
    """Member → its tar's open descriptor, first byte, bytes."""
    for path in tars:
        try:
            with tarfile.open(path, "r:") as archive:
                members = {member.name.removeprefix("./"): member for member in archive if member.isreg()}
        except tarfile.TarError as error:
            raise BadFile(f"{path}: not a sound tar ({error})") from None
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        for name, member in members.items():
            full = f"{path.stem}/{name}" if len(tars) > 1 and "/" not in name else name
            if full in places:
                raise UserError(f"{path}: it holds {shown(name)}, as does another tar beside it")
            places[full] = (file, member.offset_data, member.size)

    def read(name: str) -> bytes:
        file, start, size = places[name]
        data = os.pread(file, size, start)
        if len(data) != size:
            raise OSError(f"{size} bytes expected, {len(data)} found: the tar is cut off")
        return data

    files = Files(where, list(places), read)
    if any(name.endswith(".cls") for name in places):
        return _webdataset(files)
    return _from_files(files, subset)


def _webdataset(files: Files) -> Source:
    """key.jpg beside key.cls, which holds the label as a number."""
    names, images, labels = set(files.names), _images(files.names), []
    for name in images:
        folder, slash, file = name.rpartition("/")
        label_name = f"{folder}{slash}{file.partition('.')[0]}.cls"
        if label_name not in names:
            raise UserError(f"{files.where}: {shown(name)} has no {shown(label_name)} with its label beside it")
        data = files.read(label_name)
        try:
            labels.append(int(data))
        except ValueError:
            raise UserError(f"{files.where}: {label_name}: {shown(data)} is not a class number") from None
    return _source(files, "webdataset tars", images, labels, ())


def _from_files(files: Files, subset: str) -> Source:
    """Class folders, or files with a dataset.json; a single folder around everything is stepped into."""
    prefix = f"{subset.strip('/')}/" if subset else ""
    names = [name for name in files.names if name.startswith(prefix)]
    if not _images(names):
        there = ", ".join(sorted({name.partition("/")[0] for name in files.names})[:8]) or "nothing"
        raise UserError(
            f"source {str(files.where)!r}{f', subset {subset!r}' if subset else ''}: no image in it "
            f"({', '.join(SUFFIXES)}); it holds {there}"
        )
    while len(tops := {_top(name, prefix) for name in _images(names)}) == 1 and "" not in tops:
        inner = f"{prefix}{next(iter(tops))}/"
        if f"{prefix}{LABELS_FILE}" in names or not any("/" in n[len(inner) :] for n in _images(names)):
            break  # labels by file, or one class only
        prefix = inner
    listed = [n for n in (f"{prefix}{LABELS_FILE}", f"{prefix}images/{LABELS_FILE}") if n in names]
    images = _images(name for name in names if name.startswith(prefix))
    if not listed:
        return _class_folders(files, prefix, images)
    # Every image has its label in a dataset.json beside or above it.
    labels_file, folder = listed[0], listed[0].removesuffix(LABELS_FILE)
    table = read_labels(files.read(labels_file), f"{files.where}: {labels_file}")
    images = [name for name in images if name.startswith(folder)]
    missing = [name for name in images if name[len(folder) :] not in table]
    if missing or len(images) != len(table):
        first = f"; {shown(missing[0])} has no label" if missing else ""
        raise UserError(f"{files.where}: {len(images)} images, but {len(table)} labels in {labels_file}{first}")
    return _source(files, "files with dataset.json", images, [table[name[len(folder) :]] for name in images], ())


def read_labels(data: bytes, where: str) -> dict[str, int]:
    """A dataset.json's labels: file name → class number. UserError names what is wrong."""
    try:
        labels = json.loads(data)["labels"]
        table = {str(name).replace("\\", "/"): label for name, label in labels}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{where}: {{"labels": [[file, class], …]}} is needed ({error})') from None
    wrong = next((name for name, label in table.items() if type(label) is not int or label < 0), None)
    if wrong is not None:
        raise UserError(f"{where}: the label of {shown(wrong)} is {shown(table[wrong])}; a class number is needed")
    if len(table) != len(labels):
        raise UserError(f"{where}: {len(labels)} labels, but only {len(table)} different file names")
    return table


def _class_folders(files: Files, prefix: str, images: list[str]) -> Source:
    tops = [_top(name, prefix) for name in images]
    classes = sorted(set(tops))
    if "" in classes:
        loose = next(name for name, top in zip(images, tops, strict=True) if not top)
        raise UserError(
            f"source {str(files.where)!r}: {shown(loose)} lies in no class folder, and there is no {LABELS_FILE}"
        )
    if len(classes) > 1 and set(map(str.lower, classes)) <= set(SPLITS):
        splits = ", ".join(classes)
        raise UserError(f"source {str(files.where)!r}: it holds {splits}: choose one, --subset {classes[-1]}")
    number = {name: i for i, name in enumerate(classes)}
    return _source(files, "class folders", images, [number[top] for top in tops], tuple(classes))


def _source(files: Files, kind: str, images: list[str], labels: list[int], classes: tuple[str, ...]) -> Source:
    array = np.array(labels, np.int64)
    count = len(classes) or int(array.max()) + 1
    printable = tuple(name.encode("utf-8", "replace").decode() for name in classes)
    return Source(f"{files.where.name} ({kind})", images, array, count, printable, lambda i: files.read(images[i]))


def _top(name: str, prefix: str) -> str:
    """The first folder of a name below `prefix`, or ""."""
    return name[len(prefix) :].rpartition("/")[0].partition("/")[0]


def _images(names: Iterable[str]) -> list[str]:
    """The images among names, sorted; hidden files and macOS leftovers are none."""
    return sorted(
        name
        for name in names
        if name.lower().endswith(SUFFIXES)
        and not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
    )


def open_hub_dataset(path: Path, subset: str = "") -> Source:
    """The image and label columns of a Hugging Face dataset on disk; `subset` names a split if there are several."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"source {str(path)!r}: a Hugging Face dataset, which the package datasets reads; it is not installed: "
            'pip install "st_fast[hub]"'
        ) from error
    data: Any = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if subset not in data and len(data) > 1:
            splits = ", ".join(data)
            raise UserError(f"source {str(path)!r}: it holds {splits}: choose one, --subset {next(iter(data))}")
        data = data[subset or next(iter(data))]
    image = _column(path, data.features, datasets.Image, "image")
    label = _column(path, data.features, datasets.ClassLabel, "label")
    data = data.cast_column(image, datasets.Image(decode=False))
    labels = np.array(data[label], np.int64)
    classes = tuple(getattr(data.features[label], "names", None) or ())
    count, rows = len(classes) or int(labels.max(initial=0)) + 1, [f"row {number}" for number in range(len(data))]

    def read(number: int) -> bytes:
        cell = data[number][image]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    return Source(f"{path.name} (Hugging Face dataset)", rows, labels, count, classes, read)


def _column(path: Path, features: Any, kind: type, usual: str) -> str:
    """The only column of that kind, or the one with the usual name."""
    found: list[str] = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1 and usual not in features:
        raise UserError(f"source {str(path)!r}: no {kind.__name__} column; it has {', '.join(features)}")
    return found[0] if len(found) == 1 else usual
