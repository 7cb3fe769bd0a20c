"""`real-images`: the data's class numbers and size, bad images named, one folder split."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from st_fast.core.errors import UserError
from st_fast.data.shards import open_data
from st_fast.evaluate.classifier import read_images
from st_fast.prepare import __main__ as prepare
from st_fast.prepare import real_images
from st_fast.prepare.features import open_record_images

from . import sources
from .conftest import encoded, picture


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """train/ of three classes and its latents; test/ lacks the first class."""
    for split, classes in (("train", "abc"), ("test", "bc")):
        for name in classes:
            (tmp_path / "in" / split / name).mkdir(parents=True)
            for number in range(3):
                (tmp_path / "in" / split / name / f"{number}.png").write_bytes(encoded(picture(number)))
    options = ["--subset", "train", "--size", "16", "--vae", "pixels", "--device", "cpu"]
    prepare.main([str(tmp_path / "in"), str(tmp_path / "out"), *options])
    return tmp_path / "in", tmp_path / "out"


def test_held_out_images_have_the_datas_class_numbers(made: tuple[Path, Path]) -> None:
    source, data = made
    real_images.main([str(source), str(data)])
    found = read_images(data)
    assert found.train.shape == (9, 3, 16, 16) and found.test_labels.tolist() == [1, 1, 1, 2, 2, 2]


def test_a_class_that_the_data_lack_is_refused(made: tuple[Path, Path]) -> None:
    source, data = made
    (source / "test" / "b").rename(source / "test" / "d")
    with pytest.raises(UserError, match=r"1 of its 2 classes are not of the data's 3 \(a, b, c\): d"):
        real_images.main([str(source), str(data)])


def test_one_folder_is_split_and_bad_images_are_named(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = made
    (source / "train" / "a" / "bad.png").write_bytes(b"x")
    real_images.main([str(source / "train"), str(data), "--test", "2", "--other-images"])
    found = read_images(data)
    assert len(found.test) == 2 and len(found.train) == 7
    assert "real-images: skipped 'a/bad.png'" in capsys.readouterr().out


def test_another_size_than_the_datas_is_refused(made: tuple[Path, Path]) -> None:
    source, data = made
    with pytest.raises(UserError, match=r"real-images: --size 8: .* is of 16; leave --size out"):
        real_images.main([str(source), str(data), "--size", "8"])


def test_images_that_the_latents_were_not_made_from_are_refused_unless_wanted(made: tuple[Path, Path]) -> None:
    source, data = made
    other = source.parent / "other"
    for name in "abc":
        (other / "train" / name).mkdir(parents=True)
        for number in range(3):  # under the same names
            (other / "train" / name / f"{number}.png").write_bytes(encoded(picture(9 - number)))
    with pytest.raises(UserError, match=r"other .*: other images or labels than .*out was made from, 9 images of 'in"):
        real_images.main([str(other), str(data)])
    assert not (data / "images.safetensors").exists()
    real_images.main([str(other), str(data), "--other-images"])
    found = read_images(data)
    assert (len(found.train), len(found.test)) == (5, 4)


@pytest.mark.parametrize("packed", ["zip", "tar", "folder"])
def test_the_same_images_in_another_place_are_taken(made: tuple[Path, Path], packed: str) -> None:
    source, data = made
    moved = source.rename(source.parent / "moved")
    (moved / "train").rename(moved / "training")  # other names, the same content
    if packed != "folder":
        moved = Path(shutil.make_archive(str(moved), packed, moved))
    real_images.main([str(moved), str(data)])
    assert len(read_images(data).train) == 9


def test_images_under_other_labels_are_refused(made: tuple[Path, Path]) -> None:
    source, data = made
    (source / "train" / "b" / "0.png").rename(source / "train" / "a" / "9.png")  # in the same order
    with pytest.raises(UserError, match="other images or labels"):
        real_images.main([str(source), str(data)])


def test_a_job_of_an_older_version_is_compared_as_far_as_it_tells(made: tuple[Path, Path]) -> None:
    source, data = made
    job = json.loads((data / "job.json").read_text())
    for key in ("probe", "content", "images"):
        (data / "job.json").write_text(json.dumps(job | {key: 5}))
        with pytest.raises(UserError, match=rf"job.json: {key} = '5': text is needed"):
            real_images.main([str(source), str(data)])
        (data / "job.json").write_text(json.dumps(job | {key: "0" * 64}))
        with pytest.raises(UserError, match="other images or labels"):
            real_images.main([str(source), str(data)])
        del job[key]
        (data / "job.json").write_text(json.dumps(job))
        real_images.main([str(source), str(data)])
        (data / "images.safetensors").unlink()


@pytest.mark.parametrize(
    ("images", "held_out", "few"), [(130, 65, ""), (129, 64, "64 images in 'test'"), (400, 80, "")]
)
def test_of_one_folder_as_many_are_held_out_as_the_classifier_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], images: int, held_out: int, few: str
) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for number in range(images):
        (tmp_path / "in" / "a" / f"{number}.png").write_bytes(encoded(picture(number % 7)))
    options = ["--size", "16", "--vae", "pixels", "--device", "cpu"]
    prepare.main([str(tmp_path / "in"), str(tmp_path / "out"), *options])
    real_images.main([str(tmp_path / "in"), str(tmp_path / "out")])
    found, said = read_images(tmp_path / "out"), capsys.readouterr().out
    assert (len(found.test), len(found.train)) == (held_out, images - held_out)
    assert (f"warning: {few}; the classifier's scores need 65" in said) if few else ("warning" not in said)


@pytest.mark.parametrize(
    ("make", "options", "labels"),
    [
        (sources.nested_folders, ["--unlabelled"], {0}),
        (sources.class_folders, ["--unlabelled"], {0}),
        (
            lambda path: sources.webdataset_shards(path, ("b", "a", "c", "a", "b"), "json", "species"),
            ["--label-column", "species"],
            {0, 1, 2},
        ),
        (lambda path: sources.webdataset_shards(path, (2, None, 0, 2), "json"), [], {0, 2}),
        (lambda path: sources.edm_folder(path, (None, 1, 0, None, 1)), ["--flip"], {0, 1}),
        (lambda path: sources.edm_folder(path, (0, None, 0)), [], {0}),
        (
            lambda path: sources.img2dataset_shards(path, [{"kind": k} for k in ("z", None, "x", "z")]),
            ["--label-column", "kind", "--captions", "auto"],
            {0, 1},
        ),
    ],
)
def test_the_images_of_a_set_are_found_again_as_they_were_labelled(
    make: Callable[[Path], Path], options: list[str], labels: set[int], tmp_path: Path
) -> None:
    """By real-images and by record number, without being told again; those whose label is null are left out again."""
    source, data = make(tmp_path / "in"), tmp_path / "data"
    prepare.main([str(source), str(data), "--size", "16", "--vae", "pixels", "--device", "cpu", *options])
    records = open_data(data)
    images = open_record_images(data, records, str(source), "")
    pixels = np.empty((len(records), 3, 16, 16), np.uint8)
    images.read_into(np.arange(len(records)), pixels)
    mean = records.gather(np.arange(len(records)))[0][:, :3].numpy().astype(np.float32)
    assert np.allclose(mean, pixels / 127.5 - 1, atol=2e-3)
    real_images.main([str(source), str(data), "--test", "1"])
    found = read_images(data)
    assert len(found.train) + len(found.test) == len(records) // (1 + records.manifest.flip)
    assert {*found.train_labels.tolist(), *found.test_labels.tolist()} == labels


def test_columns_of_a_damaged_job_are_told(made: tuple[Path, Path]) -> None:
    source, data = made
    job = json.loads((data / "job.json").read_text())
    (data / "job.json").write_text(json.dumps(job | {"label_column": 3}))
    with pytest.raises(UserError, match=r"job\.json: label_column = 3: text is needed"):
        real_images.main([str(source), str(data)])
