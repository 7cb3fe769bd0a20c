"""LayerNorm of q and k over head_dim, straight from the packed projection, in Triton (QK-norm, arXiv 2302.05442).

    q̂ = LN(q)·q_weight + q_bias, the same for k

Needs torch and Triton only. qkv is (B, N, 3, H, d) with any strides; q and k come back as (B, H, N, d), in that order
in memory or in the order (B, N, H, d). Statistics (4, B, N, H) are float32: mean and rstd of q, mean and rstd of k.

A tile is a few tokens of a group of heads, which lie side by side in memory; each of its rows is a head's d channels,
padded in registers to a power of two. In the backward a program walks a chunk of one sample's tokens, of q,
k or v, and keeps the sums for the gradients of weights and biases in float32 registers. One more kernel adds the
programs' sums up in a fixed order: deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launched
from ..common.rows import by_row, cdiv, column_sums
from .definition import empty_heads

PROGRAMS = 1024
"""Programs that the backward aims at, for each of q, k and v: four to five waves on an H100 together."""


@triton.jit
def _columns(D: tl.constexpr, WIDE: tl.constexpr):
    """A row's channels (1, WIDE), and which of them are there."""
    column = tl.arange(0, WIDE)[None, :]
    return column, column < D


@triton.jit
def _place(H, N, tokens, GROUP: tl.constexpr):
    """This program's number among those of one group of heads, its sample, first token and first head, for a grid of
    samples × chunks of `tokens` × groups; groups are next to one another, as they are in qkv's rows."""
    groups, chunks = H // GROUP, tl.cdiv(N, tokens)
    number = tl.program_id(0) // groups
    head = (tl.program_id(0) % groups * GROUP).to(tl.int64)
    return number.to(tl.int64), (number // chunks).to(tl.int64), number % chunks * tokens, head


@triton.jit
def _rows(token_stride, head_stride, T: tl.constexpr, GROUP: tl.constexpr):
    """Offsets (T, 1) of a tile's rows: T / GROUP tokens, GROUP heads each."""
    row = tl.arange(0, T)[:, None]
    return (row // GROUP).to(tl.int64) * token_stride + (row % GROUP) * head_stride


@triton.jit
def _normalise(
    x_ptr, x_at, weight_ptr, bias_ptr, y_ptr, y_at, mean_ptr, rstd_ptr, stats_at, inside,
    EPS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    column, there = _columns(D, WIDE)
    x = tl.load(x_ptr + x_at + column, mask=inside & there, other=0.0).to(tl.float32)
    mean = (tl.sum(x, 1) / D)[:, None]
    x = tl.where(there, x - mean, 0.0)
    rstd = tl.rsqrt((tl.sum(x * x, 1) / D)[:, None] + EPS)
    weight = tl.load(weight_ptr + column, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_at + column, x * rstd * weight + bias, mask=inside & there)
    tl.store(mean_ptr + stats_at, mean, mask=inside)
    tl.store(rstd_ptr + stats_at, rstd, mask=inside)


@launched
@triton.jit
def _qk_norm_forward_kernel(
    qkv_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, q_ptr, k_ptr, stats_ptr,
    N, H, plane, qkv_b, qkv_n, qkv_part, qkv_h, y_b, y_n, y_h, UNIT: tl.constexpr, EPS: tl.constexpr,
    T: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """qkv → q, k, stats for a tile; plane is B·N·H; strides are in UNITs, y's are those of q and of k."""
    qkv_b, qkv_n, qkv_part, qkv_h = qkv_b * UNIT, qkv_n * UNIT, qkv_part * UNIT, qkv_h * UNIT
    y_b, y_n, y_h = y_b * UNIT, y_n * UNIT, y_h * UNIT
    _, sample, token, head = _place(H, N, T // GROUP, GROUP)
    inside = token + tl.arange(0, T)[:, None] // GROUP < N
    token = token.to(tl.int64)
    source, x_at = qkv_ptr + sample * qkv_b + token * qkv_n + head * qkv_h, _rows(qkv_n, qkv_h, T, GROUP)
    y, y_at = sample * y_b + token * y_n + head * y_h, _rows(y_n, y_h, T, GROUP)
    stats, stats_at = stats_ptr + (sample * N + token) * H + head, _rows(H, 1, T, GROUP)
    plane = tl.cast(plane, tl.int64)  # a size of one comes as a constant, which has no .to
    _normalise(source, x_at, q_weight_ptr, q_bias_ptr, q_ptr + y, y_at, stats, stats + plane, stats_at, inside,
               EPS, D, WIDE)  # fmt: skip
    stats += 2 * plane
    _normalise(source + qkv_part, x_at, k_weight_ptr, k_bias_ptr, k_ptr + y, y_at, stats, stats + plane, stats_at,
               inside, EPS, D, WIDE)  # fmt: skip


@triton.jit
def _store_by_head(ptr, sums, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """Sums (T, d) → (GROUP, d) over tokens, at ptr."""
    column, there = _columns(D, WIDE)
    if GROUP == 1:
        sums = tl.sum(sums, 0)[None, :]
    elif sums.shape[0] != GROUP:
        sums = tl.sum(tl.reshape(sums, (sums.shape[0] // GROUP, GROUP, WIDE)), 0)
    tl.store(ptr + tl.arange(0, GROUP)[:, None] * D + column, sums, mask=there)


@triton.jit
def _denormalise(
    dy_ptr, dy_n, dy_h, x_ptr, x_n, x_h, weight_ptr, mean_ptr, rstd_ptr, H, dx_ptr, dx_n, sums_ptr, dbias_ptr, count,
    T: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx for `count` tokens of a group of heads; its sums for dweight and dbias, and those of dx by head."""
    column, there = _columns(D, WIDE)
    weight = tl.load(weight_ptr + column, mask=there, other=0.0).to(tl.float32)
    dweight = tl.zeros((T, WIDE), tl.float32)
    dbias, dx_sum = dweight, dweight
    dy_at, x_at, dx_at = _rows(dy_n, dy_h, T, GROUP), _rows(x_n, x_h, T, GROUP), _rows(dx_n, D, T, GROUP)
    stats_at, of_row = _rows(H, 1, T, GROUP), tl.arange(0, T)[:, None] // GROUP
    for start in tl.range(0, count, T // GROUP, num_stages=STAGES):
        inside = start + of_row < count
        token = tl.cast(start, tl.int64)
        dy = tl.load(dy_ptr + token * dy_n + dy_at + column, mask=inside & there, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + token * x_n + x_at + column, mask=inside & there, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + token * H + stats_at, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + token * H + stats_at, mask=inside, other=0.0)
        h = (x - mean) * rstd  # where nothing is there, it only ever meets dy = 0
        dweight += dy * h
        dbias += dy
        dh = dy * weight
        dx = (dh - (tl.sum(dh, 1) / D)[:, None] - h * (tl.sum(dh * h, 1) / D)[:, None]) * rstd
        if dbias_ptr is not None:
            dx_sum += dx
        tl.store(dx_ptr + token * dx_n + dx_at + column, dx, mask=inside & there)
    _store_by_head(sums_ptr, dweight, 1, D, WIDE)
    _store_by_head(sums_ptr + D, dbias, 1, D, WIDE)
    if dbias_ptr is not None:
        _store_by_head(dbias_ptr, dx_sum, GROUP, D, WIDE)


@launched
@triton.jit
def _qk_norm_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, stats_ptr, dqkv_ptr, affine_ptr, bias_ptr,
    N, H, tokens, plane, dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, qkv_b, qkv_n, qkv_part, qkv_h,
    UNIT: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, dk or dv, by the program's second number, → its part of dqkv (B, N, 3, H, d) for a chunk of tokens of a group
    of heads, its sums for the affine gradients (2, d) and, unless bias_ptr is None, for qkv's bias (GROUP, d)."""
    qkv_b, qkv_n, qkv_part, qkv_h = qkv_b * UNIT, qkv_n * UNIT, qkv_part * UNIT, qkv_h * UNIT
    dq_b, dq_h, dq_n = dq_b * UNIT, dq_h * UNIT, dq_n * UNIT
    dk_b, dk_h, dk_n = dk_b * UNIT, dk_h * UNIT, dk_n * UNIT
    dv_b, dv_h, dv_n = dv_b * UNIT, dv_h * UNIT, dv_n * UNIT
    number, sample, token, head = _place(H, N, tokens, GROUP)
    count = tl.minimum(N - token, tokens)
    token = token.to(tl.int64)
    source = qkv_ptr + sample * qkv_b + token * qkv_n + head * qkv_h
    out_n = 3 * H * D
    out = dqkv_ptr + (sample * N + token) * out_n + head * D
    stats = stats_ptr + (sample * N + token) * H + head
    plane = tl.cast(plane, tl.int64)  # a size of one comes as a constant, which has no .to
    sums = affine_ptr + tl.program_id(0).to(tl.int64) * (4 * D)
    of_q = None if bias_ptr is None else bias_ptr + number * out_n + head * D
    of_k = None if bias_ptr is None else of_q + H * D
    if tl.program_id(1) == 0:
        dq_ptr += sample * dq_b + token * dq_n + head * dq_h
        _denormalise(dq_ptr, dq_n, dq_h, source, qkv_n, qkv_h, q_weight_ptr, stats, stats + plane, H, out, out_n,
                     sums, of_q, count, T, GROUP, D, WIDE, STAGES)  # fmt: skip
    elif tl.program_id(1) == 1:
        stats += 2 * plane
        dk_ptr += sample * dk_b + token * dk_n + head * dk_h
        _denormalise(dk_ptr, dk_n, dk_h, source + qkv_part, qkv_n, qkv_h, k_weight_ptr, stats, stats + plane, H,
                     out + H * D, out_n, sums + 2 * D, of_k, count, T, GROUP, D, WIDE, STAGES)  # fmt: skip
    else:
        dv_ptr += sample * dv_b + token * dv_n + head * dv_h
        out += 2 * H * D
        column, there = _columns(D, WIDE)
        total = tl.zeros((T, WIDE), tl.float32)
        dv_at, out_at = _rows(dv_n, dv_h, T, GROUP), _rows(out_n, D, T, GROUP)
        of_row = tl.arange(0, T)[:, None] // GROUP
        for start in tl.range(0, count, T // GROUP, num_stages=STAGES):
            inside = (start + of_row < count) & there
            token = tl.cast(start, tl.int64)
            dv = tl.load(dv_ptr + token * dv_n + dv_at + column, mask=inside, other=0.0)
            if bias_ptr is not None:
                total += dv.to(tl.float32)
            tl.store(out + token * out_n + out_at + column, dv, mask=inside)
        if bias_ptr is not None:
            _store_by_head(of_k + H * D, total, GROUP, D, WIDE)


@triton.jit
def _add_columns(partial_ptr, out_ptr, rows, columns, block, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of columns of partial (rows, columns), each added up, → out (columns,)."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    total = column_sums(partial_ptr, rows, columns, at, columns, ROWS, BLOCK)
    tl.store(out_ptr + at, total, mask=at < columns)


@launched
@triton.jit
def _qk_norm_add_kernel(
    affine_ptr, daffine_ptr, affine_rows, affine_columns, bias_ptr, dbias_ptr, bias_rows, bias_columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The programs' sums → the affine gradients and, unless bias_ptr is None, that of qkv's bias, in their dtypes."""
    block, of_affine = tl.program_id(0), tl.cdiv(affine_columns, BLOCK)
    if block < of_affine:
        _add_columns(affine_ptr, daffine_ptr, affine_rows, affine_columns, block, ROWS, BLOCK)
    elif bias_ptr is not None:
        _add_columns(bias_ptr, dbias_ptr, bias_rows, bias_columns, block - of_affine, ROWS, BLOCK)


def _strides(*strides: int) -> tuple[list[int], int]:
    """Strides in units of 8 elements where all allow it: Triton's launcher itself only looks for multiples of 16, and
    with head_dim 72 would load 8 bytes at a time."""
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return [stride // unit for stride in strides], unit


@cache
def _config(heads: int, width: int, elements: int) -> dict[str, int]:
    """A tile: rows of head_dim padded to a power of two, of about `elements` elements for 4 warps; how many heads of a
    token are in it: the largest power of two that divides them and fits."""
    wide = triton.next_power_of_2(width)
    rows = min(max(elements // wide, 1), 64)
    return {"T": rows, "GROUP": min(heads & -heads, rows), "D": width, "WIDE": wide, "num_warps": 4}


def qk_norm(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    eps: float,
    heads_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (B, H, N, d) in qkv's dtype, laid out as `empty_heads`, and stats (4, B, N, H); qkv (B, N, 3, H, d), weights
    and biases (d,)."""
    qkv = by_row(qkv)
    samples, tokens, _, heads, width = qkv.shape
    q, k = empty_heads(qkv, heads_first), empty_heads(qkv, heads_first)
    stats = torch.empty((4, samples, tokens, heads), dtype=torch.float32, device=qkv.device)
    y_b, y_h, y_n, _ = q.stride()
    strides, unit = _strides(*qkv.stride()[:4], y_b, y_n, y_h)
    config = _config(heads, width, 2048)
    tiles = samples * cdiv(tokens, config["T"] // config["GROUP"]) * (heads // config["GROUP"])
    _qk_norm_forward_kernel[(tiles,)](
        qkv, q_weight.contiguous(), q_bias.contiguous(), k_weight.contiguous(), k_bias.contiguous(), q, k, stats,
        tokens, heads, samples * tokens * heads, *strides, UNIT=unit, EPS=eps, **config,
    )  # fmt: skip
    return q, k, stats


def qk_norm_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, qkv_bias: Optional[Tensor],
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dqkv (B, N, 3, H, d) in qkv's dtype; daffine (4, d) in the weights': dq_weight, dq_bias, dk_weight, dk_bias; and
    qkv_bias's gradient (3·H·d,), empty if qkv_bias is None."""
    dq, dk, dv, qkv = (by_row(t) for t in (dq, dk, dv, qkv))
    samples, tokens, _, heads, width = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    daffine = torch.empty((4, width), dtype=q_weight.dtype, device=qkv.device)
    strides, unit = _strides(*dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *qkv.stride()[:4])
    config = _config(heads, width, 1024) | {"STAGES": 3}
    groups, step = heads // config["GROUP"], config["T"] // config["GROUP"]
    chunk = cdiv(max(min(samples * groups * tokens // PROGRAMS, tokens), 1), step) * step
    chunks = samples * cdiv(tokens, chunk)
    affine = torch.empty((chunks * groups, 4 * width), dtype=torch.float32, device=qkv.device)
    bias, dbias = None, torch.empty(0, dtype=q_weight.dtype, device=qkv.device)
    if qkv_bias is not None:
        bias = torch.empty((chunks, 3 * heads * width), dtype=torch.float32, device=qkv.device)
        dbias = torch.empty(qkv_bias.shape, dtype=qkv_bias.dtype, device=qkv.device)
    if chunks:
        _qk_norm_backward_kernel[(chunks * groups, 3)](
            dq, dk, dv, qkv, q_weight.contiguous(), k_weight.contiguous(), stats.contiguous(), dqkv, affine, bias,
            tokens, heads, chunk, samples * tokens * heads, *strides, UNIT=unit, **config,
        )  # fmt: skip
    blocks = cdiv(4 * width, 32) + (0 if bias is None else cdiv(3 * heads * width, 32))
    _qk_norm_add_kernel[(blocks,)](
        affine, daffine, len(affine), 4 * width, bias, dbias, chunks, 3 * heads * width, ROWS=64, BLOCK=32, num_warps=4
    )
    return dqkv, daffine, dbias


WIDTHS = (64, 72)
CEILINGS = {"forward": 72, "backward": 128, "qk_norm_add": 64}
"""What `resources.py` compiles: head widths, and the most registers a thread may take in each kernel."""


def resource_calls(meta: Callable[..., Tensor], width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """256 samples of 256 tokens in 16 heads, and the gradient of qkv's bias too."""
    qkv, weight, bias = meta(256, 256, 3, 16, width), meta(width, dtype=torch.float32), meta(48 * width)
    grad, stats = meta(256, 256, 16, width).transpose(1, 2), meta(4, 256, 256, 16, dtype=torch.float32)
    yield "forward", lambda: qk_norm(qkv, weight, weight, weight, weight, 1e-6, False)
    yield "backward", lambda: qk_norm_backward(grad, grad, grad, qkv, weight, weight, bias, stats)
