"""Columns, labels and splits of tables are found by name, and what can't be is told with what there is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from st_fast.core.errors import UserError
from st_fast.data import parquet, tables
from st_fast.data.parquet import files_of, split_of
from st_fast.data.source import Asked
from st_fast.data.sources import open_source
from st_fast.data.tables import IMAGE, LABEL, Column, Table, class_numbers, image_bytes, source_of
from tests.prepare import sources
from tests.prepare.sources import picture

COLUMNS = (Column("img", IMAGE), Column("mask", IMAGE), Column("fine", LABEL, ("b", "a")), Column("kind", "string"))


def table(values: Sequence[Any], columns: Sequence[Column] = COLUMNS) -> Table:
    return Table("here", "some rows", columns, len(values), lambda name: values, lambda name, row: picture(row))


@pytest.mark.parametrize(
    ("values", "names", "labels", "classes"),
    [
        (["emu", None, "cat", "emu"], (), [1, -1, 0, 1], ("cat", "emu")),
        ([None, 1, 0, float("nan")], ("b", "a"), [-1, 1, 0, -1], ("b", "a")),
        ([np.int64(3), 0], (), [3, 0], ()),
        (["10", "9"], (), [1, 0], ("9", "10")),
    ],
)
def test_strings_are_numbered_by_sorted_names_and_nulls_have_none(
    values: list[object], names: tuple[str, ...], labels: list[int], classes: tuple[str, ...]
) -> None:
    found, known = class_numbers("here", values, names)
    assert found.tolist() == labels and known == classes and found.dtype == np.int64


@pytest.mark.parametrize(
    ("values", "names", "words"),
    [
        ([None, None], (), "no row of 2 has a label; --unlabelled takes"),
        ([0, 2], ("a", "b"), r"row 1 has the label 2, 1 row of 2 no class number \(0 … 1\)"),
        ([None, -1, -1], ("a",), r"row 1 has the label -1, 2 rows of 3"),
        (["a", 1, None], (), "row 1 has the label 1"),
        ([True], (), "row 0 has the label True"),
        ([[1]], (), r"row 0 has the label \[1\]"),
        ([""], (), "row 0 has the label ''"),
    ],
)
def test_labels_that_are_no_classes_are_told(values: list[object], names: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        class_numbers("here", values, names)
    assert "\n" not in str(told.value)


def test_columns_are_taken_by_name_and_rows_without_label_can_not_be_read() -> None:
    source = source_of(table(["x", None, "w"]), Asked(image_column="mask", label_column="kind"))
    assert source.labels.tolist() == [1, -1, 0] and source.class_names == ("w", "x") and source.num_classes == 2
    assert source.names[1] == "row 1" and source.read(2) == picture(2)
    with pytest.raises(OSError, match="its label is null"):
        source.read(1)
    assert source.summary() == "some rows: 3 images of 2 classes: w, x"


def test_an_unlabelled_table_is_one_class_whatever_its_columns() -> None:
    source = source_of(table([7, None]), Asked(image_column="img", unlabelled=True))
    assert (source.labels.tolist(), source.num_classes, source.class_names) == ([0, 0], 1, ())
    assert source.read(1) == picture(1)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(), r"2 Image columns and none of them called image; it has img \(Image\), .*--image-column NAME"),
        (Asked(image_column="nope"), r"--image-column nope: here: no such column; it has .*kind \(string\)"),
        (Asked(image_column="kind"), r"--image-column kind: here: it holds string, no images; it has img"),
        (Asked(image_column="img", label_column="nope"), r"--label-column nope: here: no such column; it has img"),
    ],
)
def test_a_column_that_is_not_there_is_told_with_those_that_are(asked: Asked, words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        source_of(table([0]), asked)
    assert "\n" not in str(told.value)


def test_without_a_label_column_both_ways_on_are_told() -> None:
    with pytest.raises(UserError, match=r"no ClassLabel columns .*--label-column NAME names one, --unlabelled takes"):
        source_of(table([0], [Column("img", IMAGE), Column("kind", "string")]), Asked())


def test_captions_need_no_labels_and_keep_those_that_there_are() -> None:
    image, text = Column("img", IMAGE), Column("text", "string")
    for columns, labels, classes in (
        ((image, text), [0, 0], 1),
        ((image, text, Column("fine", LABEL, ("b", "a"))), [1, 0], 2),
        ((image, text, Column("label", "int64")), [1, 0], 2),
    ):
        rows = {"text": ["one", ["two", "three"]], "fine": [1, 0], "label": [1, 0]}
        told = Table("here", "some rows", columns, 2, rows.__getitem__, lambda name, row: b"")
        source = source_of(told, Asked(captioned=True))
        assert source.labels.tolist() == labels and source.num_classes == classes
        assert [list(source.captions(row)) for row in range(2)] == [["one"], ["two", "three"]]


def test_class_numbers_without_names_count_to_the_largest() -> None:
    source = source_of(table([3, None, 1]), Asked(image_column="img", label_column="kind"))
    assert source.num_classes == 4 and source.class_names == () and source.captions(0) == ()


def test_an_image_is_bytes_or_a_cell_with_bytes_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image_bytes(b"x") == image_bytes({"bytes": b"x", "path": "y"}) == b"x"
    (tmp_path / "file").write_bytes(b"image")
    assert image_bytes({"bytes": None, "path": str(tmp_path / "file")}) == b"image"
    monkeypatch.setattr(tables, "MAX_FILE", 5)
    assert image_bytes({"path": str(tmp_path / "file")}) == b"image"
    monkeypatch.setattr(tables, "MAX_FILE", 4)
    with pytest.raises(UserError, match="5 bytes, at most 4 are read"):
        image_bytes({"path": str(tmp_path / "file")})
    for cell in (None, {}, {"bytes": None, "path": None}, 3):
        with pytest.raises(OSError, match="no image in this row"):
            image_bytes(cell)


@pytest.mark.parametrize(
    ("name", "folder", "split"),
    [
        ("data/train-00000-of-00004.parquet", "data", "train"),
        ("data/train-00000-of-00004-d5f0b4.parquet", "data", "train"),
        ("plain_text/test-00003-of-00004.parquet", "plain_text", "test"),
        ("cifar100/train/0000.parquet", "cifar100", "train"),
        ("train/part-7.parquet", "", "train"),
        ("0000.parquet", "", ""),
        ("all.parquet", "", "all"),
        ("my-train-00000-of-00001.parquet", "", "my-train"),
    ],
)
def test_the_split_of_a_parquet_file_is_its_name_or_its_folders(name: str, folder: str, split: str) -> None:
    assert split_of(name) == (folder, split)


HUB = ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"]
CONFIGS = ["a/train/0000.parquet", "b/train/0000.parquet", "b/train/0001.parquet", "b/test/0000.parquet"]


@pytest.mark.parametrize(
    ("names", "subset", "chosen"),
    [
        (HUB, "train", HUB[1::-1]),
        (HUB, "test", HUB[2:]),
        (HUB, "data/test", HUB[2:]),
        (HUB[:2], "", HUB[1::-1]),
        (["x.parquet"], "", ["x.parquet"]),
        (CONFIGS, "b/train", CONFIGS[1:3]),
        (CONFIGS, "a", CONFIGS[:1]),
        (CONFIGS, "test", CONFIGS[3:]),
    ],
)
def test_subset_chooses_the_files_of_a_split(names: list[str], subset: str, chosen: list[str]) -> None:
    assert files_of("here", names, subset) == chosen


@pytest.mark.parametrize(
    ("names", "subset", "words"),
    [
        (HUB, "", "it holds test, train: choose one, --subset train"),
        (HUB, "val", "no split 'val'; it holds test, train"),
        (CONFIGS, "train", "it holds a/train, b/train: choose one, --subset a/train"),
        (CONFIGS, "b", "it holds test, train: choose one"),
        (["b.parquet", "a.parquet"], "", "it holds a, b: choose one, --subset a"),
    ],
)
def test_several_splits_are_listed(names: list[str], subset: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        files_of("here", names, subset)


def test_parquet_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    sources.write({"data/train-00000-of-00001.parquet": b"PAR1PAR1", "README.md": b""}, tmp_path)
    with pytest.raises(UserError, match=r"pyarrow reads; it is not installed: pip install"):
        open_source(tmp_path)


@pytest.mark.parametrize("metadata", [True, False])
def test_a_snapshot_of_the_hub_is_read_in_place(tmp_path: Path, metadata: bool) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow isn't installed")
    folder = sources.parquet_snapshot(tmp_path / "set", metadata=metadata)
    with pytest.raises(UserError, match="it holds test, train: choose one, --subset train"):
        open_source(folder)
    source = open_source(folder, "train")
    assert source.labels.tolist() == [1, 0, -1, 1, 2, 0]
    assert source.class_names == (("cat", "dog", "emu") if metadata else ()) and source.num_classes == 3
    assert [source.read(row) for row in (5, 0, 3, 4, 1)] == [picture(row) for row in (5, 0, 3, 4, 1)]
    with pytest.raises(OSError, match="its label is null"):
        source.read(2)
    one = open_source(folder / "data" / "test-00001-of-00002.parquet")
    assert one.labels.tolist() == [1, 2, 0] and one.read(2) == picture(5)


def test_strings_nulls_and_columns_of_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow isn't installed")
    values = ["fox", None, "ape", "fox"]
    folder = sources.parquet_snapshot(
        tmp_path, values, metadata=False, splits=("train",), columns=("img", "what"), without_image=(3,)
    )
    with pytest.raises(UserError, match=r"no ClassLabel columns .*it has img \(Image\), what \(string\), id \(int64\)"):
        open_source(folder)
    source = open_source(folder, label_column="what")
    assert source.labels.tolist() == [1, -1, 0, 1] and source.class_names == ("ape", "fox")
    with pytest.raises(OSError, match="no image in this row"):
        source.read(3)
    assert open_source(folder, unlabelled=True).read(1) == picture(1)
    with pytest.raises(UserError, match=r"--image-column id: .*it holds int64, no images"):
        open_source(folder, image_column="id", label_column="what")


def test_damaged_parquet_is_told_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow isn't installed")
    folder = sources.parquet_snapshot(tmp_path, splits=("train",))
    file = folder / "data" / "train-00000-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match="not readable as parquet") as told:
        open_source(folder)
    assert "\n" not in str(told.value)


def test_damaged_and_huge_groups_of_rows_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow isn't installed")
    folder = sources.parquet_snapshot(tmp_path, splits=("train",))
    source = open_source(folder)
    file = folder / "data" / "train-00000-of-00002.parquet"
    data = bytearray(file.read_bytes())
    data[4:300] = bytes(296)  # the first group's images
    file.write_bytes(data)
    with pytest.raises(OSError, match=r"train-00000-of-00002\.parquet: rows of group 0"):
        source.read(0)
    assert source.read(3) == picture(3)
    monkeypatch.setattr(parquet, "GROUP_MOST", 100)
    with pytest.raises(UserError, match=r"bytes of images in one group of rows, .*smaller row_group_size"):
        open_source(folder)


def test_a_saved_dataset_has_its_columns_by_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the Hugging Face package isn't installed")
    source = open_source(sources.saved_dataset(tmp_path / "a"))
    assert source.labels.tolist() == [1, 0, -1, 1] and source.class_names == ("cat", "dog")
    assert source.read(3) == picture(3)
    text = sources.saved_dataset(tmp_path / "b", ["y", "x", None, "y"])
    with pytest.raises(UserError, match=r"no ClassLabel columns .*picture \(Image\), kind \(string\)"):
        open_source(text)
    named = open_source(text, label_column="kind", image_column="picture")
    assert named.labels.tolist() == [1, 0, -1, 1] and named.class_names == ("x", "y") and named.read(0) == picture(0)
