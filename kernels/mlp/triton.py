"""GELU's tanh form (arXiv 1606.08415) and SwiGLU (arXiv 2002.05202) in Triton, forward and backward, with the gradient
of the bias before them.

    gelu_tanh    y = x·σ(2u)        u = √(2/π)·(x + 0.044715x³)        σ(2u) = ½(1 + tanh u)
    swiglu       y = silu(g)·v      silu(g) = g·σ(g)                   a row of h is F gates g, then F values v

The public functions take and return tensors and know nothing of dispatch or autograd; `../common/rows.py` is all they
need. float32, bfloat16 or float16, mixed freely; arithmetic is float32.

How it works. A backward pass walks down the rows of a block of columns, so that it can add up the gradient of each
column in float32 registers; it writes one partial sum a chunk of rows, and a second kernel adds them in a fixed order.
How rows are cut into chunks depends on the shape alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launched
from ..common.rows import cdiv, column_sums, cut_tokens

PROGRAMS = 1024
"""Programs that a backward launch aims at: about two waves on an H200."""
FORWARD_BLOCK, COLUMNS, ROWS = 4096, 512, 4
"""Elements of a forward program; columns of a backward program, and rows that it reads at a time."""
HALF = 256
"""As COLUMNS, of each half of SwiGLU's h: its sums are twice as many, and more columns would spill registers."""


@triton.jit
def _within_ten(x):
    """x, cut to ±10: beyond, GELU is x or 0 to the last bit, and the exponential would leave float32."""
    x = tl.where(x > 10.0, 10.0, x)  # keeps NaN, as tl.clamp does not
    return tl.where(x < -10.0, -10.0, x)


@triton.jit
def _gelu(x):
    """x·σ(2u), float32; −0 below −10."""
    v = _within_ten(x)
    y = x / (1.0 + tl.exp(-1.5957691216057308 * v * (1.0 + 0.044715 * v * v)))
    return tl.where(x < -10.0, x * 0.0, y)


@triton.jit
def _slope(x):
    """Its derivative σ(2u) + 2u'·x·σ(2u)·(1 − σ(2u)), float32."""
    v = _within_ten(x)
    exponential = tl.exp(-1.5957691216057308 * v * (1.0 + 0.044715 * v * v))
    sigma = 1.0 / (1.0 + exponential)
    return sigma + v * (1.5957691216057308 * (1.0 + 0.134145 * v * v)) * (exponential * sigma) * sigma  # e·σ = 1 − σ


@launched
@triton.jit
def _gelu_forward_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """x → y, contiguous."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, _gelu(x), mask=at < count)


@launched
@triton.jit
def _gelu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, partial_ptr, rows, columns, chunk,
    SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dy, x → dx, all (rows, columns), and, if SUMS, each chunk's sums of its columns: partial (chunks, columns)."""
    blocks = tl.cdiv(columns, COLUMNS)
    number = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    first = number * chunk
    last = tl.minimum(first + chunk, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in tl.range(first, last, ROWS, num_stages=3):
        down = row + tl.arange(0, ROWS)
        mask = (down < last)[:, None] & (at < columns)[None, :]
        place = down[:, None] * columns + at[None, :]
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dx = dy * _slope(x)
        tl.store(dx_ptr + place, dx, mask=mask)
        if SUMS:
            total += dx
    if SUMS:
        tl.store(partial_ptr + number * columns + at, tl.sum(total, 0), mask=at < columns)


@launched
@triton.jit
def _bias_add_kernel(partial_ptr, bias_ptr, chunks, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partial (chunks, columns) float32 → the bias's gradient (columns,)."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = column_sums(partial_ptr, chunks, columns, at, columns, ROWS, COLUMNS)
    tl.store(bias_ptr + at, total, mask=at < columns)


@triton.jit
def _sigmoid(g):
    """g cut to ±87, σ(g) and 1 − σ(g), float32: beyond, silu is g or 0 to the last bit, and e⁻ᵍ leaves float32."""
    v = tl.where(g > 87.0, 87.0, g)  # keeps NaN, as tl.clamp does not
    v = tl.where(v < -87.0, -87.0, v)
    exponential = tl.exp(-v)
    sigma = 1.0 / (1.0 + exponential)
    return v, sigma, exponential * sigma


@launched
@triton.jit
def _swiglu_forward_kernel(
    h_ptr, y_ptr, rows, units, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """h (rows, 2F) → y (rows, F), F = units·UNIT."""
    columns = units * UNIT
    blocks = tl.cdiv(columns, COLUMNS)
    down = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (down < rows)[:, None] & (at < columns)[None, :]
    place = down[:, None] * (2 * columns) + at[None, :]
    gate = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(h_ptr + columns + place, mask=mask, other=0.0).to(tl.float32)
    _, sigma, _ = _sigmoid(gate)
    silu = tl.where(gate < -87.0, gate * 0.0, gate * sigma)
    tl.store(y_ptr + down[:, None] * columns + at[None, :], silu * value, mask=mask)


@launched
@triton.jit
def _swiglu_backward_kernel(
    dy_ptr, h_ptr, dh_ptr, partial_ptr, rows, units, chunk,
    SUMS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dy (rows, F), h → dh (rows, 2F), and, if SUMS, each chunk's sums of its columns: partial (chunks, 2F)."""
    columns = units * UNIT
    blocks = tl.cdiv(columns, COLUMNS)
    number = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    first = number * chunk
    last = tl.minimum(first + chunk, rows)
    of_gate, of_value = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in tl.range(first, last, ROWS, num_stages=3):
        down = row + tl.arange(0, ROWS)
        mask = (down < last)[:, None] & (at < columns)[None, :]
        place = down[:, None] * (2 * columns) + at[None, :]
        dy = tl.load(dy_ptr + down[:, None] * columns + at[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(h_ptr + columns + place, mask=mask, other=0.0).to(tl.float32)
        v, sigma, rest = _sigmoid(gate)
        dgate = dy * value * (sigma + v * rest * sigma)
        dvalue = dy * tl.where(gate < -87.0, gate * 0.0, gate * sigma)
        tl.store(dh_ptr + place, dgate, mask=mask)
        tl.store(dh_ptr + columns + place, dvalue, mask=mask)
        if SUMS:
            of_gate += dgate
            of_value += dvalue
    if SUMS:
        start = number * (2 * columns)
        tl.store(partial_ptr + start + at, tl.sum(of_gate, 0), mask=at < columns)
        tl.store(partial_ptr + start + columns + at, tl.sum(of_value, 0), mask=at < columns)


def gelu_tanh(x: Tensor, x_bias: Tensor | None = None) -> Tensor:
    """GELU in x's dtype, contiguous."""
    x = x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _gelu_forward_kernel[(cdiv(x.numel(), FORWARD_BLOCK),)](x, y, x.numel(), BLOCK=FORWARD_BLOCK, num_warps=4)
    return y


def gelu_tanh_backward(dy: Tensor, x: Tensor, x_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dx in x's dtype, and dx_bias, the sum of dx over all axes but the last; it is empty without x_bias."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = x.shape[-1] if x.dim() else 1
    rows = x.numel() // max(columns, 1)
    blocks = cdiv(columns, COLUMNS)
    chunk = cut_tokens(1, rows, max(PROGRAMS // max(blocks, 1), 1), ROWS, 4096)
    chunks = cdiv(rows, chunk)
    partial = None if x_bias is None else x.new_empty((chunks, columns), dtype=torch.float32)
    _gelu_backward_kernel[(chunks * blocks,)](
        dy, x, dx, partial, rows, columns, chunk, SUMS=x_bias is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
    return dx, _bias_gradient(partial, x_bias, x.device)


def swiglu(h: Tensor, h_bias: Tensor | None = None) -> Tensor:
    """silu(gate)·value (…, F) in h's dtype, contiguous."""
    h = h.contiguous()
    rows, columns, unit = _halves(h)
    y = torch.empty((*h.shape[:-1], columns), dtype=h.dtype, device=h.device)
    grid = (cdiv(rows, ROWS) * cdiv(columns, HALF),)
    _swiglu_forward_kernel[grid](h, y, rows, columns // unit, UNIT=unit, ROWS=ROWS, COLUMNS=HALF, num_warps=4)
    return y


def swiglu_backward(dy: Tensor, h: Tensor, h_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dh (…, 2F) in h's dtype, and dh_bias, the sum of dh over all axes but the last; it is empty without h_bias."""
    dy, h = dy.contiguous(), h.contiguous()
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    rows, columns, unit = _halves(h)
    blocks = cdiv(columns, HALF)
    chunk = cut_tokens(1, rows, max(PROGRAMS // blocks, 1), ROWS, 4096)
    chunks = cdiv(rows, chunk)
    partial = None if h_bias is None else h.new_empty((chunks, 2 * columns), dtype=torch.float32)
    _swiglu_backward_kernel[(chunks * blocks,)](
        dy, h, dh, partial, rows, columns // unit, chunk,
        SUMS=h_bias is not None, UNIT=unit, ROWS=ROWS, COLUMNS=HALF, num_warps=4,
    )  # fmt: skip
    return dh, _bias_gradient(partial, h_bias, h.device)


def _halves(h: Tensor) -> tuple[int, int, int]:
    """Rows of h (…, 2F), F, and a power of two up to 16 that divides F, which decides how wide loads may be."""
    columns = h.shape[-1] // 2
    return h.numel() // (2 * columns), columns, min(columns & -columns, 16)


def _bias_gradient(partial: Tensor | None, bias: Tensor | None, device: torch.device) -> Tensor:
    """The sums of partial's columns (chunks, D) float32, in the dtype of the bias (D,); empty without a bias."""
    if bias is None or partial is None:
        return torch.empty(0, dtype=torch.float32, device=device)
    gradient, (chunks, columns) = torch.empty_like(bias), partial.shape
    _bias_add_kernel[(cdiv(columns, 16),)](partial, gradient, chunks, columns, ROWS=128, COLUMNS=16, num_warps=4)
    return gradient


WIDTHS = (384, 768, 1024, 1152)
CEILINGS = {
    "gelu_forward": 64, "gelu_backward": 64, "gelu_bias_backward": 64, "bias_add": 48,
    "swiglu_forward": 64, "swiglu_backward": 64, "swiglu_bias_backward": 80,
}  # fmt: skip
"""What `resources.py` compiles: widths of a model, and the most registers a thread may take in each kernel."""


def resource_calls(meta: Callable[..., Tensor], width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """At the shapes of training: 256 tokens, a batch of 256, four times the model's channels; in SwiGLU ⅔ of that, cut
    to a multiple of 16 (of a width of 1024 LightningDiT takes 2730, whose rows nothing can load 16 bytes wide)."""
    x, bias = meta(256, 256, 4 * width), meta(4 * width)
    yield "gelu_forward", lambda: gelu_tanh(x)
    yield "gelu_backward", lambda: gelu_tanh_backward(x, x)
    yield "gelu_bias_backward", lambda: gelu_tanh_backward(x, x, bias)
    hidden = 8 * width // 48 * 16
    h, dy, h_bias = meta(256, 256, 2 * hidden), meta(256, 256, hidden), meta(2 * hidden)
    yield "swiglu_forward", lambda: swiglu(h)
    yield "swiglu_backward", lambda: swiglu_backward(dy, h)
    yield "swiglu_bias_backward", lambda: swiglu_backward(dy, h, h_bias)
