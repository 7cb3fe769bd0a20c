"""Where images come from: a folder, a zip, a tar, webdataset tars, a Hugging Face dataset on disk, REPA's images/.

A source knows its images by number; reading one gives the file's bytes. What is an image, its label and its order are
decided from names (and from the files that hold labels) alone, so the same input gives the same set on any machine.
"""

import hashlib
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import open_regular, printable, shown
from st_fast.data.archives import Files, hidden, open_folder, open_tars, open_zip
from st_fast.data.captions import KINDS, Captions, captions_beside
from st_fast.data.images import SUFFIXES
from st_fast.data.labels import LABELS_FILE, by_cls, by_json, by_table, numbered, numbered_names, sibling, top_folder

SPLITS = ("train", "training", "test", "val", "valid", "validation")
STAMPED, PROBED = 20_000, 256
"""Images, evenly spaced, of which the size and the content go into `Source.content`."""
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
IMAGENET = re.compile(r"(n\d{8})_")


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
    stamp: Callable[[int], str] = lambda number: ""
    """A cheap trace of image i's content."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files beside the images that are none or can't be read as such, by name with the reason."""
    captions: Captions = lambda number: ()

    def digest(self) -> str:
        """SHA-256 over names and labels: interrupted work continues only on the same images."""
        names = b"".join(name.encode("utf-8", "surrogateescape") + b"\0" for name in self.names)
        return hashlib.sha256(self.labels.tobytes() + names).hexdigest()

    def content(self) -> str:
        """SHA-256 over the sizes of STAMPED images and the bytes of PROBED ones: an edited source is another one."""
        lines = (f"{number} {_or_why(self.stamp, number)!r}\n" for number in self._spaced(STAMPED))
        return self._probed("".join(lines).encode())

    def probe(self) -> str:
        """SHA-256 over the labels and the bytes of PROBED images: the same wherever the set lies and in any packing."""
        return self._probed(self.labels.tobytes())

    def _probed(self, first: bytes) -> str:
        probed = (_or_why(self.read, number) for number in self._spaced(PROBED))
        parts = (hashlib.sha256(data if isinstance(data, bytes) else str(data).encode()).digest() for data in probed)
        return hashlib.sha256(first + b"".join(parts)).hexdigest()

    def _spaced(self, most: int) -> list[int]:
        return sorted(set(map(int, np.linspace(0, len(self.names) - 1, min(len(self.names), most)))))

    def summary(self) -> str:
        """One line: what it is, how many images of how many classes, and the classes in their order."""
        if self.num_classes == 1 and not self.class_names:
            return f"{self.description}: {len(self.names):,} images, all of one class"
        present = len(np.unique(self.labels))
        some = f", {present} of which have images" if present < self.num_classes else ""
        names = ", ".join(self.class_names[:10])
        more = f", … {self.class_names[-1]}" if len(self.class_names) > 10 else ""
        what = f"{names}{more}" if names else f"numbered 0 … {self.num_classes - 1}, without names"
        classes = f"{self.num_classes} class{'es' * (self.num_classes != 1)}"
        return f"{self.description}: {len(self.names):,} images of {classes}{some}: {what}"

    def left_out_summary(self) -> str:
        """One line on the files that are no images, or ""."""
        if not self.left_out:
            return ""
        kinds = Counter(self.left_out.values()).most_common(5)
        named = ", ".join(f"{count} {why}" for why, count in kinds)
        first = ", ".join(shown(name) for name in list(self.left_out)[:3])
        tops = {name.partition("/")[0] for name in self.left_out if "/" in name} - set(self.class_names)
        folders = f"; no image at all in {', '.join(map(shown, sorted(tops)[:5]))}" if tops and self.class_names else ""
        were = "file was not an image" if (count := len(self.left_out)) == 1 else "files were not images"
        return f"{count:,} {were}: {named} ({first}{', …' * (count > 3)}){folders}"


def _or_why(read: Callable[[int], Any], number: int) -> Any:
    try:
        return read(number)
    except (OSError, UserError, KeyError) as error:
        return type(error).__name__


def numbered_by(source: Source, class_names: Sequence[str], num_classes: int) -> Source:
    """The same images with the class numbers of another set; UserError for a class that it does not know."""
    theirs = class_names or [str(number) for number in range(num_classes)]
    labels = source.labels
    if source.class_names:
        number = {name: i for i, name in enumerate(theirs)}
        if unknown := [name for name in source.class_names if name not in number]:
            raise UserError(
                f"{source.description}: {len(unknown)} of its {source.num_classes} classes are not of the data's "
                f"{num_classes} ({', '.join(theirs[:8])}{', …' * (num_classes > 8)}): {', '.join(unknown[:8])}"
            )
        labels = np.array([number[name] for name in source.class_names], np.int64)[labels]
    if len(labels) and int(labels.max()) >= num_classes:
        raise UserError(f"{source.description}: class {labels.max()}; the data's are 0 … {num_classes - 1}")
    return replace(source, labels=labels, num_classes=num_classes, class_names=tuple(class_names))


def open_source(path: Path, subset: str = "", captioned: bool = False) -> Source:
    """The images at `path`; `subset` keeps what lies in that folder of it. UserError says what was expected.

    captioned: images may have no labels, and are of one class then; .txt and .json files are none of `left_out`.
    """
    source = _open(Path(path), subset, captioned)
    if not captioned:
        return source
    return replace(source, left_out={name: why for name, why in source.left_out.items() if why not in KINDS})


def _open(path: Path, subset: str, captioned: bool) -> Source:
    where = f"source {str(path)!r}"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{where}: no such file or folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: can't be opened ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            from st_fast.data.hub import open_hub_dataset

            return open_hub_dataset(path, subset, captioned)
        return _open_folder(path, subset, captioned)
    with open_regular(path) as file:
        start = file.read(264) or b""
    if packed := next((name for magic, name in PACKED.items() if start.startswith(magic)), ""):
        raise UserError(f"{where}: packed by {packed}; a compressed tar can't be read at random; decompress it first")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")) or path.suffix.lower() == ".zip":
        return _from_files(open_zip(path), subset, captioned)
    if start[257:262] == b"ustar" or path.suffix.lower() == ".tar":
        return _from_files(open_tars(path, [path]), subset, captioned)
    raise UserError(
        f"{where}: a folder, .zip, .tar, a folder of webdataset .tar files or a Hugging Face dataset folder is needed"
    )


def _open_folder(path: Path, subset: str, captioned: bool) -> Source:
    """A folder of images or of tars; of tars, `subset` may be the folder that they lie in or a word of their names."""
    inner = path / subset if subset and (path / subset).is_dir() else path
    tars = sorted(tar for tar in inner.glob("*.tar") if tar.is_file() and not hidden(tar.name))
    if not tars:
        return _from_files(open_folder(path), subset, captioned)
    loose = next((name for name in open_folder(inner).names if not hidden(name) and is_image(name)), None)
    if loose is not None:
        raise UserError(
            f"source {str(inner)!r}: it holds tars ({shown(tars[0].name)}) and images ({shown(loose)}): name one of "
            "them, or move them apart"
        )
    splits = {word: [tar for tar in tars if word in re.split(r"[^a-z]+", tar.stem.lower())] for word in SPLITS}
    splits = {word: some for word, some in splits.items() if some}
    if inner is path and subset in splits:
        return _from_files(open_tars(path, splits[subset]), "", captioned)
    if len(splits) > 1:
        raise UserError(
            f"source {str(inner)!r}: it holds tars of {', '.join(splits)}: choose one, --subset {next(iter(splits))}"
        )
    return _from_files(open_tars(inner, tars), subset if inner is path else "", captioned)


def _from_files(files: Files, subset: str, captioned: bool) -> Source:
    """Files with labels beside them, or class folders; a single folder around everything is stepped into."""
    prefix = f"{subset.strip('/')}/" if subset else ""
    names = [name for name in files.names if name.startswith(prefix)]
    images = images_of(names)
    if not images:
        tops = ", ".join(sorted({printable(name.partition("/")[0]) for name in files.names})[:8]) or "nothing"
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(map(_suffix, names)).most_common(4))
        raise UserError(
            f"source {str(files.where)!r}{f', subset {subset!r}' if subset else ''}: no image in it "
            f"({', '.join(SUFFIXES[:6])}, …); it holds {tops}{f' ({kinds})' * bool(kinds)}"
        )
    known = set(names)
    siblings = {kind: sum(sibling(name, kind) in known for name in images) for kind in ("cls", "json")}
    if siblings["cls"] or any(name.endswith(".cls") for name in names):
        return _source(files, "webdataset tars", names, images, *by_cls(files, known, images))
    labels_file = _labels_file(known, images, prefix)
    if labels_file:
        images, labels = by_table(files, labels_file, images)
        return _source(files, "files with dataset.json", names, images, labels)
    if siblings["json"] == len(images) and (found := by_json(files, images, prefix, captioned)):
        return _source(files, "webdataset tars with .json", names, images, *found)
    return _class_folders(files, prefix, names, images, captioned)


def _labels_file(known: set[str], images: list[str], prefix: str) -> str:
    """The dataset.json beside or above the images, or ""."""
    while True:
        for name in (f"{prefix}{LABELS_FILE}", f"{prefix}images/{LABELS_FILE}"):
            if name in known:
                return name
        if not (inner := _only_folder(images, prefix)):
            return ""
        prefix = inner


def _only_folder(images: list[str], prefix: str) -> str:
    """The folder below `prefix` that holds all images, in folders of its own; "" if there is none."""
    tops = {top_folder(name, prefix) for name in images}
    inner = f"{prefix}{next(iter(tops))}/" if len(tops) == 1 and "" not in tops else ""
    return inner if inner and any("/" in name[len(inner) :] for name in images) else ""


def _class_folders(files: Files, prefix: str, names: list[str], images: list[str], captioned: bool) -> Source:
    """A folder a class, or ImageNet's file names, which begin with the class."""
    while inner := _only_folder(images, prefix):
        prefix = inner
    tops = [top_folder(name, prefix) for name in images]
    loose = next((name for name, top in zip(images, tops, strict=True) if top in files.shards or not top), None)
    if loose is not None:
        found = [IMAGENET.match(name.rpartition("/")[2]) for name in images]
        wnids = [match[1] for match in found if match]
        if len(wnids) == len(images):
            return _source(files, "ImageNet's file names", names, images, *numbered(wnids))
        if captioned:
            return _source(files, "images without classes", names, images, [0] * len(images))
        raise UserError(
            f"source {str(files.where)!r}: {shown(loose)} lies in no class folder, and there is no {LABELS_FILE}, and "
            "no .cls or .json with a label beside it; one of these is needed"
        )
    classes = numbered_names(tops)
    nested = [t for name, t in zip(images, tops, strict=True) if "/" in name[len(prefix) + len(t) + 1 :]]
    splits = {top for top in classes if top.lower() in SPLITS}
    if len(classes) > 1 and splits and (splits == set(classes) or splits & set(nested)):
        best = next((top for top in classes if top.lower().startswith("train")), sorted(splits)[-1])
        raise UserError(
            f"source {str(files.where)!r}: it holds {', '.join(map(printable, classes[:8]))}: choose one, --subset "
            f"{prefix}{best}"
        )
    number = {name: i for i, name in enumerate(classes)}
    return _source(files, "class folders", names, images, [number[top] for top in tops], classes)


def _source(
    files: Files, kind: str, names: list[str], images: list[str], labels: list[int], classes: tuple[str, ...] = ()
) -> Source:
    array = np.array(labels, np.int64)
    used = set(images)
    keys = {sibling(name, "") for name in images} if kind.startswith("webdataset") else set()
    left_out = {printable(name): why for name, why in files.left_out.items()}
    for name in names:
        if hidden(name):
            left_out[printable(name)] = "hidden"
        elif name not in used and not name.endswith(LABELS_FILE) and sibling(name, "") not in keys:
            left_out[printable(name)] = _suffix(name)
    return Source(
        f"{printable(files.where.name)} ({kind})",
        [name.encode("utf-8", "backslashreplace").decode() for name in images],
        array,
        len(classes) or int(array.max()) + 1,
        tuple(map(printable, classes)),
        lambda i: files.read(images[i]),
        lambda i: files.stamp(images[i]),
        left_out,
        captions_beside(files, images),
    )


def _suffix(name: str) -> str:
    """.txt of "a/b.txt"; without one, "no suffix"."""
    file = name.rpartition("/")[2]
    return f".{printable(file.rpartition('.')[2].lower())[:12]}" if "." in file.lstrip(".") else "without suffix"


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image that can be read."""
    return name.lower().endswith(SUFFIXES)


def images_of(names: Iterable[str]) -> list[str]:
    """The images among names, sorted; hidden files and what macOS and Windows leave behind are none."""
    return sorted(name for name in names if is_image(name) and not hidden(name))
