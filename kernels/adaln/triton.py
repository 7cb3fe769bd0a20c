"""LayerNorm + adaLN modulation and the gated residual in Triton, forward and backward (DiT, arXiv 2212.09748).

    x' = x + gate·a        y = LN(x')·(1 + scale) + shift        LN without affine, per token over D channels

The public functions take and return tensors and know nothing of dispatch or autograd; `../common/rows.py` is all they
need.

Shapes: x, a and their gradients (B, N, D), any strides; gate, shift, scale (B, D), any strides (views of one (B, 6D)
tensor as a rule). float32, bfloat16 or float16, mixed freely; arithmetic and statistics are float32; mean and rstd are
(B, N) float32. Outputs are contiguous. The modulation's gradients come back in one slab (B, k·D).

How it works. One program owns a chunk of one sample's tokens, so it reads the modulation once; in the backward it also
adds up the sample's gate, shift and scale gradients in float32 registers, writes one partial sum per chunk, and a
second kernel adds the partials in a fixed order: deterministic, no atomics. Where the bias of the layer that made a is
given, its gradient, the sum of da over all samples, is one more partial sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launched
from ..common.rows import (
    by_row,
    cdiv,
    column_sums,
    cut_tokens,
    load_row,
    row_config,
    row_sum,
    store_row,
    token_chunk,
    zero_row,
)

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 2048, 1024
"""Programs a launch aims at: two waves on an H200 at the kernels' register counts. More rows a program mean fewer
reads of the modulation (forward) and fewer partial sums (backward)."""


REGISTERS = 168
"""The most that a thread of the backward takes: they leave twelve warps on a multiprocessor."""


@triton.jit
def _centred(main, tail, mean, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """x − mean, with the padding lanes left at zero."""
    if TAIL == 0:
        return main - mean, tail
    else:
        return main - mean, tl.where(MAIN + tl.arange(0, TAIL) < D, tail - mean, 0.0)


@launched
@triton.jit
def _adaln_forward_kernel(
    x_ptr, a_ptr, gate_ptr, shift_ptr, scale_ptr, x_out_ptr, y_ptr, mean_ptr, rstd_ptr,
    N, rows, x_b, x_n, a_b, a_n, gate_b, shift_b, scale_b,
    EPS: tl.constexpr, GATED: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x (B, N, D) → y, mean, rstd and, if GATED, x_out = x + gate·a."""
    sample, first, last = token_chunk(N, rows)
    shift, shift_t = load_row(shift_ptr + sample * shift_b, D, MAIN, TAIL)
    scale, scale_t = load_row(scale_ptr + sample * scale_b, D, MAIN, TAIL)
    if GATED:
        gate, gate_t = load_row(gate_ptr + sample * gate_b, D, MAIN, TAIL)
    for token in tl.range(first, last, num_stages=STAGES):
        row = sample * N + token
        x, x_t = load_row(x_ptr + sample * x_b + token * x_n, D, MAIN, TAIL)
        if GATED:
            a, a_t = load_row(a_ptr + sample * a_b + token * a_n, D, MAIN, TAIL)
            # The statistics are those of x' as it is stored.
            x = (x + gate * a).to(x_out_ptr.dtype.element_ty)
            x_t = (x_t + gate_t * a_t).to(x_out_ptr.dtype.element_ty)
            store_row(x_out_ptr + row * D, x, x_t, D, MAIN, TAIL)
            x, x_t = x.to(tl.float32), x_t.to(tl.float32)
        mean = row_sum(x, x_t, TAIL) / D
        x, x_t = _centred(x, x_t, mean, D, MAIN, TAIL)
        rstd = tl.rsqrt(row_sum(x * x, x_t * x_t, TAIL) / D + EPS)
        y, y_t = x * rstd * (1 + scale) + shift, x_t * rstd * (1 + scale_t) + shift_t
        store_row(y_ptr + row * D, y, y_t, D, MAIN, TAIL)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@launched
@triton.jit
def _adaln_backward_kernel(
    dx_out_ptr, dy_ptr, x_ptr, a_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, da_ptr, partial_ptr,
    N, rows, dx_out_b, dx_out_n, dy_b, dy_n, x_b, x_n, a_b, a_n, gate_b, scale_b,
    GATED: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dy, if GATED dx_out → dx, da and the chunk's sums [dgate], dshift, dscale and, if BIAS, Σ da; x is what was
    normalised."""
    sample, first, last = token_chunk(N, rows)
    scale, scale_t = load_row(scale_ptr + sample * scale_b, D, MAIN, TAIL)
    scale, scale_t = 1 + scale, 1 + scale_t
    dshift, dshift_t = zero_row(MAIN, TAIL)
    dscale, dscale_t = zero_row(MAIN, TAIL)
    if GATED:
        gate, gate_t = load_row(gate_ptr + sample * gate_b, D, MAIN, TAIL)
        dgate, dgate_t = zero_row(MAIN, TAIL)
    if BIAS:
        ungated, ungated_t = zero_row(MAIN, TAIL)  # Σ dx: the gate is the same for all tokens
    for token in tl.range(first, last, num_stages=STAGES):
        row = sample * N + token
        dy, dy_t = load_row(dy_ptr + sample * dy_b + token * dy_n, D, MAIN, TAIL)
        x, x_t = load_row(x_ptr + sample * x_b + token * x_n, D, MAIN, TAIL)
        if GATED:
            dx_out, dx_out_t = load_row(dx_out_ptr + sample * dx_out_b + token * dx_out_n, D, MAIN, TAIL)
            a, a_t = load_row(a_ptr + sample * a_b + token * a_n, D, MAIN, TAIL)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        # Padding lanes hold x = 0 and dy = 0: whatever h is there, it only ever meets a zero factor.
        h, h_t = (x - mean) * rstd, (x_t - mean) * rstd
        dshift, dshift_t = dshift + dy, dshift_t + dy_t
        dscale, dscale_t = dscale + dy * h, dscale_t + dy_t * h_t
        dh, dh_t = dy * scale, dy_t * scale_t
        along_one = row_sum(dh, dh_t, TAIL) / D
        along_h = row_sum(dh * h, dh_t * h_t, TAIL) / D
        dx, dx_t = (dh - along_one - h * along_h) * rstd, (dh_t - along_one - h_t * along_h) * rstd
        if GATED:
            dx, dx_t = dx + dx_out, dx_t + dx_out_t
            dgate, dgate_t = dgate + dx * a, dgate_t + dx_t * a_t
            if BIAS:
                ungated, ungated_t = ungated + dx, ungated_t + dx_t
            store_row(da_ptr + row * D, dx * gate, dx_t * gate_t, D, MAIN, TAIL)
        store_row(dx_ptr + row * D, dx, dx_t, D, MAIN, TAIL)
    slab = partial_ptr + tl.program_id(0).to(tl.int64) * (((3 if GATED else 2) + (1 if BIAS else 0)) * D)
    if GATED:
        store_row(slab, dgate, dgate_t, D, MAIN, TAIL)
        slab += D
    store_row(slab, dshift, dshift_t, D, MAIN, TAIL)
    store_row(slab + D, dscale, dscale_t, D, MAIN, TAIL)
    if BIAS:
        store_row(slab + 2 * D, ungated * gate, ungated_t * gate_t, D, MAIN, TAIL)


@launched
@triton.jit
def _adaln_gate_forward_kernel(
    x_ptr, a_ptr, gate_ptr, x_out_ptr, N, rows, x_b, x_n, a_b, a_n, gate_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x_out = x + gate·a."""
    sample, first, last = token_chunk(N, rows)
    gate, gate_t = load_row(gate_ptr + sample * gate_b, D, MAIN, TAIL)
    for token in tl.range(first, last, num_stages=STAGES):
        x, x_t = load_row(x_ptr + sample * x_b + token * x_n, D, MAIN, TAIL)
        a, a_t = load_row(a_ptr + sample * a_b + token * a_n, D, MAIN, TAIL)
        store_row(x_out_ptr + (sample * N + token) * D, x + gate * a, x_t + gate_t * a_t, D, MAIN, TAIL)


@launched
@triton.jit
def _adaln_gate_backward_kernel(
    dx_out_ptr, a_ptr, gate_ptr, da_ptr, partial_ptr, N, rows, dx_out_b, dx_out_n, a_b, a_n, gate_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """da = gate·dx_out and the chunk's sum dgate = Σ dx_out·a."""
    sample, first, last = token_chunk(N, rows)
    gate, gate_t = load_row(gate_ptr + sample * gate_b, D, MAIN, TAIL)
    dgate, dgate_t = zero_row(MAIN, TAIL)
    for token in tl.range(first, last, num_stages=STAGES):
        dx, dx_t = load_row(dx_out_ptr + sample * dx_out_b + token * dx_out_n, D, MAIN, TAIL)
        a, a_t = load_row(a_ptr + sample * a_b + token * a_n, D, MAIN, TAIL)
        dgate, dgate_t = dgate + dx * a, dgate_t + dx_t * a_t
        store_row(da_ptr + (sample * N + token) * D, dx * gate, dx_t * gate_t, D, MAIN, TAIL)
    store_row(partial_ptr + tl.program_id(0).to(tl.int64) * D, dgate, dgate_t, D, MAIN, TAIL)


@launched
@triton.jit
def _add_partials_kernel(
    partial_ptr, out_ptr, bias_ptr, samples, chunks, columns, width,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial (B, chunks, columns [+ width]) float32 → out (B, columns): the sum over chunks, in their order; and, if
    BIAS, the sum of the last `width` columns over chunks and samples."""
    blocks = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    pitch = columns + width if BIAS else columns
    if program < samples * blocks:
        sample = (program // blocks).to(tl.int64)
        at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for chunk in range(chunks):
            total += tl.load(partial_ptr + (sample * chunks + chunk) * pitch + at, mask=at < columns, other=0.0)
        tl.store(out_ptr + sample * columns + at, total, mask=at < columns)
    elif BIAS:
        channel = (program - samples * blocks) * COLUMNS + tl.arange(0, COLUMNS)
        summed = column_sums(partial_ptr + columns, samples * chunks, pitch, channel, width, ROWS, COLUMNS)
        tl.store(bias_ptr + channel, summed, mask=channel < width)


def _add_partials(
    partial: Tensor, columns: int, dtype: torch.dtype, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, chunks, columns [+ D]) float32 → the slab (B, columns) of the modulation's gradients, and the bias's (D,)."""
    samples, chunks, _ = partial.shape
    out = partial.new_empty((samples, columns), dtype=dtype)
    summed = torch.empty(0, device=partial.device) if bias is None else torch.empty_like(bias)
    grid = samples * cdiv(columns, 512) + cdiv(summed.numel(), 16)
    _add_partials_kernel[(grid,)](
        partial, out, summed, samples, chunks, columns, summed.numel(),
        BIAS=bias is not None, BLOCK=512, ROWS=128, COLUMNS=16, num_warps=4,
    )  # fmt: skip
    return out, summed


def _forward(
    x: Tensor, a: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Launches the forward with or without the gated residual: x_out or None, y, mean, rstd."""
    samples, tokens, width = x.shape
    x, shift, scale = by_row(x), by_row(shift), by_row(scale)
    a, gate = (None, None) if a is None or gate is None else (by_row(a), by_row(gate))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x_out = None if a is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = x.new_empty((samples, tokens), dtype=torch.float32)
    rstd = x.new_empty((samples, tokens), dtype=torch.float32)
    rows = cut_tokens(samples, tokens, FORWARD_PROGRAMS, 1, 16)
    _adaln_forward_kernel[(samples * cdiv(tokens, rows),)](
        x, a, gate, shift, scale, x_out, y, mean, rstd, tokens, rows, *x.stride()[:2],
        *((0, 0) if a is None else a.stride()[:2]), 0 if gate is None else gate.stride(0),
        shift.stride(0), scale.stride(0),
        EPS=eps, GATED=a is not None, **row_config(width, 1 if a is None else 2, x.dtype),
    )  # fmt: skip
    return x_out, y, mean, rstd


def _backward(
    dx_out: Tensor | None, dy: Tensor, x: Tensor, a: Tensor | None, gate: Tensor | None, scale: Tensor,
    mean: Tensor, rstd: Tensor, a_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Launches the backward with or without the gated residual: dx, da or None, slab [dgate,] dshift, dscale, and
    da_bias."""
    samples, tokens, width = x.shape
    dy, x, scale, mean, rstd = by_row(dy), by_row(x), by_row(scale), mean.contiguous(), rstd.contiguous()
    if dx_out is not None and a is not None and gate is not None:
        dx_out, a, gate = by_row(dx_out), by_row(a), by_row(gate)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    da = None if a is None else torch.empty_like(a, memory_format=torch.contiguous_format)
    rows = cut_tokens(samples, tokens, BACKWARD_PROGRAMS, 8, 128)
    chunks = cdiv(tokens, rows)
    config = row_config(width, 2 if a is None else 4, x.dtype)
    if a_bias is not None and config["num_warps"] < 4:
        config = {**config, "maxnreg": REGISTERS}  # unbounded, 768 channels take 211 on sm_80
    sums = 2 if a is None else 3
    columns = (sums if a_bias is None else sums + 1) * width
    partial = x.new_empty((samples, chunks, columns), dtype=torch.float32)
    _adaln_backward_kernel[(samples * chunks,)](
        dx_out, dy, x, a, gate, scale, mean, rstd, dx, da, partial, tokens, rows,
        *((0, 0) if dx_out is None else dx_out.stride()[:2]), *dy.stride()[:2], *x.stride()[:2],
        *((0, 0) if a is None else a.stride()[:2]), 0 if gate is None else gate.stride(0), scale.stride(0),
        GATED=a is not None, BIAS=a_bias is not None, **config,
    )  # fmt: skip
    return dx, da, *_add_partials(partial, sums * width, scale.dtype, a_bias)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = LN(x)·(1 + scale) + shift; returns y in x's dtype, mean and rstd."""
    _, y, mean, rstd = _forward(x, None, None, shift, scale, eps)
    return y, mean, rstd


def norm_modulate_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx in x's dtype, and the slab (B, 2D) = [dshift, dscale] in scale's dtype."""
    dx, _, slab, _ = _backward(None, dy, x, None, None, scale, mean, rstd)
    return dx, slab


def gate_residual_norm_modulate(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float,
    a_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x' = x + gate·a and y = LN(x')·(1 + scale) + shift; returns x', y (both in x's dtype), mean and rstd of x'."""
    x_out, y, mean, rstd = _forward(x, a, gate, shift, scale, eps)
    assert x_out is not None
    return x_out, y, mean, rstd


def gate_residual_norm_modulate_backward(
    dx_out: Tensor, dy: Tensor, x_out: Tensor, a: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    a_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx in x's dtype, da in a's, the slab (B, 3D) = [dgate, dshift, dscale] in scale's dtype, and da_bias (D,), which
    is empty without a_bias."""
    dx, da, slab, da_bias = _backward(dx_out, dy, x_out, a, gate, scale, mean, rstd, a_bias)
    assert da is not None
    return dx, da, slab, da_bias


def gate_residual(x: Tensor, a: Tensor, gate: Tensor) -> Tensor:
    """x' = x + gate·a in x's dtype."""
    samples, tokens, width = x.shape
    x, a, gate = by_row(x), by_row(a), by_row(gate)
    x_out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = cut_tokens(samples, tokens, FORWARD_PROGRAMS, 1, 16)
    _adaln_gate_forward_kernel[(samples * cdiv(tokens, rows),)](
        x, a, gate, x_out, tokens, rows, *x.stride()[:2], *a.stride()[:2], gate.stride(0),
        **row_config(width, 2, x.dtype),
    )  # fmt: skip
    return x_out


def gate_residual_backward(dx_out: Tensor, a: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """da in a's dtype and dgate (B, D) in gate's; dx is dx_out itself."""
    samples, tokens, width = a.shape
    dx_out, a, gate = by_row(dx_out), by_row(a), by_row(gate)
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    rows = cut_tokens(samples, tokens, BACKWARD_PROGRAMS, 8, 128)
    chunks = cdiv(tokens, rows)
    partial = a.new_empty((samples, chunks, width), dtype=torch.float32)
    _adaln_gate_backward_kernel[(samples * chunks,)](
        dx_out, a, gate, da, partial, tokens, rows, *dx_out.stride()[:2], *a.stride()[:2], gate.stride(0),
        **row_config(width, 2, a.dtype),
    )  # fmt: skip
    return da, _add_partials(partial, width, gate.dtype)[0]


WIDTHS = (384, 768, 1024, 1152)
CEILINGS = {
    "forward": 80, "plain_forward": 64, "backward": REGISTERS, "bias_backward": REGISTERS, "plain_backward": 128,
    "gate_forward": 64, "gate_backward": 64, "add_partials": 48,
}  # fmt: skip
"""What `resources.py` compiles: widths, and the most registers a thread may take in each kernel."""


def resource_calls(meta: Callable[..., Tensor], width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """At the shapes of training: 256 tokens, a batch of 256, modulation as views of one (B, 6D) tensor."""
    x, statistic = meta(256, 256, width), meta(256, 256, dtype=torch.float32)
    gate, shift, scale = meta(256, 6 * width).chunk(6, 1)[2:5]
    bias = meta(width)
    yield "forward", lambda: gate_residual_norm_modulate(x, x, gate, shift, scale, 1e-6)
    yield "plain_forward", lambda: norm_modulate(x, shift, scale, 1e-6)
    backward = gate_residual_norm_modulate_backward
    yield "backward", lambda: backward(x, x, x, x, gate, scale, statistic, statistic)
    yield "plain_backward", lambda: norm_modulate_backward(x, x, scale, statistic, statistic)
    yield "gate_forward", lambda: gate_residual(x, x, gate)
    yield "gate_backward", lambda: gate_residual_backward(x, x, gate)
    yield "bias_backward", lambda: backward(x, x, x, x, gate, scale, statistic, statistic, bias)
