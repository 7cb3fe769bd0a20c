"""Randomness as a pure function: every draw follows from (seed, purpose, ordinal), on any device and rank count.

The ordinal of a sample is its position in the training stream, step · global batch + place in the batch; which
record that is follows from `epoch_order`. There is no generator state, so resuming and re-sharding need none.
Bits come from Philox4x32-10 (Salmon et al., SC 2011), a counter-based generator.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a stream of draws is for; part of the key, so streams never overlap. Numbers are part of the format."""

    NOISE = 1
    POSTERIOR = 2
    TIME = 3
    CLASS_DROPOUT = 4
    FLIP = 5
    STRATA = 6
    ORDER = 7
    SAMPLE_NOISE = 8
    SAMPLE_LABELS = 9
    SAMPLE_PATH = 10
    TEACHER_TIME = 11


_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit counter words (int64 tensors, broadcastable) → four 32-bit words (int64 tensors)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words(seed: int, purpose: Purpose, ordinals: Tensor, count: int) -> Tensor:
    """(B,) → (B, count) 32-bit words as int64: row b depends on (seed, purpose, ordinals[b]) alone."""
    blocks = torch.arange((count + 3) // 4, device=ordinals.device)[None, :]
    ordinal = ordinals.to(torch.int64)[:, None]
    purposes = torch.full_like(ordinal, int(purpose))
    counter = (blocks, ordinal & _MASK, (ordinal >> 32) & _MASK, purposes)
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :count]


def uniform(seed: int, purpose: Purpose, ordinals: Tensor, count: int = 1) -> Tensor:
    """(B, count) float32 uniforms in (0, 1), one row an ordinal. `ordinals` (B,) int64 sets the device."""
    words = _words(seed, purpose, ordinals, count)
    return (words >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25


def normal(seed: int, purpose: Purpose, ordinals: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, *shape) float32 standard normals by Box–Muller, one row an ordinal. `ordinals` (B,) int64 sets the device."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    words = _words(seed, purpose, ordinals, 2 * pairs).view(-1, pairs, 2)
    radius = ((words[..., 0].to(torch.float32) + 0.5) * 2.0**-32).log().mul(-2.0).clamp_min(0.0).sqrt()
    angle = words[..., 1].to(torch.float32) * (2.0**-32 * 2.0 * math.pi)
    values = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    return values[:, :count].reshape(-1, *shape)


def _sorted_by_key(seed: int, purpose: Purpose, nonce: int, size: int) -> np.ndarray:
    """A permutation of range(size): the order of `size` random 64-bit keys, whose stream NumPy's policy freezes."""
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=[0, nonce, int(purpose), 0])
    return np.argsort(bits.random_raw(size), kind="stable")


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """(size,) int64: the order in which `epoch` visits the records."""
    return _sorted_by_key(seed, Purpose.ORDER, epoch, size)


class RecordOrder:
    """Maps ordinals of the training stream to record indices; holds one epoch's permutation at a time."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __call__(self, ordinals: np.ndarray) -> np.ndarray:
        """(B,) int64 ascending ordinals → (B,) int64 record indices. Every epoch visits each record once."""
        epochs, places = np.divmod(ordinals, self.size)
        records = np.empty_like(ordinals)
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                self._epoch, self._order = int(epoch), epoch_order(self.seed, int(epoch), self.size)
            chosen = epochs == epoch
            records[chosen] = self._order[places[chosen]]
        return records


def strata(seed: int, step: int, batch_size: int) -> np.ndarray:
    """(batch_size,) int64: the shuffled assignment of a batch's places to equal bins of (0, 1)."""
    return _sorted_by_key(seed, Purpose.STRATA, step, batch_size)
