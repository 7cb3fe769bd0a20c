"""Links are followed inside their bounds, whatever can't be read is counted, and a damaged archive is refused."""

from __future__ import annotations

import gc
import os
import random
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.data.archives import open_tars
from st_fast.data.source import numbered_by
from st_fast.data.sources import open_source
from tests.fuzz import blocks, watched

from .conftest import encoded, picture
from .test_sources import add, pack


def linked(root: Path) -> Path:
    """A class, a link to it, one that leads back to the root, one to itself, a linked picture and a text."""
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "0.png").write_bytes(encoded(picture(0)))
    (root / "cat" / "1.png").symlink_to("0.png")
    (root / "dog").symlink_to("cat")
    (root / "cat" / "loop").symlink_to("..")
    (root / "self").symlink_to("self")
    (root / "cat" / "note.txt").write_text("x")
    return root


@pytest.mark.parametrize("name", ["folder", "a.tar"])
def test_links_are_followed_and_a_loop_is_not(tmp_path: Path, name: str) -> None:
    path = linked(tmp_path / "in")
    if name == "a.tar":
        with tarfile.open(tmp_path / name, "w") as archive:
            archive.add(path, ".")
        path = tmp_path / name
    source = open_source(path)
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [0, 0, 1, 1]
    assert all(source.read(i) == encoded(picture(0)) for i in range(4))
    assert "leads back" in str(source.left_out) and ".txt" in source.left_out_summary()


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_hard_link_in_a_tar_is_the_image_that_it_leads_to(tmp_path: Path, order: str) -> None:
    """Of which tar packs the second name of a file; its target counts from the archive's beginning."""
    link = tarfile.TarInfo("dog/1.png")
    link.type, link.linkname = tarfile.LNKTYPE, "cat/0.png"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        if order == "before":
            archive.addfile(link)
        add(archive, "cat/0.png", encoded(picture(7)))
        if order == "after":
            archive.addfile(link)
    source = open_source(tmp_path / "a.tar")
    assert (source.class_names, source.labels.tolist()) == (("cat", "dog"), [0, 1]) and not source.left_out
    assert source.read(0) == source.read(1) == encoded(picture(7))


@pytest.mark.parametrize("target", ["/etc/hostname", "../../out.png", "nowhere.png", "self.png"])
def test_a_link_in_a_tar_never_leads_out_of_it(tmp_path: Path, target: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "c/0.png", encoded(picture(0)))
        info = tarfile.TarInfo("c/self.png")
        info.type, info.linkname = tarfile.SYMTYPE, target
        archive.addfile(info)
    source = open_source(tmp_path / "a.tar")
    with pytest.raises(OSError, match=r"a link that leads (out of|nowhere in) the archive"):
        source.read(1)


def test_a_pipe_and_a_name_that_is_no_text_are_met_without_waiting(class_folders: Path) -> None:
    os.mkfifo(class_folders / "b c" / "pipe.png")
    Path(os.fsdecode(os.fsencode(class_folders) + b"/b c/bad\xff.png")).write_bytes(b"x")
    source = open_source(class_folders)
    pipe = list(source.names).index("b c/pipe.png")
    with pytest.raises(OSError, match="not a regular file"):
        source.read(pipe)
    assert any("\\udcff" in name for name in source.names)


def test_numbered_folders_are_sorted_by_number_and_windows_zips_have_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in (0, 1, 2, 10):
            archive.writestr(f"in\\{number}\\x.png", encoded(picture(number)))
    assert open_source(tmp_path / "a.zip").class_names == ("0", "1", "2", "10")


def test_another_sets_numbers_are_taken_and_an_unknown_class_is_refused(class_folders: Path) -> None:
    source = open_source(class_folders)
    assert numbered_by(source, ("a", "b c", "été 中文"), 3).labels.tolist() == [1, 1, 1, 2, 2, 2]
    with pytest.raises(UserError, match=r"1 of its 2 classes are not of the data's 2 .*: été 中文"):
        numbered_by(source, ("a", "b c"), 2)


@contextmanager
def one_bad_picture_is_no_bad_archive() -> Iterator[None]:
    """Takes an OSError of one line."""
    try:
        yield
    except OSError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize("block", blocks(2, 12))
@pytest.mark.parametrize("kind", ["a.tar", "a.zip"])
def test_a_damaged_archive_is_refused_in_one_line_or_read(
    class_folders: Path, tmp_path: Path, kind: str, block: int
) -> None:
    draw = random.Random(block)
    good = pack(class_folders, tmp_path / kind).read_bytes()
    for _ in range(50):
        data = bytearray(good)
        if draw.random() < 0.4:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.randrange(1, 6)):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / kind).write_bytes(data)
        with watched("archive of images", len(data)), one_bad_picture_is_no_bad_archive():
            source = open_source(tmp_path / kind)
            for number in range(len(source.names)):
                source.read(number)


def test_a_tar_cut_between_members_is_refused(class_folders: Path, tmp_path: Path) -> None:
    path = pack(class_folders, tmp_path / "a.tar")
    with tarfile.open(path) as archive:
        cut = archive.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="cut off"):
        open_source(path)


def test_tars_are_closed_with_the_last_that_reads_them(tmp_path: Path) -> None:
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
    (tmp_path / "3.tar").write_bytes(b"no tar")

    def opened() -> int:
        """How many of this folder's files are open: what other tests left open may be closed at any time."""
        found = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return sum(name.startswith(f"{tmp_path.resolve()}/") for name in found)

    files = open_tars(tmp_path, [tmp_path / f"{number}.tar" for number in range(3)])
    assert opened() == 3 and files.read("1/a.txt") == b""
    del files
    with pytest.raises(BadFile, match=r"3\.tar"):
        open_tars(tmp_path, sorted(tmp_path.glob("*.tar")))
    gc.collect()
    assert opened() == 0
