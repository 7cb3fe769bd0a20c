"""CUDA graphs of a micro-batch's whole pass: target, student, losses and backward replayed by one launch.

The whole pass rather than `torch.compile(mode="reduce-overhead")` of its blocks: at small batches every launch counts,
also those of the heads and the loss, which no block holds; the blocks share one compiled function, whose
graph would be recorded again for each block's weights; and a graph tree overwrites its outputs, among which are the
tapped streams. The optimiser stays outside, so that skipped steps, rollbacks and checkpoints are as ever.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from st_fast.model.side_stream import SideStream, tensors, with_tensors
from st_fast.train.supervision import NoisyBatch

T = TypeVar("T")

WARM_UP = 3
"""Passes before one is captured: they compile, tune, and make the libraries' workspaces."""


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
        self._replays: dict[Hashable, Callable[[NoisyBatch], T]] = {}
        self._pool: Any = None

    def __call__(self, step: int, batch: NoisyBatch) -> T:
        key = (self._kind(step), tuple(tensor.shape for tensor in tensors(batch)))
        if key not in self._replays:
            self._seen[key] += 1
            if self._seen[key] <= WARM_UP:
                self._side.follow()
                return self._side.start(lambda: (self._learn(step, batch), self._gradients()), batch)()[0]
            self._replays[key] = self._capture(step, batch)
        return self._replays[key](batch)

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self._parameters]

    def _capture(self, step: int, batch: NoisyBatch) -> Callable[[NoisyBatch], T]:
        """Records the pass without running it; returns what runs it for another batch.

        Graphs share one pool: they never run at the same time.
        """
        graph, static = torch.cuda.CUDAGraph(), with_tensors(batch, torch.clone)
        # Other threads, which read data and save checkpoints, may go on using CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = self._learn(step, static)
        self._pool, gradients = graph.pool(), self._gradients()

        def replay(batch: NoisyBatch) -> T:
            for memory, tensor in zip(tensors(static), tensors(batch), strict=True):
                memory.copy_(tensor)
            graph.replay()
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            return with_tensors(result, torch.clone)

        return replay
