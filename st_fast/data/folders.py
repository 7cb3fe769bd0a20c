"""Labels that the folders of images tell, and which folders are none of classes: splits and shards."""

import re
from collections.abc import Sequence
from typing import NoReturn

from st_fast.core.errors import UserError
from st_fast.core.files import printable, shown
from st_fast.data.archives import Files
from st_fast.data.labels import LABELS_FILE, UNLABELLED_HINT, numbered, numbered_names, top_folder

SPLITS = ("train", "training", "test", "val", "valid", "validation")
IMAGENET = re.compile(r"(n\d{8})_")
IMAGENET_UNSORTED = re.compile(r"ILSVRC\d{4}_(val|test)_\d+\.")
SHARD_FILES = ("_stats.json", ".parquet")
"""What img2dataset writes beside a folder of images, which is a shard then and no class."""
EDM_IMAGE = re.compile(r"\d{5}/img\d{8}\.[a-z]+")
Found = tuple[str, list[int], tuple[str, ...]]
"""What tells the labels, the labels, and the classes' names."""


def only_folder(images: list[str], prefix: str) -> str:
    """The folder below `prefix` that holds all images, in folders of its own; "" if there is none."""
    tops = {top_folder(name, prefix) for name in images}
    inner = f"{prefix}{next(iter(tops))}/" if len(tops) == 1 and "" not in tops else ""
    return inner if inner and any("/" in name[len(inner) :] for name in images) else ""


def innermost(images: list[str], prefix: str) -> str:
    """The folder below `prefix` that holds all images, in several folders of its own or beside one another."""
    while inner := only_folder(images, prefix):
        prefix = inner
    return prefix


def check_splits(files: Files, prefix: str, images: list[str]) -> None:
    """UserError where the folders of all images are a set's splits, which are not for one training."""
    tops = sorted({top_folder(name, prefix) for name in images})
    if len(tops) > 1 and all(top.lower() in SPLITS for top in tops):
        _choose_split(files, prefix, tops, tops)


def _choose_split(files: Files, prefix: str, folders: Sequence[str], splits: Sequence[str]) -> NoReturn:
    best = next((top for top in folders if top.lower().startswith("train")), sorted(splits)[-1])
    raise UserError(
        f"source {str(files.where)!r}: it holds {', '.join(map(printable, folders[:8]))}: choose one, --subset "
        f"{prefix}{best}"
    )


def _shard_folders(files: Files, prefix: str, images: list[str]) -> frozenset[str]:
    """Numbered folders that are shards of img2dataset or EDM's dataset_tool, and no classes."""
    tops = {top_folder(name, prefix) for name in images}
    if all(EDM_IMAGE.fullmatch(name[len(prefix) :]) for name in images):
        return frozenset(tops)
    known = set(files.names)
    return frozenset(
        top for top in tops if top.isdigit() and any(f"{prefix}{top}{file}" in known for file in SHARD_FILES)
    )


def by_folders(files: Files, prefix: str, images: list[str], captioned: bool) -> Found:
    """A folder a class, or ImageNet's file names, which begin with the class; UserError where neither tells it.

    captioned: images of no class are of one, then.
    """
    prefix = innermost(images, prefix)
    tops = [top_folder(name, prefix) for name in images]
    shards = files.shards | _shard_folders(files, prefix, images)
    loose = next((name for name, top in zip(images, tops, strict=True) if top in shards or not top), None)
    if loose is not None:
        found = [IMAGENET.match(name.rpartition("/")[2]) for name in images]
        wnids = [match[1] for match in found if match]
        if len(wnids) == len(images):
            return "ImageNet's file names", *numbered(wnids)
        if captioned:
            return "images without classes", [0] * len(images), ()
        raise UserError(f"source {str(files.where)!r}: {_no_label(files, loose)}")
    classes = numbered_names(tops)
    nested = [t for name, t in zip(images, tops, strict=True) if "/" in name[len(prefix) + len(t) + 1 :]]
    splits = {top for top in classes if top.lower() in SPLITS}
    if len(classes) > 1 and splits and (splits == set(classes) or splits & set(nested)):
        _choose_split(files, prefix, classes, sorted(splits))
    number = {name: i for i, name in enumerate(classes)}
    return "class folders", [number[top] for top in tops], classes


def _no_label(files: Files, image: str) -> str:
    """Why an image has no class, and what can be done."""
    if IMAGENET_UNSORTED.match(image.rpartition("/")[2]):
        return (
            f"{shown(image)} is of ImageNet's validation or test images, whose names have no class: sort them into "
            f"class folders first; {UNLABELLED_HINT}"
        )
    captions = any(name.endswith(".txt") for name in files.names)
    return (
        f"{shown(image)} lies in no class folder, and there is no {LABELS_FILE}, and no .cls or .json with a label "
        f"beside it; one of these is needed, or {UNLABELLED_HINT}"
        f"{', --captions auto keeps the texts beside them' * captions}"
    )
