"""Where images come from: a folder, zip or tar, webdataset tars, Hugging Face's tables, IDX files, REPA's images/.

A source knows its images by number; reading one gives the file's bytes. What is an image, its label and its order are
decided from names (and from the files that hold labels) alone, so the same input gives the same set on any machine.
"""

import itertools
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import open_regular, printable, shown
from st_fast.data.archives import Files, hidden, open_folder, open_tars, open_zip
from st_fast.data.captions import KINDS, captions_beside
from st_fast.data.folders import SPLITS, by_folders, check_splits, innermost, only_folder
from st_fast.data.idx import idx_files, open_idx
from st_fast.data.images import SUFFIXES
from st_fast.data.labels import LABELS_FILE, NULL_LABEL, by_cls, by_json, by_table, sibling
from st_fast.data.source import Asked, Source

PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
UNLABELLED = "unlabelled"


def open_source(
    path: Path, subset: str = "", captioned: bool = False, unlabelled: bool = False, image_column: str = "",
    label_column: str = "",
) -> Source:  # fmt: skip
    """The images at `path`; `subset` keeps what lies in that folder of it. UserError says what was expected.

    The rest is `Asked`'s; with captions .txt and .json files are none of `left_out`.
    """
    if unlabelled and label_column:
        raise UserError(f"--label-column {label_column}: means nothing with --unlabelled; leave one of them out")
    source = _open(Path(path), Asked(subset, captioned, unlabelled, image_column, label_column))
    columns = {"image_column": image_column, "label_column": label_column}
    source = replace(source, columns={name: column for name, column in columns.items() if column})
    if not captioned:
        return source
    return replace(source, left_out={name: why for name, why in source.left_out.items() if why not in KINDS})


def _open(path: Path, asked: Asked) -> Source:
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

            return open_hub_dataset(path, asked)
        return _open_folder(path, asked)
    if idx_files([path.name]):
        return open_idx(path.parent, [path.name], asked)
    with open_regular(path) as file:
        start = file.read(264) or b""
    if packed := next((name for magic, name in PACKED.items() if start.startswith(magic)), ""):
        raise UserError(f"{where}: packed by {packed}; a compressed tar can't be read at random; decompress it first")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")) or path.suffix.lower() == ".zip":
        return _from_files(open_zip(path), asked)
    if start.startswith(b"PAR1"):
        return _open_parquet(path.parent, [path.name], asked)
    if start[257:262] == b"ustar" or path.suffix.lower() == ".tar":
        return _from_files(open_tars(path, [path]), asked)
    raise UserError(
        f"{where}: a folder, .zip, .tar, .parquet, a folder of webdataset .tar or of .parquet files, or a Hugging Face "
        "dataset folder is needed"
    )


def _open_parquet(path: Path, names: list[str], asked: Asked) -> Source:
    from st_fast.data.parquet import open_parquet  # which reads `Source` here

    return open_parquet(path, names, asked)


def _open_folder(path: Path, asked: Asked) -> Source:
    """A folder of images, tars or parquet, also of folders of these; of tars, `subset` may be the folder that they lie
    in or a word of their names.
    """
    subset = asked.subset
    inner = path / subset if subset and (path / subset).is_dir() else path
    tars = sorted(tar for tar in inner.glob("*.tar") if tar.is_file() and not hidden(tar.name))
    if not tars:
        files = open_folder(path)
        names = [name for name in files.names if not hidden(name)]
        tars = sorted(path / name for name in names if name.endswith(".tar") and inner in (path / name).parents)
        if (tables := [name for name in names if name.lower().endswith(".parquet")]) and not (tars or images_of(names)):
            return _open_parquet(path, tables, asked)
        if idx_files(names) and not (tars or images_of(names)):
            return open_idx(path, names, asked)
        if not tars or images_of(names):
            return _from_files(files, asked)
    loose = next((name for name in open_folder(inner).names if not hidden(name) and is_image(name)), None)
    if loose is not None:
        raise UserError(
            f"source {str(inner)!r}: it holds tars ({shown(tars[0].name)}) and images ({shown(loose)}): name one of "
            "them, or move them apart"
        )
    words = {tar: re.split(r"[^a-z]+", str(tar.relative_to(inner).with_suffix("")).lower()) for tar in tars}
    splits = {word: some for word in SPLITS if (some := [tar for tar in tars if word in words[tar]])}
    if inner is path and subset in splits:
        return _from_files(open_tars(path, splits[subset]), replace(asked, subset=""))
    if len(splits) > 1:
        raise UserError(
            f"source {str(inner)!r}: it holds tars of {', '.join(splits)}: choose one, --subset {next(iter(splits))}"
        )
    return _from_files(open_tars(inner, tars), asked if inner is path else replace(asked, subset=""))


def _from_files(files: Files, asked: Asked) -> Source:
    """Files with labels beside them, or class folders; a single folder around everything is stepped into."""
    prefix = f"{asked.subset.strip('/')}/" if asked.subset else ""
    names = [name for name in files.names if name.startswith(prefix)]
    images = images_of(names)
    if not images:
        tops = ", ".join(sorted({printable(name.partition("/")[0]) for name in files.names})[:8]) or "nothing"
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(map(_suffix, names)).most_common(4))
        raise UserError(
            f"source {str(files.where)!r}{f', subset {asked.subset!r}' if asked.subset else ''}: no image in it "
            f"({', '.join(SUFFIXES[:6])}, …); it holds {tops}{f' ({kinds})' * bool(kinds)}"
        )
    if asked.image_column:
        images = _of_suffix(files, images, asked.image_column)
    known = set(names)
    siblings = {kind: sum(sibling(name, kind) in known for name in images) for kind in ("cls", "json")}
    labels_file = _labels_file(known, images, prefix)
    if asked.unlabelled:
        prefix = innermost(images, prefix)
        check_splits(files, prefix, images)
        return _source(files, UNLABELLED, names, images, [0] * len(images))
    if asked.label_column:
        if siblings["json"] < len(images):
            first = next(name for name in images if sibling(name, "json") not in known)
            raise UserError(
                f"--label-column {asked.label_column}: is of a table, or of a .json beside each image; "
                f"{files.where}: {shown(first)} has no {shown(sibling(first, 'json'))}"
            )
    elif siblings["cls"] or any(name.endswith(".cls") for name in names):
        _check_keys(files, images)
        return _source(files, "webdataset tars", names, images, *by_cls(files, known, images))
    elif labels_file:
        images, labels = by_table(files, labels_file, images)
        return _source(files, "files with dataset.json", names, images, labels)
    json_labels = siblings["json"] == len(images)
    if json_labels and (found := by_json(files, images, prefix, asked.captioned, asked.label_column)):
        _check_keys(files, images)
        return _source(files, "webdataset tars with .json", names, images, *found)
    kind, labels, classes = by_folders(files, prefix, images, asked.captioned)
    return _source(files, kind, names, images, labels, classes)


def _of_suffix(files: Files, images: list[str], suffix: str) -> list[str]:
    """The images whose names end so behind webdataset's key; UserError names the endings that there are."""
    ends = {name: name.rpartition("/")[2].partition(".")[2] for name in images}
    if chosen := [name for name in images if ends[name] == suffix.removeprefix(".")]:
        return chosen
    there = ", ".join(f"{printable(end)} ({count})" for end, count in Counter(ends.values()).most_common(8))
    raise UserError(f"--image-column {suffix}: {files.where}: no image's name ends in .{suffix}; there are {there}")


def _check_keys(files: Files, images: list[str]) -> None:
    """UserError where a sample has several images, of which one may be a mask or a smaller copy."""
    for name, after in itertools.pairwise(images):
        if sibling(name, "") == sibling(after, ""):
            suffix = name[len(sibling(name, "")) :]
            raise UserError(
                f"{files.where}: {shown(name)} and {shown(after)} are images of one sample; --image-column {suffix} "
                "takes the first of each"
            )


def _labels_file(known: set[str], images: list[str], prefix: str) -> str:
    """The dataset.json beside or above the images, or ""."""
    while True:
        for name in (f"{prefix}{LABELS_FILE}", f"{prefix}images/{LABELS_FILE}"):
            if name in known:
                return name
        if not (inner := only_folder(images, prefix)):
            return ""
        prefix = inner


def _source(
    files: Files, kind: str, names: list[str], images: list[str], labels: list[int], classes: tuple[str, ...] = ()
) -> Source:
    array = np.array(labels, np.int64)
    used = set(images)
    whole = kind.startswith("webdataset") or kind == UNLABELLED
    keys = {sibling(name, "") for name in images} if whole else set()
    left_out = {printable(name): why for name, why in files.left_out.items()}
    for name in names:
        if hidden(name):
            left_out[printable(name)] = "hidden"
        elif name not in used and not name.endswith(LABELS_FILE) and sibling(name, "") not in keys:
            left_out[printable(name)] = _suffix(name)

    def read(number: int) -> bytes:
        if array[number] < 0:
            raise OSError(NULL_LABEL)
        return files.read(images[number])

    return Source(
        f"{printable(files.where.name)} ({kind})",
        [name.encode("utf-8", "backslashreplace").decode() for name in images],
        array,
        len(classes) or int(array.max()) + 1,
        tuple(map(printable, classes)),
        read,
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
