"""Training on many ranks: sums gradients in buckets, or shards the modules.

Whole weights: a bucket's all-reduce starts as soon as its last gradient is there, while the backward pass still runs,
as in DistributedDataParallel (Li et al., VLDB 2020); in the same order of buckets on every rank, and only for the last
micro-batch of a step.

FSDP2: weights, gradients, moments and EMA in shards, one a rank (ZeRO-3, arXiv 1910.02054), for larger models, or one a
rank of a group, and as many such groups as there are (HSDP), so that only gradients travel between machines. A
sharded tensor is a DTensor split along its first dimension, as `torch.chunk` splits it. Its local part is what the
optimiser's ops read and write; whole weights exist only while a block runs. Gradients are summed over ranks, never
averaged: the losses are already weighted by 1 / global batch size.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from st_fast.core.checkpoint.store import awaited
from st_fast.core.errors import UserError
from st_fast.core.ranks import Ranks, rows, sharded
from st_fast.model import DiffusionTransformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

Groups = Mapping[str, Mapping[str, Tensor]]

SHARD = "shard"
"""The dimension of a mesh of ranks over which weights are split; over the other one they are repeated."""
REDUCTION = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
"""`optim.reduction`: the dtype that gradients travel in; None: their own."""

SHOWN_LATE = 60.0
"""Seconds after which a checkpoint that the first rank has read must be seen by all."""
FIRST_BYTES, BUCKET_BYTES = 2**20, 32 * 2**20
"""Of a bucket: the first is small, so that the link is busy early."""


class Bucket:
    """Parameters whose gradients travel together, in the order that the backward pass makes them."""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype | None) -> None:
        self.parameters, sizes = parameters, [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=dtype or parameters[0].dtype, device=parameters[0].device)
        """(numel,): the gradients end to end, in the dtype they travel in."""
        self.views = [part.view_as(p) for part, p in zip(self.flat.split(sizes), parameters, strict=True)]
        self.missing = 0
        """How many gradients the running backward has yet to make."""
        self.work: dist.Work | None = None


class GradientSum:
    """Holds the buckets of one optimiser's parameters. `expect()`, the last backward, then `finish()`.

    dtype is what gradients travel in (None: their own). bf16 halves the bytes of float32 gradients and rounds their
    sums. With one rank nothing happens. Between steps gradients must be set to None, not to zeros.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks, dtype: torch.dtype | None = None) -> None:
        self.ranks = ranks
        self.buckets = _buckets(parameters, dtype) if ranks.count > 1 else []
        self._expecting, self._next = False, 0
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))

    def expect(self) -> None:
        """To be called before the backward pass that completes the gradients; buckets are sent as they fill."""
        self._expecting, self._next = True, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    @torch.no_grad()
    def finish(self) -> None:
        """Makes every parameter's gradient the sum over ranks; one that no rank has is zeros."""
        self._expecting = False
        if not self.buckets:
            return
        while self._next < len(self.buckets):  # buckets with a gradient that this rank does not have
            self._send()
        self.ranks.heartbeat.beat("all-reduce")
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                parameter.grad = view if view.dtype == parameter.dtype else view.to(parameter.dtype)

    def _hook(self, bucket: Bucket):  # type: ignore[no-untyped-def]
        def arrived(parameter: Tensor) -> None:
            bucket.missing -= 1
            while self._expecting and self._next < len(self.buckets) and self.buckets[self._next].missing == 0:
                self._send()

        return arrived

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self.buckets[self._next]
        self._next += 1
        for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)


def _buckets(parameters: Sequence[nn.Parameter], dtype: torch.dtype | None) -> list[Bucket]:
    groups, filled = list[list[nn.Parameter]](), 0
    for parameter in reversed(list(parameters)):  # a backward pass makes the last layers' gradients first
        size = parameter.numel() * parameter.element_size()
        limit = FIRST_BYTES if len(groups) == 1 else BUCKET_BYTES
        if not groups or filled + size > limit or parameter.dtype != groups[-1][0].dtype:
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += size
    return [Bucket(group, dtype) for group in groups]


class Shards:
    """How the modules of a run are sharded: over all ranks, or within groups of `size` of them that hold the same.

    Gradients are reduced in `reduction` (None: as they are). Ranks of a group follow one another.
    """

    def __init__(self, ranks: Ranks, reduction: torch.dtype | None, size: int = 0) -> None:
        from torch.distributed import device_mesh, fsdp  # not imported by runs without shards

        self._fsdp = fsdp
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # none is changed in place
        self.size = size or ranks.count
        sizes = {"replicate": ranks.count // self.size, SHARD: self.size}
        if self.size == ranks.count:
            del sizes["replicate"]
        kind, names = ranks.device.type, tuple(sizes)
        self._mesh = device_mesh.init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=names)
        # Modules hold the precision they compute in, and the update writes it, so that only the reduction may differ.
        self._policy = fsdp.MixedPrecisionPolicy(reduce_dtype=reduction, cast_forward_inputs=False)

    def model(self, model: DiffusionTransformer, depth: int | None = None) -> None:
        """Shards a model in place: every block by itself, what makes modulations together, the rest together.

        depth: of a frozen model, how many blocks run; its methods `features` and `guided_features` stop there.
        """
        # Modulations are computed before the blocks, from all blocks' layers: these can't be parts of the blocks.
        last = model.config.depth if depth is None else depth
        weights = [weight for weight in model.norm_weights(last) if weight is not None]
        self._apply([*model.modulation_layers(last), *weights])
        for block in model.blocks:
            self._apply(block)
        # After its last use FSDP2 would keep the rest gathered for a backward pass, and so at the weights of that time.
        self._apply(model, ignored=model.constants, free=None if depth is None else True)
        for name in ("features", "guided_features"):
            self._fsdp.register_fsdp_forward_method(model, name)

    def heads(self, heads: nn.Module) -> None:
        """Shards a method's heads in place: each module that is called as a whole."""
        if type(heads).forward is nn.Module.forward:
            for child in heads.children():
                self.heads(child)
        elif any(True for _ in heads.parameters()):
            self._apply(heads)

    def _apply(
        self, module: nn.Module | list[nn.Module], ignored: set[nn.Parameter] | None = None, free: bool | None = None
    ) -> None:
        self._fsdp.fully_shard(  # type: ignore[call-overload]
            module, mesh=self._mesh, mp_policy=self._policy, ignored_params=ignored, reshard_after_forward=free
        )
        outer = cast("FSDPModule", module[0] if isinstance(module, list) else module)
        outer.set_gradient_divide_factor(1.0)
        outer.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction with a factor


class ShardedSum:
    """`GradientSum` of sharded modules: only the last micro-batch's backward reduces, block by block."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = [root for module in modules for root in _outermost(module)]
        self._sync(False)

    def expect(self) -> None:
        """To be called before the backward pass that completes the gradients."""
        self._sync(True)

    def finish(self) -> None:
        """Makes every sharded gradient this rank's part of the sum over ranks."""
        self._sync(False)

    def _sync(self, on: bool) -> None:
        for root in self._roots:
            root.set_requires_gradient_sync(on)
            root.set_is_last_backward(on)


def _outermost(module: nn.Module) -> "list[FSDPModule]":
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        return [module]
    return [part for child in module.children() for part in _outermost(child)]


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are sharded."""
    return any(sharded(parameter) for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor unchanged."""
    return tensor.to_local() if sharded(tensor) else tensor


def mesh_of_shards(tensor: "DTensor") -> "DeviceMesh":
    """The ranks that share a tensor, of which each has a part."""
    mesh = tensor.device_mesh
    return mesh[SHARD] if mesh.ndim > 1 else mesh


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return [local(tensor) for tensor in tensors]


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; all must call it. Any other tensor unchanged."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def norm_of_all(norm: Tensor, like: Tensor) -> Tensor:
    """√ Σ norm² over the ranks that share `like`, added in the order of ranks: the same bits everywhere.

    norm is 0-dim float32, of this rank's parts; returned unchanged if `like` is not sharded. NaN and Inf stay.
    """
    if sharded(like):
        mesh = mesh_of_shards(like)
        squares = norm.new_empty(mesh.size(), dtype=torch.float64)
        dist.all_gather(list(squares.split(1)), norm.double().square().reshape(1), group=mesh.get_group())
        return squares.sum().sqrt().float()
    return norm


@torch.no_grad()
def take_parts(state: Groups, path: Path, digest: str, ranks: Ranks) -> None:
    """Reads this rank's rows of the sharded tensors, and the others whole, from a checkpoint that was checked before.

    digest: of its manifest. No rank reads or holds more; all call it alike, and a UserError is raised on all of them.
    """
    ranks.heartbeat.beat("read")
    failure: UserError | None = None
    try:
        manifest = awaited(path, digest, SHOWN_LATE)
        for group, tensors in state.items():
            for name, rows_here in manifest.groups[group].each_of(path, partial(_rows_here, tensors)):
                local(tensors[name]).copy_(rows_here)
    except UserError as error:
        failure = error
    if ranks.any([failure is not None])[0]:
        raise failure or UserError(f"{path}: another rank could not read its part")


def _rows_here(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> tuple[int, int] | None:
    tensor = tensors[name]
    if not sharded(tensor):
        return None
    mesh = mesh_of_shards(tensor)
    return rows(shape[0], mesh.get_local_rank(), mesh.size())


@torch.no_grad()
def hand_out(state: Groups, whole: Groups, ranks: Ranks) -> None:
    """Sets every rank's state to the first rank's `whole` tensors ({} on other ranks), one tensor at a time.

    Where the first rank has no whole tensor, its own state counts if it is not sharded; shards stay.
    """
    given = {(g, name): t for g, ts in whole.items() for name, t in ts.items() if not sharded(t)}
    known = set(ranks.broadcast_from_rank0(lambda: list(given)))
    for group, tensors in state.items():
        for name, tensor in tensors.items():
            in_shards, place = sharded(tensor), (group, name)
            if in_shards and place not in known:
                continue
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=local(tensor).device) if in_shards else tensor
            if place in given:
                full.copy_(given[place])
            ranks.broadcast([full])
            if sharded(tensor):
                mesh = mesh_of_shards(tensor)
                start, stop = rows(len(full), mesh.get_local_rank(), mesh.size())
                local(tensor).copy_(full[start:stop])
