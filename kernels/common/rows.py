"""Rows of channels in Triton: how the kernels that work on (B, N, D) load, store and sum them, and cut up the tokens.

A row of D channels is held in registers as two blocks, a power of two and the rest (1152 = 1024 + 128), instead of
being padded to the next power of two. One program owns a chunk of one sample's tokens. How tokens are cut into chunks
depends on the shape alone, so results do not depend on the device's size. Needs torch and Triton only.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_row(ptr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The row at ptr in float32: channels [0, MAIN), and [MAIN, D) padded with zeros to TAIL lanes (0.0 if none)."""
    main = tl.load(ptr + tl.arange(0, MAIN)).to(tl.float32)
    if TAIL == 0:
        return main, tl.full((), 0.0, tl.float32)
    else:
        at = MAIN + tl.arange(0, TAIL)
        return main, tl.load(ptr + at, mask=at < D, other=0.0).to(tl.float32)


@triton.jit
def store_row(ptr, main, tail, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Writes a row, in the pointer's dtype."""
    tl.store(ptr + tl.arange(0, MAIN), main)
    if TAIL != 0:
        at = MAIN + tl.arange(0, TAIL)
        tl.store(ptr + at, tail, mask=at < D)


@triton.jit
def zero_row(MAIN: tl.constexpr, TAIL: tl.constexpr):
    if TAIL == 0:
        return tl.zeros((MAIN,), tl.float32), tl.full((), 0.0, tl.float32)
    else:
        return tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL,), tl.float32)


@triton.jit
def row_sum(main, tail, TAIL: tl.constexpr):
    if TAIL == 0:
        return tl.sum(main)
    else:
        return tl.sum(main) + tl.sum(tail)


@triton.jit
def load_vector(ptr, sample, b, at, n, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The row that run or token `at` of a sample has, in float32; n is None where a sample has one alone."""
    if n is None:
        return load_row(ptr + sample * b, D, MAIN, TAIL)
    else:
        return load_row(ptr + sample * b + at * n, D, MAIN, TAIL)


@triton.jit
def centred(main, tail, mean, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """x − mean, with the padding lanes left at zero."""
    if TAIL == 0:
        return main - mean, tail
    else:
        return main - mean, tl.where(MAIN + tl.arange(0, TAIL) < D, tail - mean, 0.0)


@triton.jit
def column_sums(ptr, rows, pitch, at, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums of the columns `at` (COLUMNS,) over `rows` rows of float32 at ptr, `pitch` apart; 0 beyond `columns`.

    ROWS rows are read at a time, each place of the block is summed on its own, and these sums are added at the end:
    the order depends on the sizes alone.
    """
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & (at < columns)[None, :]
        total += tl.load(ptr + row[:, None] * pitch + at[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def token_chunk(N, rows):
    """This program's sample and tokens [first, last), in int64 as every offset is. The grid is B · cdiv(N, rows)."""
    chunks = tl.cdiv(N, rows)
    first = (tl.program_id(0) % chunks).to(tl.int64) * rows
    return (tl.program_id(0) // chunks).to(tl.int64), first, tl.minimum(first + rows, N)


@triton.jit
def run_chunk(N, rows, LENGTHS: tl.constexpr):
    """As `token_chunk` where a sample is runs of LENGTHS tokens, of one of which a chunk is: the sample, the run, and
    its tokens [first, last). The grid is B · `count_chunks`. None: one run."""
    if LENGTHS is None:
        sample, first, last = token_chunk(N, rows)
        return sample, 0, first, last
    else:
        chunks = run_start(len(LENGTHS), rows, LENGTHS)
        chunk = tl.program_id(0) % chunks
        run, earlier, begin, end = 0, 0, 0, 0
        start, passed = 0, 0
        for number in tl.static_range(len(LENGTHS)):
            here = chunk >= passed  # in this run or a later one, which overwrites it
            run, earlier = tl.where(here, number, run), tl.where(here, passed, earlier)
            begin, end = tl.where(here, start, begin), tl.where(here, start + LENGTHS[number], end)
            start += LENGTHS[number]
            passed += tl.cdiv(LENGTHS[number], rows)
        first = begin + (chunk - earlier).to(tl.int64) * rows
        return (tl.program_id(0) // chunks).to(tl.int64), run, first, tl.minimum(first + rows, end)


@triton.jit
def run_start(run, rows, LENGTHS: tl.constexpr):
    """The number of chunks in the runs before one."""
    chunks = 0
    for number in tl.static_range(len(LENGTHS)):
        chunks += tl.where(number < run, tl.cdiv(LENGTHS[number], rows), 0)
    return chunks


def by_row(x: Tensor) -> Tensor:
    """x with a contiguous last axis; the other axes may keep any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def cdiv(n: int, by: int) -> int:
    """n / by rounded up. Triton's own, which also takes constants of kernels, costs the host many times as much."""
    return -(-n // by)


@cache
def cut_tokens(samples: int, tokens: int, programs: int, least: int, most: int) -> int:
    """Tokens a program handles: the largest power of two in least..most that leaves `programs` programs, else least."""
    fit = max(samples * tokens // programs, 1)
    return min(max(1 << (fit.bit_length() - 1), least), most)


@cache
def count_chunks(tokens: int, rows: int, lengths: tuple[int, ...] | None) -> int:
    """Chunks of a sample: the programs that `run_chunk` needs for it."""
    return sum(cdiv(length, rows) for length in lengths or (tokens,))


@cache
def row_config(width: int, streamed: int, dtype: torch.dtype) -> dict[str, int]:
    """How a row of `width` channels is cut, its warps, and its loop's stages if it reads `streamed` rows at once.

    Eight main channels a thread are one 16-byte load of bfloat16. The tail gets at least two lanes a thread: four
    bytes are the least that can be copied to shared memory asynchronously. The pipeline stays within 48 KB. The
    result is kept for the next call: not to be written to.
    """
    main = 1 << (width.bit_length() - 1)
    warps = min(max(main // 256, 1), 16)
    tail = max(triton.next_power_of_2(width - main), 64 * warps) if width > main else 0
    stage = streamed * (main + tail) * dtype.itemsize
    return {"D": width, "MAIN": main, "TAIL": tail, "STAGES": 1 + min(2, 49152 // stage), "num_warps": warps}
