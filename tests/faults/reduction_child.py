"""Run by test_reduction.py on every rank: sums gradients of a small model and writes what it saw as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from st_fast.core.ranks import process_group
from st_fast.train import parallel
from st_fast.train.parallel import GradientSum


class Model(nn.Module):
    """Four layers, one of which a rank may leave out, and a parameter that no rank ever uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, skip: bool) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = x if skip and number == 2 else layer(x).tanh()
        return x.square().sum()


def main(out: Path, dtype: torch.dtype | None) -> None:
    torch.set_num_threads(1)
    vars(parallel)["FIRST_BYTES"] = vars(parallel)["BUCKET_BYTES"] = 290  # a layer a bucket
    events: list[str] = []
    real = dist.all_reduce

    def traced(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        events.append("send")
        return real(tensor, *arguments, **options)

    dist.all_reduce = traced  # type: ignore[assignment]
    with process_group("cpu", patience=60) as ranks:
        model = Model()
        model.layers[0].weight.register_hook(lambda gradient: events.append("first layer"))
        parameters = list(model.parameters())
        sums = GradientSum(parameters, ranks, dtype)
        inputs = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(ranks.rank))
        found = []
        for step in range(2):
            for number, x in enumerate(inputs):
                if number == 1:
                    events.append("last")
                    sums.expect()
                model(x, skip=ranks.rank == 1 and step == 1).backward()
            sums.finish()
            events.append("finish")
            found.append([p.grad.flatten().tolist() if p.grad is not None else None for p in parameters])
            for parameter in parameters:
                parameter.grad = None
        record = {"gradients": found, "events": events, "buckets": len(sums.buckets)}
        (out / f"{ranks.rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), {"own": None, "bf16": torch.bfloat16, "fp32": torch.float32}[os.environ["TRAVEL"]])
