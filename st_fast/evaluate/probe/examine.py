"""Reads every block of a model on the same noisy latents, and measures: probe accuracy, loss by time, similarity."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from st_fast.evaluate.probe.latents import Latents, Split
from st_fast.model import DiffusionTransformer, flow

BATCH, BATCH_TOKENS = 200, 8_192
"""Images and tokens of one forward pass, at most."""
MOST_TOKENS = 8_192
"""Of a model's held-out tokens kept for pictures and alignment, at one time."""
MOST_BLOCKS = 12

Array = NDArray[np.floating]
Floats = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True)
class Findings:
    """Measures of one model's blocks. Block 0 is the embedded input.

    `accuracy` and `tokens` are by time, then by block; `loss` by time bin. Features are made with the null label, so
    that no block is told the class.
    """

    blocks: list[int]
    accuracy: list[list[float]]
    tokens: list[list[Floats]]
    """(n, N, D) each, less the mean of each position."""
    loss: list[float]


def chosen_blocks(depth: int, supervised: Sequence[int]) -> list[int]:
    """0 … depth, thinned to about MOST_BLOCKS in a deep model; the first, the last and the supervised ones stay."""
    even = np.linspace(0, depth, min(depth, MOST_BLOCKS) + 1).round().astype(int).tolist()
    return sorted({*even, *supervised})


def examine(
    model: DiffusionTransformer, split: Split, blocks: Sequence[int], times: Sequence[float], bins: int, path: str
) -> Findings:
    """All measures of one model; the same latents, noise and times for every model."""
    accuracy, tokens = [], []
    for t in times:
        learn, _ = features(model, split.train, t, path, blocks, images=0)
        test, patches = features(model, split.held_out, t, path, blocks, images=len(split.held_out.x))
        labels = split.train.labels.numpy(), split.held_out.labels.numpy()
        accuracy.append([linear_probe(a, labels[0], b, labels[1]) for a, b in zip(learn, test, strict=True)])
        tokens.append([patch - patch.mean(axis=0) for patch in patches])
    return Findings(list(blocks), accuracy, tokens, velocity_loss(model, split.held_out, bins, path))


@torch.no_grad()
def features(
    model: DiffusionTransformer, latents: Latents, t: float, path: str, blocks: Sequence[int], images: int
) -> tuple[list[Floats], list[Floats]]:
    """Each block's features at time t: pooled (n, D), and tokens (≤ images, N, D)."""
    x_t, _ = latents.at(torch.full((len(latents.x),), t), path)
    pooled: list[list[Floats]] = [[] for _ in blocks]
    tokens: list[list[Floats]] = [[] for _ in blocks]
    left = min(images, max(1, MOST_TOKENS // model.pos_embed.shape[1]))
    for part in _parts(len(x_t), model):
        x = x_t[part].to(model.pos_embed.device)
        null = model.null_condition(len(x))
        times = torch.full((len(x),), t, device=x.device)
        kept = min(left, len(x))

        def look(stream: Tensor, kept: int = kept) -> tuple[Floats, Floats]:
            return stream.float().mean(1).cpu().numpy(), stream[:kept].float().cpu().numpy()

        _, seen = read_blocks(model, x, times, null, look)
        for place, block in enumerate(blocks):
            pooled[place].append(seen[block][0])
            tokens[place].append(seen[block][1])
        left -= kept
    return [np.concatenate(parts) for parts in pooled], [np.concatenate(parts) for parts in tokens]


@torch.no_grad()
def velocity_loss(model: DiffusionTransformer, latents: Latents, bins: int, path: str) -> list[float]:
    """Mean denoising loss in each of `bins` equal bins of t, told the true labels."""
    means = []
    for number in range(bins):
        t = latents.times(number / bins, (number + 1) / bins)
        x_t, velocity = latents.at(t, path)
        losses: list[Tensor] = []
        for part in _parts(len(x_t), model):
            given = (values[part].to(model.pos_embed.device) for values in (x_t, t, latents.labels, velocity))
            x, times, labels, v = given
            losses.append(flow.denoising_loss(model(x, times, labels)[0], v).cpu())
        means.append(float(torch.cat(losses).mean()))
    return means


def _parts(count: int, model: DiffusionTransformer) -> Iterator[slice]:
    """Places of the images of each forward pass."""
    size = max(1, min(BATCH, BATCH_TOKENS // model.pos_embed.shape[1]))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@torch.no_grad()
def read_blocks(
    model: DiffusionTransformer, x: Tensor, t: Tensor, labels: Tensor, look: Callable[[Tensor], T]
) -> tuple[Tensor, list[T]]:
    """x (B, C, S, S), t (B,), labels (B,) → velocity (B, C, S, S) and `look` of each stream (B, N, D).

    The first is the embedded input's, then one a block, in order: depth + 1 in all. A stream is looked at as soon as
    it is there, so that a deep model's streams need not be held together.
    """
    seen = [look(model.embed_tokens(x))]
    run = model.run_block

    def recording(block: nn.Module, *arguments: Tensor) -> tuple[Tensor, ...]:
        stream, *others = run(block, *arguments)
        seen.append(look(stream))
        return stream, *others

    model.run_block = recording
    try:
        velocity, _ = model(x, t, labels)
    finally:
        model.run_block = run
    return velocity, seen


def linear_probe(train: Array, train_labels: NDArray[np.int64], test: Array, test_labels: NDArray[np.int64]) -> float:
    """Share of `test` (m, F) classified correctly by a logistic regression on standardised `train` (n, F)."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = train.mean(axis=0), train.std(axis=0)
    scale = np.where(spread > 1e-6, spread, 1.0)
    model = LogisticRegression(max_iter=200, tol=1e-3)
    model.fit((train - mean) / scale, train_labels)
    return float(model.score((test - mean) / scale, test_labels))


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
