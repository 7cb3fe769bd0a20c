"""q and k normalised over head_dim and rotated, straight from the packed projection, in Triton (QK-norm, arXiv
2302.05442; RoPE, arXiv 2104.09864).

    q̂ = R(LN(q)·q_weight + q_bias), the same for k

With the norm "rms" it is R(q / √(mean(q²) + eps)·q_weight), with "none" R(q); R turns pairs of channels, or nothing.
Needs torch and Triton only. qkv is (B, N, 3, H, d) with any strides; q and k come back as (B, H, N, d), in that order
in memory or in the order (B, N, H, d). Statistics are float32: (4, B, N, H), mean and rstd of q, mean and rstd of k;
(2, B, N, H), rstd of q and of k; or none.

A tile is a few tokens of a group of heads, which lie side by side in memory; each of its rows is a head's d channels,
padded in registers to a power of two. A pair of channels is in one thread, where it is turned. In the backward a
program walks a chunk of one sample's tokens, of q, k or v, and keeps the sums for the gradients of weights and biases
in float32 registers. One more kernel adds the programs' sums up in a fixed order: deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launched
from ..common.rows import by_row, cdiv, column_sums
from .definition import STATISTICS, affine_gradients, empty_heads

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
def _vector(ptr, column, there):
    """A vector's channels in float32."""
    return tl.load(ptr + column, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _angles(rope_ptr, rope_at, inside, D: tl.constexpr, WIDE: tl.constexpr):
    """Cosines and sines (T, WIDE / 2) of the rows of a tile; without a table nothing that is looked at."""
    if rope_ptr is None:
        return 1.0, 0.0
    else:
        pair, there = _columns(D // 2, WIDE // 2)
        cos = tl.load(rope_ptr + rope_at + pair, mask=inside & there, other=0.0)
        return cos, tl.load(rope_ptr + rope_at + D // 2 + pair, mask=inside & there, other=0.0)


@triton.jit
def _turned(x, cos, sin, T: tl.constexpr, WIDE: tl.constexpr):
    """The channels 2i and 2i + 1 of x (T, WIDE) turned by an angle of which these are cosine and sine."""
    even, odd = tl.split(tl.reshape(x, (T, WIDE // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (T, WIDE))


@triton.jit
def _normalise(
    x_ptr, x_at, weight_ptr, bias_ptr, cos, sin, y_ptr, y_at, stats_ptr, plane, stats_at, inside,
    NORM: tl.constexpr, ROPE: tl.constexpr, EPS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    column, there = _columns(D, WIDE)
    x = tl.load(x_ptr + x_at + column, mask=inside & there, other=0.0).to(tl.float32)
    if NORM == "layer":
        mean = (tl.sum(x, 1) / D)[:, None]
        tl.store(stats_ptr + stats_at, mean, mask=inside)
        stats_ptr += plane
        x = tl.where(there, x - mean, 0.0)
    if NORM != "none":
        rstd = tl.rsqrt((tl.sum(x * x, 1) / D)[:, None] + EPS)
        tl.store(stats_ptr + stats_at, rstd, mask=inside)
        x *= rstd
    if weight_ptr is not None:
        x *= _vector(weight_ptr, column, there)
    if bias_ptr is not None:
        x += _vector(bias_ptr, column, there)
    if ROPE:
        x = _turned(x, cos, sin, T, WIDE)
    tl.store(y_ptr + y_at + column, x, mask=inside & there)


@launched
@triton.jit
def _qk_norm_forward_kernel(
    qkv_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, rope_ptr, q_ptr, k_ptr, stats_ptr,
    N, H, plane, qkv_b, qkv_n, qkv_part, qkv_h, y_b, y_n, y_h, rope_b, rope_n,
    UNIT: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    T: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """qkv → q, k, stats for a tile; plane is B·N·H; strides are in UNITs, y's are those of q and of k; rope_ptr None:
    no rotation."""
    qkv_b, qkv_n, qkv_part, qkv_h = qkv_b * UNIT, qkv_n * UNIT, qkv_part * UNIT, qkv_h * UNIT
    y_b, y_n, y_h = y_b * UNIT, y_n * UNIT, y_h * UNIT
    _, sample, token, head = _place(H, N, T // GROUP, GROUP)
    inside = token + tl.arange(0, T)[:, None] // GROUP < N
    token = token.to(tl.int64)
    source, x_at = qkv_ptr + sample * qkv_b + token * qkv_n + head * qkv_h, _rows(qkv_n, qkv_h, T, GROUP)
    y, y_at = sample * y_b + token * y_n + head * y_h, _rows(y_n, y_h, T, GROUP)
    stats, stats_at = stats_ptr + (sample * N + token) * H + head, _rows(H, 1, T, GROUP)
    plane = tl.cast(plane, tl.int64)  # a size of one comes as a constant, which has no .to
    ROPE: tl.constexpr = rope_ptr is not None
    if ROPE:
        rope_ptr += sample * rope_b * UNIT + token * rope_n * UNIT
    cos, sin = _angles(rope_ptr, _rows(rope_n * UNIT, 0, T, GROUP), inside, D, WIDE)
    _normalise(source, x_at, q_weight_ptr, q_bias_ptr, cos, sin, q_ptr + y, y_at, stats, plane, stats_at, inside,
               NORM, ROPE, EPS, T, D, WIDE)  # fmt: skip
    stats += plane if NORM == "rms" else 2 * plane
    _normalise(source + qkv_part, x_at, k_weight_ptr, k_bias_ptr, cos, sin, k_ptr + y, y_at, stats, plane, stats_at,
               inside, NORM, ROPE, EPS, T, D, WIDE)  # fmt: skip


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
    dy_ptr, dy_n, dy_h, x_ptr, x_n, x_h, weight_ptr, rope_ptr, rope_n, stats_ptr, plane, H, dx_ptr, dx_n,
    sums_ptr, dbias_ptr, count,
    NORM: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx for `count` tokens of a group of heads; its sums for dweight and dbias, and those of dx by head."""
    column, there = _columns(D, WIDE)
    dweight = tl.zeros((T, WIDE), tl.float32)
    dbias, dx_sum = dweight, dweight
    if weight_ptr is not None:
        weight = _vector(weight_ptr, column, there)
    dy_at, x_at, dx_at = _rows(dy_n, dy_h, T, GROUP), _rows(x_n, x_h, T, GROUP), _rows(dx_n, D, T, GROUP)
    stats_at, of_row = _rows(H, 1, T, GROUP), tl.arange(0, T)[:, None] // GROUP
    for start in tl.range(0, count, T // GROUP, num_stages=STAGES):
        inside = start + of_row < count
        token = tl.cast(start, tl.int64)
        dy = tl.load(dy_ptr + token * dy_n + dy_at + column, mask=inside & there, other=0.0).to(tl.float32)
        if rope_ptr is not None:
            cos, sin = _angles(rope_ptr + token * rope_n, _rows(rope_n, 0, T, GROUP), inside, D, WIDE)
            dy = _turned(dy, cos, -sin, T, WIDE)
        if NORM == "none":
            dx = dy
        else:
            x = tl.load(x_ptr + token * x_n + x_at + column, mask=inside & there, other=0.0).to(tl.float32)
            dh = dy
            if NORM == "layer":
                mean = tl.load(stats_ptr + token * H + stats_at, mask=inside, other=0.0)
                rstd = tl.load(stats_ptr + plane + token * H + stats_at, mask=inside, other=0.0)
                h = (x - mean) * rstd  # where nothing is there, it only ever meets dy = 0
            else:
                rstd = tl.load(stats_ptr + token * H + stats_at, mask=inside, other=0.0)
                h = x * rstd
            if weight_ptr is not None:
                dweight += dy * h
                if NORM == "layer":
                    dbias += dy
                dh = dy * weight
            of_h = h * (tl.sum(dh * h, 1) / D)[:, None]
            if NORM == "layer":
                dh -= (tl.sum(dh, 1) / D)[:, None]
            dx = (dh - of_h) * rstd
        if dbias_ptr is not None:
            dx_sum += dx
        tl.store(dx_ptr + token * dx_n + dx_at + column, dx, mask=inside & there)
    if weight_ptr is not None:
        _store_by_head(sums_ptr, dweight, 1, D, WIDE)
        if NORM == "layer":
            _store_by_head(sums_ptr + D, dbias, 1, D, WIDE)
    if dbias_ptr is not None:
        _store_by_head(dbias_ptr, dx_sum, GROUP, D, WIDE)


@launched
@triton.jit
def _qk_norm_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, rope_ptr, stats_ptr, dqkv_ptr, affine_ptr, bias_ptr,
    N, H, tokens, plane, dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, qkv_b, qkv_n, qkv_part, qkv_h,
    rope_b, rope_n, UNIT: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr,
    T: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, dk or dv, by the program's second number, → its part of dqkv (B, N, 3, H, d) for a chunk of tokens of a group
    of heads, its sums for the affine gradients (AFFINE / 2, d) and, unless bias_ptr is None, for qkv's bias
    (GROUP, d)."""
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
    rope_n = rope_n * UNIT
    if rope_ptr is not None:
        rope_ptr += sample * rope_b * UNIT + token * rope_n
    sums = affine_ptr + tl.program_id(0).to(tl.int64) * (AFFINE * D)
    of_q = None if bias_ptr is None else bias_ptr + number * out_n + head * D
    of_k = None if bias_ptr is None else of_q + H * D
    if tl.program_id(1) == 0:
        dq_ptr += sample * dq_b + token * dq_n + head * dq_h
        _denormalise(dq_ptr, dq_n, dq_h, source, qkv_n, qkv_h, q_weight_ptr, rope_ptr, rope_n, stats, plane, H,
                     out, out_n, sums, of_q, count, NORM, T, GROUP, D, WIDE, STAGES)  # fmt: skip
    elif tl.program_id(1) == 1:
        stats += plane if NORM == "rms" else 2 * plane
        dk_ptr += sample * dk_b + token * dk_n + head * dk_h
        _denormalise(dk_ptr, dk_n, dk_h, source + qkv_part, qkv_n, qkv_h, k_weight_ptr, rope_ptr, rope_n, stats,
                     plane, H, out + H * D, out_n, sums + AFFINE // 2 * D, of_k, count, NORM, T, GROUP, D, WIDE,
                     STAGES)  # fmt: skip
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


def _table(rope: Optional[Tensor]) -> tuple[Optional[Tensor], int, int]:
    """The table and its strides of samples and tokens; one sample's is all samples'."""
    if rope is None:
        return None, 0, 0
    rope = by_row(rope)
    return rope, rope.stride(0) if len(rope) > 1 else 0, rope.stride(1)


def _contiguous(*vectors: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
    return tuple(None if vector is None else vector.contiguous() for vector in vectors)


def qk_norm(
    qkv: Tensor, q_weight: Optional[Tensor], q_bias: Optional[Tensor], k_weight: Optional[Tensor],
    k_bias: Optional[Tensor], eps: float, heads_first: bool = False, norm: str = "layer",
    rope: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k (B, H, N, d) in qkv's dtype, laid out as `empty_heads`, and stats (4, 2 or 0, B, N, H); qkv (B, N, 3, H, d),
    weights and biases (d,) or None, rope (1 or B, N, d) or None."""
    qkv = by_row(qkv)
    samples, tokens, _, heads, width = qkv.shape
    q, k = empty_heads(qkv, heads_first), empty_heads(qkv, heads_first)
    stats = torch.empty((STATISTICS[norm], samples, tokens, heads), dtype=torch.float32, device=qkv.device)
    y_b, y_h, y_n, _ = q.stride()
    rope, rope_b, rope_n = _table(rope)
    strides, unit = _strides(*qkv.stride()[:4], y_b, y_n, y_h, rope_b, rope_n)
    config = _config(heads, width, 2048)
    tiles = samples * cdiv(tokens, config["T"] // config["GROUP"]) * (heads // config["GROUP"])
    _qk_norm_forward_kernel[(tiles,)](
        qkv, *_contiguous(q_weight, q_bias, k_weight, k_bias), rope, q, k, stats,
        tokens, heads, samples * tokens * heads, *strides, UNIT=unit, NORM=norm, EPS=eps, **config,
    )  # fmt: skip
    return q, k, stats


def qk_norm_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Optional[Tensor], k_weight: Optional[Tensor],
    qkv_bias: Optional[Tensor], stats: Tensor, norm: str = "layer", rope: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dqkv (B, N, 3, H, d) in qkv's dtype; daffine (4, 2 or 0, d) in the weights' or else in qkv's: dq_weight, dq_bias,
    dk_weight, dk_bias, or the weights' alone; and qkv_bias's gradient (3·H·d,), empty if qkv_bias is None."""
    dq, dk, dv, qkv = (by_row(t) for t in (dq, dk, dv, qkv))
    samples, tokens, _, heads, width = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    columns = affine_gradients(norm, q_weight) * width
    like = qkv if q_weight is None else q_weight
    daffine = torch.empty((columns // width, width), dtype=like.dtype, device=qkv.device)
    rope, rope_b, rope_n = _table(rope)
    strides, unit = _strides(
        *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *qkv.stride()[:4], rope_b, rope_n
    )  # fmt: skip
    config = _config(heads, width, 1024) | {"STAGES": 3}
    groups, step = heads // config["GROUP"], config["T"] // config["GROUP"]
    chunk = cdiv(max(min(samples * groups * tokens // PROGRAMS, tokens), 1), step) * step
    chunks = samples * cdiv(tokens, chunk)
    affine = torch.empty((chunks * groups, columns), dtype=torch.float32, device=qkv.device)
    bias, dbias = None, torch.empty(0, dtype=like.dtype, device=qkv.device)
    if qkv_bias is not None:
        bias = torch.empty((chunks, 3 * heads * width), dtype=torch.float32, device=qkv.device)
        dbias = torch.empty(qkv_bias.shape, dtype=qkv_bias.dtype, device=qkv.device)
    if chunks:
        _qk_norm_backward_kernel[(chunks * groups, 3)](
            dq, dk, dv, qkv, *_contiguous(q_weight, k_weight), rope, stats.contiguous(), dqkv, affine, bias,
            tokens, heads, chunk, samples * tokens * heads, *strides, UNIT=unit, NORM=norm, AFFINE=columns // width,
            **config,
        )  # fmt: skip
    blocks = cdiv(columns, 32) + (0 if bias is None else cdiv(3 * heads * width, 32))
    if blocks:
        _qk_norm_add_kernel[(blocks,)](
            affine, daffine, len(affine), columns, bias, dbias, chunks, 3 * heads * width, ROWS=64, BLOCK=32,
            num_warps=4,
        )  # fmt: skip
    return dqkv, daffine, dbias


WIDTHS = (64, 72)
FORMS = {"": ("layer", False), "_rope": ("layer", True), "_rms_rope": ("rms", True), "_rope_alone": ("none", True)}
"""Names of what `resources.py` compiles: the norm, with its vectors, and whether there is a rotation."""
CEILINGS = {
    **dict.fromkeys(map("forward{}".format, FORMS), 72),
    **dict.fromkeys(map("backward{}".format, FORMS), 128),
    "qk_norm_add": 64,
}
"""The most registers that a thread may take in each kernel."""


def resource_calls(meta: Callable[..., Tensor], width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """256 samples of 256 tokens in 16 heads, and the gradient of qkv's bias too."""
    qkv, weight, bias = meta(256, 256, 3, 16, width), meta(width, dtype=torch.float32), meta(48 * width)
    grad, table = meta(256, 256, 16, width).transpose(1, 2), meta(1, 256, width, dtype=torch.float32)
    for name, (norm, rotated) in FORMS.items():
        stats = meta(STATISTICS[norm], 256, 256, 16, dtype=torch.float32)
        w = None if norm == "none" else weight
        b, rope = weight if norm == "layer" else None, table if rotated else None
        yield f"forward{name}", partial(qk_norm, qkv, w, b, w, b, 1e-6, False, norm, rope)
        yield f"backward{name}", partial(qk_norm_backward, grad, grad, grad, qkv, w, w, bias, stats, norm, rope)
