"""One call of every op, forward and backward, that runs on either implementation at any dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from st_fast import kernels

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """`call(module, leaves)` gives outputs; gradients flow to all leaves but those in `frozen`."""

    name: str
    leaves: Leaves  # float64
    call: Callable[[Any, Leaves], tuple[Tensor, ...]]
    frozen: tuple[str, ...] = ()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def modulated(
    batch: int, tokens: int | tuple[int, ...], width: int, per_token: bool = False, norm: str = "layer"
) -> list[Case]:
    """The adaLN ops: modulation cut from one (B, 6D) tensor, x a transposed view, a with a strided last axis.

    `tokens` may be the lengths of runs, each with a modulation of its own; `per_token`: one of every token. With
    another norm than "layer" those that have one.
    """
    lengths = None if isinstance(tokens, int) else tokens
    count = tokens if isinstance(tokens, int) else sum(tokens)
    vectors = (count,) if per_token else () if lengths is None else (len(lengths),)
    leaves = {
        "x": 2 * random(batch, width, count) + 1, "a": random(batch, count, 2 * width),
        "mod": random(batch, *vectors, 6 * width), "bias": random(width),
    }  # fmt: skip

    def parts(t: Leaves) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return t["x"].transpose(1, 2), t["a"][..., ::2], t["mod"].chunk(6, -1)

    chosen = {} if norm == "layer" else {"norm": norm}  # the default, too

    def normed(ops: Any, t: Leaves) -> tuple[Tensor, ...]:
        x, _, mod = parts(t)
        return (ops.norm_modulate(x, mod[1], mod[4], 1e-6, lengths, **chosen),)

    def gated(ops: Any, t: Leaves) -> tuple[Tensor, ...]:
        x, a, mod = parts(t)
        out: tuple[Tensor, ...] = ops.gate_residual_norm_modulate(
            x, a, mod[0], mod[2], mod[5], 1e-5, lengths=lengths, **chosen
        )
        return out

    def biased(ops: Any, t: Leaves) -> tuple[Tensor, ...]:
        x, a, mod = parts(t)
        out: tuple[Tensor, ...] = ops.gate_residual_norm_modulate(
            x, a, mod[0], mod[2], mod[5], 1e-5, t["bias"], lengths, **chosen
        )
        return out

    def residual(ops: Any, t: Leaves) -> tuple[Tensor, ...]:
        x, a, mod = parts(t)
        return (ops.gate_residual(x, a, mod[3], lengths),)

    runs = str(tokens) if lengths is None else f"({'+'.join(map(str, lengths))})"
    size = f"{batch}x{runs}x{width}" + ("-per-token" if per_token else "") + ("" if norm == "layer" else f"-{norm}")
    calls = {"norm_modulate": normed, "gate_residual_norm_modulate": gated,
             "gate_residual_norm_modulate-biased": biased}  # fmt: skip
    if norm == "layer":
        calls["gate_residual"] = residual
    return [Case(f"{name}-{size}", leaves, call) for name, call in calls.items()]


def features(batch: int, tokens: int, width: int) -> list[Case]:
    """align, and the guided loss in its three forms at three scales, with an index and without."""
    named = max(batch - 1, 1)
    q = random(batch, tokens, width)
    leaves = {
        "q": q, "f": random(batch, tokens, width) + 0.5 * q,  # alike, so that a loss is not the rest of a cancellation
        "null": random(batch, width, tokens), "w": random(batch).abs(),
    }  # fmt: skip
    frozen = ("f", "null", "w")

    def align(ops: Any, t: Leaves) -> tuple[Tensor, ...]:
        return (ops.align(t["q"], t["f"], t["w"]),)

    def guided(loss: str, scale: float, index: Tensor | None) -> Callable[[Any, Leaves], tuple[Tensor, ...]]:
        def call(ops: Any, t: Leaves) -> tuple[Tensor, ...]:
            rows = slice(None) if index is None else slice(len(index))
            null = t["null"].transpose(1, 2)
            return (ops.guided_feature_loss(t["q"], t["f"][rows], null[rows], t["w"][rows], scale, loss, index),)

        return call

    size = f"{batch}x{tokens}x{width}"
    cases = [Case(f"align-{size}", leaves, align, frozen)]
    for loss, scale in (("mse", 0.0), ("mse", 30.0), ("cosine", 1.0), ("normalized_mse", 30.0)):
        for index in (None, torch.randperm(batch)[:named]):
            indexed = "-indexed" if index is not None else ""
            cases.append(Case(f"guided-{loss}-{scale:g}{indexed}-{size}", leaves, guided(loss, scale, index), frozen))
    return cases


def others(batch: int, tokens: int, heads: int, dim: int) -> list[Case]:
    """qk_norm from a strided packed tensor in both layouts, cfg_extrapolate and gelu_tanh."""
    leaves = {
        "qkv": random(batch, tokens, 3, heads, dim + 3),
        **{name: random(dim) for name in ("qw", "qb", "kw", "kb")},
    }

    def qk_norm(ops: Any, t: Leaves) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = ops.qk_norm(t["qkv"][..., :dim], t["qw"], t["qb"], t["kw"], t["kb"], 1e-6)
        return out

    def with_bias(ops: Any, t: Leaves) -> tuple[Tensor, ...]:
        qkv = t["qkv"][..., :dim] + t["bias"].detach().view(3, heads, dim)
        vectors = (t["qw"], t["qb"], t["kw"], t["kb"])
        out: tuple[Tensor, ...] = ops.qk_norm(qkv, *vectors, 1e-6, qkv_bias=t["bias"], layout="heads")
        return out

    flat = {"a": 3 * random(tokens, batch, dim), "b": random(tokens, batch, dim), "bias": random(dim)}
    size = f"{batch}x{tokens}x{heads}x{dim}"
    return [
        Case(f"qk_norm-{size}", leaves, qk_norm),
        Case(f"qk_norm-bias-heads-{size}", leaves | {"bias": leaves["qb"].repeat(3 * heads)}, with_bias),
        Case(f"cfg_extrapolate-{size}", flat, lambda ops, t: (ops.cfg_extrapolate(t["a"], t["b"], 30.0),)),
        Case(f"gelu_tanh-{size}", flat, lambda ops, t: (ops.gelu_tanh(t["a"].transpose(0, 1)),), ("b",)),
        Case(f"gelu_tanh-biased-{size}", flat, lambda ops, t: (ops.gelu_tanh(t["a"].transpose(0, 1), t["bias"]),)),
    ]


def heads(batch: int, tokens: int, count: int, dim: int) -> list[Case]:
    """qk_norm in its other forms from a strided packed tensor; with an even dim rotated by tables, of all samples or of
    each, that are no rotations, cut from wider ones, and with channels that are not side by side."""
    vectors = ("qw", "qb", "kw", "kb")
    leaves = {
        "qkv": random(batch, tokens, 3, count, dim + 3),
        **{name: random(dim) for name in vectors},
        "bias": random(3 * count * dim),
        "rope": random(1, tokens + 2, dim).float().double(),
        "ropes": random(batch, dim, tokens).float().double(),
    }

    def call(ops: Any, t: Leaves, norm: str, given: str, rope: str = "", layout: str = "tokens") -> tuple[Tensor, ...]:
        q_weight, q_bias, k_weight, k_bias = (t[name] if name in given.split() else None for name in vectors)
        qkv = t["qkv"][..., :dim] + t["bias"].detach().view(3, count, dim)
        bias = t["bias"] if layout == "heads" else None
        table = {"": None, "rope": t["rope"][:, 2:], "ropes": t["ropes"].transpose(1, 2)}[rope]
        out: tuple[Tensor, ...] = ops.qk_norm(
            qkv, q_weight, q_bias, k_weight, k_bias, 1e-3, bias, layout, norm, table
        )  # fmt: skip
        return out

    forms: list[tuple[str, dict[str, str]]] = [
        ("layer-plain", {"norm": "layer", "given": "", "layout": "heads"}),
        ("rms", {"norm": "rms", "given": "qw kw"}),
        ("rms-plain", {"norm": "rms", "given": ""}),
        ("none", {"norm": "none", "given": "", "layout": "heads"}),
    ]
    if dim % 2 == 0:
        forms += [
            ("layer-rope", {"norm": "layer", "given": "qw qb kw kb", "rope": "rope"}),
            ("layer-ropes-bias", {"norm": "layer", "given": "qw qb kw kb", "rope": "ropes", "layout": "heads"}),
            ("rms-ropes", {"norm": "rms", "given": "qw kw", "rope": "ropes"}),
            ("rms-rope-bias", {"norm": "rms", "given": "qw kw", "rope": "rope", "layout": "heads"}),
            ("none-rope", {"norm": "none", "given": "", "rope": "rope"}),
        ]
    size = f"{batch}x{tokens}x{count}x{dim}"
    frozen = ("rope", "ropes")
    return [Case(f"qk_{name}-{size}", leaves, partial(call, **form), frozen) for name, form in forms]


def gated(batch: int, tokens: int, dim: int) -> list[Case]:
    """swiglu of h with 2·dim channels, without a bias and with one."""
    leaves = {"h": 3 * random(tokens, batch, 2 * dim), "bias": random(2 * dim)}
    size = f"{batch}x{tokens}x{dim}"
    return [
        Case(f"swiglu-{size}", leaves, lambda ops, t: (ops.swiglu(t["h"].transpose(0, 1)),), ("bias",)),
        Case(f"swiglu-biased-{size}", leaves, lambda ops, t: (ops.swiglu(t["h"].transpose(0, 1), t["bias"]),)),
    ]


def layers() -> list[Case]:
    """Linear layers from transposed inputs and with cut weights, large enough for oneDNN but for the last."""

    def linear(ops: Any, t: Leaves) -> tuple[Tensor, ...]:
        return (ops.linear(t["x"].transpose(1, 2), t["weight"][:, 1:], t["bias"]),)

    made = []
    for batch, tokens, deep, wide in ((2, 133, 384, 352), (1, 300, 256, 513), (2, 33, 7, 5)):
        leaves = {"x": random(batch, deep, tokens), "weight": random(wide, deep + 1), "bias": random(wide)}
        made.append(Case(f"linear-{batch}x{tokens}x{deep}x{wide}", leaves, linear))
    return made


def cases() -> list[Case]:
    torch.manual_seed(0)
    made = []
    for batch, tokens, width in ((2, 33, 100), (1, 1, 33), (3, 64, 384), (1, 70, 5)):
        made += modulated(batch, tokens, width) + features(batch, tokens, width)
    for batch, tokens, count, dim in ((2, 33, 3, 64), (1, 1, 1, 72), (2, 40, 2, 7)):
        made += others(batch, tokens, count, dim)
    for batch, tokens, count, dim in ((2, 33, 3, 64), (1, 1, 1, 72), (3, 40, 2, 7), (3, 37, 2, 10), (1, 5, 2, 2)):
        made += heads(batch, tokens, count, dim)
    made += layers()
    for batch, tokens, count, dim in ((2, 96, 3, 64), (1, 32, 1, 32), (1, 288, 1, 96), (2, 71, 2, 64), (1, 3, 2, 32)):
        leaves = {"qkv": 2 * random(batch, tokens, 3, count, dim)}
        size = f"{batch}x{tokens}x{count}x{dim}"
        made.append(Case(f"attention-{size}", leaves, lambda ops, t: (ops.attention(t["qkv"]),)))
        made.append(Case(f"attention_heads-{size}", leaves, _apart))
    for lengths, count, dim in (((32, 65), 3, 64), ((1, 70, 2), 2, 96), ((5,), 1, 32), ((64, 33, 128), 1, 32)):
        leaves = {"qkv": 2 * random(2, sum(lengths), 3, count, dim)}
        size = f"{'+'.join(map(str, lengths))}x{count}x{dim}"
        packed = partial(_packed_in_groups, lengths=lengths)
        made.append(Case(f"attention-groups-{size}", leaves, packed))
        made.append(Case(f"attention_heads-groups-{size}", leaves, partial(_apart, lengths=lengths)))
    for batch, lengths, width in ((2, (33, 70), 100), (1, (1,), 33), (3, (5, 1, 41), 64), (1, (32, 3, 32, 64), 5)):
        made += modulated(batch, lengths, width)
    for batch, tokens, width in ((2, 33, 100), (1, 1, 33), (3, 67, 384)):
        made += modulated(batch, tokens, width, per_token=True)
    for tokens, width, per_token in ((33, 100, False), (1, 33, False), ((5, 1, 64), 384, False), (33, 5, True)):
        made += modulated(2, tokens, width, per_token, "rms")
    for batch, tokens, width in ((2, 33, 100), (1, 1, 1), (3, 67, 1027)):
        made += gated(batch, tokens, width)
    return made


def _packed_in_groups(ops: Any, t: Leaves, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return (ops.attention(t["qkv"], lengths),)


def _apart(ops: Any, t: Leaves, lengths: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
    """q, k and v by themselves: (B, N, H, d) in memory, contiguous, and with channels that are not side by side."""
    q, k, v = (part.transpose(1, 2) for part in t["qkv"].unbind(2))
    return (ops.attention_heads(q, k.contiguous(), v.transpose(2, 3).contiguous().transpose(2, 3), lengths),)


def output_gradient(out: Tensor, strides: str) -> Tensor:
    """The same numbers in one of three layouts, or one number for all."""
    plain = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape).to(out.dtype)
    if strides == "transposed" and out.dim() > 1:
        return plain.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "sliced" and out.dim() > 0:
        return torch.stack([plain, torch.full_like(plain, torch.nan)], -1)[..., 0]
    if strides == "expanded":
        return torch.tensor(0.75, dtype=out.dtype).expand(out.shape)
    return plain


def evaluate(
    case: Case, ops: ModuleType, dtype: torch.dtype, strides: str = "plain", copied: bool = False
) -> dict[str, Tensor]:
    """Outputs and gradients of a case, computed at `dtype`; copied: from the same gradients, laid out plainly."""
    leaves = {}
    for name, value in case.leaves.items():
        keep = torch.float32 if name in ("w", "rope", "ropes") and dtype != torch.float64 else dtype
        leaves[name] = value.to(keep, copy=True).requires_grad_(name not in case.frozen)
    outs = case.call(ops, leaves)
    given = [output_gradient(out, strides) for out in outs]
    torch.autograd.backward(
        outs, [one.clone(memory_format=torch.contiguous_format) for one in given] if copied else given
    )
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {f"out{i}": out.detach() for i, out in enumerate(outs)} | grads


def error(value: Tensor, truth: Tensor) -> float:
    """Largest difference in units of the truth's largest magnitude. NaN counts as infinite."""
    if value.shape != truth.shape:
        return torch.inf
    if not truth.numel():
        return 0.0
    difference = (value.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-30)
    return torch.inf if difference.isnan() else difference.item()


def assert_nothing_supervised_is_nothing(loss: str, *shape: int) -> None:
    """guided_feature_loss over an empty index: zero, and a gradient that is there and zero."""
    q = torch.randn(shape, requires_grad=True)
    none = torch.empty(0, *shape[1:])
    value = kernels.guided_feature_loss(q, none, none, torch.empty(0), 3.0, loss, torch.empty(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0 and q.grad is not None and torch.equal(q.grad, torch.zeros_like(q))
