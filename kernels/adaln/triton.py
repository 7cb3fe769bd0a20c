"""LayerNorm or RMSNorm + adaLN modulation and the gated residual in Triton, forward and backward (arXiv 2212.09748).

    x' = x + gate·a        y = norm(x')·(1 + scale) + shift        no affine in the norm, per token over D channels

The public functions take and return tensors and know nothing of dispatch or autograd; `partials.py` and `../common/`
are all they need.

Shapes: x, a and their gradients (B, N, D), any strides; gate, shift, scale (B, D), or (B, G, D) with the lengths of G
runs of tokens, or (B, N, D), any strides (views of one (B, 6D) tensor as a rule). float32, bfloat16 or float16, mixed
freely; arithmetic and statistics are float32; mean and rstd are (B, N) float32. RMSNorm (rms=True), which is compiled
apart, has no mean: it is (0,), neither written nor read. Outputs are contiguous. The modulation's gradients come back
in one slab (B, k·D), (B, G, k·D) or (B, N, k·D).

How it works. One program owns a chunk of one run of a sample's tokens, so it reads the modulation once; in the backward
it also adds up the gate, shift and scale gradients in float32 registers, writes one partial sum per chunk, and a second
kernel adds a run's partials in a fixed order: deterministic, no atomics. The lengths are constants of the kernels,
which are compiled for each: nothing is copied to the GPU for them, be it in a CUDA graph or not. With a modulation of
every token a chunk is cut as without runs, each token's vectors are read beside it, and their gradients written, not
summed. Where the bias of the layer that made a is given, its gradient, the sum of da over all samples, is one more
partial sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launched
from ..common.plain import Lengths
from ..common.rows import (
    by_row,
    centred,
    count_chunks,
    cut_tokens,
    load_row,
    load_vector,
    row_config,
    row_sum,
    run_chunk,
    store_row,
    zero_row,
)
from .partials import add_partials

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 2048, 1024
"""Programs a launch aims at: two waves on an H200 at the kernels' register counts. More rows a program mean fewer
reads of the modulation (forward) and fewer partial sums (backward)."""


REGISTERS = 168
"""The most that a thread of the backward takes: they leave twelve warps on a multiprocessor."""


@launched
@triton.jit
def _adaln_forward_kernel(
    x_ptr, a_ptr, gate_ptr, shift_ptr, scale_ptr, x_out_ptr, y_ptr, mean_ptr, rstd_ptr,
    N, rows, x_b, x_n, a_b, a_n, gate_b, gate_n, shift_b, shift_n, scale_b, scale_n,
    LENGTHS: tl.constexpr, TOKENS: tl.constexpr, EPS: tl.constexpr, GATED: tl.constexpr, RMS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x (B, N, D) → y, rstd, unless RMS mean and, if GATED, x_out = x + gate·a."""
    sample, run, first, last = run_chunk(N, rows, LENGTHS)
    if not TOKENS:
        shift, shift_t = load_vector(shift_ptr, sample, shift_b, run, shift_n, D, MAIN, TAIL)
        scale, scale_t = load_vector(scale_ptr, sample, scale_b, run, scale_n, D, MAIN, TAIL)
        if GATED:
            gate, gate_t = load_vector(gate_ptr, sample, gate_b, run, gate_n, D, MAIN, TAIL)
    for token in tl.range(first, last, num_stages=STAGES):
        row = sample * N + token
        if TOKENS:
            shift, shift_t = load_vector(shift_ptr, sample, shift_b, token, shift_n, D, MAIN, TAIL)
            scale, scale_t = load_vector(scale_ptr, sample, scale_b, token, scale_n, D, MAIN, TAIL)
            if GATED:
                gate, gate_t = load_vector(gate_ptr, sample, gate_b, token, gate_n, D, MAIN, TAIL)
        x, x_t = load_row(x_ptr + sample * x_b + token * x_n, D, MAIN, TAIL)
        if GATED:
            a, a_t = load_row(a_ptr + sample * a_b + token * a_n, D, MAIN, TAIL)
            # The statistics are those of x' as it is stored.
            x = (x + gate * a).to(x_out_ptr.dtype.element_ty)
            x_t = (x_t + gate_t * a_t).to(x_out_ptr.dtype.element_ty)
            store_row(x_out_ptr + row * D, x, x_t, D, MAIN, TAIL)
            x, x_t = x.to(tl.float32), x_t.to(tl.float32)
        if not RMS:
            mean = row_sum(x, x_t, TAIL) / D
            x, x_t = centred(x, x_t, mean, D, MAIN, TAIL)
        rstd = tl.rsqrt(row_sum(x * x, x_t * x_t, TAIL) / D + EPS)
        y, y_t = x * rstd * (1 + scale) + shift, x_t * rstd * (1 + scale_t) + shift_t
        store_row(y_ptr + row * D, y, y_t, D, MAIN, TAIL)
        if not RMS:
            tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@launched
@triton.jit
def _adaln_backward_kernel(
    dx_out_ptr, dy_ptr, x_ptr, a_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, da_ptr, dmod_ptr, partial_ptr,
    N, rows, dx_out_b, dx_out_n, dy_b, dy_n, x_b, x_n, a_b, a_n, gate_b, gate_n, scale_b, scale_n,
    LENGTHS: tl.constexpr, TOKENS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RMS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dy, if GATED dx_out → dx, da and the chunk's sums [dgate], dshift, dscale and, if BIAS, Σ da; x is what was
    normalised. If TOKENS, only the last is a sum, and dmod gets the others."""
    sample, run, first, last = run_chunk(N, rows, LENGTHS)
    sums: tl.constexpr = 3 if GATED else 2
    if not TOKENS:
        scale, scale_t = load_vector(scale_ptr, sample, scale_b, run, scale_n, D, MAIN, TAIL)
        scale, scale_t = 1 + scale, 1 + scale_t
        dshift, dshift_t = zero_row(MAIN, TAIL)
        dscale, dscale_t = zero_row(MAIN, TAIL)
        if GATED:
            gate, gate_t = load_vector(gate_ptr, sample, gate_b, run, gate_n, D, MAIN, TAIL)
            dgate, dgate_t = zero_row(MAIN, TAIL)
    if BIAS:
        summed, summed_t = zero_row(MAIN, TAIL)  # Σ dx where the gate is the same for all tokens, else Σ da
    for token in tl.range(first, last, num_stages=STAGES):
        row = sample * N + token
        dy, dy_t = load_row(dy_ptr + sample * dy_b + token * dy_n, D, MAIN, TAIL)
        x, x_t = load_row(x_ptr + sample * x_b + token * x_n, D, MAIN, TAIL)
        if GATED:
            dx_out, dx_out_t = load_row(dx_out_ptr + sample * dx_out_b + token * dx_out_n, D, MAIN, TAIL)
            a, a_t = load_row(a_ptr + sample * a_b + token * a_n, D, MAIN, TAIL)
        if TOKENS:
            scale, scale_t = load_vector(scale_ptr, sample, scale_b, token, scale_n, D, MAIN, TAIL)
            scale, scale_t = 1 + scale, 1 + scale_t
            if GATED:
                gate, gate_t = load_vector(gate_ptr, sample, gate_b, token, gate_n, D, MAIN, TAIL)
        # Padding lanes hold x = 0 and dy = 0: whatever h is there, it only ever meets a zero factor.
        if RMS:
            rstd = tl.load(rstd_ptr + row)
            h, h_t = x * rstd, x_t * rstd
        else:
            mean = tl.load(mean_ptr + row)
            rstd = tl.load(rstd_ptr + row)
            h, h_t = (x - mean) * rstd, (x_t - mean) * rstd
        if TOKENS:
            store_row(dmod_ptr + ((row + 1) * sums - 2) * D, dy, dy_t, D, MAIN, TAIL)
            store_row(dmod_ptr + ((row + 1) * sums - 1) * D, dy * h, dy_t * h_t, D, MAIN, TAIL)
        else:
            dshift, dshift_t = dshift + dy, dshift_t + dy_t
            dscale, dscale_t = dscale + dy * h, dscale_t + dy_t * h_t
        dh, dh_t = dy * scale, dy_t * scale_t
        if RMS:
            along_h = row_sum(dh * h, dh_t * h_t, TAIL) / D
            dx, dx_t = (dh - h * along_h) * rstd, (dh_t - h_t * along_h) * rstd
        else:
            along_one = row_sum(dh, dh_t, TAIL) / D
            along_h = row_sum(dh * h, dh_t * h_t, TAIL) / D
            dx, dx_t = (dh - along_one - h * along_h) * rstd, (dh_t - along_one - h_t * along_h) * rstd
        if GATED:
            dx, dx_t = dx + dx_out, dx_t + dx_out_t
            if TOKENS:
                store_row(dmod_ptr + row * sums * D, dx * a, dx_t * a_t, D, MAIN, TAIL)
            else:
                dgate, dgate_t = dgate + dx * a, dgate_t + dx_t * a_t
            if BIAS:
                if TOKENS:
                    summed, summed_t = summed + dx * gate, summed_t + dx_t * gate_t
                else:
                    summed, summed_t = summed + dx, summed_t + dx_t
            store_row(da_ptr + row * D, dx * gate, dx_t * gate_t, D, MAIN, TAIL)
        store_row(dx_ptr + row * D, dx, dx_t, D, MAIN, TAIL)
    if TOKENS:
        if BIAS:
            store_row(partial_ptr + tl.program_id(0).to(tl.int64) * D, summed, summed_t, D, MAIN, TAIL)
    else:
        slab = partial_ptr + tl.program_id(0).to(tl.int64) * ((sums + (1 if BIAS else 0)) * D)
        if GATED:
            store_row(slab, dgate, dgate_t, D, MAIN, TAIL)
            slab += D
        store_row(slab, dshift, dshift_t, D, MAIN, TAIL)
        store_row(slab + D, dscale, dscale_t, D, MAIN, TAIL)
        if BIAS:
            store_row(slab + 2 * D, summed * gate, summed_t * gate_t, D, MAIN, TAIL)


@launched
@triton.jit
def _adaln_gate_forward_kernel(
    x_ptr, a_ptr, gate_ptr, x_out_ptr, N, rows, x_b, x_n, a_b, a_n, gate_b, gate_n,
    LENGTHS: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x_out = x + gate·a."""
    sample, run, first, last = run_chunk(N, rows, LENGTHS)
    if not TOKENS:
        gate, gate_t = load_vector(gate_ptr, sample, gate_b, run, gate_n, D, MAIN, TAIL)
    for token in tl.range(first, last, num_stages=STAGES):
        if TOKENS:
            gate, gate_t = load_vector(gate_ptr, sample, gate_b, token, gate_n, D, MAIN, TAIL)
        x, x_t = load_row(x_ptr + sample * x_b + token * x_n, D, MAIN, TAIL)
        a, a_t = load_row(a_ptr + sample * a_b + token * a_n, D, MAIN, TAIL)
        store_row(x_out_ptr + (sample * N + token) * D, x + gate * a, x_t + gate_t * a_t, D, MAIN, TAIL)


@launched
@triton.jit
def _adaln_gate_backward_kernel(
    dx_out_ptr, a_ptr, gate_ptr, da_ptr, dgate_ptr, partial_ptr, N, rows,
    dx_out_b, dx_out_n, a_b, a_n, gate_b, gate_n,
    LENGTHS: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """da = gate·dx_out and the chunk's sum dgate = Σ dx_out·a; if TOKENS, dgate of every token."""
    sample, run, first, last = run_chunk(N, rows, LENGTHS)
    if not TOKENS:
        gate, gate_t = load_vector(gate_ptr, sample, gate_b, run, gate_n, D, MAIN, TAIL)
        dgate, dgate_t = zero_row(MAIN, TAIL)
    for token in tl.range(first, last, num_stages=STAGES):
        if TOKENS:
            gate, gate_t = load_vector(gate_ptr, sample, gate_b, token, gate_n, D, MAIN, TAIL)
        dx, dx_t = load_row(dx_out_ptr + sample * dx_out_b + token * dx_out_n, D, MAIN, TAIL)
        a, a_t = load_row(a_ptr + sample * a_b + token * a_n, D, MAIN, TAIL)
        if TOKENS:
            store_row(dgate_ptr + (sample * N + token) * D, dx * a, dx_t * a_t, D, MAIN, TAIL)
        else:
            dgate, dgate_t = dgate + dx * a, dgate_t + dx_t * a_t
        store_row(da_ptr + (sample * N + token) * D, dx * gate, dx_t * gate_t, D, MAIN, TAIL)
    if not TOKENS:
        store_row(partial_ptr + tl.program_id(0).to(tl.int64) * D, dgate, dgate_t, D, MAIN, TAIL)


def _strides(vector: Tensor | None) -> tuple[int, int | None]:
    """Those of a modulation from sample to sample, and from run to run or token to token, if there are several."""
    return (0, None) if vector is None else (vector.stride(0), vector.stride(1) if vector.dim() == 3 else None)


def _kind(vector: Tensor, lengths: Lengths) -> dict[str, Any]:
    """Whether there is a modulation of every sample, run or token, as kernels' constants."""
    return {"LENGTHS": lengths and tuple(lengths), "TOKENS": lengths is None and vector.dim() == 3}


def _forward(
    x: Tensor, a: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, lengths: Lengths,
    rms: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward with or without the gated residual: x_out or None, y, mean, rstd."""
    samples, tokens, width = x.shape
    x, shift, scale = by_row(x), by_row(shift), by_row(scale)
    a, gate = (None, None) if a is None or gate is None else (by_row(a), by_row(gate))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x_out = None if a is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = x.new_empty(0 if rms else (samples, tokens), dtype=torch.float32)
    rstd = x.new_empty((samples, tokens), dtype=torch.float32)
    kind, rows = _kind(scale, lengths), cut_tokens(samples, tokens, FORWARD_PROGRAMS, 1, 16)
    streamed = (1 if a is None else 2) + ((2 if a is None else 3) if kind["TOKENS"] else 0)
    _adaln_forward_kernel[(samples * count_chunks(tokens, rows, kind["LENGTHS"]),)](
        x, a, gate, shift, scale, x_out, y, None if rms else mean, rstd, tokens, rows, *x.stride()[:2],
        *((0, 0) if a is None else a.stride()[:2]), *_strides(gate), *_strides(shift), *_strides(scale),
        **kind, EPS=eps, GATED=a is not None, RMS=rms, **row_config(width, streamed, x.dtype),
    )  # fmt: skip
    return x_out, y, mean, rstd


def _backward(
    dx_out: Tensor | None, dy: Tensor, x: Tensor, a: Tensor | None, gate: Tensor | None, scale: Tensor,
    mean: Tensor, rstd: Tensor, a_bias: Tensor | None, lengths: Lengths, rms: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Launches the backward with or without the gated residual: dx, da or None, slab [dgate,] dshift, dscale, and
    da_bias."""
    samples, tokens, width = x.shape
    dy, x, scale, mean, rstd = by_row(dy), by_row(x), by_row(scale), mean.contiguous(), rstd.contiguous()
    if dx_out is not None and a is not None and gate is not None:
        dx_out, a, gate = by_row(dx_out), by_row(a), by_row(gate)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    da = None if a is None else torch.empty_like(a, memory_format=torch.contiguous_format)
    kind, rows = _kind(scale, lengths), cut_tokens(samples, tokens, BACKWARD_PROGRAMS, 8, 128)
    chunks = count_chunks(tokens, rows, kind["LENGTHS"])
    sums, streamed = (2, 2) if a is None else (3, 4)
    dmod = scale.new_empty((samples, tokens, sums * width)) if kind["TOKENS"] else None
    config = row_config(width, streamed if dmod is None else streamed + sums - 1, x.dtype)
    if a_bias is not None and config["num_warps"] < 4:
        config = {**config, "maxnreg": REGISTERS}  # unbounded, 768 channels take 211 on sm_80
    columns = ((sums if dmod is None else 0) + (0 if a_bias is None else 1)) * width
    partial = x.new_empty((samples, chunks, columns), dtype=torch.float32)
    _adaln_backward_kernel[(samples * chunks,)](
        dx_out, dy, x, a, gate, scale, None if rms else mean, rstd, dx, da, dmod, partial, tokens, rows,
        *((0, 0) if dx_out is None else dx_out.stride()[:2]), *dy.stride()[:2], *x.stride()[:2],
        *((0, 0) if a is None else a.stride()[:2]), *_strides(gate), *_strides(scale),
        **kind, GATED=a is not None, BIAS=a_bias is not None, RMS=rms, **config,
    )  # fmt: skip
    if dmod is not None:
        return dx, da, dmod, add_partials(partial, 0, scale.dtype, a_bias)[1]
    return dx, da, *add_partials(partial, sums * width, scale.dtype, a_bias, kind["LENGTHS"], rows)


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, lengths: Lengths = None, rms: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """y = norm(x)·(1 + scale) + shift; returns y in x's dtype, mean, of RMSNorm (0,), and rstd."""
    _, y, mean, rstd = _forward(x, None, None, shift, scale, eps, lengths, rms)
    return y, mean, rstd


def norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, lengths: Lengths = None, rms: bool = False
) -> tuple[Tensor, Tensor]:
    """dx in x's dtype, and the slab (B, 2D) = [dshift, dscale] in scale's dtype; (B, G or N, 2D) where scale is."""
    dx, _, slab, _ = _backward(None, dy, x, None, None, scale, mean, rstd, None, lengths, rms)
    return dx, slab


def gate_residual_norm_modulate(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float,
    a_bias: Tensor | None = None, lengths: Lengths = None, rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x' = x + gate·a and y = norm(x')·(1 + scale) + shift; returns x', y (both in x's dtype), mean, of RMSNorm (0,),
    and rstd of x'."""
    x_out, y, mean, rstd = _forward(x, a, gate, shift, scale, eps, lengths, rms)
    assert x_out is not None
    return x_out, y, mean, rstd


def gate_residual_norm_modulate_backward(
    dx_out: Tensor, dy: Tensor, x_out: Tensor, a: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    a_bias: Tensor | None = None, lengths: Lengths = None, rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx in x's dtype, da in a's, the slab (B, 3D) = [dgate, dshift, dscale] in scale's dtype, or (B, G or N, 3D) where
    scale is, and da_bias (D,), which is empty without a_bias."""
    dx, da, slab, da_bias = _backward(dx_out, dy, x_out, a, gate, scale, mean, rstd, a_bias, lengths, rms)
    assert da is not None
    return dx, da, slab, da_bias


def gate_residual(x: Tensor, a: Tensor, gate: Tensor, lengths: Lengths = None) -> Tensor:
    """x' = x + gate·a in x's dtype."""
    samples, tokens, width = x.shape
    x, a, gate = by_row(x), by_row(a), by_row(gate)
    x_out = torch.empty_like(x, memory_format=torch.contiguous_format)
    kind, rows = _kind(gate, lengths), cut_tokens(samples, tokens, FORWARD_PROGRAMS, 1, 16)
    _adaln_gate_forward_kernel[(samples * count_chunks(tokens, rows, kind["LENGTHS"]),)](
        x, a, gate, x_out, tokens, rows, *x.stride()[:2], *a.stride()[:2], *_strides(gate),
        **kind, **row_config(width, 3 if kind["TOKENS"] else 2, x.dtype),
    )  # fmt: skip
    return x_out


def gate_residual_backward(dx_out: Tensor, a: Tensor, gate: Tensor, lengths: Lengths = None) -> tuple[Tensor, Tensor]:
    """da in a's dtype and dgate in gate's dtype and shape; dx is dx_out itself."""
    samples, tokens, width = a.shape
    dx_out, a, gate = by_row(dx_out), by_row(a), by_row(gate)
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    kind, rows = _kind(gate, lengths), cut_tokens(samples, tokens, BACKWARD_PROGRAMS, 8, 128)
    chunks, config = count_chunks(tokens, rows, kind["LENGTHS"]), row_config(width, 3 if kind["TOKENS"] else 2, a.dtype)
    strides = *dx_out.stride()[:2], *a.stride()[:2], *_strides(gate)
    if kind["TOKENS"]:
        dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _adaln_gate_backward_kernel[(samples * chunks,)](
            dx_out, a, gate, da, dgate, None, tokens, rows, *strides, **kind, **config
        )
        return da, dgate
    partial = a.new_empty((samples, chunks, width), dtype=torch.float32)
    _adaln_gate_backward_kernel[(samples * chunks,)](
        dx_out, a, gate, da, None, partial, tokens, rows, *strides, **kind, **config
    )
    return da, add_partials(partial, width, gate.dtype, None, kind["LENGTHS"], rows)[0]


WIDTHS = (384, 768, 1024, 1152)
CEILINGS = {
    "forward": 80, "plain_forward": 64, "backward": REGISTERS, "bias_backward": REGISTERS, "plain_backward": 128,
    "rms_forward": 80, "rms_plain_forward": 64, "rms_backward": REGISTERS, "rms_bias_backward": REGISTERS,
    "rms_plain_backward": 128, "gate_forward": 64, "gate_backward": 64, "add_partials": 48, "runs_forward": 80,
    "runs_backward": REGISTERS, "runs_gate_backward": 64, "tokens_forward": 80, "tokens_backward": REGISTERS,
    "tokens_bias_backward": REGISTERS, "tokens_gate_backward": 64,
}  # fmt: skip
"""What `resources.py` compiles: widths, and the most registers a thread may take in each kernel."""


def resource_calls(meta: Callable[..., Tensor], width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """At the shapes of training: 256 tokens, a batch of 256, modulation as views of one (B, 6D) tensor; and of every
    one of two runs, and of every token."""
    x, statistic = meta(256, 256, width), meta(256, 256, dtype=torch.float32)
    gate, shift, scale = meta(256, 6 * width).chunk(6, 1)[2:5]
    bias, none, backward = meta(width), meta(0, dtype=torch.float32), gate_residual_norm_modulate_backward
    for name, mean, rms in (("", statistic, False), ("rms_", none, True)):
        both = functools.partial(gate_residual_norm_modulate, x, x, gate, shift, scale, 1e-6, rms=rms)
        yield f"{name}forward", both
        yield f"{name}plain_forward", functools.partial(norm_modulate, x, shift, scale, 1e-6, rms=rms)
        down = functools.partial(backward, x, x, x, x, gate, scale, mean, statistic, rms=rms)
        yield f"{name}backward", down
        yield f"{name}bias_backward", functools.partial(down, bias)
        yield f"{name}plain_backward", functools.partial(norm_modulate_backward, x, x, scale, mean, statistic, rms=rms)
    yield "gate_forward", lambda: gate_residual(x, x, gate)
    yield "gate_backward", lambda: gate_residual_backward(x, x, gate)
    for name, lengths, vectors in (("runs", (64, 192), 2), ("tokens", None, 256)):
        gates, shifts, scales = meta(256, vectors, 6 * width).chunk(6, 2)[2:5]
        both = functools.partial(gate_residual_norm_modulate, x, x, gates, shifts, scales, 1e-6, lengths=lengths)
        yield f"{name}_forward", both
        down = functools.partial(backward, x, x, x, x, gates, scales, statistic, statistic, lengths=lengths)
        yield f"{name}_backward", down
        yield f"{name}_gate_backward", functools.partial(gate_residual_backward, x, x, gates, lengths)
    yield "tokens_bias_backward", functools.partial(down, bias)
