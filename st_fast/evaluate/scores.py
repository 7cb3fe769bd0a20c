"""FID, sFID, Inception Score, KID, precision and recall as ADM's evaluator defines them (arXiv 2105.05233).

Everything is streamed: besides statistics of fixed size, only the pooled features are kept, for precision, recall and
KID (410 MB for 50,000 samples), and only where the reference has images to compare them with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from st_fast.core.errors import UserError
from st_fast.core.files import sha256_file
from st_fast.core.progress import bar
from st_fast.data.images import SUFFIXES, load_image
from st_fast.evaluate.classifier import read_images
from st_fast.evaluate.inception import FEATURES, Inception
from st_fast.evaluate.metrics import Array, GaussianStats, frechet, kernel_distance, precision_recall
from st_fast.sample.files import Images, open_npz, three_channels

SPATIAL = 17 * 17 * 7
SPLIT = 5_000
"""Samples of a split of the Inception Score in ADM's evaluator."""
KID_SUBSET, KID_SUBSETS = 1_000, 100
RESIZE = "bilinear as TensorFlow 1 to 299"


class SplitScore:
    """The Inception Score of probabilities (n, classes) that arrive in order, in splits of `size`; nothing is kept.

    exp(E KL(p(y|x) ‖ p(y))) = exp(E Σ p·log p − Σ m·log m) with m the split's mean (arXiv 1606.03498). A last split
    shorter than half of `size` counts with the one before it.
    """

    def __init__(self, classes: int, count: int, size: int = SPLIT) -> None:
        self.ends = [size * (i + 1) for i in range(max(1, round(count / size)))]
        self.ends[-1] = count
        self.sums = np.zeros((len(self.ends), classes))
        self.entropies = np.zeros(len(self.ends))
        self.counts = np.zeros(len(self.ends), np.int64)

    def update(self, probabilities: NDArray[np.float32]) -> None:
        """Takes in the next rows; ValueError beyond `count`."""
        first = int(self.counts.sum())
        if first + len(probabilities) > self.ends[-1]:
            raise ValueError(f"{first + len(probabilities)} samples; {self.ends[-1]} were announced")
        splits = np.searchsorted(self.ends, np.arange(first, first + len(probabilities)), side="right")
        p = probabilities.astype(np.float64)
        entropy = (p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
        for split in np.unique(splits):
            mine = splits == split
            self.sums[split] += p[mine].sum(axis=0)
            self.entropies[split] += entropy[mine].sum()
            self.counts[split] += mine.sum()

    def read(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits."""
        m = self.sums / self.counts[:, None]
        scores = np.exp(self.entropies / self.counts - (m * np.log(np.where(m > 0, m, 1.0))).sum(axis=1))
        return float(scores.mean()), float(scores.std())


class Blocks(Protocol):
    """Images of one size that come a few at a time: a file's, or those in memory."""

    @property
    def count(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    def blocks(self) -> Iterator[Images]: ...


@dataclass(frozen=True)
class InMemory:
    """Images (n, 1 or 3, H, W) uint8 that are there already."""

    images: NDArray[np.uint8]

    @property
    def count(self) -> int:
        """How many."""
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.images.shape[2], self.images.shape[3], 3

    def blocks(self) -> Iterator[Images]:
        """A few (n, H, W, 3) at a time."""
        return (three_channels(self.images[i : i + 256]) for i in range(0, self.count, 256))


@dataclass(frozen=True)
class Seen:
    """What is kept of a set of images."""

    pooled: GaussianStats
    spatial: GaussianStats
    features: NDArray[np.float32] | None
    inception_score: tuple[float, float]
    count: int


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: from published statistics, from images, or both as in ADM's files."""

    name: str
    sha256: str
    pooled: GaussianStats
    spatial: GaussianStats | None
    features: NDArray[np.float32] | None
    images: int
    """How many of its images are at hand; 0 where only statistics are."""


def look(inception: Inception, blocks: Iterator[Images], count: int, keep: bool, what: str) -> Seen:
    """Streams images (n, H, W, 3) through the network; `keep` keeps the pooled features (count, 2048)."""
    pooled, spatial = GaussianStats(FEATURES), GaussianStats(SPATIAL)
    features = np.empty((count, FEATURES), np.float32) if keep else None
    score: SplitScore | None = None
    with bar(None, what, count, "image") as progress:
        for block in blocks:
            found = inception(block)
            score = score or SplitScore(found.probabilities.shape[1], count)
            if features is not None:
                features[pooled.count : pooled.count + len(block)] = found.pooled
            pooled.update(found.pooled)
            spatial.update(found.spatial)
            score.update(found.probabilities)
            progress.update(len(block))
    if score is None or pooled.count != count:
        raise UserError(f"{what}: {pooled.count} images of {count}")
    return Seen(pooled, spatial, features, score.read(), count)


def read_reference(path: Path, inception: Inception, shape: tuple[int, int, int]) -> Reference:
    """An ADM `.npz` (mu, sigma, mu_s, sigma_s and/or arr_0), a folder of images or a data folder; shape (H, W, 3).

    UserError in one line for a missing file, features of another size, or images of another resolution.
    """
    found = open_reference(path, shape)
    if found.images is None:
        assert found.pooled is not None
        return Reference(path.name, found.sha256, found.pooled, found.spatial, None, 0)
    blocks, count = found.images
    seen = look(inception, blocks, count, True, f"reference {path.name}")
    pooled, spatial = found.pooled or seen.pooled, found.spatial or seen.spatial
    return Reference(path.name, found.sha256, pooled, spatial, seen.features, count)


@dataclass(frozen=True)
class Opened:
    """What a reference holds, before its images are looked at: statistics, images and how many, or both."""

    sha256: str
    pooled: GaussianStats | None
    spatial: GaussianStats | None
    images: tuple[Iterator[Images], int] | None


def open_reference(path: Path, shape: tuple[int, int, int]) -> Opened:
    """Checks what `read_reference` will read as far as that takes no network; UserError as there."""
    if path.is_dir():
        blocks, count, sha256 = _folder(path, shape)
        return Opened(sha256, None, None, (blocks, count))
    if path.suffix != ".npz" or not path.is_file():
        raise UserError(f"reference {path}: an ADM .npz, a folder of images, or a data folder is needed")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            known = {key: file[key] for key in ("mu", "sigma", "mu_s", "sigma_s") if key in names}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"reference {path}: can't be read ({str(error).splitlines()[0][:120]})") from None
    pooled = _gaussian(path, known, "mu", "sigma", FEATURES)
    spatial = _gaussian(path, known, "mu_s", "sigma_s", SPATIAL)
    if "arr_0" in names:
        images = open_npz(path)
        if images.shape != shape:
            raise UserError(f"reference {path}: images of {_size(images.shape)}, the samples have {_size(shape)}")
        return Opened(sha256_file(path), pooled, spatial, (images.blocks(), images.count))
    if pooled is None:
        raise UserError(f"reference {path}: neither mu and sigma nor arr_0 in it, only {', '.join(sorted(names))}")
    return Opened(sha256_file(path), pooled, spatial, None)


def _gaussian(path: Path, known: dict[str, Array], mean: str, covariance: str, width: int) -> GaussianStats | None:
    if mean not in known or covariance not in known:
        return None
    mu, sigma = known[mean], known[covariance]
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise UserError(
            f"reference {path}: {mean} {mu.shape} and {covariance} {sigma.shape}; these features need {(width,)} "
            f"and {(width, width)}"
        )
    return GaussianStats.known(mu, sigma)


def _folder(folder: Path, shape: tuple[int, int, int]) -> tuple[Iterator[Images], int, str]:
    """The images of a data folder (its training part) or of a folder of pictures, how many, and a digest."""
    if (folder / "images.safetensors").is_file():
        real = read_images(folder)
        if tuple(real.train.shape[-2:]) != shape[:2]:
            raise UserError(
                f"reference {folder}: images of {_size(real.train.shape[-2:])}, the samples have {_size(shape)}"
            )
        return InMemory(real.train.numpy()).blocks(), len(real.train), real.digest
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"reference {folder}: neither images.safetensors nor pictures in it")
    if shape[0] != shape[1]:
        raise UserError(f"reference {folder}: pictures are cut square, the samples have {_size(shape)}")
    return _pictures(files, shape[0]), len(files), f"{len(files)} files"


def _pictures(files: Sequence[Path], side: int) -> Iterator[Images]:
    """Pictures cut as ADM cuts them; UserError for one smaller than the samples, which would be blown up."""
    from PIL import Image

    for first in range(0, len(files), 256):
        block = []
        for path in files[first : first + 256]:
            data = path.read_bytes()
            block.append(load_image(data, side, 3).transpose(1, 2, 0))
            with Image.open(path) as picture:
                if min(picture.size) < side:
                    raise UserError(
                        f"reference {path}: {picture.width}×{picture.height}, the samples have {side}×{side}"
                    )
        yield np.stack(block)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def enough(count: int) -> None:
    """UserError where a covariance of `count` samples would be singular, before anything slow is done."""
    if count <= FEATURES:
        needed = f"needs at least {FEATURES + 1} samples"
        raise UserError(f"--num {count}: a Fréchet distance of {FEATURES} features {needed}")


def check_classes(labels: NDArray[np.int64] | None, num_classes: int) -> None:
    """UserError naming the classes that no sample has: classes mixed unlike the reference's compare unfairly."""
    if labels is None:
        return
    empty = sorted(set(range(num_classes)) - set(labels.tolist()))
    if empty:
        named = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        raise UserError(
            f"samples: none of {len(labels)} has class {named} ({len(empty)} of {num_classes} are empty); draw more, "
            "or --any-labels to compare all the same"
        )


def score(samples: Blocks, inception: Inception, reference: Reference) -> dict[str, float]:
    """Every number that the reference allows, of samples of its resolution."""
    enough(samples.count)
    with_images = reference.features is not None
    seen = look(inception, samples.blocks(), samples.count, with_images, "samples")
    numbers = {"fid": frechet(seen.pooled, reference.pooled)}
    if reference.spatial is not None:
        numbers["sfid"] = frechet(seen.spatial, reference.spatial)
    numbers["inception_score"], numbers["inception_score_std"] = seen.inception_score
    if reference.features is not None and seen.features is not None:
        size = min(KID_SUBSET, samples.count, len(reference.features))
        numbers["kid"], numbers["kid_std"] = kernel_distance(reference.features, seen.features, KID_SUBSETS, size)
        numbers["precision"], numbers["recall"] = precision_recall(reference.features, seen.features)
    return numbers


def protocol(samples: Blocks, inception: Inception, reference: Reference) -> dict[str, object]:
    """Under what the numbers hold."""
    return {
        "num": samples.count,
        "size": _size(samples.shape),
        "reference": reference.name,
        "reference_sha256": reference.sha256,
        "reference_images": reference.images,
        "resize": RESIZE,
        "features": f"InceptionV3 (2015), pool3 {FEATURES}; sFID: Mixed_6d.branch1x1, 17×17×7",
        "weights_sha256": inception.sha256,
        "inception_score_split": SPLIT,
        "kid": f"{KID_SUBSETS} subsets of at most {KID_SUBSET}, cubic kernel",
        "precision_recall": "k = 3, float64",
    }
