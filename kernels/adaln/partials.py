"""Adds up the partial sums that the backward kernels of `triton.py` write, one a chunk of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launched
from ..common.plain import Lengths
from ..common.rows import cdiv, column_sums, run_start


@launched
@triton.jit
def _add_partials_kernel(
    partial_ptr, out_ptr, bias_ptr, samples, chunks, columns, width, rows,
    LENGTHS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial (B, chunks, columns [+ width]) float32 → out (B, [G,] columns): the sum over a run's chunks, in their
    order; and, if BIAS, the sum of the last `width` columns over all chunks and samples."""
    blocks = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    pitch = columns + width if BIAS else columns
    runs: tl.constexpr = 1 if LENGTHS is None else len(LENGTHS)
    if program < samples * runs * blocks:
        sum_of = (program // blocks).to(tl.int64)  # a run of a sample
        at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        if LENGTHS is None:
            first, count = sum_of * chunks, chunks
        else:
            run = sum_of % runs
            first = run_start(run, rows, LENGTHS)
            count = run_start(run + 1, rows, LENGTHS) - first
            first += sum_of // runs * chunks
        for chunk in range(count):
            total += tl.load(partial_ptr + (first + chunk) * pitch + at, mask=at < columns, other=0.0)
        tl.store(out_ptr + sum_of * columns + at, total, mask=at < columns)
    elif BIAS:
        channel = (program - samples * runs * blocks) * COLUMNS + tl.arange(0, COLUMNS)
        summed = column_sums(partial_ptr + columns, samples * chunks, pitch, channel, width, ROWS, COLUMNS)
        tl.store(bias_ptr + channel, summed, mask=channel < width)


def add_partials(
    partial: Tensor, columns: int, dtype: torch.dtype, bias: Tensor | None, lengths: Lengths = None, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """(B, chunks, columns [+ D]) float32 → the slab (B, [G,] columns) of the modulation's gradients, and the bias's
    (D,). lengths: of G runs, which were cut into chunks of `rows` tokens one by one.
    """
    samples, chunks, _ = partial.shape
    out = partial.new_empty((samples, *(() if lengths is None else (len(lengths),)), columns), dtype=dtype)
    summed = torch.empty(0, device=partial.device) if bias is None else torch.empty_like(bias)
    grid = samples * (1 if lengths is None else len(lengths)) * cdiv(columns, 512) + cdiv(summed.numel(), 16)
    if grid:
        _add_partials_kernel[(grid,)](
            partial, out, summed, samples, chunks, columns, summed.numel(), rows,
            LENGTHS=lengths, BIAS=bias is not None, BLOCK=512, ROWS=128, COLUMNS=16, num_warps=4,
        )  # fmt: skip
    return out, summed
