"""Numbered images with labels, wherever they lie; `data.sources` opens them."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import shown
from st_fast.data.captions import Captions

STAMPED, PROBED = 20_000, 256
"""Images, evenly spaced, of which the size and the content go into `Source.content`."""


@dataclass(frozen=True)
class Asked:
    """What of a source is wanted.

    captioned: images may have no labels, and are of one class then. unlabelled: they are in any case. The columns are
    those of a table, or the image's suffix and the label's key of webdataset's samples; "" leaves them to be found.
    """

    subset: str = ""
    captioned: bool = False
    unlabelled: bool = False
    image_column: str = ""
    label_column: str = ""


@dataclass(frozen=True)
class Source:
    """Numbered images with labels. `read(i)` → the bytes of image i's file; may be called from many threads."""

    description: str
    names: Sequence[str]
    labels: np.ndarray
    """(n,) int64; -1 for an image that has none, which can't be read."""
    num_classes: int
    class_names: tuple[str, ...]
    read: Callable[[int], bytes]
    stamp: Callable[[int], str] = lambda number: ""
    """A cheap trace of image i's content."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files beside the images that are none or can't be read as such, by name with the reason."""
    captions: Captions = lambda number: ()
    columns: Mapping[str, str] = field(default_factory=dict)
    """The columns that were named, by the argument of `open_source`, so that the same images are found again."""
    own_numbers: bool = False
    """Whether the labels stand as numbers in the source itself, and names, if any, only explain them."""

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
        present = len(np.unique(self.labels[self.labels >= 0]))
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
    """The same images with the class numbers of another set; UserError for a class that it does not know.

    A set without names has the numbers that the source's labels are, where they are numbers.
    """
    theirs = class_names or [str(number) for number in range(num_classes)]
    labels = source.labels
    if source.class_names and (class_names or not source.own_numbers):
        number = {name: i for i, name in enumerate(theirs)}
        if unknown := [name for name in source.class_names if name not in number]:
            raise UserError(
                f"{source.description}: {len(unknown)} of its {source.num_classes} classes are not of the data's "
                f"{num_classes} ({', '.join(theirs[:8])}{', …' * (num_classes > 8)}): {', '.join(unknown[:8])}"
            )
        labels = np.where(labels < 0, labels, np.array([number[name] for name in source.class_names], np.int64)[labels])
    if len(labels) and int(labels.max()) >= num_classes:
        raise UserError(f"{source.description}: class {labels.max()}; the data's are 0 … {num_classes - 1}")
    return replace(source, labels=labels, num_classes=num_classes, class_names=tuple(class_names))
