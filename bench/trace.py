"""Which kernels a piece of code launches, and what each reads, writes and multiplies: counted while it runs.

It runs on the "meta" device, where tensors have shapes and no memory, under a mode that sees every operation with its
gradient. What is compiled on a GPU goes through AOTAutograd and its partitioner, as under torch.compile, and what
Inductor would fuse is joined by a rule (`bench.fusion`). Needs no GPU, and seconds at any size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.fusion import Bytes, Kernel, Op, fused

aten = torch.ops.aten

LAUNCHES = {
    "norm_modulate_backward": 2, "gate_residual_norm_modulate_backward": 2, "gate_residual_backward": 2,
    "qk_norm_backward": 7, "guided_feature_loss": 2, "align": 2, "grad_norm": 6, "adamw_ema_": 20,
    "_scaled_dot_product_cudnn_attention_backward": 3, "_scaled_dot_product_efficient_attention_backward": 3,
}  # fmt: skip
"""Kernels of an op that has several: the main one, sums of its partials, casts, scalars. All others have one."""

READS = {
    "copy_": (0, 0.0), "zero_": (0, 0.0), "fill_": (0, 0.0), "_foreach_copy_": (0, 0.0), "adamw_ema_": (5, 0.0),
    "qk_norm_backward": (3, 2 / 3),
}  # fmt: skip
"""Op → an argument of which it reads only a share: what it overwrites, and of the packed q, k and v all but v."""

CONTIGUOUS = ("native_layer_norm", "native_layer_norm_backward")
"""PyTorch's kernels that first copy an input which is not contiguous."""

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

DECOMPOSITIONS = get_decompositions(
    [aten.native_layer_norm, aten.native_layer_norm_backward, aten.slice_backward, aten.select_backward]
)
"""As Inductor takes them apart: statistics, elementwise parts and sums over tokens are seen one by one."""

REDUCTIONS = ("sum", "mean", "var_mean")


class Counter(TorchDispatchMode):
    """Records what runs on meta tensors. `phase` is what it belongs to; `paused` leaves it out."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.phase, self.paused = "", False
        self._ops: list[Op] | None = None
        self._kept: list[Any] = []  # within compiled code, so that no two storages share an address
        self._fused: dict[Any, list[Kernel]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:  # a value is read back from the device: any will do
            return 1.0
        out = func(*args, **kwargs)
        if not self.paused:
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name, schema = func._schema.name.split("::")[1], func._schema.arguments
        given, made = _tensors((args, kwargs)), _tensors(out)
        written = _tensors([a for a, s in zip(args, schema, strict=False) if s.alias_info and s.alias_info.is_write])
        known = {_storage(t) for t in given}
        written += [t for t in made if _storage(t) not in known]
        if not written or name in ALLOCATIONS:  # views, and what stays on the host
            return
        reads, writes = _bytes(given), _bytes(written)
        place, share = READS.get(name, (0, 1.0))
        for tensor in _tensors(args[place]) if share < 1 else ():
            reads[_storage(tensor)] *= share
        moved = sum(reads.values()) + sum(writes.values())
        if name in CONTIGUOUS and self._ops is None:
            moved += sum(2 * _size(t) for t in given[:2] if not t.is_contiguous())
        formula = flop_registry.get(func._overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
        low = given[0].dtype != torch.float32 if given else True
        kernel = Kernel(func._schema.name, self.phase, moved, flops, low, LAUNCHES.get(name, 1))
        if self._ops is None:
            self.kernels.append(kernel)
        else:
            self._kept.append((given, made))
            self._ops.append(Op(kernel, reads, writes, _reduces(name, args)))

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """What runs in the block belongs to `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def hook(self, module: nn.Module, phase: str) -> None:
        """What runs in `module`, forward and backward, belongs to `phase`."""
        entered: list[str] = []

        def enter(*_: Any) -> None:
            entered.append(self.phase)
            self.phase = phase

        def leave(*_: Any) -> None:
            self.phase = entered.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        module.register_full_backward_pre_hook(enter)
        module.register_full_backward_hook(leave)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs in the block is not counted."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def compiled(self, graph: Callable[..., Any], *args: Any) -> Any:
        """Runs a graph as compiled code, whose kernels are what fusion leaves of it: the same at every call."""
        if self.paused:
            return graph(*args)
        if graph not in self._fused:
            self._ops = []
            out = graph(*args)
            ops, self._ops = self._ops, None
            self._fused[graph] = fused(ops, {_storage(t) for t in _tensors(out)})
            self._kept.clear()
        else:
            with self.pause():
                out = graph(*args)
        self.kernels += [replace(kernel, phase=self.phase) for kernel in self._fused[graph]]
        return out


class CompiledModule:
    """Runs modules of one class and shape as torch.compile would: `compiled(module, *inputs)`.

    The first call compiles; what runs for that is not counted. With gradients and without are two objects' work.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._run: Callable[..., Any] | None = None

    def __call__(self, module: nn.Module, *inputs: Tensor) -> Any:
        names, parameters = zip(*module.named_parameters(), strict=True)
        if self._run is None:
            bare = copy.copy(module)
            bare.__dict__.pop("forward", None)  # which may be this object

            def call(parameters: Sequence[Tensor], *inputs: Tensor) -> Any:
                return torch.func.functional_call(bare, dict(zip(names, parameters, strict=True)), inputs)

            def compiler(graph: Callable[..., Any], _: Any) -> Callable[..., Any]:
                return make_boxed_func(lambda *args: self._counter.compiled(graph, *args))

            self._run = aot_function(
                call, fw_compiler=compiler, bw_compiler=compiler, decompositions=DECOMPOSITIONS,
                partition_fn=min_cut_rematerialization_partition,
            )  # fmt: skip
            with self._counter.pause():
                self._run(parameters, *inputs)
        return self._run(parameters, *inputs)


def _reduces(name: str, args: Any) -> str:
    if name not in REDUCTIONS:
        return ""
    axes = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else []
    return "rows" if [axis % args[0].dim() for axis in axes] == [args[0].dim() - 1] else "columns"


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.device.type == "meta"]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> float:
    """Bytes that a pass over it touches: of an expanded one only what there is."""
    return float(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def _bytes(tensors: Sequence[Tensor]) -> Bytes:
    found: Bytes = {}
    for tensor in tensors:
        storage = _storage(tensor)
        found[storage] = min(found.get(storage, 0.0) + _size(tensor), float(tensor.untyped_storage().nbytes()))
    return found
