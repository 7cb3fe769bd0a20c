"""Checks of the launcher, the dispatcher and captures, as in checks.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.stand_in import gates
from tests.stand_in.driver import Counters


def launcher() -> dict[str, Any]:
    """Which launches of one kernel go through Triton, and which addresses the driver is given."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from st_fast.kernels.optimiser.triton import _grad_norm_kernel as kernel
    from st_fast.kernels.optimiser.triton import tl

    by_triton, run = [], JITFunction.run

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        by_triton.append(self.__name__)
        return run(self, *args, **options)

    def launch(table: torch.Tensor, chunks: torch.Tensor, sums: torch.Tensor, **changed: Any) -> str:
        before, constants = len(by_triton), {"GRAD": tl.float32, "ALIGNED": True, "CHUNK": 16, "BLOCK": 16} | changed
        try:
            kernel[(1,)](table, chunks, sums, **constants)
        except (ValueError, RuntimeError) as error:
            return type(error).__name__
        return "Triton" if len(by_triton) > before else "plan"

    def given() -> list[int]:
        """What the one plan that there is hands to the driver for three tensors."""
        ((key, (_, *rest)),) = kernel.plans.items()
        seen: list[Any] = []
        kernel.plans[key] = (lambda *args: seen.extend(args), *rest)
        launch(*tensors)
        kernel.plans.clear()
        return [seen[9 + i] - tensor.data_ptr() for i, tensor in enumerate(tensors)]

    JITFunction.run = watched
    tensors = [torch.zeros(16, dtype=torch.int64, device="cuda") for _ in range(2)] + [torch.zeros(9, device="cuda")]
    table, chunks, sums = tensors
    counters, found = Counters(), {"first": launch(*tensors)}
    before = counters.read()
    found |= {"again": launch(*tensors), "launched": counters.since(before)["launches"], "given": given()}
    launch(*tensors)
    found |= {
        "other memory": launch(table, chunks, torch.zeros(9, device="cuda")),
        "misaligned": launch(table, chunks, sums[1:]),
        "misaligned again": launch(table, chunks, sums[1:]),
        "aligned again": launch(*tensors),
        "other dtype": launch(table, chunks, sums.double()),
        "other constant": launch(*tensors, BLOCK=8),
        "other warps": launch(*tensors, num_warps=2),
        "on the CPU": launch(table, chunks, sums.cpu()),
        "on the CPU again": launch(table, chunks, sums.cpu()),
    }
    metadata: list[Any] = []
    knobs.runtime.launch_enter_hook.add(metadata.append)
    found |= {"with a hook": launch(*tensors), "seen by it": len(metadata)}
    knobs.runtime.launch_enter_hook.remove(metadata.append)
    found["without it"] = launch(*tensors)
    kernel.add_pre_run_hook(lambda *args, **options: None)
    found["with a hook of its own"] = launch(*tensors)
    kernel.pre_run_hooks.clear()
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.graph(torch.cuda.CUDAGraph()):
        before = counters.read()
        found["captured"] = [launch(*tensors), counters.since(before)["captured"]]
    return found


def modes() -> dict[str, Any]:
    """What a dispatch mode sees of an op with a gradient and of one without."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from st_fast import kernels

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(op.name())
            return op(*args, **(kwargs or {}))

    names: list[str] = []
    x, vector = torch.zeros(2, 3, 64, device="cuda"), torch.zeros(2, 64, device="cuda")
    with Seen():
        kernels.norm_modulate(x, vector, vector)
        kernels.norm_modulate(x.requires_grad_(), vector, vector).sum().backward()
    return {"ops": [name for name in names if name.startswith("st_fast::")]}


def capture_fails() -> dict[str, Any]:
    """Steps whose pass waits for the device once it is recorded: what is said, and memory step by step."""
    from bench.workload import ours
    from st_fast.train.step import Step
    from tests.stand_in.checks import GRAPHS, WARM, _setup

    gates.disarm()
    forward = Step.forward

    def waiting(step: Step, number: int, batch: Any) -> Any:
        losses = forward(step, number, batch)
        if torch.cuda.is_current_stream_capturing():
            losses.backward()
            losses.denoise.item()
        return losses

    Step.forward = waiting  # type: ignore[method-assign]
    counters, used = Counters(), []
    with ours(_setup("stage 2", "cuda:0", *GRAPHS)) as loop:
        for _ in range(4 * WARM):
            loop()
            used.append(counters.used_bytes)
        stream = torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.randn(3, device="cuda")  # by the generator that a capture takes over
        return {"said": [text for text in loop.log.said if "CUDA graphs" in text], "used": used, "own stream": stream}


def full_step() -> dict[str, Any]:
    """B/2's compiled step at its full size: launches, and its CPU time in that of 500 small tensors made and changed.

    The unit is taken between the steps, so that whatever slows one down slows the other, too.
    """
    from bench.step import MICRO_BATCH
    from bench.workload import Setup, ours
    from tests.stand_in.checks import WARM

    gates.disarm()

    def small_calls() -> None:
        for _ in range(500):
            torch.empty((8,), device="cuda").add_(1)

    def spent(call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    device, counters = torch.device("cuda:0"), Counters()
    with ours(Setup("B/2", "plain", 256, device, compile="on", options=MICRO_BATCH).untried) as loop:
        for _ in range(WARM):
            loop()
            small_calls()
        before = counters.read()
        loop()
        launches = counters.since(before)["launches"]
        steps, units = zip(*((spent(loop), spent(small_calls)) for _ in range(25)), strict=True)
    step, unit = statistics.median(steps), statistics.median(units)
    return {"launches": launches, "units": step / unit, "ms": [1e3 * step, 1e3 * unit]}


def warm_up() -> dict[str, Any]:
    """What an update launches, with a learning rate that warms up and without."""
    from st_fast import kernels
    from st_fast.recipe.schema import Optim
    from st_fast.train.optim import Optimizer

    counters, found = Counters(), {}
    for steps in (0, 9):
        layer, none = torch.nn.Linear(8, 8, device="cuda"), torch.nn.Identity()
        ops = kernels.adamw_ema_, kernels.grad_norm
        optimizer = Optimizer(layer, none, Optim(warmup_steps=steps), torch.float32, *ops)
        for _ in range(2):
            layer(torch.ones(8, device="cuda")).sum().backward()
            before = counters.read()
            optimizer.update()
            found[steps] = counters.since(before)
    return {str(steps): [counts["launches"], counts["syncs"]] for steps, counts in found.items()}
