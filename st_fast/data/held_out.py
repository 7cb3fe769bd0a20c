"""Which records are held out of training: a pure function of a seed and of how many records there are."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from st_fast.core import random
from st_fast.core.errors import UserError
from st_fast.core.random import Purpose
from st_fast.data.ahead import RecordSet
from st_fast.data.buckets import parts_of


def split(records: RecordSet, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the records that are trained on, and of those held out: int64, each in rising order.

    An image and its mirrored twin go together. Of latents of several shapes the share is taken of each. UserError
    where one of both would be empty.
    """
    kept, held, start = list[np.ndarray](), list[np.ndarray](), 0
    for number, part in enumerate(parts_of(records).values()):
        views = 1 + part.manifest.flip
        images = len(part) // views
        order = random.permutation(seed, Purpose.HELD_OUT, number, images)
        count = round(share * images)
        for some, into in ((order[count:], kept), (order[:count], held)):
            into.append(start + np.sort((views * some[:, None] + np.arange(views)).ravel()))
        start += len(part)
    trained, apart = np.concatenate(kept), np.concatenate(held)
    if not len(apart) or not len(trained):
        left = "to hold out" if len(trained) else "to train on"
        raise UserError(f"validate.share = {share:g}: of {len(records)} records that leaves none {left}")
    return trained, apart


def sizes_of(records: RecordSet, kept: np.ndarray | None) -> list[int]:
    """How many records of each shape there are; with `kept`, as `split` gives them, how many of these."""
    sizes = [len(part) for part in parts_of(records).values()]
    return sizes if kept is None else np.diff(np.searchsorted(kept, np.cumsum([0, *sizes]))).tolist()


@dataclass(frozen=True)
class OrderOfKept:
    """The order of the records that are kept, which is the one of a set of as many."""

    order: Callable[[np.ndarray], np.ndarray]
    kept: np.ndarray

    def __call__(self, ordinals: np.ndarray) -> np.ndarray:
        """(B,) int64 ordinals → (B,) int64 record indices."""
        found: np.ndarray = self.kept[self.order(ordinals)]
        return found
