"""Measures of features with NumPy and scikit-learn: linear probe, CKA, cosine, principal components as colours."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def linear_probe(
    train: NDArray[np.floating], train_labels: NDArray[np.int64],
    test: NDArray[np.floating], test_labels: NDArray[np.int64],
) -> float:  # fmt: skip
    """Share of `test` (m, F) classified correctly by a logistic regression on standardised `train` (n, F)."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = train.mean(axis=0), train.std(axis=0)
    scale = np.where(spread > 1e-6, spread, 1.0)
    model = LogisticRegression(max_iter=200, tol=1e-3)
    model.fit((train - mean) / scale, train_labels)
    return float(model.score((test - mean) / scale, test_labels))


def cka(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Linear centred kernel alignment of x (n, F) and y (n, G), 0 to 1 (Kornblith et al., arXiv 1905.00414).

    ‖Yᵀ X‖² / (‖Xᵀ X‖·‖Yᵀ Y‖) of the centred matrices: 1 where they agree up to rotation and scale. NaN where either
    is constant.
    """
    a, b = (m.astype(np.float64) - m.mean(axis=0, dtype=np.float64) for m in (x, y))
    norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(b.T @ a) ** 2 / norms) if norms > 0 else float("nan")


def cosine(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Mean over rows of cos(x_n, y_n), both (n, F): what REPA and LayerSync align."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(norms, 1e-12)).mean())


def pca_colours(tokens: NDArray[np.floating]) -> NDArray[np.float64]:
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
