"""Randomness as a pure function: every draw follows from (seed, purpose, ordinal), on any device and rank count.

The ordinal of a sample is its position in the training stream, step · global batch + place in the batch; which
record that is follows from `epoch_order`. There is no generator state, so resuming and re-sharding need none.
How bits and numbers are made, the same ones on any device: `st_fast/kernels/noise/definition.py`.
"""

from enum import IntEnum

import numpy as np
import torch

from st_fast.kernels.noise.definition import NOISE, POSTERIOR, normal, uniform, words

__all__ = [
    "Purpose", "RecordOrder", "bucket_order", "epoch_order", "normal", "others", "permutation", "strata", "uniform",
]  # fmt: skip


class Purpose(IntEnum):
    """What a stream of draws is for; part of the key, so streams never overlap. Numbers are part of the format."""

    NOISE = NOISE
    POSTERIOR = POSTERIOR
    TIME = 3
    CLASS_DROPOUT = 4
    FLIP = 5
    STRATA = 6
    ORDER = 7
    SAMPLE_NOISE = 8
    SAMPLE_LABELS = 9
    SAMPLE_PATH = 10
    TEACHER_TIME = 11
    CAPTION = 12
    BUCKETS = 13
    TOKEN_ORDER = 14
    WHOLE_SAMPLE = 15
    GROUP_TIME = 16
    NEGATIVE = 17
    PATH_DROP = 18
    VALIDATION = 19
    VALIDATION_TIME = 20
    HELD_OUT = 21


def permutation(seed: int, purpose: Purpose, nonce: int, size: int, part: int = 0) -> np.ndarray:
    """A permutation of range(size): the order of `size` random 64-bit keys, whose stream NumPy's policy freezes."""
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=[0, nonce, int(purpose), part])
    return np.argsort(bits.random_raw(size), kind="stable")


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """(size,) int64: the order in which `epoch` visits the records."""
    return permutation(seed, Purpose.ORDER, epoch, size)


def bucket_order(seed: int, epoch: int, batches: int) -> np.ndarray:
    """(batches,) int64: the order of an epoch's batches where each is of one bucket of the records."""
    return permutation(seed, Purpose.BUCKETS, epoch, batches)


class RecordOrder:
    """Maps ordinals of the training stream to record indices; holds one epoch's permutation at a time."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __call__(self, ordinals: np.ndarray) -> np.ndarray:
        """(B,) int64 ordinals → (B,) int64 record indices. Every epoch visits each record once."""
        epochs, places = np.divmod(ordinals, self.size)
        records = np.empty_like(ordinals)
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                self._epoch, self._order = int(epoch), epoch_order(self.seed, int(epoch), self.size)
            chosen = epochs == epoch
            records[chosen] = self._order[places[chosen]]
        return records


def strata(seed: int, step: int, batch_size: int, group: int = 0) -> np.ndarray:
    """(batch_size,) int64: the shuffled assignment of a batch's places to equal bins of (0, 1).

    Each `group` of tokens has one of its own.
    """
    return permutation(seed, Purpose.STRATA, step, batch_size, group)


def others(seed: int, ordinals: np.ndarray, batch_size: int) -> np.ndarray:
    """(B,) int64 ordinals → (B,) int64: for each sample another one of its global batch, uniform over all others.

    A distance of 1 … batch_size − 1 is drawn, around the batch's end. ValueError for a batch of one.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size = {batch_size}: a batch of one sample has no other")
    word = words(seed, Purpose.NEGATIVE, torch.from_numpy(np.ascontiguousarray(ordinals, np.int64)), 1)[:, 0].numpy()
    steps, places = np.divmod(ordinals, batch_size)
    distance = 1 + (word * (batch_size - 1) >> 32)  # 32-bit words, and batches below 2^31: no product overflows
    return steps * batch_size + (places + distance) % batch_size
