"""The same pictures give the same labels and bytes from a folder, a zip, a tar, webdataset tars and dataset.json."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from st_fast.core.errors import UserError, how_to_install
from st_fast.data.sources import open_source

from .conftest import encoded, picture


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def pack(root: Path, target: Path, prefix: str = "") -> Path:
    """A zip or tar of a folder."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for path in files:
                archive.write(path, f"{prefix}{path.relative_to(root).as_posix()}")
    else:
        with tarfile.open(target, "w") as tar:
            for path in files:
                tar.add(path, f"{prefix}{path.relative_to(root).as_posix()}")
    return target


@pytest.mark.parametrize(
    ("name", "prefix"),
    [(name, prefix) for name in ("folder", "a.zip", "a.tar") for prefix in ("", "set/")] + [("a.tar", "./")],
)
def test_class_folders_from_anywhere(class_folders: Path, tmp_path: Path, name: str, prefix: str) -> None:
    path = class_folders if name == "folder" else pack(class_folders, tmp_path / name, prefix)
    if name == "folder" and prefix:
        (tmp_path / "outer").mkdir()
        path = tmp_path / "outer"
        class_folders.rename(path / "set")
        class_folders = path / "set"
    source = open_source(path)
    assert source.class_names == ("b c", "été 中文")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.num_classes == 2
    for number, file in enumerate(sorted(class_folders.rglob("*.png"), key=lambda p: p.as_posix())):
        assert source.read(number) == file.read_bytes()


def test_digest_depends_on_names_and_labels_alone(class_folders: Path, tmp_path: Path) -> None:
    one, other = (open_source(pack(class_folders, tmp_path / name)) for name in ("a.zip", "b.tar"))
    assert one.digest() == other.digest()
    (class_folders / "b c" / "more.png").write_bytes(encoded(picture(9)))
    more = open_source(class_folders).digest()
    (class_folders / "b c" / "more.png").rename(class_folders / "b c" / "other.png")  # as many, with the same labels
    assert len({one.digest(), more, open_source(class_folders).digest()}) == 3


def test_files_that_are_no_pictures_and_hidden_ones_are_left_out(class_folders: Path) -> None:
    for name in ("notes.txt", ".hidden.png", "._picture 0 ü.png"):
        (class_folders / "b c" / name).write_bytes(b"x")
    (class_folders / "__MACOSX" / "b c").mkdir(parents=True)
    (class_folders / "__MACOSX" / "b c" / "x.png").write_bytes(b"x")
    found = open_source(class_folders)
    assert len(found.names) == 6
    hidden = dict.fromkeys(("b c/.hidden.png", "b c/._picture 0 ü.png"), "hidden") | {"__MACOSX": "a hidden folder"}
    assert found.left_out == hidden | {"b c/notes.txt": ".txt"}


@pytest.mark.parametrize("tars", [1, 2])
def test_webdataset_tars(tmp_path: Path, tars: int) -> None:
    folder = tmp_path / "wds"
    folder.mkdir()
    for t in range(tars):
        with tarfile.open(folder / f"{t:05d}.tar", "w") as archive:
            for i in range(3):
                add(archive, f"{t}{i:03d}.jpg", encoded(picture(t * 3 + i), "JPEG"))
                add(archive, f"{t}{i:03d}.cls", str(i + 2).encode())
                add(archive, f"{t}{i:03d}.json", b"{}")
    source = open_source(folder if tars > 1 else folder / "00000.tar")
    assert source.labels.tolist() == [2, 3, 4] * tars and source.num_classes == 5
    assert source.read(len(source.names) - 1) == encoded(picture(tars * 3 - 1), "JPEG")


def test_webdataset_picture_without_label_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.jpg", encoded(picture(0)))
        add(archive, "0.cls", b"1")
        add(archive, "1.jpg", encoded(picture(0)))
    with pytest.raises(UserError, match=r"'1\.jpg' has no '1\.cls'"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("label", ["1" + "0" * 30, "9" * 5_000, "1000000", "-1", "1.0", "cat", "", "\u0663"])
def test_a_cls_that_is_no_class_number_is_refused_in_one_line(tmp_path: Path, label: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.jpg", encoded(picture(0)))
        add(archive, "0.cls", label.encode())
    with pytest.raises(UserError, match=r"'0\.cls': .* is not a class number \(0 … 999999\)") as caught:
        open_source(tmp_path / "a.tar")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_webdataset_of_arrays_is_told_as_one_without_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.npy", b"\x93NUMPY")
        add(archive, "0.cls", b"1")
    with pytest.raises(UserError, match=r"no image in it .*1 \.npy, 1 \.cls"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("tars", [("n00000001", "n00000002"), ("train-0", "train-1"), ("all",)])
def test_imagenets_file_names_tell_the_class(tmp_path: Path, tars: tuple[str, ...]) -> None:
    """Its own tars, of which each is a class, and the same pictures spread over shards."""
    for t, name in enumerate(tars):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for wnid in (1, 2) if "n0" not in name else (t + 1,):
                add(archive, f"n{wnid:08d}_{t}.JPEG", encoded(picture(t), "JPEG"))
    source = open_source(tmp_path)
    assert source.class_names == ("n00000001", "n00000002")
    found = [source.class_names[label] for label in source.labels]
    assert found == [name.rpartition("/")[2][:9] for name in source.names]


@pytest.mark.parametrize("names", [("a.jpg",), ("n00000001_0.JPEG", "val_1.JPEG")])
def test_the_name_of_a_shard_is_no_class(tmp_path: Path, names: tuple[str, ...]) -> None:
    for shard in ("shard-0", "shard-1"):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for name in names:
                add(archive, name, encoded(picture(0), "JPEG"))
    with pytest.raises(UserError, match=r"lies in no class folder, and .* no \.cls or \.json"):
        open_source(tmp_path)


@pytest.mark.parametrize("form", ["tars", "one tar", "folders"])
@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([{"label": 3}, {"label": 1}, {"label": 1}, {"label": 0}], (), [3, 1, 1, 0]),
        ([{"cls": 3}, {"label": 9, "cls": 1}, {"cls": 1, "class": "a"}, {"cls": 0}], (), [3, 1, 1, 0]),
        ([{"cls": "dog"}, {"cls": "cat"}, {"cls": "cat"}, {"cls": "emu"}], ("cat", "dog", "emu"), [1, 0, 0, 2]),
        ([{"class": "10"}, {"class": "9"}, {"class": "9"}, {"class": "10"}], ("9", "10"), [1, 0, 0, 1]),
    ],
)
def test_labels_from_the_json_beside_an_image(
    tmp_path: Path, form: str, labels: list[dict[str, object]], names: tuple[str, ...], numbers: list[int]
) -> None:
    json_beside(tmp_path / "in", form, labels)
    source = open_source(tmp_path / "in")
    assert source.labels.tolist() == numbers and source.class_names == names and not source.left_out


def json_beside(folder: Path, form: str, labels: list[dict[str, object]]) -> None:
    """Four pictures with .json and .txt beside them: two shards of two, one tar, or folders named like shards."""
    folder.mkdir()
    for shard in range(2):
        files = {}
        for n in (2 * shard, 2 * shard + 1):
            files |= {f"{n:05d}.a.jpg": encoded(picture(n), "JPEG"), f"{n:05d}.txt": b"a caption"}
            files[f"{n:05d}.json"] = json.dumps(labels[n]).encode()
        if form == "folders":
            (folder / f"{shard:05d}").mkdir()
            for name, data in files.items():
                (folder / f"{shard:05d}" / name).write_bytes(data)
        else:
            with tarfile.open(folder / ("0.tar" if form == "one tar" else f"{shard:05d}.tar"), "a") as archive:
                for name, data in files.items():
                    add(archive, name, data)


@pytest.mark.parametrize("form", ["tars", "one tar", "folders"])
@pytest.mark.parametrize(
    ("label", "words"),
    [
        (
            {"caption": "a cat", "url": "x\x1b"},
            r"no label: '.*00000\.json' beside .* holds caption, url; a \.cls",
        ),
        ({"label": 1.5}, "label = 1.5; a class number"),
        ({"label": True}, "label = True; a class number"),
        ({"label": -1}, "label = -1; a class number"),
        ({"label": 10**18}, "label = 1000000000000000000; a class number"),
        ({"label": 10**30}, "more than 64 bits"),
        ({"label": ""}, "label = ''; a class number"),
        ({"label": "cat"}, r"00001\.json': label = 1; a class number"),
        ({"class": 3}, r"00001\.json' holds label, caption, no class$"),
    ],
)
def test_json_without_a_label_is_refused(tmp_path: Path, form: str, label: dict[str, object], words: str) -> None:
    json_beside(tmp_path / "in", form, [label, *[{"label": 1, "caption": "x"}] * 3])
    with pytest.raises(UserError, match=words) as refusal:
        open_source(tmp_path / "in")
    assert "\n" not in str(refusal.value) and "\x1b" not in str(refusal.value)


@pytest.mark.parametrize("inner", ["", "images/"])
def test_labels_from_dataset_json(tmp_path: Path, inner: str) -> None:
    folder = tmp_path / inner / "00000"
    folder.mkdir(parents=True)
    labels = []
    for i in range(3):
        (folder / f"img{i:08d}.png").write_bytes(encoded(picture(i)))
        labels.append([f"00000/img{i:08d}.png", 5 - i])
    (tmp_path / inner / "dataset.json").write_text(json.dumps({"labels": labels}))
    source = open_source(tmp_path)
    assert source.labels.tolist() == [5, 4, 3] and source.num_classes == 6
    (folder / "img00000007.png").write_bytes(encoded(picture(7)))
    with pytest.raises(UserError, match=r"4 images, but 3 labels .*img00000007\.png' has no label"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ('{"labels": null}', "is null, an unlabelled set"),
        ('{"labels": 3}', "is needed, not 3"),
        ("{}", "is needed, not ''"),
        ("[]", "expected a JSON object"),
        ('{"labels": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"labels": [["a.png", 1' + "0" * 30 + "]]}", "more than 64 bits"),
        ('{"labels": [["a.png", 1000000]]}', "'a.png' is 1000000; a class number"),
        ('{"labels": [["a.png", "cat"]]}', "'a.png' is 'cat'; a class number"),
        ('{"labels": [["a.png", -1]]}', "'a.png' is -1"),
        ('{"labels": [["a.png", null]]}', "the label of every file is null, an unlabelled set; --unlabelled takes all"),
        ('{"labels": [["a.png", 1], ["a.png", 2]]}', "2 labels, but only 1 different"),
    ],
)
def test_wrong_dataset_json_is_told(tmp_path: Path, labels: str, words: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    (tmp_path / "dataset.json").write_text(labels)
    with pytest.raises(UserError, match=words):
        open_source(tmp_path)


def test_splits_must_be_chosen(class_folders: Path, tmp_path: Path) -> None:
    path = pack(class_folders, tmp_path / "a.zip", "train/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("test/b c/x.png", encoded(picture(1)))
    with pytest.raises(UserError, match=r"it holds test, train: choose one, --subset train"):
        open_source(path)
    assert len(open_source(path, "train").names) == 6
    with pytest.raises(UserError, match=r"subset 'val': no image in it .* it holds test, train"):
        open_source(path, "val")


def test_hugging_face_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the Hugging Face package isn't installed")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})

    def rows() -> Iterator[dict[str, object]]:
        for i in range(3):
            yield {"picture": {"bytes": encoded(picture(i)), "path": None}, "kind": (i + 1) % 2}

    cache = str(tmp_path / "cache")
    split = datasets.Dataset.from_generator(rows, features=features, cache_dir=cache, fingerprint="rows")
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "hub")
    with pytest.raises(UserError, match="it holds train, test: choose one"):
        open_source(tmp_path / "hub")
    source = open_source(tmp_path / "hub", "train")
    assert source.labels.tolist() == [1, 0, 1] and source.class_names == ("cat", "dog")
    assert source.read(2) == encoded(picture(2))


def test_hugging_face_dataset_without_the_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match=f"it is not installed: {re.escape(how_to_install('hub'))}") as caught:
        open_source(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "file.txt", "a.tar.gz", "empty", "loose"])
def test_what_is_no_source_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "loose" / "b").mkdir(parents=True)
    for inner in ("a.png", "b/a.png"):
        (tmp_path / "loose" / inner).write_bytes(encoded(picture(0)))
    words = {
        "nowhere": "no such file or folder",
        "file.txt": "a folder, .zip, .tar",
        "a.tar.gz": "decompress it first",
        "empty": "no image in it .* it holds nothing",
        "loose": r"'a\.png' lies in no class folder",
    }
    with pytest.raises(UserError, match=words[name]):
        open_source(tmp_path / name)
