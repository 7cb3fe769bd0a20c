"""What gelu_mlp asks of cuBLASLt, recorded by the stand-in; and what cuBLASLt would do with it, in NumPy.

`carry_out` is a model of cublasLtMatmul as its manual describes it: element (i, j) of a matrix lies at i + j·ld. It
reads and writes the very addresses that were handed over, which on the stand-in are the host's memory.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from st_fast import kernels
from st_fast.kernels.common.trial import Draw, Size
from tests.stand_in.driver import Counters

GELU_AUX_BIAS, DGELU_BGRAD, GELU_BIAS = 164, 208, 36  # CUBLASLT_EPILOGUE_*
BF16, FP16 = 14, 2  # CUDA_R_16BF, CUDA_R_16F
OURS = (GELU_AUX_BIAS, DGELU_BGRAD)
BATCH, TOKENS, WIDTH, HIDDEN, OUT = 3, 8, 16, 40, 24


class Recorder:
    """cuBLASLt on the stand-in."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.stand_in_recorded.restype = ctypes.c_char_p

    def during(self, call: Callable[[], Any]) -> tuple[Any, list[dict[str, Any]]]:
        """What the call returns, and all choices and products in it."""
        self._library.stand_in_record()
        result = call()
        return result, [json.loads(line) for line in self._library.stand_in_recorded().decode().splitlines()]

    def refuse(self, epilogue: int) -> None:
        self._library.stand_in_refuse(ctypes.c_longlong(epilogue))

    def want_workspace(self, size: int) -> None:
        self._library.stand_in_want_workspace(ctypes.c_longlong(size))


def ours(record: list[dict[str, Any]], what: str = "product") -> list[dict[str, Any]]:
    """The lines of csrc's products; PyTorch's have other epilogues."""
    return [line for line in record if line["what"] == what and line["epilogue"] in OURS]


def _memory(address: int, layout: dict[str, int]) -> NDArray[np.uint16]:
    """A view (rows, columns) of 16-bit numbers."""
    rows, columns, ld = layout["rows"], layout["columns"], layout["ld"]
    flat = np.frombuffer((ctypes.c_uint16 * (ld * (columns - 1) + rows)).from_address(address), np.uint16)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (2, 2 * ld))


def _read(address: int, layout: dict[str, int]) -> NDArray[np.float64]:
    bits = _memory(address, layout)
    if layout["type"] == FP16:
        return bits.copy().view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _write(address: int, layout: dict[str, int], values: NDArray[np.float64]) -> None:
    dtype = {BF16: torch.bfloat16, FP16: torch.float16}[layout["type"]]
    _memory(address, layout)[:] = torch.from_numpy(values).to(dtype).view(torch.uint16).numpy()


def carry_out(product: dict[str, Any]) -> None:
    """D ← epilogue(op(A)·op(B)), by the description alone."""
    a, b, c, d, _, _ = product["pointers"]
    assert product["alpha"] == 1 and product["beta"] == 0 and c == d and product["c"] == product["d"]
    left, right = _read(a, product["a"]), _read(b, product["b"])
    left, right = (left.T if product["trans_a"] else left), (right.T if product["trans_b"] else right)
    made, layout = left @ right, product["d"]
    assert made.shape == (layout["rows"], layout["columns"])
    vector = {"type": layout["type"], "rows": layout["rows"], "columns": 1, "ld": layout["rows"]}
    aux = {**layout, "ld": product["aux_ld"]}
    if product["epilogue"] == GELU_AUX_BIAS:
        made = made + _read(product["bias"], vector)
        _write(product["aux"], aux, made)
        _write(d, layout, torch.nn.functional.gelu(torch.from_numpy(made), approximate="tanh").numpy())
        return
    assert product["epilogue"] == DGELU_BGRAD
    before = torch.from_numpy(_read(product["aux"], aux))
    made = torch.ops.aten.gelu_backward(torch.from_numpy(made), before, approximate="tanh").numpy()
    _write(d, layout, made)
    _write(product["bias"], vector, made.sum(1, keepdims=True))


def _drawn(dtype: torch.dtype, hidden: int = HIDDEN) -> tuple[Tensor, ...]:
    """x, both layers, dy and h on the device, no two sizes equal."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCH, TOKENS, WIDTH), (hidden, WIDTH), (hidden,), (OUT, hidden), (OUT,), (BATCH, TOKENS, OUT),
              (BATCH, TOKENS, hidden))  # fmt: skip
    return tuple((torch.randn(shape, generator=generator) / 2).to(dtype).cuda() for shape in shapes)


def _off(found: Tensor, truth: Tensor) -> float:
    """The largest difference, in units of the truth's largest entry."""
    return float((found.cpu().double() - truth).abs().max() / truth.abs().max())


def emulated(dtype: str) -> dict[str, Any]:
    """How far what the descriptions mean is off from the definition, in float64, for each output."""
    recorder = Recorder()
    x, w1, b1, w2, b2, dy, h = _drawn(getattr(torch, dtype))
    (_, g_made, h_made), forward = recorder.during(lambda: kernels.ops.gelu_mlp(x, w1, b1, w2, b2))
    (dh, db1), backward = recorder.during(lambda: kernels.ops.gelu_mlp_backward(dy, w2, h))
    for product in ours(forward + backward):
        carry_out(product)
    doubled = [t.cpu().double() for t in (x, w1, b1, w2, b2, dy, h)]
    plain = torch.ops.st_fast_reference
    _, g_truth, h_truth = plain.gelu_mlp(*doubled[:5])
    dh_truth, db_truth = plain.gelu_mlp_backward(doubled[5], doubled[3], doubled[6])
    made = {"g": (g_made, g_truth), "h": (h_made, h_truth), "dh": (dh, dh_truth), "db": (db1, db_truth)}
    return {"off": {name: _off(*pair) for name, pair in made.items()}, "products": len(ours(forward + backward))}


def asked() -> dict[str, Any]:
    """What is asked for at XL/2 in one call with its gradient, then in a second one on another stream."""
    recorder, counters, device = Recorder(), Counters(), torch.device("cuda", 0)
    recorder.want_workspace(3000)
    op = kernels.declared("gelu_mlp")
    assert op.trial is not None
    inputs = op.trial(Draw(device, torch.bfloat16, 0), Size(2, 256, 1152, 16))

    def run() -> None:
        torch.autograd.grad((op.call(*inputs.args),), inputs.leaves, inputs.grads)

    _, first = recorder.during(run)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _, second = recorder.during(run)
    before = counters.read()
    _, frozen = recorder.during(lambda: torch.no_grad()(op.call)(*inputs.args))
    return {
        "choices": ours(first, "choice"),
        "products": ours(first),
        "asked_again": len(ours(second, "choice")),
        "streams": [product["pointers"][5] == stream.cuda_stream for product in ours(second)],
        "leaves": [leaf.data_ptr() for leaf in inputs.leaves],
        "frozen": [line["epilogue"] for line in frozen if line["what"] == "product"],
        "frozen_launches": counters.since(before)["launches"],
    }


def fallbacks() -> dict[str, Any]:
    """What is said and computed where cuBLASLt can't: no algorithm, odd sizes and addresses, a new shape in a graph."""
    recorder, said = Recorder(), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("st_fast").addHandler(handler)
    x, w1, b1, w2, b2, dy, h = _drawn(torch.bfloat16)
    counts = {}

    def forward(*arguments: Tensor) -> int:
        return len(ours(recorder.during(lambda: kernels.ops.gelu_mlp(*arguments))[1]))

    recorder.refuse(DGELU_BGRAD)
    for _ in range(2):  # said once
        _, record = recorder.during(lambda: kernels.ops.gelu_mlp_backward(dy, w2, h))
    counts["refused"], counts["asked_again"] = len(ours(record)), len(ours(record, "choice"))
    odd = _drawn(torch.bfloat16, hidden=36)
    counts["odd size"] = forward(*odd[:5])
    moved = torch.zeros(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape)
    counts["odd address"] = forward(moved, w1, b1, w2, b2)
    counts["float32"] = forward(*(t.float() for t in (x, w1, b1, w2, b2)))
    counts["empty"] = forward(x[:0], w1, b1, w2, b2)
    graph, counters = torch.cuda.CUDAGraph(), Counters()
    with torch.cuda.graph(graph):
        counts["new in a graph"] = forward(x, w1, b1, w2, b2)
    counts["known"] = forward(x, w1, b1, w2, b2)
    graph, before = torch.cuda.CUDAGraph(), counters.read()
    with torch.cuda.graph(graph):
        counts["known in a graph"] = forward(x, w1, b1, w2, b2)
    counts["captured"] = counters.since(before)["captured"]
    return {"counts": counts, "said": said}
