"""What the tests run on the stand-in, each in a process of its own: `python -m tests.stand_in.checks NAME ARGUMENTS`.

Each prints what it found as a line of JSON, which the tests judge.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tests.stand_in import gates, host, products
from tests.stand_in.driver import Counters

GRAPHS = ("--run.supervised_rows=padded", "--run.cuda_graphs=true")
WARM, STEPS = 6, 4


def memory() -> dict[str, Any]:
    """Copies there and back by several ways, and what the allocator holds afterwards."""
    counters, host = Counters(), torch.arange(3_000_017, dtype=torch.float32)
    before = counters.read()
    there = host.cuda()
    moved = torch.empty(4_000_000, device="cuda")[29 : 29 + len(host)].copy_(there)
    pageable = counters.since(before)
    before = counters.read()
    pinned = host.pin_memory().to("cuda", non_blocking=True)
    from_pinned = counters.since(before)
    same = [torch.equal(t.cpu(), host) for t in (there, moved, pinned, pinned.zero_().copy_(moved))]
    large = torch.empty(2**34, dtype=torch.uint8, device="cuda").zero_()  # more than the machine may have
    found = {"same": same, "pageable": pageable, "from_pinned": from_pinned, "large": large.clone()[-1].item()}
    del there, moved, pinned, large
    torch.cuda.empty_cache()
    return found | {"left": counters.used_bytes}


def out_of_memory() -> dict[str, Any]:
    """Allocations up to the device's size and beyond it."""
    counters = Counters()
    fits = [torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(3)]
    try:
        torch.empty(2**30, dtype=torch.uint8, device="cuda")
        error = None
    except torch.OutOfMemoryError as caught:
        error = str(caught)
    counters.resize(8 * 2**30)
    fits.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))
    return {"error": error, "used": counters.used_bytes, "fitted": len(fits)}


def captures() -> dict[str, Any]:
    """A graph of three kernels over two streams, and a wait for the device inside of a capture."""
    counters, side = Counters(), torch.cuda.Stream()
    x = torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    before, graph = counters.read(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.mul_(2)
        torch.cuda.current_stream().wait_stream(side)
        x.add_(3)
    captured = counters.since(before)
    before = counters.read()
    graph.replay()
    replayed = counters.since(before)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.sum().item()
        error = None
    except RuntimeError as caught:
        error = str(caught).splitlines()[0]
    return {"captured": captured, "replayed": replayed, "error": error}


def broken() -> dict[str, Any]:
    """A device that fails after five launches: what calls say before and ever after."""
    x, said = torch.zeros(8, device="cuda"), []
    Counters().fail_after(5)
    for _ in range(8):
        try:
            x.add_(1)
            torch.cuda.synchronize()
            said.append("")
        except RuntimeError as error:
            said.append(str(error).splitlines()[0])
    return {"said": said}


def missing() -> dict[str, Any]:
    """A call of something that the stand-in does not have."""
    try:
        torch.zeros(1, device="cuda").untyped_storage()._share_cuda_()
        return {"error": None}
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}


def _setup(stage: str, device: str, *options: str, compile: str = "off", batch: int = 12) -> Any:
    from bench.workload import Setup

    return Setup(
        "B/2", stage, batch, torch.device(device), tokens=16, depth=2, compile=compile, options=options
    ).untried


def steps(stage: str) -> dict[str, Any]:
    """What a step of a small model calls, by device's name, compilation and graphs; every step's counts."""
    from bench.measure import tidy
    from bench.workload import ours

    gates.disarm()
    variants = {
        "cuda": _setup(stage, "cuda"),
        "cuda:0": _setup(stage, "cuda:0"),
        "compiled": _setup(stage, "cuda:0", compile="on"),
        "graphs": _setup(stage, "cuda:0", *GRAPHS, compile="on"),
    }
    counters, found = Counters(), {}
    for name, setup in variants.items():
        with ours(setup) as loop, tidy(setup.device):
            for _ in range(WARM):
                loop()
            counts = []
            for _ in range(STEPS):
                before = counters.read()
                loop()
                counts.append(counters.since(before))
            found[name] = {"steps": counts, "said": list(loop.log.said)}
    return found


def tried() -> dict[str, Any]:
    """What the trials before a measured step decide, what else is said, and the graphs that a step launches."""
    from bench.workload import Setup, ours

    gates.disarm()
    setup = Setup("B/2", "stage 2", 12, torch.device("cuda:0"), tokens=16, depth=2, compile="off")
    counters = Counters()
    with ours(setup) as loop:
        for _ in range(WARM):
            loop()
        before = counters.read()
        loop()
        graphs = counters.since(before)["graph_launches"]
        return {
            "decided": loop.decided,
            "said": list(loop.log.said),
            "graphs": graphs,
            "padded": loop.recipe.run.padded,
        }


def rows() -> dict[str, Any]:
    """Device memory in use after each of four rows, of which the third fails; the first leaves what is kept for all."""
    from bench.measure import give_memory_back
    from bench.workload import ours

    gates.disarm()
    device, left = torch.device("cuda:0"), []
    for fails in (False, False, True, False):
        try:
            with ours(_setup("stage 2", "cuda:0")) as loop:
                loop()
                if fails:
                    raise ValueError("in the middle of a row")
        except ValueError:
            pass
        del loop
        give_memory_back(device)
        left.append(torch.cuda.memory_allocated(device))
    return {"left": left}


def csrc() -> dict[str, Any]:
    """Which of csrc is loaded, and what a step of its optimiser launches."""
    from bench.optimiser import OptimiserCase, fresh, fused_step
    from st_fast.kernels import native

    case = OptimiserCase("two tensors", torch.device("cuda:0"), (torch.Size((300, 7)), torch.Size((70_001,))))
    state, counters = fresh(case, case.shapes), Counters()
    fused_step(state)
    before = counters.read()
    fused_step(state)
    return {"loaded": [kind for kind in ("cpu", "cuda") if native.available(kind)], "step": counters.since(before)}


def launches(op: str) -> dict[str, Any]:
    """What `bench.launches` counts of an op whose launches are known."""
    from bench.launches import op_costs
    from bench.ops import Case, Size

    case = Case(op, Size("S/2", 3, 16), torch.bfloat16, torch.device("cuda:0"))
    costs = op_costs(case)
    return {part: [cost[key] for key in ("launches", "syncs", "host_us")] for part, cost in costs.items()}


def draws() -> dict[str, Any]:
    """A batch's noisy latents in one call, for other seeds, ordinals and scales of the moments; the kernel's forms."""
    from st_fast import kernels
    from st_fast.kernels.noise.triton import _noisy_latents_kernel

    device, counters, calls = torch.device("cuda:0"), Counters(), []
    forms = _noisy_latents_kernel.device_caches[0][0]
    moments, t = torch.zeros(6, 8, 32, 32, dtype=torch.float16, device=device), torch.rand(6, device=device)
    for op in (kernels.noisy_latents, kernels.reference.noisy_latents):
        for seed, first in ((0, 0), (1, 2**40), (16, 7), (2**40, 0), (2**63 + 5, 1), (-1, 2**62)):
            ordinals = torch.arange(6, device=device) + first
            before = counters.read()
            op(moments, ordinals, t, seed, 0.18215, "linear")
            calls.append(counters.since(before))
    return {"ours": calls[:6], "definition": calls[6:], "forms": len(forms)}


def attention(form: str, caches: str) -> dict[str, Any]:
    """Kernels of Inductor's own and ops of ours around attention in a compiled layer, and its caches' counts.

    `caches` is their folder.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
    from torch._dynamo.utils import counters
    from torch._inductor.utils import run_and_get_code

    from st_fast import kernels
    from st_fast.model.attention import _efficient
    from st_fast.model.sit import Attention

    device = torch.device("cuda:0")
    layer = Attention(144, 2, True, kernels.select({"qk_norm": form}, device), _efficient).to(device, torch.bfloat16)
    y = torch.randn(3, 32, 144, device=device, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    _, codes = run_and_get_code(lambda: compiled(y).backward(torch.ones_like(y)))
    kernel, op = re.compile(r"(triton_\w+)\.run\("), re.compile(r"torch\.ops\.(\w+\.\w+)\.default\(")
    return {
        "kernels": [name for code in codes for name in kernel.findall(code)],
        "ops": [name for code in codes for name in op.findall(code)],
        "cache": {key: counters["aot_autograd"][f"autograd_cache_{key}"] for key in ("miss", "hit", "bypass")},
    }


HERE = (memory, out_of_memory, captures, broken, missing, steps, tried, rows, csrc, launches, draws, attention)
OF_PRODUCTS = (products.emulated, products.asked, products.fallbacks)
OF_THE_HOST = (host.launcher, host.modes, host.capture_fails, host.full_step, host.warm_up)
CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    check.__name__: check for check in (*HERE, *OF_PRODUCTS, *OF_THE_HOST)
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(CHECKS[sys.argv[1]](*sys.argv[2:])), flush=True)
    sys.stderr.flush()
    os._exit(0)  # torch's thread for the backward pass may still be there, which an interpreter that ends aborts for
