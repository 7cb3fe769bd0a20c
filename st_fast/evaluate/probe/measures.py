"""What a probe measures on features, as NumPy functions: each value with what every image adds to its uncertainty."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
RIDGE = 1e-3
"""Penalty of the linear map to the latents, relative to the features' variance."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images, or a ratio of two: its value, and by how much each image moves it (n,), with mean 0.

    The standard error is that of another draw of held-out images. It knows nothing of another seed's training.
    """

    value: float
    parts: Array

    @property
    def error(self) -> float:
        """The standard error."""
        return float(self.parts.std(ddof=1) / math.sqrt(len(self.parts)))

    def over(self, other: "Estimate") -> "Estimate":
        """How much larger it is than another one of the same images: what both have in common does not count."""
        return Estimate(self.value - other.value, self.parts - other.parts)

    def exceeds(self, other: "Estimate", errors: float = 2.0) -> bool:
        """Whether it is larger by more than so many standard errors of the difference."""
        return self.over(other).above(errors)

    def above(self, errors: float = 2.0) -> bool:
        """Whether it is above 0 by more than so many standard errors."""
        return self.value > errors * self.error


def share(right: NDArray[np.bool_]) -> Estimate:
    """How many are true; its standard error is the binomial one."""
    values = right.astype(np.float64)
    return Estimate(float(values.mean()), values - values.mean())


def explained(left: Array, total: Array) -> Estimate:
    """1 − Σ left / Σ total, of each image's unexplained and whole sum of squares (n,); NaN where nothing varies."""
    left, total = left.astype(np.float64), total.astype(np.float64)
    whole = total.sum()
    if not whole > 0:
        return Estimate(math.nan, np.full(len(total), math.nan))
    ratio = left.sum() / whole
    return Estimate(float(1 - ratio), -(left - ratio * total) / total.mean())


class Classifier:
    """A logistic regression on standardised features x (n, F) with labels (n,)."""

    def __init__(self, x: Array, labels: Labels) -> None:
        from sklearn.linear_model import LogisticRegression

        self.mean, spread = x.mean(axis=0), x.std(axis=0)
        self.scale = np.where(spread > 1e-6, spread, 1.0)
        self.model = LogisticRegression(max_iter=200, tol=1e-3).fit((x - self.mean) / self.scale, labels)

    def __call__(self, x: Array) -> Labels:
        """(m, F) → (m,): the classes that it names."""
        named: Labels = self.model.predict((x - self.mean) / self.scale)
        return named


def linear_probe(train: Array, train_labels: Labels, test: Array, test_labels: Labels) -> Estimate:
    """Share of `test` (m, F) classified correctly by a logistic regression on `train` (n, F)."""
    return share(Classifier(train, train_labels)(test) == test_labels)


def between_classes(x: Array, labels: Labels) -> Estimate:
    """Share of the variance of x (n, …) that lies between the classes of labels (n,).

    Both variances are the unbiased ones: labels that have nothing to do with x give 0 on average (so a little below
    0 as well), and 1 means that x is known once its class is. Each place of x has means of its own. NaN where every
    class has one member.
    """
    x = x.reshape(len(x), -1).astype(np.float64)
    within, count = _less_class_means(x, labels)
    total = np.square(x - x.mean(axis=0)).sum(axis=1)
    freedom = (len(x) - 1) / (len(x) - count) if len(x) > count else math.nan
    return explained(np.square(within).sum(axis=1) * freedom, total)


def image_share(one: Array, other: Array, labels: Labels | None = None) -> Estimate:
    """Share of the features' variance that the image decides and not the noise.

    one, other (n, …): features of the same images under two independent noises. Each place's mean is removed; with
    `labels` each class's mean at each place is, and what is left is the share within a class.
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (one, other))
    if labels is None:
        (centred_a, centred_b), count = (x - x.mean(axis=0) for x in (a, b)), 1
    else:
        (centred_a, count), (centred_b, _) = (_less_class_means(x, labels) for x in (a, b))
    freedom = len(a) / max(len(a) - count, 1)
    total = (np.square(centred_a) + np.square(centred_b)).sum(axis=1) * freedom
    return explained(np.square(a - b).sum(axis=1), total)


def _less_class_means(x: Array, labels: Labels) -> tuple[Array, int]:
    """x (n, F) less the mean of its class, and how many classes there are."""
    classes, place = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), x.shape[1]))
    np.add.at(sums, place, x)
    return x - (sums / np.bincount(place)[:, None])[place], len(classes)


def linear_fit(train: Array, train_targets: Array, test: Array, test_targets: Array) -> Estimate:
    """R² on held-out images of one linear map from a token to its patch, fitted by ridge regression.

    train (n, N, D) → train_targets (n, N, P), and m held-out ones likewise. Each position's own means over the
    training images are removed first, so that knowing where a patch lies counts for nothing.
    """
    shift, goal = train.mean(axis=0, dtype=np.float64), train_targets.mean(axis=0, dtype=np.float64)
    x, y = ((a - m).reshape(-1, a.shape[-1]) for a, m in ((train, shift), (train_targets, goal)))
    spread = x.std(axis=0)
    scale = np.where(spread > 1e-6, spread, 1.0)
    x = x / scale
    weights = np.linalg.solve(x.T @ x / len(x) + RIDGE * np.eye(x.shape[1]), x.T @ y / len(x))
    wanted = test_targets - goal
    missed = wanted - ((test - shift) / scale) @ weights
    return explained(np.square(missed).sum(axis=(1, 2)), np.square(wanted).sum(axis=(1, 2)))


def cka(x: Array, y: Array) -> float:
    """Linear centred kernel alignment of x (n, F) and y (n, G), 0 to 1 (Kornblith et al., arXiv 1905.00414).

    ‖Yᵀ X‖² / (‖Xᵀ X‖·‖Yᵀ Y‖) of the centred matrices: 1 where they agree up to rotation and scale. NaN where either
    is constant.
    """
    a, b = (m.astype(np.float64) - m.mean(axis=0, dtype=np.float64) for m in (x, y))
    norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(b.T @ a) ** 2 / norms) if norms > 0 else float("nan")


def cosine(x: Array, y: Array) -> float:
    """Mean over rows of cos(x_n, y_n), both (n, F): what REPA and LayerSync align."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(norms, 1e-12)).mean())


def pca_colours(tokens: Array) -> NDArray[np.float64]:
    """Tokens (n, N, D) → their first three principal components as colours (n, N, 3) in 0..1.

    The components are of all n·N tokens. Subtract each position's own mean first, or they show where a patch lies
    instead of its content. Each is signed so that its largest loading is positive, and cut at the 2nd and
    98th percentile.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat -= flat.mean(axis=0)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    top = vectors[:, ::-1][:, :3]
    top = top * np.sign(top[np.abs(top).argmax(axis=0), np.arange(top.shape[1])])
    scores = flat @ top
    low, high = np.percentile(scores, (2, 98), axis=0)
    colours = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    return np.pad(colours, ((0, 0), (0, 3 - colours.shape[1]))).reshape(*tokens.shape[:2], 3)
