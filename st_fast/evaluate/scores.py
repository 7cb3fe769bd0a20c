"""FID, sFID, Inception Score, KID, precision and recall as ADM's evaluator defines them (arXiv 2105.05233).

Everything is streamed: besides statistics of fixed size, only the pooled features are kept, for precision, recall and
KID (410 MB for 50,000 samples), and only where the reference has images to compare them with.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_fast.core.errors import UserError
from st_fast.core.files import sha256_file, shown
from st_fast.core.limits import Zip
from st_fast.core.progress import bar
from st_fast.data.archives import Files, open_folder
from st_fast.data.images import center_crop, decode_image
from st_fast.data.manifest import FILE_NAME
from st_fast.data.sources import images_of
from st_fast.evaluate.classifier import how_to_write_images, read_images
from st_fast.evaluate.inception import CLASSES, FEATURES, Inception
from st_fast.evaluate.metrics import Array, GaussianStats, InceptionScore, frechet, kernel_distance, precision_recall
from st_fast.sample.set import ImageFile, Images, open_npz, three_channels

SPATIAL = 17 * 17 * 7
SPLIT = 5_000
"""Samples of a split of the Inception Score in ADM's evaluator."""
KID_SUBSET, KID_SUBSETS = 1_000, 100
BLOCK = 256
"""Images in memory at once."""


class InMemory:
    """Images (n, 1 or 3, H, W) uint8 with the interface of `ImageFile`; its `shape` is (H, W, 3)."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images, self.count = images, len(images)
        self.shape = (images.shape[2], images.shape[3], 3)

    def blocks(self) -> Iterator[Images]:
        """A few (n, H, W, 3) at a time."""
        return (three_channels(self.images[i : i + BLOCK]) for i in range(0, self.count, BLOCK))


Opened = tuple[str, GaussianStats | None, GaussianStats | None, tuple[Iterator[Images], int] | None]
"""A reference before its images are read: SHA-256, pooled and spatial statistics, and images with their number."""


class Reference(NamedTuple):
    """Statistics to compare samples with, and where it has images, their pooled features and number (else 0)."""

    name: str
    sha256: str
    pooled: GaussianStats
    spatial: GaussianStats | None
    features: NDArray[np.float32] | None
    images: int


def extract(
    inception: Inception, blocks: Iterator[Images], count: int, keep: bool, what: str
) -> tuple[GaussianStats, GaussianStats, NDArray[np.float32] | None, tuple[float, float]]:
    """Streams images (n, H, W, 3) through the network.

    Returns pooled and spatial statistics, if `keep` the pooled features (count, 2048), and the Inception Score.
    """
    pooled, spatial = GaussianStats(FEATURES), GaussianStats(SPATIAL)
    features = np.empty((count, FEATURES), np.float32) if keep else None
    score = InceptionScore(CLASSES, count, SPLIT)
    with bar(None, what, count, "image") as progress:
        for block in blocks:
            found = inception(block)
            if features is not None:
                features[pooled.count : pooled.count + len(block)] = found.pooled
            pooled.update(found.pooled)
            spatial.update(found.spatial)
            score.update(found.probabilities)
            progress.update(len(block))
    if pooled.count != count:
        raise UserError(f"{what}: {pooled.count} images of {count}")
    return pooled, spatial, features, score.read()


def read_reference(path: Path, inception: Inception, shape: tuple[int, int, int]) -> Reference:
    """An ADM `.npz` (mu, sigma, mu_s, sigma_s and/or arr_0), a folder of images or a data folder; shape (H, W, 3).

    UserError in one line for a missing file, features of another size, or images of another resolution.
    """
    sha256, pooled, spatial, images = open_reference(path, shape)
    if images is None:
        assert pooled is not None
        return Reference(path.name, sha256, pooled, spatial, None, 0)
    own_pooled, own_spatial, features, _ = extract(inception, *images, True, f"reference {path.name}")
    return Reference(path.name, sha256, pooled or own_pooled, spatial or own_spatial, features, images[1])


def open_reference(path: Path, shape: tuple[int, int, int]) -> Opened:
    """Checks all of a reference that can be checked without the network; UserError as `read_reference`."""
    if path.is_dir():
        return _open_folder(path, shape)
    if path.suffix != ".npz" or not path.is_file():
        raise UserError(f"reference {path}: an ADM .npz, a folder of images, or a data folder is needed")
    with Zip(path) as file:
        names = {name.removesuffix(".npy") for name in file.namelist()}
        known = {key: file.array(key) for key in ("mu", "sigma", "mu_s", "sigma_s") if f"{key}.npy" in file.NameToInfo}
    pooled = _gaussian(path, known, "mu", "sigma", FEATURES)
    spatial = _gaussian(path, known, "mu_s", "sigma_s", SPATIAL)
    images = open_npz(path) if "arr_0" in names else None
    if images is None and pooled is None:
        raise UserError(f"reference {path}: neither mu and sigma nor arr_0 in it, only {shown(sorted(names))}")
    if images is not None:
        _check_size(path, images.shape, shape)
    return sha256_file(path), pooled, spatial, (images.blocks(BLOCK), images.count) if images else None


def _gaussian(path: Path, known: dict[str, Array], mean: str, covariance: str, width: int) -> GaussianStats | None:
    if mean not in known or covariance not in known:
        return None
    mu, sigma = known[mean], known[covariance]
    floats = all(np.issubdtype(found.dtype, np.floating) and np.isfinite(found).all() for found in (mu, sigma))
    if mu.shape != (width,) or sigma.shape != (width, width) or not floats:
        given = f"{mean} {mu.shape} and {covariance} {sigma.shape}" + " of finite numbers" * (not floats)
        raise UserError(f"reference {path}: {given}; these features need {(width,)} and {(width, width)}")
    return GaussianStats.known(mu, sigma)


def _open_folder(folder: Path, shape: tuple[int, int, int]) -> Opened:
    """The training images of a data folder, or a folder of pictures."""
    if (folder / "images.safetensors").is_file():
        real = read_images(folder)
        images = InMemory(real.train.numpy())
        _check_size(folder, images.shape, shape)
        return real.digest, None, None, (images.blocks(), images.count)
    files = open_folder(folder)
    names = images_of(files.names)
    if not names:
        how = f"; {how_to_write_images(folder)}" if (folder / FILE_NAME).is_file() else ""
        raise UserError(f"reference {folder}: neither images.safetensors nor pictures in it{how}")
    if shape[0] != shape[1]:
        raise UserError(f"reference {folder}: pictures are cut square, the samples have {_size(shape)}")
    return f"{len(names)} files", None, None, (_pictures(files, names, shape[0]), len(names))


def _pictures(files: Files, names: Sequence[str], side: int) -> Iterator[Images]:
    """Pictures cut as ADM cuts them; UserError naming one that can't be used or is smaller than the samples."""
    for first in range(0, len(names), BLOCK):
        block = []
        for name in names[first : first + BLOCK]:
            where = f"reference {files.where}: {shown(name)}"
            try:
                picture = decode_image(files.read(name), 3)
            except (UserError, OSError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"{where} can't be used ({reason}); remove it") from None
            if min(picture.size) < side:
                raise UserError(f"{where}: {picture.width}×{picture.height}, the samples have {side}×{side}")
            block.append(center_crop(picture, side))
        yield np.stack(block)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def _check_size(path: Path, found: Sequence[int], samples: Sequence[int]) -> None:
    if tuple(found[:2]) != tuple(samples[:2]):
        raise UserError(f"reference {path}: images of {_size(found)}, the samples have {_size(samples)}")


def check_count(count: int) -> None:
    """UserError where a covariance of `count` samples would be singular, before anything slow is done."""
    if count <= FEATURES:
        needs = f"a Fréchet distance of {FEATURES} features needs at least {FEATURES + 1} samples"
        raise UserError(f"--num {count}: {needs}")


def check_classes(labels: NDArray[np.int64] | None, num_classes: int) -> None:
    """UserError naming the classes without a sample: another mixture of classes than the reference's is unfair."""
    if labels is not None and (empty := sorted(set(range(num_classes)) - set(labels.tolist()))):
        named = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        raise UserError(
            f"samples: none of {len(labels)} has class {named} ({len(empty)} of {num_classes} are empty); draw more, "
            "or --any-labels to compare all the same"
        )


def score(samples: ImageFile | InMemory, inception: Inception, reference: Reference) -> dict[str, float]:
    """Every metric that the reference allows, by its key, of samples of its resolution."""
    check_count(samples.count)
    real = reference.features
    found = extract(inception, samples.blocks(), samples.count, real is not None, "samples")
    pooled, spatial, features, inception_score = found
    numbers = {"fid": frechet(pooled, reference.pooled)}
    if reference.spatial is not None:
        numbers["sfid"] = frechet(spatial, reference.spatial)
    numbers["inception_score"], numbers["inception_score_std"] = inception_score
    if real is not None and features is not None:
        size = min(KID_SUBSET, samples.count, len(real))
        numbers["kid"], numbers["kid_std"] = kernel_distance(real, features, KID_SUBSETS, size)
        numbers["precision"], numbers["recall"] = precision_recall(real, features)
    return numbers


def protocol(samples: ImageFile | InMemory, inception: Inception, reference: Reference) -> dict[str, object]:
    """The conditions under which the numbers were taken."""
    return {
        "num": samples.count, "size": _size(samples.shape), "reference": reference.name,
        "reference_sha256": reference.sha256, "reference_images": reference.images,
        "resize": "bilinear as TensorFlow 1 to 299", "weights_sha256": inception.sha256,
        "features": f"InceptionV3 (2015), pool3 {FEATURES}; sFID: Mixed_6d.branch1x1, 17×17×7",
        "inception_score_split": SPLIT, "kid": f"{KID_SUBSETS} subsets of at most {KID_SUBSET}, cubic kernel",
        "precision_recall": "k = 3, float64",
    }  # fmt: skip
