"""The kernels of a training step on CUDA, counted without one: what each reads, writes and multiplies.

The step runs as it is, so that a change of its code changes what is counted: on the "meta" device, where tensors have
shapes and no memory, under a mode that sees every operation with its gradient. What is compiled on a GPU goes through
AOTAutograd and its partitioner, as under torch.compile, and what Inductor would fuse is joined by a rule (`fused`).
Needs no GPU, and seconds at any size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from functorch.compile import (  # type: ignore[import-untyped]
    aot_function,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import machine
from bench.workload import Setup, make_recipe, make_stage
from st_fast import kernels
from st_fast.core.ranks import Ranks
from st_fast.kernels.common import registry
from st_fast.model import SiT
from st_fast.recipe.batch import images_a_pass
from st_fast.recipe.schema import Recipe, Stage
from st_fast.train import adamw, profiling, supervision
from st_fast.train.optim import Optimizer
from st_fast.train.step import Step
from st_fast.train.supervision import NoisyBatch, Parts, Rows, select_rows

aten = torch.ops.aten
META, CUDA = torch.device("meta"), torch.device("cuda")
LATENT_SCALE = 0.18215

flop_registry.setdefault(aten._addmm_activation, flop_registry[aten.addmm])
TIMED = ("--kernels.gelu_mlp=fused",)
"""What a trial at a run's start decides: taken to be found faster, as on H100 and H200 others found GELU in cuBLASLt's
epilogues to be (karpathy/llm.c#653, sgl-project/sglang#34350)."""

Bytes = dict[int, float]
"""By storage: views of one count once."""


@dataclass(frozen=True)
class Kernel:
    """The work of one op, or of several that are fused."""

    name: str
    """As a profiler would show it: `st_fast.train.profiling` sorts by it."""
    phase: str
    """The range of the step that it belongs to (`st_fast.train.profiling`, or "heads")."""
    bytes: float
    """Read and written."""
    flops: float = 0.0
    low: bool = True
    """Multiplies in 16 bits, else in float32."""
    launches: int = 1
    aside: float = 0.0
    """Of the bytes, those of a product's epilogue that are neither its factors nor its result."""

    @property
    def family(self) -> str:
        """Its family as `st_fast.train.profiling` has it."""
        found = profiling.family(self.name)
        return "matrix products" if self.flops and found != "attention" else found


@dataclass(frozen=True)
class Op:
    """One operation as it was dispatched."""

    kernel: Kernel
    reads: Bytes
    writes: Bytes
    reduces: str
    """"rows": over the last axis alone; "columns": over others; "": nothing."""

    @property
    def alone(self) -> bool:
        """Whether nothing is fused with it: products, attention, ops of ours; sums over columns start anew."""
        return bool(self.kernel.flops) or self.kernel.name.startswith("st_fast::") or self.reduces == "columns"


def fused(ops: Sequence[Op], needed: set[int]) -> list[Kernel]:
    """The kernels of a compiled graph, of which the storages `needed` are results.

    Elementwise ops and reductions over rows that hand values to one another, with nothing between them that runs alone,
    are one kernel: it reads what it does not make and writes what others need. A sum over columns is a kernel of its
    own, which computes again what only it needs; sums that share an input are one. Inductor does the same, but for its
    limits on size, and copies that its layouts take.
    """
    made = {storage: number for number, op in enumerate(ops) for storage in op.writes}
    levels = _levels(ops, made, needed)
    groups = list(range(len(ops)))

    def join(a: int, b: int) -> None:
        groups[:] = [groups[b] if g == groups[a] else g for g in groups]

    handed = [(number, made.get(storage, number), storage) for number, op in enumerate(ops) for storage in op.reads]
    for number, maker, _ in handed:
        if not ops[number].alone and not ops[maker].alone and levels[maker] == levels[number]:
            join(number, maker)
    stored = set(needed)
    for number, maker, storage in handed:
        again = ops[number].reduces == "columns" and not ops[maker].alone and not ops[maker].reduces
        if groups[maker] != groups[number] and not again:
            stored.add(storage)
    reads = [_computed_again(op, ops, made, stored) if op.reduces == "columns" else op.reads for op in ops]
    first: dict[tuple[int, int], int] = {}
    for number, op in enumerate(ops):
        for storage in reads[number] if op.reduces == "columns" else ():
            join(number, first.setdefault((storage, levels[number]), number))
    members = [[n for n, group in enumerate(groups) if group == name] for name in dict.fromkeys(groups)]
    return [kernel for group in members if (kernel := _kernel(ops, group, reads, stored)) is not None]


def _levels(ops: Sequence[Op], made: dict[int, int], needed: set[int]) -> list[int]:
    """How many ops that run alone must come before each; what is not a result waits until it is asked for."""
    levels: list[int] = []
    for number, op in enumerate(ops):
        makers = [made[storage] for storage in op.reads if made.get(storage, number) < number]
        levels.append(max((levels[maker] + ops[maker].alone for maker in makers), default=0))
    wanted = [len(ops)] * len(ops)
    for number in reversed(range(len(ops))):
        op = ops[number]
        if wanted[number] < len(ops) and not op.alone and not needed & op.writes.keys():
            levels[number] = max(levels[number], wanted[number])
        for storage in op.reads:
            maker = made.get(storage, number)
            wanted[maker] = min(wanted[maker], levels[number])
    return levels


def _computed_again(op: Op, ops: Sequence[Op], made: dict[int, int], stored: set[int]) -> Bytes:
    """What an op reads if it makes for itself what nobody stores."""
    found: Bytes = {}
    for storage, size in op.reads.items():
        if storage in stored or storage not in made:
            found[storage] = max(size, found.get(storage, 0.0))
        else:
            found |= _computed_again(ops[made[storage]], ops, made, stored)
    return found


def _kernel(ops: Sequence[Op], group: Sequence[int], reads: Sequence[Bytes], stored: set[int]) -> Kernel | None:
    """One kernel of the ops of a group; None where all of it is computed again elsewhere."""
    if len(group) == 1 and ops[group[0]].alone and not ops[group[0]].reduces:
        return ops[group[0]].kernel
    inside = {storage for number in group for storage in ops[number].writes}
    read: Bytes = {}
    for number in group:
        read |= {s: max(size, read.get(s, 0.0)) for s, size in reads[number].items() if s not in inside}
    written = {s: size for number in group for s, size in ops[number].writes.items() if s in stored}
    if not written:
        return None
    reduces = any(ops[number].reduces for number in group)
    names = dict.fromkeys(ops[number].kernel.name.split("::")[1].strip("_") for number in group)
    name = f"triton_{'red' if reduces else 'poi'}_fused_{'_'.join(names)}"
    return Kernel(name, ops[group[0]].kernel.phase, sum(read.values()) + sum(written.values()))


def launches(folder: Path = machine.FOLDER) -> dict[str, int]:
    """Kernels that an op launches, of ours as `bench.launches` counted them; others that are not named launch one."""
    kernels = "cudnn", "efficient"
    found = {f"aten::_scaled_dot_product_{kernel}_attention_backward": 3 for kernel in kernels}
    for op, costs in machine.load(folder / "launches.json").get("ops", {}).items():
        names = {"forward": op, "backward": f"{op}_backward", "step": f"{op}_"}
        found |= {f"st_fast::{names[part]}": cost["launches"] for part, cost in costs.items()}
    found.pop("st_fast::gelu_mlp_backward", None)  # one; the others are PyTorch's own products, counted by themselves
    return found


OVERWRITTEN = ("copy_", "zero_", "fill_", "_foreach_copy_")
"""PyTorch's ops that write their first argument and do not read it; ours say so themselves (`registry.UNREAD`)."""

CONTIGUOUS = ("native_layer_norm", "native_layer_norm_backward")
"""PyTorch's kernels that first copy an input which is not contiguous."""

ASIDE = {"gelu_mlp": "h", "gelu_mlp_backward": "h"}
"""The argument or result that the epilogue of a product reads or writes beside the product's own."""

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

DECOMPOSITIONS = get_decompositions(
    [aten.native_layer_norm, aten.native_layer_norm_backward, aten.slice_backward, aten.select_backward]
)
"""As Inductor takes them apart: statistics, elementwise parts and sums over tokens are seen one by one."""

REDUCTIONS = ("sum", "mean", "var_mean")


class Counter(TorchDispatchMode):
    """Records what runs on meta tensors. `phase` is what it belongs to; None: it is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.phase: str | None = ""
        self._launches = launches()
        self._ops: list[Op] | None = None
        self._kept: list[Any] = []  # within compiled code, so that no two storages share an address
        self._fused: dict[Any, tuple[list[Kernel], list[Layout | None]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:  # a value is read back from the device: any will do
            return 1.0
        out = func(*args, **kwargs)
        if self.phase is not None:
            self._record(self.phase, func, args, kwargs, out)
        return out

    def _record(self, phase: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name, schema = func._schema.name.split("::")[1], func._schema.arguments
        given, made = _tensors((args, kwargs)), _tensors(out)
        written = _tensors([a for a, s in zip(args, schema, strict=False) if s.alias_info and s.alias_info.is_write])
        known = {_storage(t) for t in given}
        written += [t for t in made if _storage(t) not in known]
        if not written or name in ALLOCATIONS:  # views, and what stays on the host
            return
        reads, writes = _bytes(given), _bytes(written)
        label, unread = registry.UNREAD.get(name, (schema[0].name, float(name in OVERWRITTEN)))
        place = next(place for place, argument in enumerate(schema) if argument.name == label)
        for tensor in _tensors(args[place]) if unread else ():
            reads[_storage(tensor)] *= 1 - unread
        moved = sum(reads.values()) + sum(writes.values())
        if name in CONTIGUOUS and self._ops is None:
            moved += sum(2 * _size(t) for t in given[:2] if not t.is_contiguous())
        formula = flop_registry.get(func._overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
        low = given[0].dtype != torch.float32 if given else True
        aside = 0.0
        if name in ASIDE:
            names = [one.name for one in (*schema, *func._schema.returns)]
            aside = _size((*args, *out)[names.index(ASIDE[name])])
        launches = self._launches.get(func._schema.name, 1)
        kernel = Kernel(func._schema.name, phase, moved, flops, low, launches, aside)
        if self._ops is None:
            self.kernels.append(kernel)
        else:
            self._kept.append((given, made))
            self._ops.append(Op(kernel, reads, writes, _reduces(name, args)))

    @contextmanager
    def within(self, phase: str | None) -> Iterator[None]:
        """What runs in the block belongs to `phase`; None: it is not counted."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def hook(self, module: nn.Module, phase: str) -> None:
        """What runs in `module`, forward and backward, belongs to `phase`."""
        entered: list[str | None] = []

        def enter(*_: Any) -> None:
            entered.append(self.phase)
            self.phase = phase

        def leave(*_: Any) -> None:
            self.phase = entered.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        module.register_full_backward_pre_hook(enter)
        module.register_full_backward_hook(leave)

    def compiled(self, graph: Callable[..., Any], *args: Any) -> Any:
        """Runs a graph as compiled code, whose kernels are what fusion leaves of it: the same at every call.

        Later calls run nothing: their results are shaped as the first's, and share what those shared with arguments.
        """
        phase = self.phase
        if phase is None:
            return graph(*args)
        if graph not in self._fused:
            self._ops = []
            out = graph(*args)
            ops, self._ops = self._ops, None
            self._fused[graph] = fused(ops, {_storage(t) for t in _tensors(out)}), _layouts(args, out)
            self._kept.clear()
        else:
            with self.within(None):
                out = _laid_out(args, self._fused[graph][1])
        self.kernels += [replace(kernel, phase=phase) for kernel in self._fused[graph][0]]
        return out


class CompiledModule:
    """Runs modules of one class and shape as torch.compile would: `compiled(module, *inputs)`.

    The first call with inputs of some shapes compiles; what runs for that is not counted. With gradients and without
    are two objects' work.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._runs: dict[tuple[torch.Size, ...], Callable[..., Any]] = {}

    def __call__(self, module: nn.Module, *given: Tensor | None) -> Any:
        inputs = [one for one in given if one is not None]  # a block is told of no groups of tokens
        names, parameters = zip(*module.named_parameters(), strict=True)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._runs:
            bare = copy.copy(module)
            bare.__dict__.pop("forward", None)  # which may be this object

            def call(parameters: Sequence[Tensor], *inputs: Tensor) -> Any:
                return torch.func.functional_call(bare, dict(zip(names, parameters, strict=True)), inputs)

            def compiler(graph: Callable[..., Any], _: Any) -> Callable[..., Any]:
                return make_boxed_func(lambda *args: self._counter.compiled(graph, *args))

            run = self._runs[shapes] = aot_function(
                call, fw_compiler=compiler, bw_compiler=compiler, decompositions=DECOMPOSITIONS,
                partition_fn=min_cut_rematerialization_partition,
            )  # fmt: skip
            with self._counter.within(None):
                run(parameters, *inputs)
        return self._runs[shapes](parameters, *inputs)


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


Layout = tuple[int, Tensor]
"""A result's place among those that share its storage, arguments first, and its shape, strides and offset."""


def _layouts(args: Sequence[Any], out: Sequence[Any]) -> list[Layout | None]:
    """How the results of a graph lie; None where one is no tensor."""
    places: dict[int, int] = {}
    for place, value in enumerate((*args, *out)):
        if isinstance(value, Tensor):
            places.setdefault(_storage(value), place)
    return [(places[_storage(value)], value.detach()) if isinstance(value, Tensor) else None for value in out]


def _laid_out(args: Sequence[Any], layouts: Sequence[Layout | None]) -> list[Any]:
    """New results that lie so."""
    out: list[Any] = []
    for layout in layouts:
        if layout is None:
            out.append(None)
            continue
        place, like = layout
        if place == len(args) + len(out):
            size = like.untyped_storage().nbytes() // like.element_size()
            base = torch.empty(size, dtype=like.dtype, device=META)
        else:
            base = (*args, *out)[place]
        out.append(torch.as_strided(base.detach(), like.shape, like.stride(), like.storage_offset()))
    return out


def recipe_of(setup: Setup) -> tuple[Recipe, Stage]:
    """The recipe and the stage of a step, on CUDA; nothing is read from or written to the disk but the recipe."""
    recipe = make_recipe(setup, Path("unused"))
    return recipe, make_stage(setup, recipe)


def ours(setup: Setup, passes: int = 1) -> list[Kernel]:
    """The kernels of st_fast's step on CUDA with the trials' outcome `TIMED`; the recipe chooses the other ops.

    passes: into how many micro-batches the batch is split, where the setup's options don't say so.
    """
    split = (f"--optim.accumulation={passes}",) if passes > 1 else ()
    return step_kernels(*recipe_of(replace(setup, options=(*TIMED, *setup.options, *split))))


def step_kernels(recipe: Recipe, stage: Stage) -> list[Kernel]:
    """The kernels of a step of that stage on CUDA: bf16, blocks compiled, t stratified, without a CUDA graph."""
    recipe = replace(recipe, run=replace(recipe.run, cuda_graphs=False))  # a graph launches the same kernels
    choices = {name: choice for name, choice in vars(recipe.kernels).items() if name != "adamw_ema"}
    counter, table, teacher = Counter(), kernels.select(choices, CUDA), None
    with META:
        model = SiT(recipe.model, table, attend_as_cudnn)
        model.run_block = CompiledModule(counter)
        if stage.method.teacher_name:
            teacher = SiT(recipe.model, table, attend_as_cudnn).to(torch.bfloat16).eval().requires_grad_(False)
            teacher.run_block = CompiledModule(counter)
        method = supervision.create(stage, Parts(recipe.model, table, teacher), 1)
        update = adamw.choose(recipe.optim.implementation, CUDA)
        optimizer = Optimizer(model, method.heads, recipe.optim, torch.bfloat16, update.update, update.norm)
        step = Step(model, method, optimizer, recipe, Ranks(0, 1, META), print)
        if optimizer.heads.parameters:
            counter.hook(method.heads, "heads")
        size = images_a_pass(recipe.optim, ranks=1)
        moments = torch.empty(size, *moments_shape(recipe), dtype=torch.float16)
        whole, times = torch.empty(size, dtype=torch.int64), torch.empty(size)  # labels and ordinals; t
        rows = _rows(recipe.optim.batch_size, size, stage)
        with profiling.recording_ranges(counter.within), counter:
            with profiling.named_range("noise"):
                made = (table.noisy_latents(moments, whole, times, 0, LATENT_SCALE, recipe.flow.path) for _ in rows)
                latents: list[tuple[Tensor, Tensor, Tensor, Tensor]] = list(made)
            step(0, [NoisyBatch(*xs, times, whole, whole, whole, r) for xs, r in zip(latents, rows, strict=True)])
    return counter.kernels


def attend_as_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as cuDNN has it, the first of the pinned order; its output is laid out like q."""
    out: Tensor = aten._scaled_dot_product_cudnn_attention(q, k, v, None, q.requires_grad, 0.0, False, False)[0]
    return out


def moments_shape(recipe: Recipe) -> tuple[int, int, int]:
    """Of an image's moments."""
    return 2 * recipe.model.channels, *recipe.model.latent_sides


def _rows(total: int, size: int, stage: Stage) -> list[Rows]:
    """The supervised rows of a step's micro-batches, at stratified times."""
    with torch.device("cpu"):
        t = (torch.arange(total) + 0.5) / total
        rows = [select_rows(t, slice(first, first + size), stage.method.selection) for first in range(0, total, size)]
    return [Rows(index.to(META), weight.to(META)) for index, weight in rows]
