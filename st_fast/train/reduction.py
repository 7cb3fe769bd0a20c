"""Sums gradients over ranks in buckets, while the backward pass that makes them still runs.

As in DistributedDataParallel (Li et al., VLDB 2020): a bucket's all-reduce starts as soon as its last gradient is
there, in the same order of buckets on every rank, and only for the last micro-batch of a step.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from st_fast.core.ranks import Ranks

REDUCTION = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
"""`optim.reduction`: the dtype that gradients travel in; None: their own."""

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
    groups: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in reversed(list(parameters)):  # a backward pass makes the last layers' gradients first
        size = parameter.numel() * parameter.element_size()
        limit = FIRST_BYTES if len(groups) == 1 else BUCKET_BYTES
        if not groups or filled + size > limit or parameter.dtype != groups[-1][0].dtype:
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += size
    return [Bucket(group, dtype) for group in groups]
