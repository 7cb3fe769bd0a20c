"""REPA's layout is read in place and converted both ways; nothing in it is ever unpickled."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.data.layouts.npy import read_npy_header
from st_fast.data.layouts.repa import RepaSet
from st_fast.data.loader import make_loader
from st_fast.data.manifest import Manifest, VaeInfo, read_manifest
from st_fast.data.shards import open_data, read_any_manifest
from st_fast.prepare import __main__ as prepare
from st_fast.prepare.writing import write_shards

from .conftest import MakeSet, encoded, picture, random_moments

SHAPE = (8, 4, 4)


def write_layout(
    root: Path, count: int = 12, dtype: type = np.float32, shape: tuple[int, int, int] = SHAPE
) -> np.ndarray:
    """A folder as REPA's preprocessing leaves it; returns the moments."""
    moments = random_moments(count, shape).numpy().astype(dtype)
    labels = []
    for number, row in enumerate(moments):
        part = f"{number // 5:05d}"
        for folder in ("images", "vae-sd"):
            (root / folder / part).mkdir(parents=True, exist_ok=True)
        (root / "images" / part / f"img{number:08d}.png").write_bytes(encoded(picture(number, (8, 8))))
        np.save(root / "vae-sd" / part / f"img-mean-std-{number:08d}.npy", row)
        labels.append([f"{part}/img-mean-std-{number:08d}.npy", (number * 5) % 4])
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return moments


def latent(root: Path, number: int) -> Path:
    return root / "vae-sd" / f"{number // 5:05d}" / f"img-mean-std-{number:08d}.npy"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["resident", "torch", "dali"])
def test_the_layout_is_read_in_place_by_every_loader(tmp_path: Path, dtype: type, kind: str) -> None:
    moments = write_layout(tmp_path, dtype=dtype)
    records = open_data(tmp_path, at_least=12)
    assert records.manifest.scale == 0.18215 and records.manifest.vae.name == "sd-vae-ft-mse"
    loader = make_loader(kind, records, torch.device("cpu"), lambda text: None)
    request = np.array([7, 0, 11, 7])
    ((got, labels),) = loader.stream([request])
    assert np.array_equal(got.numpy(), moments[request]) and got.numpy().dtype == dtype
    assert labels.tolist() == (request * 5 % 4).tolist()
    loader.close()
    records.close()


def test_from_repa_makes_shards_with_the_same_records(tmp_path: Path) -> None:
    moments = write_layout(tmp_path / "repa")
    out = tmp_path / "out"
    prepare.main(["--from-repa", str(tmp_path / "repa"), str(out), "--dtype", "float32", "--shard-size", "5"])
    shards = open_data(out)
    assert [entry.count for entry in shards.manifest.shards] == [5, 5, 2]
    got, labels = shards.gather(np.arange(12))
    assert np.array_equal(got.numpy(), moments) and labels.tolist() == [n * 5 % 4 for n in range(12)]


def test_to_repa_and_back_keeps_every_bit(make_set: MakeSet, tmp_path: Path) -> None:
    folder = make_set()
    prepare.main(["--to-repa", str(folder), str(tmp_path / "repa")])
    one = np.load(tmp_path / "repa" / "vae-sd" / "00000" / "img-mean-std-00000003.npy")
    assert one.dtype == np.float32 and np.array_equal(one, open_data(folder).gather(np.array([3]))[0][0].float())
    prepare.main(["--from-repa", str(tmp_path / "repa"), str(tmp_path / "back"), "--shard-size", "16"])
    original, back = read_manifest(folder), read_manifest(tmp_path / "back")
    assert [entry.sha256 for entry in original.shards] == [entry.sha256 for entry in back.shards]
    with pytest.raises(UserError, match=r"holds vae-sd/dataset\.json already"):
        prepare.main(["--to-repa", str(folder), str(tmp_path / "repa")])


def test_a_set_is_no_target_for_repas_layout(make_set: MakeSet, tmp_path: Path) -> None:
    folder = make_set()
    before = sorted(folder.rglob("*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    for target, words in [
        (folder, "the set to convert"),
        (tmp_path / "link", "the set to convert"),
        (folder / "repa", "the set to convert"),
        (tmp_path / "other", r"holds manifest\.json"),
    ]:
        with pytest.raises(UserError, match=words):
            prepare.main(["--to-repa", "--dry-run", str(folder), str(target)])
        with pytest.raises(UserError, match=words):
            prepare.main(["--to-repa", str(folder), str(target)])
    assert sorted(folder.rglob("*")) == before and len(list((tmp_path / "other").iterdir())) == 1


def test_a_manifest_beside_the_layout_is_what_is_read(make_set: MakeSet) -> None:
    folder = make_set()
    manifest = read_manifest(folder)
    write_layout(folder)
    assert open_data(folder).manifest == read_any_manifest(folder) == manifest


def test_the_layout_carries_what_made_its_latents(tmp_path: Path) -> None:
    vae, names = VaeInfo("mine", "abc", "vae"), ("a", "b", "c", "d")
    made = Manifest(0, (6, 4, 4), "float16", 0.75, vae, "random", 4, class_names=names)
    write_shards(tmp_path / "set", [(random_moments(6, (6, 4, 4)).half(), torch.arange(6) % 2)], made, 16)
    (tmp_path / "set" / "vae").mkdir()
    (tmp_path / "set" / "vae" / "config.json").write_text("{}")
    prepare.main(["--to-repa", str(tmp_path / "set"), str(tmp_path / "repa")])
    prepare.main(["--from-repa", str(tmp_path / "repa"), str(tmp_path / "back")])
    for folder in (tmp_path / "repa", tmp_path / "back"):
        found = open_data(folder).manifest
        assert (found.vae, found.scale, found.num_classes, found.class_names) == (vae, 0.75, 4, names)
        assert (folder / "vae" / "config.json").is_file()
    path = tmp_path / "repa" / "vae-sd" / "dataset.json"
    whole = json.loads(path.read_text())
    for key, value, words in [
        ("channels", 4, "channels = 4, but the latents have 3"),
        ("scale", 0, "scale = 0"),
        ("vae", "mine", "st_fast: vae = 'mine': an object is needed"),
        ("num_classes", 1, "label 1, allowed are 0 … 0"),
    ]:
        path.write_text(json.dumps(whole | {"st_fast": whole["st_fast"] | {key: value}}))
        with pytest.raises(BadFile, match=rf"dataset\.json: .*{words}"):
            open_data(tmp_path / "repa")


def test_latents_that_the_usual_vae_can_not_have_made_ask_for_their_vae(tmp_path: Path) -> None:
    write_layout(tmp_path / "repa", shape=(6, 4, 4))
    for read in (open_data, read_any_manifest):
        with pytest.raises(BadFile, match=r"latents of 3 channels, .* OUT --vae VAE names it"):
            read(tmp_path / "repa")
    with pytest.raises(UserError, match=r"latents of 3 channels, .* --vae VAE"):
        prepare.main(["--from-repa", str(tmp_path / "repa"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


class Bomb:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_object_arrays_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    write_layout(tmp_path)
    array = np.empty((2, 1, 1), object)
    array[...] = Bomb(tmp_path / "boom")
    np.save(latent(tmp_path, 6), array, allow_pickle=True)
    with pytest.raises(BadFile, match=r"img-mean-std-00000006\.npy: an array of Python objects"):
        open_data(tmp_path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("gone", ["latent", "image", "label"])
def test_counts_of_images_latents_and_labels_must_agree(tmp_path: Path, gone: str) -> None:
    write_layout(tmp_path)
    if gone == "latent":
        latent(tmp_path, 4).unlink()
    elif gone == "image":
        next((tmp_path / "images").rglob("*.png")).unlink()
    else:
        path = tmp_path / "vae-sd" / "dataset.json"
        path.write_text(json.dumps({"labels": json.loads(path.read_text())["labels"][1:]}))
    counts = {"latent": "11 latents, 12 labels, 12 images", "image": "12 latents, 12 labels, 11 images"}
    with pytest.raises(BadFile, match=counts.get(gone, "12 latents, 11 labels, 12 images")):
        open_data(tmp_path)


def test_cut_off_file_tells_expected_and_actual_bytes(tmp_path: Path) -> None:
    write_layout(tmp_path)
    size = latent(tmp_path, 3).stat().st_size
    os.truncate(latent(tmp_path, 3), size - 9)
    with pytest.raises(BadFile, match=rf"img-mean-std-00000003\.npy: {size - 9} bytes, {size} expected"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((8, 4, 5), np.float32), r"float32 \(8, 4, 5\); the first file of the set has float32 \(8, 4, 4\)"),
        (np.zeros(SHAPE, np.float16), r"float16 \(8, 4, 4\); the first file"),
        (np.asfortranarray(np.zeros(SHAPE, np.float32)), "in Fortran order"),
        (np.zeros(SHAPE, np.float64), "float64"),
        (np.zeros(SHAPE, ">f4"), ">f4 .*the first file"),
        (np.full(SHAPE, np.nan, np.float32), "NaN or Inf"),
        (np.full(SHAPE, -1, np.float32), "can't be negative"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, array: np.ndarray, words: str) -> None:
    write_layout(tmp_path)
    np.save(latent(tmp_path, 9), array)
    with pytest.raises(BadFile, match=rf"img-mean-std-00000009\.npy: .*{words}"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((7, 4, 5), np.float32), r"float32 \(7, 4, 5\)"),
        (np.zeros((1, 8, 4, 4), np.float32), r"float32 \(1, 8, 4, 4\)"),
        (np.zeros(SHAPE, np.int32), r"int32 \(8, 4, 4\)"),
        (np.zeros(SHAPE, ">f4"), r">f4 \(8, 4, 4\)"),
    ],
)
def test_a_first_file_of_no_moments_is_named(tmp_path: Path, array: np.ndarray, words: str) -> None:
    write_layout(tmp_path)
    np.save(latent(tmp_path, 0), array)
    with pytest.raises(BadFile, match=rf"00000\.npy: {words}; float16 or float32 \(2C, H, W\) is needed"):
        open_data(tmp_path)


@pytest.mark.parametrize("data", [b"", b"not numpy", b"\x93NUMPY\x01\x00\xff\xff{", b"\x93NUMPY\x01\x00\x04\x00{1:2"])
def test_what_is_no_npy_file_is_named(tmp_path: Path, data: bytes) -> None:
    write_layout(tmp_path)
    latent(tmp_path, 0).write_bytes(data)
    with pytest.raises(BadFile, match=r"img-mean-std-00000000\.npy: not a sound \.npy file"):
        open_data(tmp_path)


def test_labels_can_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    write_layout(tmp_path)
    path = tmp_path / "vae-sd" / "dataset.json"
    labels = json.loads(path.read_text())["labels"]
    labels[0][0] = "../../../etc/passwd.npy"
    path.write_text(json.dumps({"labels": labels}))
    with pytest.raises(BadFile, match="must stay inside the folder"):
        open_data(tmp_path)


def test_the_digest_follows_the_labels(tmp_path: Path) -> None:
    write_layout(tmp_path)
    before = RepaSet(tmp_path).digest
    path = tmp_path / "vae-sd" / "dataset.json"
    path.write_text(path.read_text().replace(", 3]", ", 2]"))
    assert RepaSet(tmp_path).digest != before


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vae-sd").mkdir()
    (tmp_path / "vae-sd" / "dataset.json").write_text('{"labels": []}')
    with pytest.raises(BadFile, match="0 records, nothing to train on"):
        open_data(tmp_path)


def test_many_threads_read_headers_but_one_at_a_time_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's ast raises SystemError when threads overlap in it, once in a great while: overlaps are counted."""
    path = tmp_path / "moments.npy"
    np.save(path, np.zeros((8, 4, 4), np.float32))
    parse, inside, most = np.lib.format.read_array_header_1_0, list[int](), list[int]()

    def counted(*arguments: object, **options: object) -> object:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)  # lets go of the interpreter, as parsing may at any moment
        inside.pop()
        return parse(*arguments, **options)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", counted)
    with ThreadPoolExecutor(8) as pool:
        headers = set(pool.map(lambda _: read_npy_header(path), range(60)))
    assert headers == {((8, 4, 4), "float32", 128, False)}
    assert len(most) == 60 and max(most) == 1
