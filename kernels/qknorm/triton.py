"""LayerNorm of q and k over head_dim, straight from the packed projection, in Triton (QK-norm, arXiv 2302.05442).

    q̂ = LN(q)·q_weight + q_bias, the same for k; v is copied

Needs torch and Triton only. qkv is (B, N, 3, H, d) with any strides; q, k, v come back as contiguous
(B, H, N, d), which is what attention wants, so the norm costs no pass of its own over what the transposition moves
anyway. Statistics (4, B, H, N) are float32: mean and rstd of q, mean and rstd of k.

A program takes the tokens of one head as a tile of rows; head_dim is cut into a power of two and the rest
(72 = 64 + 8). In the backward a program walks a chunk of tokens and keeps the sums for the weights' and biases'
gradients in float32 registers; the programs' sums are added in a fixed order, 64 at a time: deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launched

PROGRAMS = 2048
"""Programs the backward aims at: two waves on an H200."""


@triton.jit
def _load(ptr, n, n_stride, N, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Rows n of one head, as they are stored: channels [0, MAIN) and [MAIN, D), zeros where there is nothing."""
    rows = ptr + n.to(tl.int64)[:, None] * n_stride
    inside = n[:, None] < N
    main = tl.load(rows + tl.arange(0, MAIN)[None, :], mask=inside, other=0.0)
    if TAIL == 0:
        return main, tl.full((1, 1), 0.0, tl.float32)
    else:
        at = MAIN + tl.arange(0, TAIL)[None, :]
        return main, tl.load(rows + at, mask=inside & (at < D), other=0.0)


@triton.jit
def _store(ptr, main, tail, n, n_stride, N, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    rows = ptr + n.to(tl.int64)[:, None] * n_stride
    inside = n[:, None] < N
    tl.store(rows + tl.arange(0, MAIN)[None, :], main, mask=inside)
    if TAIL != 0:
        at = MAIN + tl.arange(0, TAIL)[None, :]
        tl.store(rows + at, tail, mask=inside & (at < D))


@triton.jit
def _vector(ptr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """An affine vector (d,) as a (1, ·) row in float32."""
    main = tl.load(ptr + tl.arange(0, MAIN)[None, :]).to(tl.float32)
    if TAIL == 0:
        return main, tl.full((1, 1), 0.0, tl.float32)
    else:
        at = MAIN + tl.arange(0, TAIL)[None, :]
        return main, tl.load(ptr + at, mask=at < D, other=0.0).to(tl.float32)


@triton.jit
def _mean(main, tail, D: tl.constexpr, TAIL: tl.constexpr):
    """(T, d) → (T, 1)."""
    if TAIL == 0:
        return (tl.sum(main, 1) / D)[:, None]
    else:
        return ((tl.sum(main, 1) + tl.sum(tail, 1)) / D)[:, None]


@triton.jit
def _centred(main, tail, mean, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """x − mean, with the padding lanes left at zero."""
    if TAIL == 0:
        return main - mean, tail
    else:
        return main - mean, tl.where(MAIN + tl.arange(0, TAIL)[None, :] < D, tail - mean, 0.0)


@triton.jit
def _head(H, tiles):
    """This program's sample, head and tile; heads are next to one another, as they are in qkv's rows."""
    pid = tl.program_id(0)
    return (pid // (H * tiles)).to(tl.int64), (pid % H).to(tl.int64), (pid // H) % tiles


@triton.jit
def _normalise(
    x_ptr, x_n, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, n, N,
    EPS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    x, x_t = _load(x_ptr, n, x_n, N, D, MAIN, TAIL)
    x, x_t = x.to(tl.float32), x_t.to(tl.float32)
    mean = _mean(x, x_t, D, TAIL)
    x, x_t = _centred(x, x_t, mean, D, MAIN, TAIL)
    rstd = tl.rsqrt(_mean(x * x, x_t * x_t, D, TAIL) + EPS)
    weight, weight_t = _vector(weight_ptr, D, MAIN, TAIL)
    bias, bias_t = _vector(bias_ptr, D, MAIN, TAIL)
    y, y_t = x * rstd * weight + bias, x_t * rstd * weight_t + bias_t
    _store(y_ptr, y, y_t, n, D, N, D, MAIN, TAIL)
    tl.store(mean_ptr + n[:, None], mean, mask=n[:, None] < N)
    tl.store(rstd_ptr + n[:, None], rstd, mask=n[:, None] < N)


@launched
@triton.jit
def _qk_norm_forward_kernel(
    qkv_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, q_ptr, k_ptr, v_ptr, stats_ptr,
    N, H, plane, qkv_b, qkv_n, qkv_part, qkv_h,
    UNIT: tl.constexpr, EPS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """qkv → q, k, v, stats for T tokens of one head; plane is B·H·N; strides are in UNITs."""
    qkv_b, qkv_n, qkv_part, qkv_h = qkv_b * UNIT, qkv_n * UNIT, qkv_part * UNIT, qkv_h * UNIT
    sample, head, tile = _head(H, tl.cdiv(N, T))
    n = tile * T + tl.arange(0, T)
    source = qkv_ptr + sample * qkv_b + head * qkv_h
    rows = (sample * H + head) * N
    stats = stats_ptr + rows
    plane = tl.cast(plane, tl.int64)  # a size of one comes as a constant, which has no .to
    _normalise(source, qkv_n, q_weight_ptr, q_bias_ptr, q_ptr + rows * D, stats, stats + plane, n, N,
               EPS, D, MAIN, TAIL)  # fmt: skip
    stats += 2 * plane
    _normalise(source + qkv_part, qkv_n, k_weight_ptr, k_bias_ptr, k_ptr + rows * D, stats, stats + plane, n, N,
               EPS, D, MAIN, TAIL)  # fmt: skip
    v, v_t = _load(source + 2 * qkv_part, n, qkv_n, N, D, MAIN, TAIL)
    _store(v_ptr + rows * D, v, v_t, n, D, N, D, MAIN, TAIL)


@triton.jit
def _denormalise(
    dy_ptr, dy_n, x_ptr, x_n, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dx_n, sums_ptr, first, last,
    T: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dx for tokens [first, last) of one head, and its sums for dweight and dbias."""
    weight, weight_t = _vector(weight_ptr, D, MAIN, TAIL)
    dweight = tl.zeros((T, MAIN), tl.float32)
    dweight_t = tl.zeros((T, TAIL if TAIL != 0 else 1), tl.float32)
    dbias, dbias_t = dweight, dweight_t
    for start in range(first, last, T):
        n = start + tl.arange(0, T)
        dy, dy_t = _load(dy_ptr, n, dy_n, last, D, MAIN, TAIL)
        x, x_t = _load(x_ptr, n, x_n, last, D, MAIN, TAIL)
        mean = tl.load(mean_ptr + n[:, None], mask=n[:, None] < last, other=0.0)
        rstd = tl.load(rstd_ptr + n[:, None], mask=n[:, None] < last, other=0.0)
        dy, dy_t = dy.to(tl.float32), dy_t.to(tl.float32)
        # Padding lanes hold dy = 0, so whatever h is there only ever meets a zero factor.
        h, h_t = (x.to(tl.float32) - mean) * rstd, (x_t.to(tl.float32) - mean) * rstd
        dweight, dweight_t = dweight + dy * h, dweight_t + dy_t * h_t
        dbias, dbias_t = dbias + dy, dbias_t + dy_t
        dh, dh_t = dy * weight, dy_t * weight_t
        along_one = _mean(dh, dh_t, D, TAIL)
        along_h = _mean(dh * h, dh_t * h_t, D, TAIL)
        dx, dx_t = (dh - along_one - h * along_h) * rstd, (dh_t - along_one - h_t * along_h) * rstd
        _store(dx_ptr, dx, dx_t, n, dx_n, last, D, MAIN, TAIL)
    main = tl.arange(0, MAIN)
    tl.store(sums_ptr + main, tl.sum(dweight, 0))
    tl.store(sums_ptr + D + main, tl.sum(dbias, 0))
    if TAIL != 0:
        tail = MAIN + tl.arange(0, TAIL)
        tl.store(sums_ptr + tail, tl.sum(dweight_t, 0), mask=tail < D)
        tl.store(sums_ptr + D + tail, tl.sum(dbias_t, 0), mask=tail < D)


@launched
@triton.jit
def _qk_norm_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, stats_ptr, dqkv_ptr, partial_ptr,
    N, H, rows, plane, dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, qkv_b, qkv_n, qkv_part, qkv_h,
    UNIT: tl.constexpr, T: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv → dqkv (B, N, 3, H, d) for a chunk of one head, and its sums for the affine gradients (4, d)."""
    qkv_b, qkv_n, qkv_part, qkv_h = qkv_b * UNIT, qkv_n * UNIT, qkv_part * UNIT, qkv_h * UNIT
    dq_b, dq_h, dq_n = dq_b * UNIT, dq_h * UNIT, dq_n * UNIT
    dk_b, dk_h, dk_n = dk_b * UNIT, dk_h * UNIT, dk_n * UNIT
    dv_b, dv_h, dv_n = dv_b * UNIT, dv_h * UNIT, dv_n * UNIT
    sample, head, chunk = _head(H, tl.cdiv(N, rows))
    first = chunk * rows
    last = tl.minimum(first + rows, N)
    source = qkv_ptr + sample * qkv_b + head * qkv_h
    out_n = 3 * H * D
    out = dqkv_ptr + sample * N * out_n + head * D
    stats = stats_ptr + (sample * H + head) * N
    sums = partial_ptr + tl.program_id(0).to(tl.int64) * (4 * D)
    plane = tl.cast(plane, tl.int64)  # a size of one comes as a constant, which has no .to
    _denormalise(dq_ptr + sample * dq_b + head * dq_h, dq_n, source, qkv_n, q_weight_ptr, stats, stats + plane,
                 out, out_n, sums, first, last, T, D, MAIN, TAIL)  # fmt: skip
    stats += 2 * plane
    _denormalise(dk_ptr + sample * dk_b + head * dk_h, dk_n, source + qkv_part, qkv_n, k_weight_ptr, stats,
                 stats + plane, out + H * D, out_n, sums + 2 * D, first, last, T, D, MAIN, TAIL)  # fmt: skip
    dv_ptr += sample * dv_b + head * dv_h
    for start in range(first, last, T):
        n = start + tl.arange(0, T)
        dv, dv_t = _load(dv_ptr, n, dv_n, last, D, MAIN, TAIL)
        _store(out + 2 * H * D, dv, dv_t, n, out_n, last, D, MAIN, TAIL)


@launched
@triton.jit
def _add_rows_kernel(partial_ptr, out_ptr, count, columns, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """(count, columns) → (cdiv(count, GROUP), columns): sums of GROUP rows, in their order."""
    group = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(group * GROUP, tl.minimum(group * GROUP + GROUP, count)):
        total += tl.load(partial_ptr + row * columns + at, mask=at < columns, other=0.0)
    tl.store(out_ptr + group * columns + at, total, mask=at < columns)


def _by_row(x: Tensor) -> Tensor:
    """x with a contiguous last axis; the other axes may keep any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*strides: int) -> tuple[list[int], int]:
    """Strides in units of 8 elements where all allow it: Triton's launcher itself only looks for multiples of 16, and
    with head_dim 72 would load 8 bytes at a time."""
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return [stride // unit for stride in strides], unit


def _config(width: int, elements: int) -> dict[str, int]:
    """How head_dim is cut, and tokens a tile, so that its main block has about `elements` elements for 4 warps."""
    main = 1 << (width.bit_length() - 1)
    tail = triton.next_power_of_2(width - main) if width > main else 0
    return {"T": min(max(elements // main, 1), 64), "D": width, "MAIN": main, "TAIL": tail, "num_warps": 4}


def qk_norm(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, d) in qkv's dtype, and stats (4, B, H, N); qkv (B, N, 3, H, d), weights and biases (d,)."""
    qkv = _by_row(qkv)
    samples, tokens, _, heads, width = qkv.shape
    q, k, v = (qkv.new_empty((samples, heads, tokens, width)) for _ in range(3))
    stats = qkv.new_empty((4, samples, heads, tokens), dtype=torch.float32)
    strides, unit = _strides(*qkv.stride()[:4])
    config = _config(width, 2048)
    _qk_norm_forward_kernel[(samples * heads * triton.cdiv(tokens, config["T"]),)](
        qkv, q_weight.contiguous(), q_bias.contiguous(), k_weight.contiguous(), k_bias.contiguous(), q, k, v, stats,
        tokens, heads, samples * heads * tokens, *strides, UNIT=unit, EPS=eps, **config,
    )  # fmt: skip
    return q, k, v, stats


def qk_norm_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dqkv (B, N, 3, H, d) in qkv's dtype; dq_weight, dq_bias, dk_weight, dk_bias (d,) in the weights' dtypes."""
    dq, dk, dv, qkv = (_by_row(t) for t in (dq, dk, dv, qkv))
    samples, tokens, _, heads, width = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    strides, unit = _strides(*dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *qkv.stride()[:4])
    config = _config(width, 1024)
    fit = samples * heads * tokens // PROGRAMS
    rows = triton.cdiv(max(min(fit, 512), 1), config["T"]) * config["T"]
    programs = samples * heads * triton.cdiv(tokens, rows)
    sums = qkv.new_empty((programs, 4 * width), dtype=torch.float32)
    if programs == 0:
        sums = torch.zeros((1, 4 * width), dtype=torch.float32, device=qkv.device)
    _qk_norm_backward_kernel[(programs,)](
        dq, dk, dv, qkv, q_weight.contiguous(), k_weight.contiguous(), stats.contiguous(), dqkv, sums,
        tokens, heads, rows, samples * heads * tokens, *strides, UNIT=unit, **config,
    )  # fmt: skip
    while len(sums) > 1:
        groups = triton.cdiv(len(sums), 64)
        added = qkv.new_empty((groups, 4 * width), dtype=torch.float32)
        _add_rows_kernel[(groups, triton.cdiv(4 * width, 128))](
            sums, added, len(sums), 4 * width, GROUP=64, BLOCK=128, num_warps=4
        )
        sums = added
    weights = (q_weight, q_weight, k_weight, k_weight)
    parts = [part.to(w.dtype, copy=True) for part, w in zip(sums.view(4, width), weights)]
    return dqkv, parts[0], parts[1], parts[2], parts[3]


WIDTHS = (64, 72)
CEILINGS = {"forward": 72, "backward": 128, "add_rows": 32}
NARROW = ("add_rows",)
"""What `resources.py` compiles: head widths, the most registers a thread may take in each kernel, and kernels without a
16-byte load: `add_rows` adds 288 columns with 128 threads."""


def resource_calls(meta: Callable[..., Tensor], width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """256 samples of 256 tokens in 16 heads."""
    qkv, weight = meta(256, 256, 3, 16, width), meta(width, dtype=torch.float32)
    grad, stats = meta(256, 16, 256, width), meta(4, 256, 16, 256, dtype=torch.float32)
    yield "forward", lambda: qk_norm(qkv, weight, weight, weight, weight, 1e-6)
    yield "backward", lambda: qk_norm_backward(grad, grad, grad, qkv, weight, weight, stats)
