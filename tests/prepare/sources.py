"""Sources of images as people have them, made in a folder: each function writes one and returns what prepare is given.

Pictures are numbered, and of one number the same everywhere. Nothing here is written by this project's own code.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (20, 16)) -> bytes:
    """The file of picture `number`."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def write(files: Mapping[str, bytes], folder: Path) -> Path:
    """Files by name, into a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(files: Mapping[str, bytes], path: Path) -> Path:
    """Files by name, into a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def flat_folder(path: Path, count: int = 6) -> Path:
    """Pictures in one folder, without labels."""
    return write({f"IMG_{n:04d}.jpg": picture(n) for n in range(count)}, path)


def nested_folders(path: Path) -> Path:
    """Pictures without labels in folders of several depths, such as a photo library."""
    names = ("2023/01/a.jpg", "2023/01/b.jpg", "2024/c.jpg", "d.jpg", "2024/05/07/e.jpg")
    return write({name: picture(n) for n, name in enumerate(names)}, path)


def class_folders(path: Path, classes: Sequence[str] = ("cat", "dog", "emu"), count: int = 3) -> Path:
    """A folder a class."""
    names = [f"{name}/{n:03d}.jpg" for name in classes for n in range(count)]
    return write({name: picture(n) for n, name in enumerate(names)}, path)


def class_zip(path: Path, split: str = "train") -> Path:
    """A zip with a folder a split, and a folder a class in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(6):
            archive.writestr(f"{split}/{('cat', 'dog')[n % 2]}/{n}.png", picture(n, "PNG"))
    return path


def edm_folder(path: Path, labels: Sequence[int | None] | None = (2, 0, 1, 2)) -> Path:
    """EDM's and REPA's layout with its dataset.json, of which `labels` None is "labels": null."""
    names = [f"00000/img{n:08d}.png" for n in range(len(labels or range(4)))]
    table = {"labels": labels and [[name, label] for name, label in zip(names, labels, strict=True)]}
    files = {name: picture(n, "PNG") for n, name in enumerate(names)}
    return write(files | {"dataset.json": json.dumps(table).encode()}, path)


def webdataset_shards(path: Path, labels: Sequence[Any] = (1, 0, 2, 1), kind: str = "cls", key: str = "label") -> Path:
    """Two tars with .cls, or .json with a key, beside each picture."""
    for shard in range(2):
        files = {}
        for n in range(shard, len(labels), 2):
            content = str(labels[n]) if kind == "cls" else json.dumps({"id": n, key: labels[n]})
            files |= {f"{n:06d}.jpg": picture(n), f"{n:06d}.{kind}": content.encode()}
        write_tar(files, path / f"{shard:05d}.tar")
    return path


def img2dataset_shards(
    path: Path, more: Iterable[Mapping[str, object]] = ({}, {}, {}, {}), files: bool = False
) -> Path:
    """img2dataset's output: tars, or folders, of .jpg, .json and .txt with a .parquet and a _stats.json beside each.

    more: further entries of each picture's .json, such as a label.
    """
    for shard, entries in enumerate(zip(*[iter(more)] * 2, strict=True)):
        members = {}
        for n, extra in enumerate(entries):
            key, caption = f"{shard:05d}{n:04d}", f"picture {n} of shard {shard}"
            table = {
                "url": f"https://example.org/{key}.jpg", "caption": caption, "key": key, "status": "success",
                "error_message": None, "width": 20, "height": 16, "original_width": 40, "original_height": 32,
                "exif": "{}", "sha256": "0" * 64,
            }  # fmt: skip
            texts = {"json": json.dumps(table | extra), "txt": caption}
            members |= {f"{key}.jpg": picture(2 * shard + n)} | {f"{key}.{k}": t.encode() for k, t in texts.items()}
        write(members, path / f"{shard:05d}") if files else write_tar(members, path / f"{shard:05d}.tar")
        write({f"{shard:05d}.parquet": b"PAR1PAR1", f"{shard:05d}_stats.json": b'{"count": 2}'}, path)
    return path


WNIDS = ("n01440764", "n01443537", "n02102040")


def imagenet_tars(path: Path) -> Path:
    """ImageNet's tars of its classes, each with its pictures, in a folder."""
    for c, wnid in enumerate(WNIDS):
        write_tar({f"{wnid}_{n}.JPEG": picture(2 * c + n) for n in range(2)}, path / f"{wnid}.tar")
    return path


def imagenet_flat_tar(path: Path) -> Path:
    """All pictures of several of ImageNet's classes in one tar, in no folder."""
    return write_tar({f"{wnid}_{n}.JPEG": picture(2 * c + n) for c, wnid in enumerate(WNIDS) for n in range(2)}, path)


def imagenet_train_tar(path: Path) -> Path:
    """ILSVRC2012_img_train.tar: a tar of the tars of the classes."""
    parts = imagenet_tars(path.parent / "parts")
    return write_tar({tar.name: tar.read_bytes() for tar in sorted(parts.glob("*.tar"))}, path)


def imagenet_val_folder(path: Path) -> Path:
    """ImageNet's validation images as they are unpacked, whose names tell no class."""
    return write({f"ILSVRC2012_val_{n:08d}.JPEG": picture(n) for n in range(1, 5)}, path)


def parquet_snapshot(
    path: Path, labels: Sequence[Any] = (1, 0, None, 1, 2, 0), names: Sequence[str] = ("cat", "dog", "emu"),
    metadata: bool = True, splits: Sequence[str] = ("train", "test"), columns: tuple[str, str] = ("image", "label"),
    without_image: Sequence[int] = (), card: bytes = b"---\nlicense: mit\n---\n", folder: str = "data",
) -> Path:  # fmt: skip
    """A data set of the hub as `huggingface-cli download` leaves it: README.md and data/train-00000-of-00002.parquet …

    Needs pyarrow. Labels are numbers with `names`, or strings; None is null. metadata: whether the files have Hugging
    Face's own, which says what is an Image and a ClassLabel. card: the README.md. Rows are in groups of two.
    """
    import pyarrow as pa
    from pyarrow import parquet

    image, label = columns
    text = any(isinstance(value, str) for value in labels)
    features: dict[str, Any] = {
        image: {"_type": "Image"},
        label: {"dtype": "string", "_type": "Value"} if text else {"names": list(names), "_type": "ClassLabel"},
        "id": {"dtype": "int64", "_type": "Value"},
    }
    rows = [None if n in without_image else {"bytes": picture(n), "path": f"{n}.jpg"} for n in range(len(labels))]
    arrays = [
        pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.array(labels, pa.string() if text else pa.int64()),
        pa.array(range(len(labels)), pa.int64()),
    ]
    table = pa.table(arrays, names=[image, label, "id"])
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    write({"README.md": card, ".cache/huggingface/x.metadata": b"x"}, path)
    (path / folder).mkdir(parents=True)
    for split in splits:
        half = -(-len(labels) // 2)
        for part in range(2):
            name = f"{split}-{part:05d}-of-00002.parquet"
            parquet.write_table(table.slice(part * half, half), path / folder / name, row_group_size=2)
    return path


def saved_dataset(path: Path, labels: Sequence[Any] = (1, 0, None, 1), names: Sequence[str] = ("cat", "dog")) -> Path:
    """A Hugging Face `save_to_disk` folder with the columns picture and kind. Needs the package datasets."""
    import datasets

    text = any(isinstance(value, str) for value in labels)
    kind = datasets.Value("string") if text else datasets.ClassLabel(names=list(names))
    rows = {"picture": [{"bytes": picture(n), "path": None} for n in range(len(labels))], "kind": list(labels)}
    features = datasets.Features({"picture": datasets.Image(), "kind": kind})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return path


def captioned_folder(path: Path) -> Path:
    """Pictures with a .txt of the same name beside each."""
    files = {f"{n}.jpg": picture(n) for n in range(4)}
    return write(files | {f"{n}.txt": f"picture number {n}".encode() for n in range(4)}, path)


def idx_arrays(count: int, seed: int, size: tuple[int, int] = (28, 28)) -> tuple[np.ndarray, np.ndarray]:
    """Grey images uint8 (count, height, width), and labels 0 to 2."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *size), np.uint8)
    return images, (np.arange(count) % 3).astype(np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file of bytes."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_files(path: Path, packed: str = ".gz", size: tuple[int, int] = (28, 28)) -> Path:
    """MNIST's four files, of six and of four images."""
    pack = gzip.compress if packed else bytes
    for seed, (split, count) in enumerate((("train", 6), ("t10k", 4))):
        images, labels = idx_arrays(count, seed, size)
        write({f"{split}-images-idx3-ubyte{packed}": pack(idx_bytes(images))}, path)
        write({f"{split}-labels-idx1-ubyte{packed}": pack(idx_bytes(labels))}, path)
    return path
