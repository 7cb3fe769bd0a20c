"""Run by test_sharding.py on every rank: gradients and update of a sharded and of a whole model; prints JSON."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from st_fast import kernels
from st_fast.core.ranks import Ranks, process_group
from st_fast.model import SiT, build
from st_fast.model.compiling import CompiledBlocks
from st_fast.recipe.schema import Model, Optim
from st_fast.train.optim import Optimizer
from st_fast.train.parallel import ShardedSum, Shards, gathered

CONFIG = Model("custom", depth=3, width=24, heads=2, patch=2, channels=3, latent_size=4, num_classes=5)
"""Over 3 ranks; of the heads' sizes 7 does not divide, and 4 leaves the last rank nothing."""
SETTINGS = Optim(lr=1e-2, weight_decay=0.1, grad_clip=0.5, ema_decay=0.9)
MUON = replace(SETTINGS, name="muon", muon_split=True, muon_adaln=True, muon_weight_decay=0.2)
UNEVEN = replace(
    CONFIG, width=20, heads=1, mlp="swiglu", norm="rms_affine", position="both", qk_norm="rms", value_residual=True,
    registers=2,
)  # fmt: skip
"""Of whose matrices no rank's rows are as many as another's; norms' weights are used before the blocks, a share of
values is one number, and the registers lie outside of all blocks."""
MICRO_BATCHES = 2
EVENTS: list[str] = []


class Heads(nn.Module):
    """Heads that are called one by one, as REPA's are, and of which one gets no gradient in the second step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 7), nn.SiLU(), nn.Linear(7, 4)) for _ in range(2)
        )


def model(dtype: torch.dtype, config: Model) -> SiT:
    choices = {"bias_gradients": "fused"}  # the default on CUDA: a bias is used outside of its layer, and in its block
    if dtype == torch.bfloat16:  # as it may be there, too
        choices["gelu_mlp"] = "fused"
    found = build(config, kernels.select(choices, torch.device("cpu")), 0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return found


def data(rank: int, micro: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    x, t = torch.randn(2, 3, 4, 4, generator=generator), torch.rand(2, generator=generator)
    return x, t, torch.randint(0, 5, (2,), generator=generator)


def loss(net: SiT, heads: Heads, rank: int, micro: int, step: int) -> Tensor:
    velocity, hidden = net(*data(rank, micro, step), 2)
    used = list(heads.projectors)[: 2 - step]
    return velocity.float().square().mean() + sum(head(hidden).float().square().mean() for head in used)


def optimizer(net: SiT, heads: Heads, dtype: torch.dtype, settings: Optim) -> Optimizer:
    return Optimizer(net, heads, settings, dtype, kernels.adamw_ema_, kernels.grad_norm)


def whole(dtype: torch.dtype, count: int, config: Model, settings: Optim) -> tuple[list[float], dict[str, Tensor]]:
    """Two steps on one rank that sees every rank's samples."""
    net, heads = model(dtype, config), Heads(config.width)
    optim, norms = optimizer(net, heads, dtype, settings), []
    for step in range(2):
        for rank in range(count):
            for micro in range(MICRO_BATCHES):
                loss(net, heads, rank, micro, step).backward()
        norms.append(float(optim.update()))
    return norms, {f"{g}/{k}": t for g, ts in optim.state().items() for k, t in ts.items()}


def sharded(
    dtype: torch.dtype, ranks: Ranks, compiled: bool, config: Model, settings: Optim
) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    """The same, each rank with its own samples and its own part of everything; and what was seen on the way."""
    net, heads = model(dtype, config), Heads(config.width)
    shards = Shards(ranks, None)
    shards.model(net)
    shards.heads(heads)
    if compiled:
        CompiledBlocks(print, dynamic=False).inside(net.blocks)
    optim = optimizer(net, heads, dtype, settings)
    sums, norms = ShardedSum((net, heads)), []
    EVENTS.clear()
    for step in range(2):
        for micro in range(MICRO_BATCHES):
            if micro == MICRO_BATCHES - 1:
                EVENTS.append("last")
                sums.expect()
            loss(net, heads, ranks.rank, micro, step).backward()
        sums.finish()
        EVENTS.append("finish")
        norms.append(float(optim.update()))
    state = {f"{g}/{k}": t for g, ts in optim.state().items() for k, t in ts.items()}
    split = [name for name, tensor in state.items() if isinstance(tensor, DTensor)]
    share = sum(t.to_local().numel() for t in state.values() if isinstance(t, DTensor))
    total = sum(state[name].numel() for name in split)
    seen = {"events": [*EVENTS], "whole": sorted(state.keys() - set(split)), "share": share / total}
    return norms, {name: gathered(tensor) for name, tensor in state.items()}, seen


def trace() -> None:
    """Notes every reduction of gradients in EVENTS from now on."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    real = group.foreach_reduce

    def traced(*arguments: Any, **options: Any) -> Any:
        EVENTS.append("reduce")
        return real(*arguments, **options)

    vars(group)["foreach_reduce"] = traced


def main(out: Path) -> None:
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="eager")  # what is captured, without a C++ compiler's time
    trace()
    found = {}
    with process_group("cpu", patience=60) as ranks:
        for name, dtype, compiled, *given in (
            ("float32", torch.float32, False, CONFIG, SETTINGS), ("bfloat16", torch.bfloat16, False, CONFIG, SETTINGS),
            ("compiled", torch.float32, True, CONFIG, SETTINGS), ("muon", torch.float32, False, UNEVEN, MUON),
        ):  # fmt: skip
            norms, state, seen = sharded(dtype, ranks, compiled, *given)
            expected_norms, expected = whole(dtype, ranks.count, *given)
            worst = max(float((state[k] - t).abs().max() / t.abs().max().clamp_min(1e-3)) for k, t in expected.items())
            same = all(state[k].shape == t.shape and state[k].dtype == t.dtype for k, t in expected.items())
            found[name] = seen | {
                "norms": norms, "expected norms": expected_norms, "worst": worst,
                "same": same and state.keys() == expected.keys(),
            }  # fmt: skip
        found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        dist.barrier()
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
