"""Folders of latents as other projects' own scripts leave them, made with NumPy, torch, safetensors and tarfile alone.

Each maker says what a set must return, computed in float64 from the same arrays: (mean, std) or the latent itself, with
what the project takes off each channel, and not scaled.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

SIDES = (3, 5)
"""Height and width of the latents."""
COUNT = 7


@dataclass(frozen=True)
class Truth:
    """What the set in `path` holds."""

    path: Path
    records: np.ndarray
    """(n, 2C or C, H, W) float64."""
    labels: list[int]
    scale: float
    vae: str
    posterior: str = "sample"
    flip: bool = False
    names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    factor: int = 8


def normal(seed: int, *shape: int, mean: object = 0.0, std: object = 4.0) -> np.ndarray:
    """float32 (shape)."""
    drawn = np.random.default_rng(seed).normal(size=shape)
    return (drawn * np.asarray(std) + np.asarray(mean)).astype(np.float32)


def log_variances(seed: int, *shape: int) -> np.ndarray:
    """float32 (shape), some of them outside of what they are clamped to."""
    found = np.random.default_rng(seed).uniform(-20, 3, shape).astype(np.float32)
    found[..., 0, 0] = -33
    return found


def stds_of(log_variance: np.ndarray) -> np.ndarray:
    return np.sqrt(np.exp(np.clip(log_variance.astype(np.float64), -30, 20)))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def lightningdit(folder: Path, channels: int = 32, dtype: type = np.float32) -> Truth:
    """Two files of two ranks, 4 and 3 images each."""
    folder.mkdir(parents=True)
    latents, flipped = (normal(seed, COUNT, channels, *SIDES, mean=1.5).astype(dtype) for seed in (1, 2))
    labels = np.arange(COUNT) * 3 % 5
    for rank, rows in enumerate((slice(0, 4), slice(4, None))):
        tensors = {"latents": latents[rows], "latents_flip": flipped[rows], "labels": labels[rows]}
        save_file(
            {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
            folder / f"latents_rank{rank:02d}_shard000.safetensors",
        )
    stats = {"mean": torch.linspace(-1, 2, channels), "std": torch.linspace(0.5, 3, channels)}
    torch.save({name: value.view(1, -1, 1, 1) for name, value in stats.items()}, folder / "latents_stats.pt")
    mean, std = (value.double().numpy() for value in stats.values())
    both = np.stack((latents, flipped), 1).reshape(2 * COUNT, channels, *SIDES).astype(np.float64)
    return Truth(
        folder, (both - mean[:, None, None]) / std[:, None, None], np.repeat(labels, 2).tolist(), 1.0,
        "hustvl/vavae-imagenet256-f16d32-dinov2", "mean", True, (), tuple(mean), tuple(std), 16,
    )  # fmt: skip


def fast_dit(folder: Path, channels: int = 4) -> Truth:
    """One latent and one label a file, in two folders; the latents are scaled already."""
    features, labelled = folder / "imagenet256_features", folder / "imagenet256_labels"
    features.mkdir(parents=True)
    labelled.mkdir()
    latents, labels = normal(3, 12, channels, *SIDES, std=0.9), (np.arange(12) * 5 % 7).astype(np.int64)
    for number in range(12):
        np.save(features / f"{number}.npy", latents[number][None])
        np.save(labelled / f"{number}.npy", labels[number][None])
    return Truth(folder, latents.astype(np.float64) / 0.18215, labels.tolist(), 0.18215, "sd-vae-ft-ema", "mean")


def mar(folder: Path, channels: int = 16) -> Truth:
    """Three classes, two or three images each."""
    records, labels, classes = [], [], ("n01440764", "n01443537", "n01484850")
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(2 + label % 2):
            views = {}
            for seed, view in enumerate(("moments", "moments_flip")):
                at = 100 * label + 10 * image + seed
                mean, log_variance = normal(at, channels, *SIDES), log_variances(at, channels, *SIDES)
                views[view] = np.concatenate((mean, log_variance))
                records.append(np.concatenate((mean.astype(np.float64), stds_of(log_variance))))
                labels.append(label)
            np.savez(folder / name / f"{name}_{image}.JPEG.npz", **views)
    return Truth(folder, np.stack(records), labels, 0.2325, "xwen99/mar-vae-kl16", "sample", True, classes, factor=16)


def object_array(moments: np.ndarray, label: np.integer, old: bool) -> bytes:
    """What np.save wrote for (moments, label), by today's NumPy or by one before 1.24."""
    array = np.empty(2, object)
    array[0], array[1] = moments, label
    if not old:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        return buffer.getvalue()
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"
    header = header.ljust(117) + b"\n"
    told = pickle.dumps(array, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + told


def uvit(folder: Path, old: bool = True, channels: int = 4) -> Truth:
    """Moments and label in each file, by number."""
    folder.mkdir(parents=True)
    records, labels = [], (np.arange(11) * 4 % 9).tolist()
    for number, label in enumerate(labels):
        mean, log_variance = normal(number, channels, *SIDES), log_variances(number, channels, *SIDES)
        data = object_array(np.concatenate((mean, log_variance)), np.int64(label), old)
        (folder / f"{number}.npy").write_bytes(data)
        records.append(np.concatenate((mean.astype(np.float64), stds_of(log_variance))))
    return Truth(folder, np.stack(records), labels, 0.18215, "sd-vae-ft-ema")


EDM2 = ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28))


def edm2(path: Path, unit: bool = True, packing: int = zipfile.ZIP_STORED) -> Truth:
    """A zip, or a folder where `path` has no such name; of images from 0 to 1 as EDM2's own, or from -1 to 1."""
    mean, std = EDM2 if unit else ((0.865, -0.278, 0.216, 0.374), (4.9, 5.3, 3.9, 4.0))
    wide = [np.array(values)[:, None, None] for values in (mean, std)]
    means, stds = normal(4, COUNT, 4, *SIDES, mean=wide[0], std=wide[1]), np.abs(normal(5, COUNT, 4, *SIDES, std=0.3))
    labels = (np.arange(COUNT) * 2 % 3).tolist()
    names = [f"{number // 4:05d}/img-mean-std-{number:08d}.npy" for number in range(COUNT)]
    files = {name: npy(np.concatenate(row)) for name, row in zip(names, zip(means, stds, strict=True), strict=True)} | {
        "dataset.json": json.dumps({"labels": list(zip(names, labels, strict=True))[::-1]}).encode()
    }
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", packing) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    off, by = wide if unit else (np.zeros((4, 1, 1)), np.ones((4, 1, 1)))
    records = np.concatenate(((means.astype(np.float64) - off) / by, stds / by), 1)
    scale = 1.0 if unit else 0.18215
    said = {"mean": mean, "std": std} if unit else {}
    return Truth(path, records, labels, scale, "sd-vae-ft-mse", **said)


def speedrun(folder: Path, channels: int = 32) -> Truth:
    """Latents of INVAE, drawn once, each with a batch of one."""
    latents, labels = normal(6, COUNT, 1, channels, *SIDES), (np.arange(COUNT) % 2).tolist()
    names = [f"00000/img-latents-{number:08d}.npy" for number in range(COUNT)]
    (folder / "vae-in" / "00000").mkdir(parents=True)
    for name, latent in zip(names, latents, strict=True):
        np.save(folder / "vae-in" / name, latent)
    table = {"labels": list(zip(names, labels, strict=True))}
    (folder / "vae-in" / "dataset.json").write_text(json.dumps(table))
    return Truth(folder, latents[:, 0].astype(np.float64), labels, 0.3099, "REPA-E/e2e-invae-hf", "mean", factor=16)


def tars(folder: Path, samples: list[dict[str, bytes]]) -> None:
    """Samples by suffix in two tars, as webdataset's ShardWriter packs them."""
    folder.mkdir(parents=True)
    half = -(-len(samples) // 2)
    for shard, first in enumerate(range(0, len(samples), half)):
        with tarfile.open(folder / f"latent-{shard:04d}.tar", "w") as archive:
            for number, sample in enumerate(samples[first : first + half], first):
                for suffix, data in sample.items():
                    info = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def maskdit(folder: Path, channels: int = 4) -> Truth:
    """Pickled moments of (mean, log-variance)."""
    records, samples, labels = [], [], (np.arange(COUNT) * 3 % 4).tolist()
    for number, label in enumerate(labels):
        mean, log_variance = normal(number + 40, channels, *SIDES), log_variances(number + 40, channels, *SIDES)
        moments = np.concatenate((mean, log_variance))
        samples.append({"latent": pickle.dumps(moments), "cls": str(label).encode()})
        records.append(np.concatenate((mean.astype(np.float64), stds_of(log_variance))))
    tars(folder, samples)
    return Truth(folder, np.stack(records), labels, 0.18215, "sd-vae-ft-ema")


def webdataset(folder: Path, suffix: str = "npy", json_labels: bool = False, moments: bool = False) -> Truth:
    """Arrays with labels beside them; nothing says what they are of."""
    moments, channels = moments or suffix == "moments.npy", 4
    rows = normal(7, COUNT, channels, *SIDES)
    if moments:
        rows = np.concatenate((rows, np.abs(rows[::-1]) / 8), 1)
    labels = (np.arange(COUNT) * 2 % 5).tolist()
    told = [{"json": json.dumps({"label": n}).encode()} if json_labels else {"cls": b"%d" % n} for n in labels]
    tars(folder, [{suffix: npy(row)} | label for row, label in zip(rows, told, strict=True)])
    return Truth(folder, rows.astype(np.float64), labels, 1.0, "", "sample" if moments else "mean")
