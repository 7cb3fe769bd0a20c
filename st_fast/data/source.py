"""What every source of images is: names, labels, and a way to read image number i."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Source:
    """Numbered images with labels. `read(i)` → the bytes of image i's file; may be called from many threads."""

    description: str
    names: Sequence[str]
    labels: np.ndarray
    """(n,) int64."""
    num_classes: int
    class_names: tuple[str, ...]
    read: Callable[[int], bytes]

    def digest(self) -> str:
        """SHA-256 over names and labels: interrupted work continues only on the same images."""
        digest = hashlib.sha256(self.labels.tobytes())
        for name in self.names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()
