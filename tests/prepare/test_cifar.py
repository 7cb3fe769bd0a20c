"""CIFAR-10 as given by the user (ST_FAST_CIFAR10, or ../shared/data): true pictures through the whole preparation."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.data.images import load_image
from st_fast.data.loader import make_loader
from st_fast.data.shards import open_data
from st_fast.data.sources import open_source
from st_fast.evaluate.classifier import read_images
from st_fast.model.vae import decode, load_vae
from st_fast.prepare import __main__ as prepare
from st_fast.prepare import real_images

ARCHIVE = Path(
    os.environ.get("ST_FAST_CIFAR10", Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10.zip")
)
pytestmark = pytest.mark.skipif(not ARCHIVE.is_file(), reason="cifar10.zip isn't there; ST_FAST_CIFAR10 names it")


def test_the_archive_has_ten_balanced_classes() -> None:
    source = open_source(ARCHIVE, "train")
    assert np.bincount(source.labels).tolist() == [5_000] * 10
    assert source.class_names[:3] == ("airplane", "automobile", "bird")


def test_the_classifiers_images_are_the_archives_own(tmp_path: Path) -> None:
    with zipfile.ZipFile(ARCHIVE) as whole, zipfile.ZipFile(tmp_path / "part.zip", "w") as part:
        for name in whole.namelist():
            if name.startswith(("train/cat/00", "train/frog/00", "test/cat/00", "test/frog/00")):
                part.writestr(name, whole.read(name))
    options = ["--subset", "train", "--size", "32", "--vae", "pixels", "--device", "cpu"]
    prepare.main([str(tmp_path / "part.zip"), str(tmp_path / "out"), *options])
    command = [str(tmp_path / "part.zip"), str(tmp_path / "out"), "--size", "32", "--train", "90", "--test", "70"]
    real_images.main(command)
    real = read_images(tmp_path / "out")
    assert (real.train.shape, real.test.shape) == ((90, 3, 32, 32), (70, 3, 32, 32))
    source = open_source(tmp_path / "part.zip", "test")
    known = {load_image(source.read(i), 32, 3).tobytes(): source.labels[i] for i in range(len(source.names))}
    assert [known[one.numpy().tobytes()] for one in real.test] == real.test_labels.tolist()
    with pytest.raises(UserError, match="there already"):
        real_images.main(command)


def test_true_pictures_survive_preparation_exactly(tmp_path: Path) -> None:
    """Two classes of the test split, as pixels, through shards and loader and back."""
    with zipfile.ZipFile(ARCHIVE) as whole, zipfile.ZipFile(tmp_path / "part.zip", "w") as part:
        for name in whole.namelist():
            if name.startswith(("test/cat/00", "test/frog/00")):
                part.writestr(name, whole.read(name))
    options = ["--subset", "test", "--size", "32", "--vae", "pixels", "--shard-size", "70", "--device", "cpu"]
    prepare.main([str(tmp_path / "part.zip"), str(tmp_path / "out"), *options])
    shards = open_data(tmp_path / "out")
    assert [entry.count for entry in shards.manifest.shards] == [70, 70, 60]
    assert shards.manifest.class_names == ("cat", "frog")
    loader = make_loader("torch", shards, torch.device("cpu"), print)
    chosen = np.array([199, 0, 131])
    ((moments, labels),) = loader.stream([chosen])
    loader.close()
    assert labels.tolist() == [1, 0, 1]
    scale = shards.manifest.scale
    pictures = decode(load_vae("pixels"), moments.float() * scale, shards.manifest.normalisation)
    source = open_source(tmp_path / "part.zip", "test")
    for picture, number in zip(pictures, chosen, strict=True):
        assert np.array_equal(picture.numpy(), load_image(source.read(int(number)), 32, 3))
