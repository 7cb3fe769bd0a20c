"""The files of a folder, a zip or tars by name: links resolved, limits kept, and nothing unpacked to disk.

A link counts as what it leads to: in a folder wherever that lies, in an archive only inside of it. Whatever has a name
but can't be read (a pipe, a link that leads nowhere) keeps its name, and reading it says why.
"""

import bisect
import errno
import os
import posixpath
import stat
import threading
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, open_regular, shown
from st_fast.core.limits import InnerTar, Zip, tar_members
from st_fast.core.machine import allow_open_files

MAX_FILE = 2**29
"""Bytes of one file that is read as an image or a label."""
MAX_DEPTH = 64
MAX_REPEATS = 16
"""How often links may repeat a folder, or an archive's files, before they count as hostile."""
MAX_HOPS = 40
MAX_TARGET = 4_096
"""Bytes of a link's target in a zip."""

Place = TypeVar("Place")


@dataclass(frozen=True)
class Files:
    """Named blobs. Names use "/"; `read` is thread-safe and raises OSError or `BadFile` where that can't be."""

    where: Path
    names: list[str]
    read: Callable[[str], bytes]
    stamp: Callable[[str], str] = lambda name: ""
    """A cheap trace of a file's content: its size, or its checksum where an archive has one."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What was not even looked at, with the reason."""
    shards: frozenset[str] = frozenset()
    """Folders that are only the names of tars whose files lie in no folder."""


def hidden(name: str) -> bool:
    """Whether a path leads through a hidden file or one that macOS or Windows leaves behind."""
    return any(
        part.startswith(".") or part == "__MACOSX" or part.lower() in ("thumbs.db", "desktop.ini")
        for part in name.split("/")
    )


def open_folder(path: Path) -> Files:
    """All files below `path`; a folder is not entered from inside itself, however links lead there."""
    names: list[str] = []
    left_out: dict[str, str] = {}
    entered: Counter[tuple[int, int]] = Counter()
    root = os.stat(path)
    below: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ((root.st_dev, root.st_ino),))]
    while below:
        prefix, above = below.pop()
        for name, is_folder, is_link in _entries(path, prefix):
            if not is_folder:
                names.append(name)
            elif hidden(name):
                left_out[name] = "a hidden folder"
            else:
                found = os.stat(path / name)
                key = (found.st_dev, found.st_ino)
                if key in above:
                    left_out[name] = "a link that leads back to a folder above it"
                    continue
                entered[key] += is_link
                if len(above) > MAX_DEPTH or entered[key] > MAX_REPEATS:
                    what = f"more than {MAX_REPEATS} links lead here" if is_link else f"more than {MAX_DEPTH} folders"
                    raise UserError(f"source {str(path)!r}: {shown(name)} is nested too deeply ({what})")
                below.append((f"{name}/", (*above, key)))

    def read(name: str) -> bytes:
        # O_NONBLOCK: opening a pipe that nobody writes to must not hang; it means nothing to a regular file.
        with os.fdopen(os.open(path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError("not a regular file")
            if found.st_size > MAX_FILE:
                raise OSError(f"{found.st_size} bytes, at most {MAX_FILE} are read")
            return file.read(MAX_FILE)

    return Files(path, names, read, lambda name: str(os.stat(path / name).st_size), left_out)


def _entries(path: Path, prefix: str) -> Iterator[tuple[str, bool, bool]]:
    """The names in a folder, whether each is a folder and whether it is a link."""
    try:
        with os.scandir(path / prefix) as entries:
            for entry in entries:
                yield f"{prefix}{entry.name}", _is_folder(entry), entry.is_symlink()
    except OSError as error:
        raise UserError(
            f"source {str(path)!r}: its folder {shown(prefix)} can't be read ({error.strerror}), so its images would "
            "be missing"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """False for a link to itself, as for a link to nothing."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def open_zip(path: Path) -> Files:
    """A zip's files; names made on Windows get their "/"."""
    # A ZipFile may be read by several threads, but each thread waits for the others: one a thread instead.
    local = threading.local()
    places: dict[str, zipfile.ZipInfo] = {}
    links: dict[str, str] = {}
    tree = Tree(places, links)
    with Zip(path) as archive:
        for info in archive.infolist():
            name = info.filename.replace("\\", "/")
            if name.endswith("/"):
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                tree.link(name, os.fsdecode(archive.member(info, MAX_TARGET)))
            else:
                tree.add(name, info)
    tree.resolve(path)

    def read(name: str) -> bytes:
        tree.check(name)
        if not hasattr(local, "archive"):
            local.archive = Zip(path)
        return bytes(local.archive.member(places[name], MAX_FILE))

    return Files(path, tree.names(), read, lambda name: f"{places[name].CRC:08x} {places[name].file_size}", tree.left)


def open_tars(where: Path, tars: list[Path]) -> Files:
    """One tar, or several; in several, a file that lies in no folder gets a folder named like its tar.

    Tars in a tar, as in ImageNet's ILSVRC2012_img_train.tar, count as several, and are read in their place.
    """
    allow_open_files(len(tars))
    every: dict[str, TarPlace] = {}
    problems: dict[str, str] = {}
    left_out: dict[str, str] = {}
    shards = set()
    parts: deque[TarPart] = deque(TarPart(path, path.stem, len(tars) > 1) for path in tars)
    while parts:
        part = parts.popleft()
        tree, inner = _tar_tree(part)
        parts.extendleft(reversed(inner))

        def full(name: str, part: TarPart = part) -> str:
            return f"{part.stem}/{name}" if part.several and "/" not in name else name

        if twice := next((name for name in tree.places if full(name) in every), None):
            raise UserError(f"{part.path}: it holds {shown(twice)}, as does another tar beside it")
        shards |= {part.stem for name in tree.places if full(name) != name}
        every |= {full(name): place for name, place in tree.places.items()}
        problems |= {full(name): why for name, why in tree.problems.items()}
        left_out |= tree.left

    def read(name: str) -> bytes:
        if name in problems:
            raise OSError(problems[name])
        file, start, size = every[name]
        if size > MAX_FILE:
            raise OSError(f"{size} bytes, at most {MAX_FILE} are read")
        data = os.pread(file.number, size, start)
        if len(data) != size:
            raise OSError(f"{size} bytes expected, {len(data)} found: the tar is cut off")
        return data

    return Files(where, [*every, *problems], read, lambda name: str(every[name][2]), left_out, frozenset(shards))


class Descriptor:
    """An open file's descriptor, closed with the last that knows it."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as opened:
            self.number = os.dup(opened.fileno())

    def __del__(self) -> None:
        if hasattr(self, "number"):  # not where the file could not be opened
            os.close(self.number)


TarPlace = tuple[Descriptor, int, int]
"""An open file, the first byte in it, bytes."""


class TarPart(NamedTuple):
    """A tar, or one that lies in the tar at `path`; `several`: whether there are others beside it."""

    path: Path
    stem: str
    several: bool
    file: Descriptor | None = None
    """The open file, where the tar is an inner one."""
    inner: InnerTar | None = None


def _tar_tree(part: TarPart) -> tuple["Tree[TarPlace]", list[TarPart]]:
    """The members of a tar, and the tars among them; those of a tar inside of another are left as they are."""
    tree, inner = Tree[TarPlace]({}, {}), list[TarPart]()
    file, first = part.file or Descriptor(part.path), part.inner.start if part.inner else 0
    for member in tar_members(part.path, part.inner):
        start = first + member.offset_data
        if member.isreg() and part.inner is None and member.name.endswith(".tar") and not hidden(member.name):
            stem = posixpath.basename(member.name).removesuffix(".tar")
            inner.append(TarPart(part.path, stem, True, file, InnerTar(member.name, start, member.size)))
        elif member.isreg():
            tree.add(member.name, (file, start, member.size))
        elif member.islnk():
            tree.link(member.name, member.linkname, hard=True)
        elif member.issym():
            tree.link(member.name, member.linkname)
        elif not member.isdir():
            tree.problems[member.name] = "a pipe or device"
    tree.resolve(part.path)
    return tree, inner


class Tree(Generic[Place]):
    """An archive's members and links; `resolve` gives every link the place of what it leads to, inside the archive."""

    def __init__(self, places: dict[str, Place], links: dict[str, str]) -> None:
        self.places, self.links = places, links
        self.problems: dict[str, str] = {}
        """Names that can't be read, with the reason."""
        self.left: dict[str, str] = {}

    def names(self) -> list[str]:
        """All names, those that can't be read, too."""
        return [*self.places, *self.problems]

    def check(self, name: str) -> None:
        """OSError saying why a name can't be read."""
        if name in self.problems:
            raise OSError(self.problems[name])

    def add(self, name: str, place: Place) -> None:
        """A member; a later one of the same name replaces it, as unpacking would."""
        clean = _inside("", name)
        if not clean:
            self.left[name] = "its name leads out of the archive"
            return
        if clean in self.places:
            self.left[f"{clean} (earlier)"] = "a later member has the same name"
        self.links.pop(clean, None)
        self.places[clean] = place

    def link(self, name: str, target: str, hard: bool = False) -> None:
        """A link: relative to its own folder, a hard one to the archive's beginning."""
        clean = _inside("", name)
        if not clean:
            self.left[name] = "its name leads out of the archive"
            return
        to = _inside("" if hard else posixpath.dirname(clean), target)
        self.places.pop(clean, None)
        if to is None:
            self.problems[clean] = "a link that leads out of the archive"
        else:
            self.links[clean] = to

    def resolve(self, where: Path) -> None:
        """Files and folders that links lead to appear under the links' names, too."""
        if not self.links:
            return
        below, linked = sorted(self.places), sorted(self.links)
        found: dict[str, Place] = {}

        def follow(link: str, name: str, above: tuple[str, ...]) -> None:
            target = self._locate(link)
            if target in self.places:
                found[name] = self.places[target]
            elif target is None or (target and not any(_range(below, target)) and not any(_range(linked, target))):
                self.problems[name] = "a link that leads nowhere in the archive"
            elif any(f"{folder}/".startswith(f"{target}/" if target else "") for folder in above):
                self.left[name] = "a link that leads back to a folder above it"
            else:
                for inner in _range(below, target):
                    found[name + inner[len(target) :]] = self.places[inner]
                if len(above) > MAX_DEPTH or len(found) > 1_000 + MAX_REPEATS * len(below):
                    raise BadFile(f"{where}: the link {shown(name)} repeats the archive's files too often")
                for inner in _range(linked, target):
                    follow(inner, name + inner[len(target) :], (*above, target))

        for link in linked:
            follow(link, link, (posixpath.dirname(link),))
        self.places |= found

    def _locate(self, name: str) -> str | None:
        """Where a name leads through links, or None where they lead in circles."""
        for _ in range(MAX_HOPS):
            parts = name.split("/")
            heads = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
            head = next((head for head in heads if head in self.links), None)
            if head is None:
                return name
            name = "/".join(filter(None, (self.links[head], name[len(head) + 1 :])))
        return None


def _range(names: list[str], folder: str) -> Iterator[str]:
    """Those of the sorted names that lie below a folder."""
    start = f"{folder}/"
    for number in range(bisect.bisect_left(names, start), len(names)):
        if not names[number].startswith(start):
            return
        yield names[number]


def _inside(folder: str, name: str) -> str | None:
    """A path from `folder` on without "." and "..": None where it leads out of the archive."""
    if name.startswith("/"):
        return None
    parts = folder.split("/") if folder else []
    for part in name.split("/"):
        if part == ".." and not parts:
            return None
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
