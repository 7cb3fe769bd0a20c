"""On every loader, for shards and for REPA's layout: which records training sees, and what damage is told."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, read_header
from st_fast.core.random import epoch_order
from st_fast.core.ranks import Ranks
from st_fast.data.loader import dali_missing, make_loader
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import open_data
from st_fast.prepare.repa import write_repa
from st_fast.prepare.writing import write_shards
from st_fast.recipe import Recipe, load
from st_fast.train.batches import BatchIterator
from tests import tiny

CPU = torch.device("cpu")
COUNT, BATCH, STEPS, SEED = 50, 8, 15, 3  # 120 samples: two epochs and a part, whose ends lie inside batches
KINDS = ["resident", "torch", pytest.param("dali", marks=pytest.mark.skipif(bool(dali_missing()), reason="no DALI"))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both layouts of a set whose record number i has mean i and std 0 everywhere, with label i mod 5."""
    root = tmp_path_factory.mktemp("sets")
    numbers = torch.arange(COUNT)
    moments = numbers.half().view(-1, 1, 1, 1).expand(-1, 2, 2, 2).contiguous()
    moments[:, 1] = 0
    manifest = Manifest(0, (2, 2, 2), "float16", 1.0, VaeInfo("none"), "numbers", 5)
    write_shards(root / "shards", [(moments, numbers % 5)], manifest, 16)
    write_repa(open_data(root / "shards"), root / "repa", lambda done: None)
    return {"shards": root / "shards", "repa": root / "repa"}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load(tiny.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path / "out"))


def seen(recipe: Recipe, folder: Path, kind: str, pieces: list[tuple[int, int, int]]) -> str:
    """A hash of the record numbers that training sees: (first step, last step, ranks) of each process in turn."""
    numbers: list[int] = []
    for first, last, count in pieces:
        feeds = []
        for rank in range(count):
            records = open_data(folder)
            loader = make_loader(kind, records, CPU, lambda text: None)
            feeds.append(
                BatchIterator(recipe, recipe.stages[0], loader, records, Ranks(rank, count, CPU)).steps(first, last)
            )
        for step in zip(*feeds, strict=True):
            for (batch,) in step:
                found = (batch.x[:, 0, 0, 0] / records.manifest.scale).round().long()
                assert torch.equal(batch.condition, found % 5)
                numbers += found.tolist()
    return hashlib.sha256(np.array(numbers, np.int64).tobytes()).hexdigest()


@pytest.mark.parametrize("layout", ["shards", "repa"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_each_epochs_order_however_often_it_is_stopped_and_on_one_rank_or_two(
    layout: str, kind: str, folders: dict[str, Path], recipe: Recipe
) -> None:
    assert (recipe.optim.batch_size, recipe.run.seed) == (BATCH, SEED)
    epochs = np.concatenate([epoch_order(SEED, epoch, COUNT) for epoch in range(3)])
    truth = hashlib.sha256(epochs[: STEPS * BATCH].astype(np.int64).tobytes()).hexdigest()
    folder = folders[layout]
    assert seen(recipe, folder, kind, [(0, STEPS, 1)]) == truth
    assert seen(recipe, folder, kind, [(0, 4, 1), (4, 5, 1), (5, STEPS, 1)]) == truth
    assert seen(recipe, folder, kind, [(0, 3, 1), (3, 9, 2), (9, STEPS, 1)]) == truth
    assert seen(recipe, folder, kind, [(0, 7, 2), (7, STEPS, 4)]) == truth


def number_21(folder: Path) -> Path:
    return folder / "vae-sd" / "00000" / "img-mean-std-00000021.npy"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def objects(path: Path) -> None:
    np.save(path, np.array([[[object()]]] * 2, object), allow_pickle=True)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, r"\d+ bytes, \d+ expected"),
    "objects": (objects, "an array of Python objects"),
    "other shape": (lambda path: np.save(path, np.zeros((2, 2, 3), np.float32)), "the first file of the set has"),
    "other dtype": (lambda path: np.save(path, np.zeros((2, 2, 2), np.float16)), "the first file of the set has"),
    "no array": (lambda path: path.write_bytes(b"<html>"), r"not a sound \.npy file"),
    "gone": (lambda path: path.unlink(), "No such file|missing|cannot be read|not there"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_repas_layout_that_is_damaged_while_training_is_named_by_every_loader(
    damage: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    write_repa(open_data(folders["shards"]), tmp_path / "repa", lambda done: None)
    records = open_data(tmp_path / "repa")
    harm, words = DAMAGE[damage]
    harm(number_21(tmp_path / "repa"))
    with pytest.raises(UserError, match=words) as caught:
        list(make_loader(kind, records, CPU, lambda text: None).stream([np.array([1, 21, 3])]))
    assert "img-mean-std-00000021.npy" in str(caught.value) and "\n" not in str(caught.value)


def set_label(path: Path, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(read_header(path)["labels"].start + 4 * 8)
        file.write(value.to_bytes(8, "little"))


def flip_bit(path: Path, record: int) -> None:
    data = bytearray(path.read_bytes())
    data[read_header(path)["moments"].start + record * 32 + 1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("label", "record 4 .*label 5, allowed are 0 … 4"),
        ("bit", "record 2 .*CRC-32"),
        ("nan", "record 6 .*NaN or Inf"),
        ("absurd", r"record 6 .*up to 3e\+04"),
        ("few", "8 records, the global batch needs 9"),
    ],
)
def test_no_loader_is_made_of_a_set_that_is_wrong(
    kind: str, fault: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found when the set is opened, before any loader exists."""
    monkeypatch.setattr("st_fast.prepare.writing.moments_problem", lambda *_: None)  # as if another program wrote it
    moments = torch.ones(8, 2, 2, 2)
    moments[6, 0, 0, 0] = {"nan": torch.nan, "absurd": 3e4}.get(fault, 1.0)
    manifest = Manifest(0, (2, 2, 2), "float32", 1.0, VaeInfo("none"), "ones", 5)
    write_shards(tmp_path, [(moments, torch.arange(8) % 5)], manifest, 8)
    if fault == "label":
        set_label(tmp_path / "latents-00000.safetensors", 5)
    elif fault == "bit":
        flip_bit(tmp_path / "latents-00000.safetensors", 2)
    with pytest.raises(BadFile, match=words):
        make_loader(kind, open_data(tmp_path, at_least=9 if fault == "few" else 8), CPU, lambda text: None)
