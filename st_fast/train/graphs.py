"""CUDA graphs of a micro-batch's whole pass: target, student, losses and backward replayed by one launch.

The whole pass rather than `torch.compile(mode="reduce-overhead")` of its blocks: at small batches every launch counts,
also those of the heads and the loss, which no block holds; the blocks share one compiled function, whose
graph would be recorded again for each block's weights; and a graph tree overwrites its outputs, among which are the
tapped streams. The optimiser stays outside, so that skipped steps, rollbacks and checkpoints are as ever.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from st_fast.model.side_stream import SideStream, tensors, with_tensors
from st_fast.train.supervision import NoisyBatch

T = TypeVar("T")

WARM_UP = 3
"""Passes before one is captured: they compile, tune, and make the libraries' workspaces."""


@dataclass(frozen=True)
class Captured(Generic[T]):
    """A graph with the memory that it reads and writes at every replay."""

    graph: torch.cuda.CUDAGraph
    batch: NoisyBatch
    result: T
    gradients: Sequence[Tensor | None]


class Graphs(Generic[T]):
    """Runs `learn(step, batch)`, which leaves gradients at the parameters, as a graph once its shapes are warm.

    `kind` tells passes of a step number apart that run other work on the same shapes. Gradients must be None before
    every call. The first passes of each kind and shape are ordinary ones, on the stream that capturing takes.
    """

    def __init__(
        self,
        learn: Callable[[int, NoisyBatch], T],
        parameters: Sequence[nn.Parameter],
        kind: Callable[[int], Hashable],
        device: torch.device,
    ) -> None:
        self._learn, self._parameters, self._kind = learn, parameters, kind
        self._stream = torch.cuda.Stream(device)
        self._side = SideStream(self._stream)
        self._seen: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, Captured[T]] = {}

    def __call__(self, step: int, batch: NoisyBatch) -> T:
        key = (self._kind(step), tuple(tensor.shape for tensor in tensors(batch)))
        if key in self._captured:
            return self._replay(self._captured[key], batch)
        self._seen[key] += 1
        if self._seen[key] <= WARM_UP:
            return self._plain(step, batch)
        self._captured[key] = self._capture(step, batch)
        return self._replay(self._captured[key], batch)

    def _plain(self, step: int, batch: NoisyBatch) -> T:
        def work() -> tuple[T, list[Tensor | None]]:
            return self._learn(step, batch), [parameter.grad for parameter in self._parameters]

        self._side.follow()
        return self._side.start(work, batch)()[0]

    def _capture(self, step: int, batch: NoisyBatch) -> Captured[T]:
        """Records the pass without running it. Graphs share one pool: they never run at the same time."""
        memory = next((one.graph.pool() for one in self._captured.values()), None)
        graph, static = torch.cuda.CUDAGraph(), with_tensors(batch, torch.clone)
        # Other threads, which read data and save checkpoints, may go on using CUDA meanwhile.
        with torch.cuda.graph(graph, pool=memory, stream=self._stream, capture_error_mode="thread_local"):
            result = self._learn(step, static)
        return Captured(graph, static, result, [parameter.grad for parameter in self._parameters])

    def _replay(self, captured: Captured[T], batch: NoisyBatch) -> T:
        for static, tensor in zip(tensors(captured.batch), tensors(batch), strict=True):
            static.copy_(tensor)
        captured.graph.replay()
        for parameter, gradient in zip(self._parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        return with_tensors(captured.result, torch.clone)
