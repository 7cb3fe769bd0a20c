"""Distances between two sets of images, on features or probabilities that are given. Pure NumPy, float64.

With Inception's features the Fréchet distance is FID; with any other network's it is not and must not be called so.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from st_fast.core.errors import UserError

Array = NDArray[np.float64]

ROWS = 2_048
"""Rows taken into float64 at once, so that a large float32 feature matrix is never copied whole."""
DISTANCES = 16_000_000
"""Distances held at once: 128 MB."""


def _matrix(name: str, values: NDArray[np.generic]) -> NDArray[np.generic]:
    """The values; UserError unless they are (n, F), not empty, and finite."""
    if values.ndim != 2 or values.shape[0] == 0 or values.shape[1] == 0:
        raise UserError(f"{name}: shape {tuple(values.shape)}; (samples, features) with at least one of each is needed")
    for start, rows in _blocks(values):
        if not np.isfinite(rows).all():
            row = start + int(np.argwhere(~np.isfinite(rows))[0, 0])
            raise UserError(f"{name}: row {row} holds NaN or Inf; features must be finite")
    return values


def _blocks(values: NDArray[np.generic], rows: int | None = None) -> Iterator[tuple[int, Array]]:
    """Yields (first row, float64 copy of up to `rows` rows; None: ROWS)."""
    rows = ROWS if rows is None else rows
    for start in range(0, len(values), rows):
        yield start, values[start : start + rows].astype(np.float64)


class GaussianStats:
    """Mean and covariance of features that arrive in pieces (Chan, Golub and LeVeque's pairwise update, 1983).

    Holds count, mean (F,) and scatter (F, F) = Σ (x − mean)(x − mean)ᵀ, all in float64: 34 MB at F = 2,048.
    """

    def __init__(self, width: int, count: int = 0) -> None:
        self.width, self.count = width, count
        self.mean, self.scatter = np.zeros(width), np.zeros((width, width))

    @classmethod
    def of(cls, features: NDArray[np.generic]) -> GaussianStats:
        """Statistics of features (n, F) of any real dtype."""
        stats = cls(features.shape[-1])
        stats.update(features)
        return stats

    @classmethod
    def known(cls, mean: Array, covariance: Array) -> GaussianStats:
        """Statistics of a published reference: mean (F,), unbiased covariance (F, F), of enough samples, as it says."""
        stats = cls(len(mean), count=len(mean) + 1)
        stats.mean, stats.scatter = mean.astype(np.float64), covariance.astype(np.float64) * len(mean)
        return stats

    def update(self, features: NDArray[np.generic]) -> None:
        """Adds features (n, F); UserError where F differs or an entry isn't finite."""
        if _matrix("features", features).shape[1] != self.width:
            raise UserError(f"features: {features.shape[1]} a sample; these statistics have {self.width}")
        for _, rows in _blocks(features):
            mean, total = rows.mean(axis=0), self.count + len(rows)
            rows -= mean
            delta = mean - self.mean
            self.scatter += rows.T @ rows
            self.scatter += np.outer(delta, delta * (self.count * len(rows) / total))
            self.mean = self.mean + delta * (len(rows) / total)
            self.count = total

    @property
    def covariance(self) -> Array:
        """The unbiased covariance (F, F) of at least two samples."""
        covariance: Array = self.scatter / (self.count - 1)
        return covariance


def frechet(a: GaussianStats, b: GaussianStats) -> float:
    """Squared Fréchet distance of two Gaussians: |μa − μb|² + tr(A + B − 2(AB)^½) (Dowson and Landau, 1982).

    tr (AB)^½ is the sum of the square roots of the eigenvalues of the symmetric A^½·B·A^½, so no complex root and no
    added diagonal is needed, and singular covariances are fine numerically. A covariance of n ≤ F samples is singular
    by construction and its distance mostly bias: UserError.
    """
    if a.width != b.width:
        raise UserError(f"Fréchet distance: {a.width} features against {b.width}; both sets need the same features")
    for stats in (a, b):
        if stats.count <= stats.width:
            needed = f"at least {stats.width + 1} are needed"
            raise UserError(f"Fréchet distance: {stats.count} samples of {stats.width} features; {needed}")
    delta = a.mean - b.mean
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(_without_noise(values))) @ vectors.T
    product = root_a @ cov_b @ root_a
    cross = np.sqrt(_without_noise(np.linalg.eigvalsh((product + product.T) / 2))).sum()
    return max(0.0, float(delta @ delta + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def _without_noise(eigenvalues: Array) -> Array:
    """Sets to 0 what eigh can't tell from 0, since the square root of rounding noise would be large."""
    noise = len(eigenvalues) * np.finfo(np.float64).eps * np.abs(eigenvalues).max()
    return np.where(eigenvalues > noise, eigenvalues, 0.0)


def squared_mmd(x: Array, y: Array) -> float:
    """Unbiased squared MMD of x (m, F) and y (n, F), m, n ≥ 2, under (x·y/F + 1)³ (Bińkowski, arXiv 1801.01401)."""
    m, n = len(x), len(y)
    k_xx, k_yy, k_xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within_x = (k_xx.sum() - np.trace(k_xx)) / (m * (m - 1))
    within_y = (k_yy.sum() - np.trace(k_yy)) / (n * (n - 1))
    return float(within_x + within_y - 2 * k_xy.mean())


def kernel_distance(
    x: NDArray[np.generic], y: NDArray[np.generic], subsets: int = 100, subset_size: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """KID: mean and standard deviation of `squared_mmd` over random subsets of x (m, F) and y (n, F).

    UserError where either set has fewer than `subset_size` samples.
    """
    _same_width("kernel distance", x, y)
    if (fewer := min(len(x), len(y))) < subset_size:
        raise UserError(f"kernel distance: {fewer} samples; subsets of {subset_size} need at least as many")
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(subsets):
        pick_x, pick_y = (rng.choice(len(s), subset_size, replace=False) for s in (x, y))
        distances.append(squared_mmd(x[pick_x].astype(np.float64), y[pick_y].astype(np.float64)))
    return float(np.mean(distances)), float(np.std(distances))


def precision_recall(reference: NDArray[np.generic], samples: NDArray[np.generic], k: int = 3) -> tuple[float, float]:
    """Improved precision and recall as ADM's evaluator defines them (Kynkäänniemi et al., arXiv 1904.06991; k = 3).

    Precision: share of `samples` (n, F) inside the ball of some reference point (m, F), whose radius reaches that
    point's k-th nearest other reference point. Recall: the same with the two sets exchanged. Distances are in
    float64, where ADM's own program takes half precision. UserError where a set has no more than k points.
    """
    _same_width("precision and recall", reference, samples)
    if (fewer := min(len(reference), len(samples))) <= k:
        raise UserError(f"precision and recall: {fewer} samples; more than k = {k} are needed")
    centre = reference.mean(axis=0, dtype=np.float64)
    ref_radii, sample_radii = _squared_radii(reference, centre, k), _squared_radii(samples, centre, k)
    covered_by_samples, hits = np.zeros(len(reference), dtype=bool), 0
    for start, rows in _distance_rows(samples, reference, centre):
        hits += int((rows <= ref_radii).any(axis=1).sum())
        covered_by_samples |= (rows <= sample_radii[start : start + len(rows), None]).any(axis=0)
    return hits / len(samples), float(covered_by_samples.mean())


def _squared_radii(points: NDArray[np.generic], centre: Array, k: int) -> Array:
    """Squared distance (n,) of each point to its k-th nearest other point."""
    radii = np.empty(len(points))
    for start, rows in _distance_rows(points, points, centre):
        rows[np.arange(len(rows)), np.arange(start, start + len(rows))] = np.inf
        radii[start : start + len(rows)] = np.partition(rows, k - 1, axis=1)[:, k - 1]
    return radii


def _distance_rows(a: NDArray[np.generic], b: NDArray[np.generic], centre: Array) -> Iterator[tuple[int, Array]]:
    """Yields (first row of a, squared distances (rows, len(b))), of up to ROWS rows and about DISTANCES entries.

    Distances that rounding can't tell from 0 are 0, so that equal points coincide.
    """
    b_sq = np.concatenate([np.square(rows - centre).sum(axis=1) for _, rows in _blocks(b)])
    step = max(1, min(ROWS, DISTANCES // len(b)))
    for start, rows in _blocks(a, step):
        rows -= centre
        scale = np.square(rows).sum(axis=1)[:, None] + b_sq
        distances = np.empty_like(scale)
        for column, others in _blocks(b):
            distances[:, column : column + len(others)] = rows @ (others - centre).T
        distances = scale - 2 * distances
        distances[distances < 1e-13 * scale] = 0.0
        yield start, distances


def _same_width(name: str, x: NDArray[np.generic], y: NDArray[np.generic]) -> None:
    if _matrix(name, x).shape[1] != _matrix(name, y).shape[1]:
        raise UserError(f"{name}: {x.shape[1]} features against {y.shape[1]}; both sets need the same features")


class InceptionScore:
    """The Inception Score of probabilities (n, classes) that arrive in order, in splits of `size`; nothing is kept.

    exp(E KL(p(y|x) ‖ p(y))) = exp(E Σ p·log p − Σ m·log m) with m the split's mean (arXiv 1606.03498). A last split
    shorter than half of `size` counts with the one before it.
    """

    def __init__(self, classes: int, count: int, size: int) -> None:
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
