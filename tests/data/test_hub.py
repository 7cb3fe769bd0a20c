"""Hugging Face tables of every make are read or refused in one line; a stand-in has the package's few names we use."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from st_fast.core.errors import UserError
from st_fast.data.sources import open_source
from tests.fuzz import blocks, watched

from .conftest import encoded, picture


@dataclass
class Image:
    decode: bool = True


@dataclass
class ClassLabel:
    names: list[str]


class Value:
    """A plain column."""


class Table(list[dict[str, Any]]):
    """Rows with the features of their columns."""

    def __init__(self, rows: list[dict[str, Any]], **features: object) -> None:
        super().__init__(rows)
        self.features, self.split = features, None

    def cast_column(self, name: str, feature: object) -> Table:
        return self

    def select_columns(self, names: list[str]) -> Table:
        return Table([{name: row[name] for name in names} for row in self])

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


class Splits(dict[str, Table]):
    """Tables by split."""


def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: object, subset: str = "", **asked: str) -> Any:
    (tmp_path / "state.json").write_text("{}")
    package = SimpleNamespace(Image=Image, ClassLabel=ClassLabel, DatasetDict=Splits, load_from_disk=lambda path: data)
    monkeypatch.setitem(sys.modules, "datasets", package)  # type: ignore[arg-type]
    return open_source(tmp_path, subset, **asked)  # type: ignore[arg-type]


def rows(*labels: object) -> list[dict[str, Any]]:
    return [{"image": {"bytes": encoded(picture(0)), "path": None}, "label": label} for label in labels]


PLAIN = {"image": Image(), "label": Value()}


@pytest.mark.parametrize(
    ("labels", "feature", "numbers", "names"),
    [
        (["dog", "cat", "dog"], Value(), [1, 0, 1], ("cat", "dog")),
        (["10", "9", "10"], Value(), [1, 0, 1], ("9", "10")),
        ([2, 0, 2], Value(), [2, 0, 2], ()),
        ([1, 0, 1], ClassLabel(["b", "a"]), [1, 0, 1], ("b", "a")),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labels: list[object],
    feature: object,
    numbers: object,
    names: object,
) -> None:
    source = opened(tmp_path, monkeypatch, Table(rows(*labels), image=Image(), label=feature))
    assert source.labels.tolist() == numbers and source.class_names == names
    assert source.read(1) == encoded(picture(0))


@pytest.mark.parametrize(
    ("data", "subset", "words"),
    [
        (Table(rows(None, None), **PLAIN), "", "column 'label': no row of 2 has a label; --unlabelled takes"),
        (Table(rows("a", 1), **PLAIN), "", "row 1 has the label 1, 1 row of 2 no class number"),
        (Table(rows(-1), **PLAIN), "", r"row 0 has the label -1"),
        (Table(rows(0.5), **PLAIN), "", r"row 0 has the label 0\.5"),
        (Table(rows(2), image=Image(), label=ClassLabel(["a"])), "", r"row 0 has the label 2.*0 … 0"),
        (Table([], **PLAIN), "", "no row in it"),
        (
            Table(rows(0), picture=Value(), kind=Value()),
            "",
            r"no Image columns .* it has picture \(Value\), kind",
        ),
        (
            Table(rows(0), image=Image(), a=ClassLabel([]), b=ClassLabel([])),
            "",
            "2 ClassLabel columns",
        ),
        (Splits(train=Table([]), test=Table([])), "", "it holds train, test: choose one, --subset train"),
        (Splits(train=Table([])), "nope", "no split 'nope'; it holds train"),
        (Table(rows(0), **PLAIN), "train", "--subset train: it has no splits"),
    ],
)
def test_what_can_not_be_used_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: object, subset: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        opened(tmp_path, monkeypatch, data, subset)
    assert "\n" not in str(refusal.value)


def test_a_row_without_label_is_skipped_as_a_bad_image_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(tmp_path, monkeypatch, Table(rows("b", None, "a"), **PLAIN))
    assert source.labels.tolist() == [1, -1, 0] and source.class_names == ("a", "b")
    with pytest.raises(OSError, match="its label is null"):
        source.read(1)


def test_a_row_without_image_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table([{"image": None, "label": 0}, *rows(1)], **PLAIN)
    with pytest.raises(OSError, match="no image in this row"):
        opened(tmp_path, monkeypatch, table).read(0)


ODD = (None, -1, 0, 1, 2, 10**30, 0.0, "", "a", "\x1b[2J\n", b"x", True, [], {}, float("nan"))


@pytest.mark.parametrize("block", blocks(1, 10))
def test_tables_of_odd_labels_are_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    draw = random.Random(block)
    for _ in range(50):
        labels = draw.choices(ODD, k=draw.randrange(4))
        feature = draw.choice((Value(), ClassLabel(["a", "b"]), ClassLabel([])))
        with watched("Hugging Face table", 100 * len(labels)):
            try:
                source = opened(tmp_path, monkeypatch, Table(rows(*labels), image=Image(), label=feature))
                assert len(source.labels) == len(labels) and source.labels.max() < source.num_classes
            except UserError as error:
                assert str(error).isprintable() and len(str(error)) < 1000
                raise
