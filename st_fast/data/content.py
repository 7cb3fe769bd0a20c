"""What moments and labels may hold, checked on bits so that one comparison catches NaN, Inf and absurd values."""

from __future__ import annotations

import numpy as np

LIMIT = 1e4
"""Largest |mean| and std of an unscaled latent that is believed; SD's are below 100."""

_BITS: dict[np.dtype, type[np.unsignedinteger]] = {np.dtype(np.float16): np.uint16, np.dtype(np.float32): np.uint32}


def moments_problem(moments: np.ndarray) -> tuple[int, str] | None:
    """The first bad record of (n, 2C, H, W) float16 or float32 moments as (its place, what is wrong), or None.

    Wrong are NaN, Inf, |mean| or std above LIMIT, and a negative std.
    """
    bits = _BITS[moments.dtype]
    words = np.ascontiguousarray(moments).view(bits)
    sign = bits(1 << (8 * moments.itemsize - 1))
    # IEEE floats of one sign sort like their bits, with Inf and NaN above every number.
    limit = moments.dtype.type(LIMIT).view(bits)
    bad = (words & ~sign) > limit
    channels = moments.shape[1] // 2
    std = words[:, channels:]
    negative = std > sign  # -0 equals `sign` and is no harm
    if not bad.any() and not negative.any():
        return None
    record = int(np.flatnonzero(bad.any((1, 2, 3)) | negative.any((1, 2, 3)))[0])
    values = moments[record].astype(np.float64)
    if not np.isfinite(values).all():
        return record, "NaN or Inf"
    if bad[record].any():
        return record, f"|value| up to {np.abs(values).max():.3g}, at most {LIMIT:.0e} is believed"
    return record, f"std {values[channels:].min():.3g}, which can't be negative (log-variance in place of std?)"


def labels_problem(labels: np.ndarray, num_classes: int) -> tuple[int, str] | None:
    """The first label outside [0, num_classes) as (its place, what is wrong), or None."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if not len(wrong):
        return None
    return int(wrong[0]), f"label {labels[wrong[0]]}, allowed are 0 … {num_classes - 1}"
