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
from st_fast.core.files import FREE_BYTES, BadFile, open_regular, parse_json, printable, shown
from st_fast.data.archives import Files, hidden, open_folder, open_tars, open_zip
from st_fast.data.images import SUFFIXES

SPLITS = ("train", "training", "test", "val", "valid", "validation")
LABELS_FILE = "dataset.json"
"""Labels by file name as EDM and REPA write them: {"labels": [["00000/img00000000.png", 3], …]}."""
LABEL_KEYS = ("label", "class", "cls", "class_id", "class_index", "label_id", "target", "class_name", "wnid")
"""What a label is called in the .json beside an image."""
MAX_CLASSES = 1_000_000
JSON_FACTOR = 16
"""Bytes of memory that a byte of dataset.json may take: a line "name, label" takes six."""
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


def numbered_names(names: Iterable[str]) -> tuple[str, ...]:
    """The different names in the order of their numbers: sorted, by value where all are whole numbers."""
    different = set(names)
    if all(name.isascii() and name.isdigit() and len(name) <= 20 for name in different):
        return tuple(sorted(different, key=lambda name: (int(name), name)))
    return tuple(sorted(different))


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


def open_source(path: Path, subset: str = "") -> Source:
    """The images at `path`; `subset` keeps what lies in that folder of it. UserError says what was expected."""
    path, where = Path(path), f"source {str(path)!r}"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{where}: no such file or folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: can't be opened ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            from st_fast.data.hub import open_hub_dataset

            return open_hub_dataset(path, subset)
        return _open_folder(path, subset)
    with open_regular(path) as file:
        start = file.read(264) or b""
    if packed := next((name for magic, name in PACKED.items() if start.startswith(magic)), ""):
        raise UserError(f"{where}: packed by {packed}; a compressed tar can't be read at random; decompress it first")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")) or path.suffix.lower() == ".zip":
        return _from_files(open_zip(path), subset)
    if start[257:262] == b"ustar" or path.suffix.lower() == ".tar":
        return _from_files(open_tars(path, [path]), subset)
    raise UserError(
        f"{where}: a folder, .zip, .tar, a folder of webdataset .tar files or a Hugging Face dataset folder is needed"
    )


def _open_folder(path: Path, subset: str) -> Source:
    """A folder of images or of tars; of tars, `subset` may be the folder that they lie in or a word of their names."""
    inner = path / subset if subset and (path / subset).is_dir() else path
    tars = sorted(tar for tar in inner.glob("*.tar") if tar.is_file() and not hidden(tar.name))
    if not tars:
        return _from_files(open_folder(path), subset)
    loose = next((name for name in open_folder(inner).names if not hidden(name) and is_image(name)), None)
    if loose is not None:
        raise UserError(
            f"source {str(inner)!r}: it holds tars ({shown(tars[0].name)}) and images ({shown(loose)}): name one of "
            "them, or move them apart"
        )
    splits = {word: [tar for tar in tars if word in re.split(r"[^a-z]+", tar.stem.lower())] for word in SPLITS}
    splits = {word: some for word, some in splits.items() if some}
    if inner is path and subset in splits:
        return _from_files(open_tars(path, splits[subset]), "")
    if len(splits) > 1:
        raise UserError(
            f"source {str(inner)!r}: it holds tars of {', '.join(splits)}: choose one, --subset {next(iter(splits))}"
        )
    return _from_files(open_tars(inner, tars), subset if inner is path else "")


def _from_files(files: Files, subset: str) -> Source:
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
    siblings = {kind: sum(_sibling(name, kind) in known for name in images) for kind in ("cls", "json")}
    if siblings["cls"] or any(name.endswith(".cls") for name in names):
        return _source(files, "webdataset tars", names, images, *_by_cls(files, known, images))
    labels_file = _labels_file(known, images, prefix)
    if labels_file:
        images, labels = _by_table(files, labels_file, images)
        return _source(files, "files with dataset.json", names, images, labels)
    if siblings["json"] == len(images) and (found := _by_json(files, images, prefix)):
        return _source(files, "webdataset tars with .json", names, images, *found)
    return _class_folders(files, prefix, names, images)


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
    tops = {_top(name, prefix) for name in images}
    inner = f"{prefix}{next(iter(tops))}/" if len(tops) == 1 and "" not in tops else ""
    return inner if inner and any("/" in name[len(inner) :] for name in images) else ""


def _sibling(name: str, kind: str) -> str:
    """The file of that kind of the same sample: webdataset's keys end at the first dot."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}.{kind}"


def _by_cls(files: Files, known: set[str], images: list[str]) -> tuple[list[int], tuple[str, ...]]:
    """key.jpg beside key.cls, which holds the label as a number."""
    labels = []
    for name in images:
        label_name = _sibling(name, "cls")
        if label_name not in known:
            raise UserError(f"{files.where}: {shown(name)} has no {shown(label_name)} with its label beside it")
        data = _small(files, label_name).strip()
        if not re.fullmatch(rb"\d{1,20}", data) or int(data) >= MAX_CLASSES:
            raise UserError(
                f"{files.where}: {shown(label_name)}: {shown(data)} is not a class number (0 … {MAX_CLASSES - 1})"
            )
        labels.append(int(data))
    return labels, ()


def _by_json(files: Files, images: list[str], prefix: str) -> tuple[list[int], tuple[str, ...]] | None:
    """key.jpg beside key.json with its label, a number or a name; None where they have none and folders are classes."""
    key, labels = "", list[Any]()
    for name in images:
        label_name = _sibling(name, "json")
        table = parse_json(_small(files, label_name), Path(f"{files.where}: {shown(label_name)}"))
        key = key or next((key for key in LABEL_KEYS if key in table), "")
        if not key:
            tops = {_top(name, prefix) for name in images}
            if len(tops - files.shards) > 1 and not all(top.isdigit() for top in tops):
                return None
            raise UserError(
                f"{files.where}: no label: {shown(label_name)} beside {shown(name)} holds "
                f"{', '.join(map(printable, list(table)[:12])) or 'nothing'}; a .cls, or one of "
                f"{', '.join(LABEL_KEYS)} in the .json, would be read"
            )
        label = table.get(key)
        right = type(label) is int and 0 <= label < MAX_CLASSES if not isinstance(label, str) else label
        if not right or (labels and type(label) is not type(labels[0])):
            raise UserError(
                f"{files.where}: {shown(label_name)}: {key} = {shown(label)}; a class number (0 … {MAX_CLASSES - 1}), "
                "or a name for all images, is needed"
            )
        labels.append(label)
    if isinstance(labels[0], int):
        return labels, ()
    return _numbered(labels)


def _numbered(labels: list[str]) -> tuple[list[int], tuple[str, ...]]:
    classes = numbered_names(labels)
    number = {name: i for i, name in enumerate(classes)}
    return [number[label] for label in labels], classes


def _small(files: Files, name: str) -> bytes:
    """The content of a file that holds a label; `BadFile` in one line where it can't be read."""
    try:
        return files.read(name)
    except OSError as error:
        raise BadFile(f"{files.where}: {shown(name)} can't be read ({error.strerror or error})") from None


def _by_table(files: Files, labels_file: str, images: list[str]) -> tuple[list[str], list[int]]:
    """Every image has its label in a dataset.json beside or above it."""
    folder = labels_file.removesuffix(LABELS_FILE)
    place = f"{files.where}: {labels_file}"
    table = read_labels(parse_labels_file(_small(files, labels_file), place), place)
    images = [name for name in images if name.startswith(folder)]
    missing = [name for name in images if name[len(folder) :] not in table]
    if missing or len(images) != len(table):
        first = f"; {shown(missing[0])} has no label" if missing else ""
        raise UserError(f"{files.where}: {len(images)} images, but {len(table)} labels in {labels_file}{first}")
    return images, [table[name[len(folder) :]] for name in images]


def parse_labels_file(data: bytes, where: str) -> dict[str, Any]:
    """The content of a dataset.json, of which only the limits of JSON are checked."""
    return parse_json(data, Path(where), max(FREE_BYTES, JSON_FACTOR * len(data)))


def read_labels(document: dict[str, Any], where: str) -> dict[str, int]:
    """A dataset.json's labels: file name → class number. UserError names what is wrong."""
    labels = document.get("labels", "")
    if labels is None:
        raise UserError(f'{where}: "labels" is null, an unlabelled set; put its images into a folder, which is a class')
    if not isinstance(labels, list):
        raise UserError(f'{where}: {{"labels": [[file, class], …]}} is needed, not {shown(labels)}')
    try:
        table = {str(name).replace("\\", "/"): label for name, label in labels}
    except (ValueError, TypeError) as error:
        raise UserError(f'{where}: {{"labels": [[file, class], …]}} is needed ({error})') from None
    sound = (type(label) is int and 0 <= label < MAX_CLASSES for label in table.values())
    wrong = next((name for name, right in zip(table, sound, strict=True) if not right), None)
    if wrong is not None:
        raise UserError(
            f"{where}: the label of {shown(wrong)} is {shown(table[wrong])}; a class number (0 … {MAX_CLASSES - 1}) is "
            "needed"
        )
    if len(table) != len(labels):
        raise UserError(f"{where}: {len(labels)} labels, but only {len(table)} different file names")
    return table


def _class_folders(files: Files, prefix: str, names: list[str], images: list[str]) -> Source:
    """A folder a class, or ImageNet's file names, which begin with the class."""
    while inner := _only_folder(images, prefix):
        prefix = inner
    tops = [_top(name, prefix) for name in images]
    loose = next((name for name, top in zip(images, tops, strict=True) if top in files.shards or not top), None)
    if loose is not None:
        found = [IMAGENET.match(name.rpartition("/")[2]) for name in images]
        wnids = [match[1] for match in found if match]
        if len(wnids) == len(images):
            return _source(files, "ImageNet's file names", names, images, *_numbered(wnids))
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
    keys = {_sibling(name, "") for name in images} if kind.startswith("webdataset") else set()
    left_out = {printable(name): why for name, why in files.left_out.items()}
    for name in names:
        if hidden(name):
            left_out[printable(name)] = "hidden"
        elif name not in used and not name.endswith(LABELS_FILE) and _sibling(name, "") not in keys:
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
    )


def _suffix(name: str) -> str:
    """.txt of "a/b.txt"; without one, "no suffix"."""
    file = name.rpartition("/")[2]
    return f".{printable(file.rpartition('.')[2].lower())[:12]}" if "." in file.lstrip(".") else "without suffix"


def _top(name: str, prefix: str) -> str:
    """The first folder of a name below `prefix`, or ""."""
    return name[len(prefix) :].rpartition("/")[0].partition("/")[0]


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image that can be read."""
    return name.lower().endswith(SUFFIXES)


def images_of(names: Iterable[str]) -> list[str]:
    """The images among names, sorted; hidden files and what macOS and Windows leave behind are none."""
    return sorted(name for name in names if is_image(name) and not hidden(name))
