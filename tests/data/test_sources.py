"""The same pictures give the same labels and bytes from a folder, a zip, a tar, webdataset tars and dataset.json."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from st_fast.core.errors import UserError
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
    assert open_source(class_folders).digest() != one.digest()


def test_files_that_are_no_pictures_and_hidden_ones_are_left_out(class_folders: Path) -> None:
    for name in ("notes.txt", ".hidden.png", "._picture 0 ü.png"):
        (class_folders / "b c" / name).write_bytes(b"x")
    (class_folders / "__MACOSX" / "b c").mkdir(parents=True)
    (class_folders / "__MACOSX" / "b c" / "x.png").write_bytes(b"x")
    assert len(open_source(class_folders).names) == 6


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


def test_a_tar_for_each_class(tmp_path: Path) -> None:
    for t, name in enumerate(("n01", "n02")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            add(archive, "same.jpg", encoded(picture(t), "JPEG"))
    source = open_source(tmp_path)
    assert source.class_names == ("n01", "n02") and source.labels.tolist() == [0, 1]


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
        ('{"labels": null}', "is needed"),
        ("[]", "is needed"),
        ('{"labels": [["a.png", "cat"]]}', "'a.png' is 'cat'; a class number"),
        ('{"labels": [["a.png", -1]]}', "'a.png' is -1"),
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
    with pytest.raises(UserError, match=r'datasets reads; it is not installed: pip install "st_fast\[hub\]"') as caught:
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
