"""Sets as people download them: labels by whatever tells them, or none, and a line that says what to do otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from st_fast.core.errors import UserError
from st_fast.data.labels import counts_line, read_labels
from st_fast.data.sources import open_source
from tests.prepare import sources
from tests.prepare.sources import picture, write, write_tar


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (sources.flat_folder, 6),
        (sources.nested_folders, 5),
        (sources.class_folders, 9),
        (sources.webdataset_shards, 4),
        (sources.img2dataset_shards, 4),
        (sources.imagenet_val_folder, 4),
        (lambda path: sources.edm_folder(path, None), 4),
        (lambda path: sources.class_zip(path / "a.zip"), 6),
        (lambda path: sources.img2dataset_shards(path, files=True), 4),
    ],
)
def test_unlabelled_images_are_one_class_wherever_they_lie(
    make: Callable[[Path], Path], count: int, tmp_path: Path
) -> None:
    source = open_source(make(tmp_path / "in"), unlabelled=True)
    assert source.labels.tolist() == [0] * count
    assert source.num_classes == 1 and source.class_names == ()
    assert sorted(map(source.read, range(count))) == sorted({source.read(n) for n in range(count)})
    assert source.summary().endswith(f": {count} images, all of one class")
    assert {name for name in source.left_out if name.endswith((".json", ".txt", ".cls"))} <= {
        "00000_stats.json",
        "00001_stats.json",
    }


def test_splits_are_not_mixed_without_being_asked(tmp_path: Path) -> None:
    for split in ("train", "val"):
        sources.nested_folders(tmp_path / split)
    with pytest.raises(UserError, match="it holds train, val: choose one, --subset train"):
        open_source(tmp_path, unlabelled=True)
    assert len(open_source(tmp_path, "train", unlabelled=True).names) == 5
    (tmp_path / "val").rename(tmp_path / "more")  # a folder like any other
    assert len(open_source(tmp_path, unlabelled=True).names) == 10


def test_one_split_alone_is_no_choice_and_a_class_may_be_called_like_one(tmp_path: Path) -> None:
    assert len(open_source(sources.flat_folder(tmp_path / "a" / "train").parent, unlabelled=True).names) == 6
    assert open_source(sources.class_folders(tmp_path / "b", ("car", "train"))).class_names == ("car", "train")
    for names in (("car", "train/x"), ("val/x", "test/y")):
        folder = sources.class_folders(tmp_path / names[0][:3], names)
        with pytest.raises(UserError, match=rf"choose one, --subset {'train' if 'car' in names else 'val'}"):
            open_source(folder)


def test_images_beside_class_folders_are_not_one_class(tmp_path: Path) -> None:
    write({"set/a/1.png": picture(1, "PNG"), "set/b/1.png": picture(2, "PNG"), "set/2.png": b""}, tmp_path)
    with pytest.raises(UserError, match=r"'set/2\.png' lies in no class folder"):
        open_source(tmp_path)
    (tmp_path / "set" / "2.png").unlink()
    write({"set/00000/img00000001.png": picture(1, "PNG")}, tmp_path)  # one that is named as EDM names all
    assert open_source(tmp_path).class_names == ("00000", "a", "b")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (sources.flat_folder, r"'IMG_0000\.jpg' lies in no class folder, .*--unlabelled takes all images as one class"),
        (sources.captioned_folder, r"--unlabelled takes .*, --captions auto keeps the texts beside them"),
        (lambda path: sources.edm_folder(path, None), r'"labels" is null, .*--unlabelled takes all'),
        (sources.img2dataset_shards, r"holds url, caption, .*--label-column names another key, --unlabelled takes"),
        (lambda path: sources.img2dataset_shards(path, files=True), r"holds url, caption, .*--unlabelled takes"),
        (sources.imagenet_val_folder, r"validation or test images, whose names have no class: sort them"),
    ],
)
def test_images_without_labels_are_refused_with_what_to_do(
    make: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as told:
        open_source(make(tmp_path / "in"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("files", [False, True])
def test_labels_of_img2dataset_are_the_key_that_is_named(tmp_path: Path, files: bool) -> None:
    more = [{"breed": "pug"}, {"breed": "akita"}, {"breed": "akita"}, {"breed": "pug", "label": 3}]
    folder = sources.img2dataset_shards(tmp_path / "in", more, files)
    source = open_source(folder, label_column="breed")
    assert source.class_names == ("akita", "pug") and source.labels.tolist() == [1, 0, 0, 1]
    with pytest.raises(UserError, match=r"--label-column bread: .*000000000\.json' holds url, caption"):
        open_source(folder, label_column="bread")
    with pytest.raises(UserError, match="means nothing with --unlabelled"):
        open_source(folder, label_column="breed", unlabelled=True)


def test_a_label_column_needs_a_table_or_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--label-column x: is of a table, or of a \.json .*'cat/000\.json'"):
        open_source(sources.class_folders(tmp_path), label_column="x")


@pytest.mark.parametrize("end", ["", ".json", ".parquet"])
def test_folders_of_shards_are_no_classes(tmp_path: Path, end: str) -> None:
    """Numbered folders are classes; beside a shard's own files, or with EDM's names in them, they are shards."""
    names = [f"0000{s}/{'img' * (not end)}{s:05d}{n:03d}.png" for s in range(2) for n in range(2)]
    write({name: picture(n, "PNG") for n, name in enumerate(names)}, tmp_path)
    if end == ".json":
        write({f"0000{s}_stats.json": b"{}" for s in range(2)}, tmp_path)
    elif end:
        write({f"0000{s}.parquet": b"" for s in range(2)}, tmp_path)
    with pytest.raises(UserError, match="lies in no class folder"):
        open_source(tmp_path)
    assert open_source(sources.class_folders(tmp_path / "00002", ("00000", "00001")).parent, "00002").num_classes == 2


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_a_sample_with_several_images_is_not_guessed(tmp_path: Path, kind: str) -> None:
    label = b"1" if kind == "cls" else b'{"label": 1}'
    names = [f"{n}.{end}" for n in range(2) for end in ("jpg", "seg.png")]
    members = {name: picture(n) for n, name in enumerate(names)} | {f"{n}.{kind}": label for n in range(2)}
    tar = write_tar(members, tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"'0\.jpg' and '0\.seg\.png' are images of one sample; --image-column jpg"):
        open_source(tar)
    for column, numbers in (("jpg", [0, 2]), (".jpg", [0, 2]), ("seg.png", [1, 3])):
        source = open_source(tar, image_column=column)
        assert [source.read(n) for n in range(2)] == [picture(n) for n in numbers]
    with pytest.raises(UserError, match=r"--image-column png: .*there are jpg \(2\), seg\.png \(2\)"):
        open_source(tar, image_column="png")


@pytest.mark.parametrize("make", [sources.imagenet_tars, sources.imagenet_flat_tar, sources.imagenet_train_tar])
def test_imagenet_in_tars_has_its_classes(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Also in a tar of tars, which is read in place."""
    source = open_source(make(tmp_path / ("in" if make is sources.imagenet_tars else "train.tar")))
    assert source.class_names == sources.WNIDS and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [source.read(n) for n in range(6)] == [picture(n) for n in range(6)]


def test_a_tar_that_is_cut_inside_of_another_is_refused(tmp_path: Path) -> None:
    whole = write_tar({f"n00000001_{n}.JPEG": picture(n) for n in range(3)}, tmp_path / "in.tar").read_bytes()
    cut = {700: "'n00000001_0\\.JPEG' ends at byte .*, the tar at 700", 512: "", len(whole) - 10_240: ""}
    for size, words in cut.items():
        outer = write_tar({"n00000001.tar": whole[:size], "n00000002.tar": whole}, tmp_path / "outer.tar")
        with pytest.raises(UserError, match=rf"outer\.tar: 'n00000001\.tar': .*{words}"):
            open_source(outer)
    deeper = write_tar({"a.tar": write_tar({"b.tar": whole}, tmp_path / "b").read_bytes()}, tmp_path / "deep.tar")
    with pytest.raises(UserError, match=r"no image in it .*1 \.tar"):
        open_source(deeper)


def test_labels_that_are_numbers_leave_room_for_classes_without_images(tmp_path: Path) -> None:
    source = open_source(sources.webdataset_shards(tmp_path, (4, 0, 4, 2)))
    assert source.num_classes == 5 and "3 of which have images" in source.summary()
    told = counts_line(source.labels, source.num_classes, source.class_names)
    assert told == "classes: 0 1, 1 0, 2 1, 3 0, 4 2"


def test_counts_of_many_classes_are_told_by_their_extremes() -> None:
    labels = np.repeat([0, 7, 29, -1], [5, 1, 3, 4])
    assert counts_line(labels, 30, ()) == "30 classes: 1 at least, 3 in the middle, 5 at most; 27 have none"
    assert counts_line(np.arange(21), 21, ()) == "21 classes: 1 at least, 1 in the middle, 1 at most"
    assert counts_line(labels[labels < 7], 2, ("a\x1b", "b")) == "classes: a\\x1b 5, b 0"
    many = np.repeat(np.arange(101), np.arange(10, 1020, 10))
    assert counts_line(many, 101, ()) == "101 classes: 10 at least, 510 in the middle, 1010 at most"
    assert counts_line(labels[:0], 30, ()) == "30 classes: 0 at least, 0 in the middle, 0 at most; 30 have none"
    assert counts_line(np.arange(20), 20, ()).endswith(", 18 1, 19 1")
    assert (
        counts_line(labels[:5], 1, ()) == "all 5 of one class" and counts_line(labels[:5], 1, ("a",)) == "classes: a 5"
    )


def test_tars_below_a_folder_are_those_of_a_split(tmp_path: Path) -> None:
    """As the hub has them: README.md, and data/train-00000.tar …, or a folder a split."""
    for split, labels in (("train", (0, 1, 2, 2)), ("test", (1, 0, 0, 0))):
        for shard in sorted(sources.webdataset_shards(tmp_path / "x" / split, labels).iterdir()):
            write({f"data/set-{split}-{shard.name}": shard.read_bytes()}, tmp_path / "named")
    write({"README.md": b"", ".cache/huggingface/a.tar": b"x"}, tmp_path / "named")
    for folder in (tmp_path / "named", tmp_path / "x"):
        with pytest.raises(UserError, match="it holds tars of train, test: choose one, --subset train"):
            open_source(folder)
        assert open_source(folder, "train").labels.tolist() == [0, 2, 1, 2]
        assert open_source(folder, "test", unlabelled=True).num_classes == 1


def test_json_of_webdataset_may_call_the_label_anything(tmp_path: Path) -> None:
    folder = sources.webdataset_shards(tmp_path, ("b", "a", "b", "c"), "json", "species")
    source = open_source(folder, label_column="species")
    assert source.class_names == ("a", "b", "c") and source.labels.tolist() == [1, 1, 0, 2]


@pytest.mark.parametrize(
    ("make", "names", "labels", "column"),
    [
        (lambda path: sources.webdataset_shards(path, (None, 4, 2, None), "json"), (), [-1, 2, 4, -1], ""),
        (lambda path: sources.webdataset_shards(path, ("b", None, "a", "b"), "json"), ("a", "b"), [1, 0, -1, 1], ""),
        (
            lambda path: sources.img2dataset_shards(path, [{"kind": k} for k in ("z", None, None, "x")], files=True),
            ("x", "z"),
            [1, -1, -1, 0],
            "kind",
        ),
        (lambda path: sources.edm_folder(path, (3, None, 0, None)), (), [3, -1, 0, -1], ""),
    ],
)
def test_an_image_whose_label_is_null_has_none_and_can_not_be_read(
    make: Callable[[Path], Path], names: tuple[str, ...], labels: list[int], column: str, tmp_path: Path
) -> None:
    source = open_source(make(tmp_path / "in"), label_column=column)
    assert source.labels.tolist() == labels and source.class_names == names
    assert source.num_classes == (len(names) or max(labels) + 1)
    for number, label in enumerate(labels):
        if label < 0:
            with pytest.raises(OSError, match="its label is null"):
                source.read(number)
        else:
            assert len(source.read(number)) > 100
    unlabelled = open_source(tmp_path / "in", unlabelled=True)
    assert unlabelled.labels.tolist() == [0] * 4 and all(map(unlabelled.read, range(4)))


def test_labels_that_are_all_null_are_told_as_an_unlabelled_set(tmp_path: Path) -> None:
    for make, words in (
        (
            lambda path: sources.webdataset_shards(path, [None] * 4, "json"),
            r"label is null in all 4 \.json files; --label-column names another key",
        ),
        (lambda path: sources.edm_folder(path, [None] * 4), r"dataset\.json: the label of every file is null"),
    ):
        with pytest.raises(UserError, match=rf"{words}.*[;,] --unlabelled takes all images as one class"):
            open_source(make(tmp_path / words[:3]))


def test_a_label_of_latents_is_never_null() -> None:
    with pytest.raises(UserError, match=r"the label of 'b\.npy' is None; a class number"):
        read_labels({"labels": [["a.npy", 1], ["b.npy", None]]}, "here")
