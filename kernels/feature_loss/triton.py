"""Feature losses in Triton, with the gradient made in the forward pass; and classifier-free guidance of features.

    f = f_∅ + ω·(f_y − f_∅)      loss = Σ_m w_m·ℓ(q_m, f_m)      dq = ∂loss/∂q

guided_feature_loss is the target of Self-Transcendence (arXiv 2601.07773), align the alignment of REPA (2410.06940),
the same cosine without guidance. Needs `../common/rows.py`, and `definition.py` for its bound, no more.

Each row of q, f_y and f_∅ is read once and each row of dq written once: 8 bytes an element in bfloat16. Extrapolation,
lengths and losses are float32. A vector shorter than EPS_NORM is divided by EPS_NORM, and its length then is a constant
to the gradient, so zero vectors give a finite one. With an index, a program looks its sample up in it; samples that
are not named get zero gradient in the same pass. An index that repeats or leaves the range makes the loss NaN, since
a kernel cannot raise. Losses are summed per program and then over programs in a fixed order: deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launched
from ..common.rows import by_row, cdiv, cut_tokens, load_row, row_config, row_sum, store_row, token_chunk, zero_row
from .definition import EPS_NORM

PROGRAMS = 2048
"""Programs a launch aims at: two waves on an H200."""


@triton.jit
def _find(index_ptr, sample, M):
    """The place of `sample` in the index, and how often it is there."""
    at = tl.arange(0, 128)
    place = tl.full((128,), 0, tl.int64)
    times = tl.full((128,), 0, tl.int32)
    for start in range(0, M, 128):
        hit = tl.load(index_ptr + start + at, mask=start + at < M, other=-1) == sample
        place += tl.where(hit, start + at, 0)
        times += hit.to(tl.int32)
    return tl.sum(place), tl.sum(times)


@triton.jit
def _inverse_length(power, EPS: tl.constexpr):
    """1 / max(√power, EPS); NaN stays NaN."""
    return tl.rsqrt(tl.where(power < EPS * EPS, EPS * EPS, power))


@launched
@triton.jit
def _feature_loss_kernel(
    q_ptr, cond_ptr, null_ptr, weight_ptr, index_ptr, dq_ptr, partial_ptr, named_ptr,
    M, N, rows, q_b, q_n, cond_b, cond_n, null_b, null_n,
    CFG: tl.constexpr, LOSS: tl.constexpr, EPS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A chunk of one sample's tokens → its dq, its part of the loss, and whether the index names the sample."""
    sample, first, last = token_chunk(N, rows)
    if index_ptr is None:
        m, times = sample, tl.full((), 1, tl.int32)
    else:
        m, times = _find(index_ptr, sample, M)
        tl.store(named_ptr + tl.program_id(0), ((times == 1) & (first == 0)).to(tl.float32))
    error, error_t = zero_row(MAIN, TAIL)
    total = tl.full((), 0.0, tl.float32)
    if times == 1:
        weight = tl.load(weight_ptr + m).to(tl.float32)
        for token in tl.range(first, last, num_stages=STAGES):
            q, q_t = load_row(q_ptr + sample * q_b + token * q_n, D, MAIN, TAIL)
            f, f_t = load_row(cond_ptr + m * cond_b + token * cond_n, D, MAIN, TAIL)
            if null_ptr is not None:
                null, null_t = load_row(null_ptr + m * null_b + token * null_n, D, MAIN, TAIL)
                f, f_t = null + CFG * (f - null), null_t + CFG * (f_t - null_t)
            if LOSS == "cosine":
                power = row_sum(q * q, q_t * q_t, TAIL)
                q_scale = _inverse_length(power, EPS)
                f_scale = _inverse_length(row_sum(f * f, f_t * f_t, TAIL), EPS)
                cosine = row_sum(q * f, q_t * f_t, TAIL) * q_scale * f_scale
                total -= cosine
                # Below the bound the length is a constant: nothing is taken out along q.
                along = tl.where(power < EPS * EPS, 0.0, cosine * q_scale)
                factor = -weight * q_scale / N
                dq, dq_t = factor * (f * f_scale - q * along), factor * (f_t * f_scale - q_t * along)
            else:
                if LOSS == "normalized_mse":
                    f_scale = _inverse_length(row_sum(f * f, f_t * f_t, TAIL) / D, EPS)
                    f, f_t = f * f_scale, f_t * f_scale
                error, error_t = error + (q - f) * (q - f), error_t + (q_t - f_t) * (q_t - f_t)
                factor = 2 * weight / D / N
                dq, dq_t = factor * (q - f), factor * (q_t - f_t)
            store_row(dq_ptr + (sample * N + token) * D, dq, dq_t, D, MAIN, TAIL)
        if LOSS != "cosine":
            total = row_sum(error, error_t, TAIL) / D
        tl.store(partial_ptr + tl.program_id(0), total * weight / N)
    else:
        for token in range(first, last):
            store_row(dq_ptr + (sample * N + token) * D, error, error_t, D, MAIN, TAIL)
        tl.store(partial_ptr + tl.program_id(0), 0.0)


@launched
@triton.jit
def _feature_loss_total_kernel(partial_ptr, named_ptr, loss_ptr, M, count, BLOCK: tl.constexpr):
    """The loss from its parts, in their order; NaN if the index does not name M samples. One program."""
    total = tl.zeros((BLOCK,), tl.float32)
    named = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + at, mask=at < count, other=0.0)
        if named_ptr is not None:
            named += tl.load(named_ptr + at, mask=at < count, other=0.0)
    loss = tl.sum(total)
    if named_ptr is not None:
        loss = tl.where(tl.sum(named) == M, loss, float("nan"))
    tl.store(loss_ptr, loss)


@launched
@triton.jit
def _extrapolate_kernel(cond_ptr, null_ptr, out_ptr, count, CFG: tl.constexpr, BLOCK: tl.constexpr):
    """f_∅ + ω·(f_y − f_∅), elementwise."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    null = tl.load(null_ptr + at, mask=at < count).to(tl.float32)
    cond = tl.load(cond_ptr + at, mask=at < count).to(tl.float32)
    tl.store(out_ptr + at, null + CFG * (cond - null), mask=at < count)


def _launch(
    q: Tensor, f_cond: Tensor, f_null: Tensor | None, weight: Tensor, cfg_scale: float, loss: str,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    samples, tokens, width = q.shape
    q, f_cond, weight = by_row(q), by_row(f_cond), weight.contiguous()
    f_null = None if f_null is None else by_row(f_null)
    index = None if index is None else index.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    value = torch.empty((), dtype=torch.float32, device=q.device)
    rows = cut_tokens(samples, tokens, PROGRAMS, 1, 16)
    programs = samples * cdiv(tokens, rows)
    partial = torch.empty((programs,), dtype=torch.float32, device=q.device)
    named = None if index is None else torch.empty((programs,), dtype=torch.float32, device=q.device)
    widest = max(q.dtype, f_cond.dtype, key=lambda dtype: dtype.itemsize)
    _feature_loss_kernel[(programs,)](
        q, f_cond, f_null, weight, index, dq, partial, named, weight.shape[0], tokens, rows,
        *q.stride()[:2], *f_cond.stride()[:2], *((0, 0) if f_null is None else f_null.stride()[:2]),
        CFG=cfg_scale, LOSS=loss, EPS=EPS_NORM, **row_config(width, 2 if f_null is None else 3, widest),
    )  # fmt: skip
    _feature_loss_total_kernel[(1,)](partial, named, value, weight.shape[0], programs, BLOCK=1024, num_warps=4)
    return value, dq


def align(q: Tensor, f: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_b w_b · mean_n −cos(q_bn, f_bn); q, f (B, N, D), weight (B,). Returns loss (), float32, and dq in q's dtype."""
    return _launch(q, f, None, weight, 1.0, "cosine", None)


def guided_feature_loss(
    q: Tensor, f_cond: Tensor, f_null: Tensor, weight: Tensor, cfg_scale: float, loss: str, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Σ_m w_m·ℓ(q_m, f_m); q (B, N, D), f_cond, f_null (M, N, D), weight (M,), index (M,) int64, distinct, or None.

    loss: "mse", "cosine" or "normalized_mse". Returns loss (), float32, and dq (B, N, D) in q's dtype.
    Each cfg_scale is compiled on its own.
    """
    return _launch(q, f_cond, f_null, weight, cfg_scale, loss, index)


def cfg_extrapolate(f_cond: Tensor, f_null: Tensor, cfg_scale: float) -> Tensor:
    """f_∅ + ω·(f_y − f_∅), any shape, in f_cond's dtype. Each cfg_scale is compiled on its own."""
    f_cond, f_null = f_cond.contiguous(), f_null.contiguous()
    out = torch.empty(f_cond.shape, dtype=f_cond.dtype, device=f_cond.device)
    grid = (cdiv(out.numel(), 2048),)
    _extrapolate_kernel[grid](f_cond, f_null, out, out.numel(), CFG=cfg_scale, BLOCK=2048, num_warps=8)
    return out


WIDTHS = (384, 768, 1024, 1152, 0)
CEILINGS = {
    "mse": 64, "cosine": 64, "normalized_mse": 64, "align": 64, "feature_loss_total": 40, "extrapolate": 32,
}  # fmt: skip
"""What `resources.py` compiles: widths, and the most registers a thread may take in each kernel."""


def resource_calls(meta: Callable[..., Tensor], width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """77 of 256 samples in range, as a t-range of 0.3 gives; at width 0 what depends on no width."""
    if not width:
        yield "extrapolate", lambda: cfg_extrapolate(meta(256, 256, 1152), meta(256, 256, 1152), 30.0)
        return
    q, f = meta(256, 256, width), meta(77, 256, width)
    weight, index = meta(77, dtype=torch.float32), meta(77, dtype=torch.int64)
    for loss in ("mse", "cosine", "normalized_mse"):
        yield loss, lambda loss=loss: guided_feature_loss(q, f, f, weight, 30.0, loss, index)  # type: ignore[misc]
    yield "align", lambda: align(q, q, meta(256, dtype=torch.float32))
