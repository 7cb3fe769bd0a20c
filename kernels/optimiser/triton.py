"""AdamW, EMA, clipping and low-precision copies in one pass over memory, for whole lists of tensors, in Triton.

The CUDA kernel of csrc comes first where it is built; this one serves CUDA machines without a compiler. Needs torch and
Triton only.

One launch serves all tensors of one (gradient dtype, copy dtype): the kernel reads their addresses from a table on the
device. The table is kept while addresses stay as they are. Nothing waits for the device: the step's scalars are
computed there, in float64, and a gradient norm that is not finite makes every program leave its memory untouched.
Elementwise arithmetic and chunks of fixed size make the result independent of how tensors are grouped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launched

CHUNK = 16384
"""Elements a program handles, and the piece of a tensor whose squares are summed together."""

TABLES_KEPT = 16

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_tables: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()
_captured: list[tuple[Tensor, Tensor]] = []
"""Tables that a captured graph reads; they stay as long as the process, since graphs do not say when they go."""


@triton.jit
def _address(table_ptr, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of a tensor's table row, as a pointer."""
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _chunk(table_ptr, chunks_ptr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's table row, and its elements [first, last); `whole` is last rounded down to a multiple of 8.

    Chunk row: tensor, first element. Only up to `whole` does the compiler know that masks do not cut a 16-byte access.
    """
    row = table_ptr + tl.load(chunks_ptr + 2 * tl.program_id(0)) * COLUMNS
    first = tl.multiple_of(tl.load(chunks_ptr + 2 * tl.program_id(0) + 1), CHUNK)
    last = tl.minimum(first + CHUNK, tl.load(row + (COLUMNS - 1)))
    return row, first, last, last // 8 * 8


@launched
@triton.jit
def _grad_norm_kernel(
    table_ptr, chunks_ptr, out_ptr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of squares of each chunk. Table row: address, elements."""
    row, first, last, whole = _chunk(table_ptr, chunks_ptr, 2, CHUNK)
    grad = _address(row, 0, GRAD, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        g = tl.load(grad + at, mask=at < whole, other=0.0).to(tl.float32)
        total += g * g
    at = whole + tl.arange(0, 8)
    g = tl.load(grad + at, mask=at < last, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total) + tl.sum(g * g))


@triton.jit
def _step(
    row, at, inside, scalars_ptr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    GRAD: tl.constexpr, EMA: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of elements. Table row: addresses of p, g, m, v, ema, copy; then elements. Scalars: see `_scalars`."""
    p_ptr = _address(row, 0, tl.float32, ALIGNED) + at
    m_ptr = _address(row, 2, tl.float32, ALIGNED) + at
    v_ptr = _address(row, 3, tl.float32, ALIGNED) + at
    p = tl.load(p_ptr, mask=inside) * tl.load(scalars_ptr + 2)
    g = tl.load(_address(row, 1, GRAD, ALIGNED) + at, mask=inside).to(tl.float32) * tl.load(scalars_ptr + 1)
    m = tl.load(m_ptr, mask=inside)
    v = tl.load(v_ptr, mask=inside)
    m += (1 - BETA1) * (g - m)
    v = v * BETA2 + (1 - BETA2) * (g * g)
    p -= tl.load(scalars_ptr + 3) * (m / (tl.sqrt(v) / tl.load(scalars_ptr + 4) + EPS))
    tl.store(p_ptr, p, mask=inside)
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)
    if EMA:
        ema_ptr = _address(row, 4, tl.float32, ALIGNED) + at
        ema = tl.load(ema_ptr, mask=inside)
        tl.store(ema_ptr, ema + tl.load(scalars_ptr + 5) * (p - ema), mask=inside)
    if COPY is not None:
        tl.store(_address(row, 5, COPY, ALIGNED) + at, p, mask=inside)


@launched
@triton.jit
def _adamw_kernel(
    table_ptr, chunks_ptr, scalars_ptr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    GRAD: tl.constexpr, EMA: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW, EMA and copy for one chunk; nothing is touched unless the first scalar says so."""
    if tl.load(scalars_ptr) != 0:
        row, first, last, whole = _chunk(table_ptr, chunks_ptr, 7, CHUNK)
        for start in range(0, CHUNK, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            _step(row, at, at < whole, scalars_ptr, BETA1, BETA2, EPS, GRAD, EMA, COPY, ALIGNED)
        at = whole + tl.arange(0, 8)
        _step(row, at, at < last, scalars_ptr, BETA1, BETA2, EPS, GRAD, EMA, COPY, ALIGNED)


def _upload(rows: list[list[int]], device: torch.device) -> Tensor:
    host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _table(columns: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, bool]:
    """Addresses by tensor, (tensor, first element) by chunk, both int64 on the device; whether all are 16-byte aligned.

    `columns` are parallel lists; an empty one leaves zeros. The last column of the table is the number of elements.
    Raises RuntimeError if a CUDA graph is being captured and a table for these addresses is not there yet.
    """
    lead = columns[0]
    device = lead[0].device
    rows = [
        [*(column[i].data_ptr() if column else 0 for column in columns), tensor.numel()]
        for i, tensor in enumerate(lead)
    ]
    key = (device, *map(tuple, rows))
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in _tables:
        if capturing:
            raise RuntimeError(
                "adamw: tensors at new addresses while a CUDA graph is captured; run the step once before, and keep the"
                " gradients' memory (zero_grad(set_to_none=False))"
            )
        chunks = [[i, first] for i, tensor in enumerate(lead) for first in range(0, tensor.numel(), CHUNK)]
        _tables[key] = _upload(rows, device), _upload(chunks, device)
    if capturing:
        _captured.append(_tables[key])
    _tables.move_to_end(key)
    while len(_tables) > TABLES_KEPT:
        _tables.popitem(last=False)
    return *_tables[key], all(address % 16 == 0 for row in rows for address in row[:-1])


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """√ Σ g², 0-dim float32; chunks' sums are added in float64 in ascending order, so tensors may come in any."""
    partial = []
    for dtype in dict.fromkeys(g.dtype for g in grads):
        group = [g.contiguous() for g in grads if g.dtype == dtype]
        table, chunks, aligned = _table([group])
        sums = torch.empty((len(chunks),), dtype=torch.float32, device=table.device)
        _grad_norm_kernel[(len(chunks),)](
            table, chunks, sums, GRAD=TRITON_DTYPES[dtype], ALIGNED=aligned, CHUNK=CHUNK, BLOCK=1024, num_warps=4
        )
        partial.append(sums)
    return torch.cat(partial).sort().values.double().cumsum(0)[-1].sqrt().float()


def _scalars(
    step: Tensor, grad_norm: Tensor, lr: Tensor, beta1: float, beta2: float, weight_decay: float, ema_decay: float,
    max_norm: float, ema_warmup: bool,
) -> Tensor:  # fmt: skip
    """float32 (6,): whether to step, clip factor, 1 − lr·wd, lr/(1 − β₁ᵗ), √(1 − β₂ᵗ), 1 − the average's decay."""
    t, rate, norm = step.double() + 1, lr.double(), grad_norm.double()
    clip = (max_norm / (norm + 1e-6)).clamp_max(1.0) if max_norm > 0 else torch.ones_like(norm)
    blend = (9 / (9 + t)).clamp_min(1 - ema_decay) if ema_warmup else torch.full_like(norm, 1 - ema_decay)
    values = [torch.isfinite(norm).double(), clip, 1 - rate * weight_decay, rate / (1 - beta1**t),
              (1 - beta2**t).sqrt(), blend]  # fmt: skip
    return torch.stack(values).float()


def adamw_ema_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor], copies: Sequence[Tensor], step: Tensor, grad_norm: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, ema_decay: float, max_norm: float,
    ema_warmup: bool = False,
) -> None:  # fmt: skip
    """One step in place, as `definition.py` has it; written tensors contiguous, gradients any strides."""
    scalars = _scalars(step, grad_norm, lr, beta1, beta2, weight_decay, ema_decay, max_norm, ema_warmup)
    groups: dict[tuple[torch.dtype, torch.dtype | None], list[int]] = {}
    for i, g in enumerate(grads):
        groups.setdefault((g.dtype, copies[i].dtype if copies else None), []).append(i)
    for (grad_dtype, copy_dtype), members in groups.items():
        lists = [
            [tensors[i] for i in members] if tensors else []
            for tensors in (params, [g.contiguous() for g in grads], exp_avgs, exp_avg_sqs, emas, copies)
        ]
        table, chunks, aligned = _table(lists)
        _adamw_kernel[(len(chunks),)](
            table, chunks, scalars, BETA1=beta1, BETA2=beta2, EPS=eps, GRAD=TRITON_DTYPES[grad_dtype],
            EMA=bool(emas), COPY=None if copy_dtype is None else TRITON_DTYPES[copy_dtype], ALIGNED=aligned,
            CHUNK=CHUNK, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    step.add_(scalars[0].to(step.dtype))


WIDTHS = (0,)
CEILINGS = {"grad_norm": 32, "step": 80}
"""What `resources.py` compiles, which does not depend on a width, and the most registers a thread may take."""


def resource_calls(meta: Callable[..., Tensor], width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """float32 state with bfloat16 gradients and copies."""
    p, low, scalar = [meta(1 << 20, dtype=torch.float32)], [meta(1 << 20)], meta(dtype=torch.float32)
    yield "grad_norm", lambda: grad_norm(low)
    yield "step", lambda: adamw_ema_(p, p, p, p, p, low, scalar, scalar, scalar, 0.9, 0.999, 1e-8, 0.0, 0.9999, 1.0)
