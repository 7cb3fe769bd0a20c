"""IDX files as MNIST's: images and labels as they were put in, splits by name, and bad files told in one line."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.data.idx import read_idx
from st_fast.data.images import decode_image
from st_fast.data.sources import open_source
from tests.prepare.sources import idx_arrays, idx_bytes, idx_files, picture

SIZE = (20, 13)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(("subset", "count", "seed"), [("train", 6, 0), ("t10k", 4, 1), ("test", 4, 1)])
def test_images_and_labels_are_those_of_the_split(
    packed: str, subset: str, count: int, seed: int, tmp_path: Path
) -> None:
    source = open_source(idx_files(tmp_path / "mnist", packed, SIZE), subset)
    images, labels = idx_arrays(count, seed, SIZE)
    assert source.labels.dtype == np.int64 and source.labels.tolist() == labels.tolist()
    assert (source.num_classes, source.class_names, source.own_numbers) == (3, (), True)
    for number in (0, count - 1):
        with Image.open(io.BytesIO(source.read(number))) as image:
            assert np.array_equal(np.asarray(image), images[number])
        assert np.array_equal(np.asarray(decode_image(source.read(number), 3))[:, :, 1], images[number])
    assert len(set(source.names)) == count and len({source.stamp(n) for n in range(count)}) == count


def test_a_split_is_chosen_by_name_by_folder_or_by_its_file(tmp_path: Path) -> None:
    folder = idx_files(tmp_path / "sets" / "raw")
    with pytest.raises(UserError, match=r"it holds t10k, train: choose one, --subset train"):
        open_source(folder)
    with pytest.raises(UserError, match=r"no split 'val'; it holds t10k, train"):
        open_source(folder, "val")
    idx_files(tmp_path / "sets" / "other", size=(5, 4))
    with pytest.raises(UserError, match=r"holds other/train, raw/train: choose one, --subset other/train"):
        open_source(tmp_path / "sets", "train")
    assert len(decode_image(open_source(tmp_path / "sets", "other/train").read(0), 1).tobytes()) == 20
    idx_files(tmp_path / "sets", size=(3, 2))
    assert len(decode_image(open_source(tmp_path / "sets", "train").read(0), 1).tobytes()) == 6, "the exact name wins"
    file = open_source(folder / "t10k-images-idx3-ubyte.gz")
    assert file.digest() == open_source(folder, "t10k").digest() and len(file.names) == 4


def test_unpacked_files_come_first_and_dots_in_names_are_read(tmp_path: Path) -> None:
    folder = idx_files(tmp_path / "mnist")
    images, labels = idx_arrays(2, 9)
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    assert len(open_source(folder, "train").names) == 2
    (tmp_path / "dots").mkdir()
    (tmp_path / "dots" / "train-images.idx3-ubyte").write_bytes(idx_bytes(images))
    with pytest.raises(UserError, match=r"has no 'train-labels.idx1-ubyte' beside it; --unlabelled takes"):
        open_source(tmp_path / "dots")
    assert open_source(tmp_path / "dots", unlabelled=True).labels.tolist() == [0, 0]
    (tmp_path / "dots" / "train-labels.idx1-ubyte").write_bytes(idx_bytes(labels))
    assert open_source(tmp_path / "dots").labels.tolist() == [0, 1]


def test_a_folder_with_images_beside_is_read_as_images(tmp_path: Path) -> None:
    folder = idx_files(tmp_path / "mnist")
    (folder / "a").mkdir()
    (folder / "a" / "0.jpg").write_bytes(picture(0))
    assert open_source(folder).class_names == ("a",)


def test_columns_and_other_counts_of_labels_are_refused(tmp_path: Path) -> None:
    folder = idx_files(tmp_path / "mnist")
    with pytest.raises(UserError, match=r"--label-column kind: .* IDX files have no columns"):
        open_source(folder, "train", label_column="kind")
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    with pytest.raises(BadFile, match=r"train-labels.*: 5 labels, .* has 6 images"):
        open_source(folder, "train")


HEADER = struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 4)
BAD = {
    "empty": (b"", "not an IDX file of bytes in 3 dimensions"),
    "short": (HEADER[:9], "not an IDX file of bytes in 3 dimensions"),
    "of int32": (struct.pack(">4B3I", 0, 0, 12, 3, 2, 3, 4) + bytes(96), "begins with 00000c03"),
    "of two dimensions": (struct.pack(">4B2I", 0, 0, 8, 2, 4, 6) + bytes(24), "begins with 00000802"),
    "none in it": (struct.pack(">4B3I", 0, 0, 8, 3, 0, 3, 4), "claims 0×3×4 bytes"),
    "enormous": (struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "claims 4294967295×4294967295"),
    "cut": (HEADER + bytes(23), r"claims 2×3×4 bytes, 23 can be|24 values by its header, 23 are there"),
    "longer": (HEADER + bytes(25), "24 values by its header, more are there"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_in_one_line(kind: str, packed: bool, tmp_path: Path) -> None:
    data, words = BAD[kind]
    (tmp_path / "x").write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(BadFile, match=words) as caught:
        read_idx(tmp_path / "x", 3)
    assert str(tmp_path / "x") in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(HEADER + bytes(np.random.default_rng(0).integers(0, 256, 24, np.uint8)))
    for broken in (whole[:30], whole[:-8] + bytes(8), whole[:12] + b"\xff" * 20 + whole[32:]):
        (tmp_path / "x").write_bytes(broken)
        with pytest.raises(BadFile, match=r"x: not a sound gzip file \("):
            read_idx(tmp_path / "x", 3)
