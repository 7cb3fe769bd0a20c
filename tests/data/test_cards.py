"""The README.md of a Hugging Face data set tells the names of classes, or none: it is no error and never trusted."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from st_fast.core.errors import UserError
from st_fast.data import cards
from st_fast.data.cards import names_on_card
from st_fast.data.manifest import read_manifest
from st_fast.data.source import Source, numbered_by
from st_fast.data.sources import open_source
from st_fast.prepare import __main__ as prepare
from st_fast.prepare import real_images
from tests.prepare import sources

pytestmark = pytest.mark.skipif(find_spec("yaml") is None, reason="PyYAML isn't installed")

BY_NUMBER = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': cat
          '1': no
          '2': 'großer Hund: "Rex"'
  splits:
  - name: train
    num_examples: 6
---
# A data set
"""
NAMES = ("cat", "no", 'großer Hund: "Rex"')


def config(name: str, *names: str, column: str = "label") -> str:
    """A configuration with the classes' names as a list, of a card with several."""
    rest = f"\n    dtype:\n      class_label:\n        names: [{', '.join(names)}]" if names else "\n    dtype: int64"
    return f"- config_name: {name}\n  features:\n  - name: image\n    dtype: image\n  - name: {column}{rest}\n"


def card(*configs: str) -> str:
    return f"---\ndataset_info:\n{''.join(configs)}---\n"


def told(
    folder: Path, text: str | bytes, file: str = "data/train-00000-of-00001.parquet"
) -> dict[str, tuple[str, ...]]:
    """What a card says of a file, both in a new folder."""
    sources.write({"README.md": text.encode() if isinstance(text, str) else text, file: b""}, folder)
    return names_on_card(folder / file)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_names_by_number_are_found_as_text_whatever_the_files_line_ends(tmp_path: Path, mark: str, end: str) -> None:
    assert told(tmp_path, mark + BY_NUMBER.replace("\n", end)) == {"label": NAMES}


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("train.parquet", {}),
        ("data/train.parquet", {"label": ("a", "b")}),
        ("fine/train/0000.parquet", {"label": ("c", "d", "e")}),
        ("numbers/train.parquet", {}),
    ],
)
def test_of_several_configurations_the_folders_counts(file: str, names: dict[str, object], tmp_path: Path) -> None:
    text = card(config("default", "a", "b"), config("fine", "c", "d", "e"), config("numbers"))
    assert told(tmp_path, text, file) == names


def test_what_all_configurations_say_is_taken_of_any_file(tmp_path: Path) -> None:
    same = card(config("x", "a", "b"), config("y", "a", "b"))
    assert told(tmp_path / "same", same) == {"label": ("a", "b")}
    assert told(tmp_path / "other", card(config("x", "a", "b"), config("y", "b", "a"))) == {}
    assert told(tmp_path / "less", card(config("x", "a", "b"), config("y"))) == {}
    assert told(tmp_path / "apart", card(config("x", "a"), config("y", "a", column="kind"))) == {}


def test_the_nearest_card_that_tells_of_the_set_counts(tmp_path: Path) -> None:
    deep = "one/two/three/x.parquet"
    sources.write({"one/README.md": b"# Notes\n", "one/two/README.md": BY_NUMBER.encode(), deep: b""}, tmp_path)
    sources.write({"README.md": card(config("x", "a", "b")).encode()}, tmp_path)
    assert names_on_card(tmp_path / deep) == {"label": NAMES}
    (tmp_path / "one" / "two" / "README.md").unlink()
    assert names_on_card(tmp_path / deep) == {"label": ("a", "b")}
    sources.write({"one/two/three/four/five/x.parquet": b""}, tmp_path)
    assert names_on_card(tmp_path / "one/two/three/four/five/x.parquet") == {}  # too far above


HOSTILE = {
    "no front matter": "# label: class_label\n",
    "front matter without an end": BY_NUMBER.replace("---\n# A data set\n", ""),
    "no YAML": "---\nclass_label: [}\n---\n",
    "a list": "---\n- class_label\n---\n",
    "no text": b"---\nclass_label: \xff\xfe\n---\n",
    "null bytes": "---\nclass_label: \0\n---\n",
    "nested": "---\nclass_label: " + "[" * 100_000 + "\n---\n",
    "nested blocks": "---\nclass_label:\n" + "- " * 100_000 + "\n---\n",
    "cyclic": "---\ndataset_info: &a\n  features: [*a, {name: label, dtype: {class_label: *a}}]\n---\n",
    "many aliases": "---\nclass_label:\n  a0: &a0 [x, x]\n"
    + "".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    + "dataset_info: {features: *a39}\n---\n",
    "an object": "---\ndataset_info: !!python/object/apply:os.system ['touch boom']\nclass_label: 1\n---\n",
    "a key that is a list": "---\n? [class_label]\n: 1\n---\n",
    "features that are text": "---\ndataset_info: {features: class_label}\n---\n",
    "a number left out": BY_NUMBER.replace("'1': no", "'3': no"),
    "a number twice": BY_NUMBER.replace("'1': no", "'0': no"),
    "a name twice": BY_NUMBER.replace("'1': no", "'1': cat"),
    "an empty name": BY_NUMBER.replace("'1': no", "'1': ''"),
    "a name that is a list": BY_NUMBER.replace("'1': no", "'1': [no]"),
    "names that are text": BY_NUMBER.replace("names:\n          '0': cat\n          '1': no\n          ", "names: a #"),
    "a sequence": BY_NUMBER.replace("dtype:\n      class_label", "sequence:\n      class_label"),
    "too long": BY_NUMBER.replace("license: mit", "license: " + "x" * cards.CARD_BYTES),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_card_that_tells_no_names_is_no_error(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not told(tmp_path, HOSTILE[kind]).get("label")
    assert not (tmp_path / "boom").exists()


def test_without_a_yaml_library_or_a_card_there_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(tmp_path, BY_NUMBER)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yaml", None)
        assert names_on_card(tmp_path / "data" / "x.parquet") == {}
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert names_on_card(tmp_path / "data" / "x.parquet") == {}


def test_parquet_without_metadata_has_its_cards_names_where_they_fit(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow isn't installed")
    labels, text = (1, 0, None, 1, 2, 0), BY_NUMBER.encode()

    def opened(folder: str, **how: object) -> Source:
        path = sources.parquet_snapshot(tmp_path / folder, splits=("train",), **how)  # type: ignore[arg-type]
        return open_source(path, label_column="label")

    named = opened("named", labels=labels, metadata=False, card=text)
    assert named.class_names == NAMES and named.labels.tolist() == [1, 0, -1, 1, 2, 0] and named.num_classes == 3
    alone = open_source(tmp_path / "named" / "data" / "train-00001-of-00002.parquet")
    assert alone.class_names == NAMES and alone.labels.tolist() == [1, 2, 0]
    assert opened("metadata", labels=labels, card=text).class_names == ("cat", "dog", "emu"), "the files' own count"
    more = opened("more", labels=(1, 3, 0), metadata=False, card=text)
    assert more.class_names == () and more.num_classes == 4, "three names for four numbers"
    words = opened("words", labels=("x", "w", "x"), metadata=False, card=text)
    assert words.class_names == ("w", "x") and words.labels.tolist() == [1, 0, 1]
    fewer = opened("fewer", labels=(1, 0, 1), metadata=False, card=text)
    assert fewer.class_names == NAMES and fewer.num_classes == 3
    assert open_source(tmp_path / "named", unlabelled=True).class_names == ()


def test_names_that_came_or_went_leave_a_finished_set_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for real images, which are found by the numbers then."""
    pytest.importorskip("pyarrow", reason="pyarrow isn't installed")
    options = ["--subset", "train", "--size", "16", "--vae", "pixels", "--device", "cpu"]
    for first, second in ((b"", BY_NUMBER.encode()), (BY_NUMBER.encode(), b"")):
        folder = tmp_path / f"names-{len(first)}"
        snapshot = sources.parquet_snapshot(folder, labels=(1, 0, 2, 1, 2, 0), metadata=False, card=first)
        out = tmp_path / f"out-{len(first)}"
        prepare.main([str(snapshot), str(out), *options])
        assert read_manifest(out).class_names == (NAMES if first else ())
        (snapshot / "README.md").write_bytes(second)
        prepare.main([str(snapshot), str(out), *options])
        assert "complete already" in capsys.readouterr().out
        real_images.main([str(snapshot), str(out), "--test", "1", "--train", "4"])
    with pytest.raises(UserError, match=r"class_names .*cat.* \(now .*cow"):
        (snapshot / "README.md").write_text(BY_NUMBER.replace("cat", "cow"), encoding="utf-8")
        prepare.main([str(snapshot), str(out), *options])


def test_numbers_are_those_of_a_set_without_names_where_they_are_the_sources_own() -> None:
    source = Source("here", ["a", "b"], np.array([1, 0]), 2, ("x", "y"), lambda number: b"", own_numbers=True)
    assert numbered_by(source, (), 3).labels.tolist() == [1, 0]
    assert numbered_by(source, ("y", "x"), 2).labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"2 of its 2 classes are not of the data's 3 \(0, 1, 2\): x, y"):
        numbered_by(replace(source, own_numbers=False), (), 3)
