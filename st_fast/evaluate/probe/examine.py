"""Reads every block of a model on the same noisy latents, and measures: probe accuracy, clean latents, loss by time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from st_fast.evaluate.probe.latents import Latents, Split
from st_fast.evaluate.probe.measures import Estimate, Floats, image_share, linear_fit, linear_probe
from st_fast.model import DiffusionTransformer, flow

BATCH, BATCH_TOKENS = 200, 8_192
"""Images and tokens of one forward pass, at most."""
MOST_TOKENS = 8_192
"""Of a model's training and held-out tokens each, kept at one time."""
MOST_BLOCKS = 12

T = TypeVar("T")


@dataclass(frozen=True)
class Findings:
    """Measures of one model's blocks. Block 0 is the embedded input.

    All but `loss`, which is by time bin, are by time, then by block. Features are made with the null label, so that no
    block is told the class.
    """

    blocks: list[int]
    accuracy: list[list[Estimate]]
    clean: list[list[Estimate]]
    """R² of a linear map from tokens to the clean latent's patches."""
    steady: list[list[Estimate]]
    """Share of the tokens' variance that the image decides, not the noise."""
    tokens: list[list[Floats]]
    """(n, N, D) each, less the mean of each position."""
    loss: list[float]

    def at(self, measure: str, place: int, block: int) -> Estimate:
        """One of the measures above at the time of this place, of one of `blocks`."""
        found: Estimate = getattr(self, measure)[place][self.blocks.index(block)]
        return found


def chosen_blocks(depth: int, supervised: Sequence[int]) -> list[int]:
    """0 … depth, thinned to about MOST_BLOCKS in a deep model; the first, the last and the supervised ones stay."""
    even = np.linspace(0, depth, min(depth, MOST_BLOCKS) + 1).round().astype(int).tolist()
    return sorted({*even, *supervised})


def examine(
    model: DiffusionTransformer, split: Split, blocks: Sequence[int], times: Sequence[float], bins: int, path: str
) -> Findings:
    """All measures of one model; the same latents, noise and times for every model."""
    found = Findings(list(blocks), [], [], [], [], velocity_loss(model, split.held_out, bins, path))
    labels = split.train.labels.numpy(), split.held_out.labels.numpy()
    patch = model.config.patch
    for t in times:
        train, train_tokens = features(model, split.train, t, path, blocks)
        test, tokens = features(model, split.held_out, t, path, blocks)
        _, again = features(model, split.held_out, t, path, blocks, draw=1)
        goals = [patches(part.x[: len(kept[0])], patch)
                 for part, kept in ((split.train, train_tokens), (split.held_out, tokens))]  # fmt: skip
        pooled = zip(train, test, strict=True)
        found.accuracy.append([linear_probe(a, labels[0], b, labels[1]) for a, b in pooled])
        streams = zip(train_tokens, tokens, strict=True)
        found.clean.append([linear_fit(a, goals[0], b, goals[1]) for a, b in streams])
        found.steady.append([image_share(a, b) for a, b in zip(tokens, again, strict=True)])
        found.tokens.append([part - part.mean(axis=0) for part in tokens])
    return found


def patches(x: Tensor, patch: int) -> Floats:
    """Latents (n, C, H, W) → their patches in the order of the tokens (n, N, C·patch²)."""
    cut: Floats = nn.functional.unfold(x, patch, stride=patch).transpose(1, 2).numpy()
    return cut


def kept_images(model: DiffusionTransformer, count: int) -> int:
    """Of how many of `count` images the tokens are kept: as many as make MOST_TOKENS."""
    return min(count, max(1, MOST_TOKENS // model.config.tokens))


@torch.no_grad()
def features(
    model: DiffusionTransformer, latents: Latents, t: float, path: str, blocks: Sequence[int], draw: int = 0
) -> tuple[list[Floats], list[Floats]]:
    """Each block's features at time t: pooled (n, D), and tokens of the first images (`kept_images`, N, D).

    `draw`: which of the noises; the same for every model and time.
    """
    x_t, _ = latents.at(torch.full((len(latents.x),), t), path, draw)
    pooled: list[list[Floats]] = [[] for _ in blocks]
    tokens: list[list[Floats]] = [[] for _ in blocks]
    left = kept_images(model, len(x_t))
    for part in parts(len(x_t), model):
        x = x_t[part].to(model.device)
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
    return [np.concatenate(each) for each in pooled], [np.concatenate(each) for each in tokens]


@torch.no_grad()
def velocity_loss(model: DiffusionTransformer, latents: Latents, bins: int, path: str) -> list[float]:
    """Mean denoising loss in each of `bins` equal bins of t, told the true labels."""
    means = []
    for number in range(bins):
        t = latents.times(number / bins, (number + 1) / bins)
        x_t, velocity = latents.at(t, path)
        losses: list[Tensor] = []
        for part in parts(len(x_t), model):
            given = (values[part].to(model.device) for values in (x_t, t, latents.labels, velocity))
            x, times, labels, v = given
            losses.append(flow.denoising_loss(model(x, times, labels)[0], v).cpu())
        means.append(float(torch.cat(losses).mean()))
    return means


def parts(count: int, model: DiffusionTransformer) -> Iterator[slice]:
    """Places of the images of each forward pass."""
    size = max(1, min(BATCH, BATCH_TOKENS // model.config.tokens))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@torch.no_grad()
def read_blocks(
    model: DiffusionTransformer, x: Tensor, t: Tensor, labels: Tensor, look: Callable[[Tensor], T]
) -> tuple[Tensor, list[T]]:
    """x (B, C, S, S), t (B,), labels (B,) → velocity (B, C, S, S) and `look` of each stream (B, N, D).

    The first is the embedded input's, then one a block, in order: depth + 1 in all, of the image's tokens, without
    registers. A stream is looked at as soon as it is there, so that a deep model's streams need not be held together.
    """
    seen = [look(model.embed_tokens(x))]
    run = model.run_block

    def recording(block: nn.Module, *arguments: Tensor) -> tuple[Tensor, ...]:
        stream, *others = run(block, *arguments)
        seen.append(look(stream[:, model.config.registers :]))  # in front of the image's tokens
        return stream, *others

    model.run_block = recording
    try:
        velocity, _ = model(x, t, labels)
    finally:
        model.run_block = run
    return velocity, seen
