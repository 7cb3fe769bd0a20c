"""CUDA graphs of a step's pass: recording and replaying one, and whether that pays, by a trial before a stage begins.

With `run.cuda_graphs = "auto"` the trial makes a few passes on a batch of the stage and throws their gradients away, so
that no step is lost or repeated. A graph is taken where queueing a pass costs the host about as much time as the pass
costs the device. What was decided is saved with the stage's checkpoints and kept by a resumed run: padded rows, which
graphs need, change the rounding of sums.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from st_fast.core.checkpoint.meta import GraphChoice, Meta
from st_fast.core.errors import Say, first_line
from st_fast.core.machine import PassTooLarge
from st_fast.core.ranks import Ranks
from st_fast.model.side_stream import SideStream, tensors, with_tensors
from st_fast.recipe import Recipe, Stage
from st_fast.recipe.check_run import graphs_problem
from st_fast.train import choices, memory
from st_fast.train.supervision import NoisyBatch

WARM_UP = 3
"""Passes before one is captured as a graph: they compile, tune, and make the libraries' workspaces."""

TIMED = 3
"""Passes of a trial whose times are compared, after WARM_UP others."""

HOST_BOUND = 0.8
"""A graph is taken from this share of the device's time for a pass that the host needs to queue it."""


@dataclass(frozen=True)
class Losses:
    """Scalars on the device, over this rank's part of the global batch; sums over ranks are the global means."""

    denoise: Tensor
    aux: Tensor
    direction: Tensor | None = None
    """Of the velocity, weighted; None where the stage has no such loss."""

    @property
    def velocity(self) -> Tensor:
        """All that is asked of v̂ itself."""
        return self.denoise if self.direction is None else self.denoise + self.direction

    def backward(self) -> None:
        """Adds the gradients of their sum to the parameters'."""
        (self.velocity + self.aux).backward()


class Graphs:
    """CUDA graphs of a micro-batch's whole pass: runs `learn(step, batch)`, which leaves gradients at the parameters.

    The whole pass rather than `torch.compile(mode="reduce-overhead")` of its blocks: at small batches every launch
    counts, also those of the heads and the loss, which no block holds; the blocks share one compiled function, whose
    graph would be recorded again for each block's weights; and a graph tree overwrites its outputs, among which are the
    tapped streams. The optimiser stays outside, so that skipped steps, rollbacks and checkpoints are as ever.

    `kind` tells passes of a step number apart that run other work on the same shapes, as a batch's route does.
    Gradients must be None before every call. The first passes of each kind and shape are ordinary ones, on the stream
    that capturing takes. Where a capture fails, which runs nothing, `say` is told so once, and all further passes are
    ordinary ones.
    """

    def __init__(
        self,
        learn: Callable[[int, NoisyBatch], Losses],
        parameters: Sequence[nn.Parameter],
        kind: Callable[[int], Hashable],
        device: torch.device,
        say: Say,
    ) -> None:
        self._learn, self._parameters, self._kind, self._device, self._say = learn, parameters, kind, device, say
        self._failed = False
        self._stream = torch.cuda.Stream(device)
        self._side = SideStream(self._stream)
        self._seen: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, Callable[[NoisyBatch], Losses]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, step: int, batch: NoisyBatch) -> Losses:
        route = None if batch.layout is None else batch.layout.route
        key = (self._kind(step), route, tuple(tensor.shape for tensor in tensors(batch)))
        if key not in self._replays:
            self._seen[key] += 1
            if self._seen[key] > WARM_UP and not self._failed:
                self._try_to_capture(key, step, batch)
        if key in self._replays:
            return self._replays[key](batch)
        self._side.follow()
        return self._side.start(lambda: (self._learn(step, batch), self._gradients()), batch)()[0]

    def _try_to_capture(self, key: Hashable, step: int, batch: NoisyBatch) -> None:
        """Adds a replay; after a failure, leaves everything as it was before: streams, generators and gradients."""
        try:
            with torch.cuda.stream(torch.cuda.current_stream()):  # which a failed capture does not give back
                self._replays[key] = self._capture(step, batch)
        except RuntimeError as error:
            self._failed = True
            self._say(f"CUDA graphs: a step can't be recorded, going on without: {first_line(error)}")
        if self._failed:  # not inside the handler, whose error refers to all that the pass has allocated
            _clear(self._parameters)
            if self._device.type == "cuda":
                self._abandon(self._device.index or 0)

    def _abandon(self, device: int) -> None:
        """Ends what a capture that failed has begun: the allocator's, which until then frees no memory that several
        streams have used, and the generator's."""
        torch._C._cuda_endAllocateToPool(device, self._pool)
        torch._C._cuda_releasePool(device, self._pool)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())  # the clone knows of no capture

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self._parameters]

    def _capture(self, step: int, batch: NoisyBatch) -> Callable[[NoisyBatch], Losses]:
        """Records the pass without running it; returns what runs it for another batch.

        Graphs share one pool: they never run at the same time.
        """
        graph, static = torch.cuda.CUDAGraph(), with_tensors(batch, torch.clone)
        # Other threads, which read data and save checkpoints, may go on using CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = self._learn(step, static)
        gradients = self._gradients()

        def replay(batch: NoisyBatch) -> Losses:
            for mine, tensor in zip(tensors(static), tensors(batch), strict=True):
                mine.copy_(tensor)
            graph.replay()
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            return with_tensors(result, torch.clone)

        return replay


@dataclass(frozen=True)
class Trial:
    """Seconds that a pass takes the host to queue and the device to carry out; `refusal`: why it may have no graph."""

    host: float
    device: float
    refusal: str = ""

    @property
    def pays(self) -> bool:
        """Whether the host holds the device up, and nothing speaks against a graph."""
        return not self.refusal and self.host > HOST_BOUND * self.device


def with_graphs(recipe: Recipe, used: bool) -> Recipe:
    """The recipe with nothing left to decide about graphs."""
    return replace(recipe, run=replace(recipe.run, cuda_graphs=used))


def refusal(recipe: Recipe, stage: Stage, ranks: Ranks, shapes: int) -> str:
    """Why "auto" leaves graphs out of a stage without a trial, in a few words; empty if it does not."""
    if ranks.device.type != "cuda":
        return f"the run is on {ranks.device.type}"
    if (problem := graphs_problem(replace(recipe, stages=(stage,)), ranks.count)) is not None:
        return problem.short
    if shapes > 1:
        return f"latents of {shapes} shapes"
    return "live image encoders" if stage.method.encodes_images else ""


def settled(recipe: Recipe, stage: Stage, ranks: Ranks, say: Say, shapes: int = 1) -> GraphChoice | None:
    """What is known of a stage's graphs before a trial; None if the trial decides. `say` is told unless on a CPU.

    `shapes`: how many the latents have.
    """
    if recipe.run.cuda_graphs != "auto":
        return GraphChoice(recipe.run.graphs, ranks.count)
    reason = refusal(recipe, stage, ranks, shapes)
    if reason:
        if ranks.device.type == "cuda":
            say(f"{stage.name}: CUDA graphs left out: {reason}")
        return GraphChoice(False, ranks.count)
    alone = replace(recipe, stages=(stage,))
    meta: Meta | None = ranks.broadcast_from_rank0(lambda: choices.newest_meta(alone))
    recorded = meta.cuda_graphs if meta else None
    if recorded is not None and recorded.ranks == ranks.count:
        say(f"{stage.name}: CUDA graphs {'taken' if recorded.used else 'left out'}, as before")
        return recorded
    return None


def decide(trial: Trial, stage: Stage, ranks: Ranks, say: Say) -> GraphChoice:
    """The choice of all ranks, by the sums of their times; a refusal on any is one on all."""
    totals = ranks.sum(torch.tensor([trial.host, trial.device], dtype=torch.float64)) / ranks.count
    (refused,) = ranks.any([bool(trial.refusal)])
    host, device = totals.tolist()
    whole = Trial(host, device, (trial.refusal or "another rank refuses") if refused else "")
    times = f"to queue a pass takes the host {1e3 * host:.1f} ms, to carry it out the device {1e3 * device:.1f} ms"
    if whole.refusal:
        say(f"{stage.name}: CUDA graphs left out: {whole.refusal}")
    else:
        say(f"{stage.name}: CUDA graphs {'taken' if whole.pays else 'left out'}: {times}")
    return GraphChoice(whole.pays, ranks.count)


def try_out(forward: Callable[[], Losses], parameters: Sequence[nn.Parameter], ranks: Ranks) -> Trial:
    """Makes WARM_UP + TIMED passes, and leaves no gradient and no memory behind."""
    device = ranks.device
    before = torch.cuda.memory_allocated(device)
    trial = Trial(0.0, 0.0, "not even an ordinary pass fits the memory")
    try:
        ranks.heartbeat.beat("graphs")
        times = [_timed(forward, parameters, device) for _ in range(WARM_UP + TIMED)][WARM_UP:]
        host, took = (statistics.median(each) for each in zip(*times, strict=True))
        trial = Trial(host, took, _lacks(torch.cuda.max_memory_allocated(device) - before, before, device))
    except PassTooLarge:
        pass
    _clear(parameters)
    torch.cuda.empty_cache()
    return trial


def _clear(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@memory.of_a_pass()
def _timed(
    forward: Callable[[], Losses], parameters: Sequence[nn.Parameter], device: torch.device
) -> tuple[float, float]:
    """Seconds of host and device for a pass. The halves one by one: a full queue, of 1024 launches, would hold the host
    up."""
    seconds: list[tuple[float, float]] = []
    with _watched(device, seconds):
        losses = forward()
    with _watched(device, seconds):
        losses.backward()
    _clear(parameters)
    host, took = (sum(each) for each in zip(*seconds, strict=True))
    return host, took


@contextmanager
def _watched(device: torch.device, seconds: list[tuple[float, float]]) -> Iterator[None]:
    """Adds the seconds of host and device for what is queued inside."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    began = time.perf_counter()
    yield
    host = time.perf_counter() - began
    end.record()
    torch.cuda.synchronize(device)
    seconds.append((host, start.elapsed_time(end) / 1e3))


def _lacks(needed: int, kept: int, device: torch.device) -> str:
    """Why a graph's memory may not fit: its pool is its own, and passes of other shapes are made beside it."""
    room = memory.capacity(device) - kept
    if 2 * needed <= room:
        return ""
    return f"a pass takes {needed / 2**30:.2f} GiB, twice that is more than the {room / 2**30:.2f} GiB there are"
