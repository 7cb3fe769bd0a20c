"""What the checkpoint tests share: a small state with every kind of tensor, comparison, and forging of manifests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import st_fast
from st_fast.core.checkpoint.store import digest_of

State = dict[str, dict[str, Tensor]]


def make_state(seed: int) -> State:
    """Three groups with fp32, bf16, fp16, fp64, int64, uint8, bool, 0-dim and empty tensors; each seed differs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 5, generator=draw)
    return {
        "model": {"weight": weight, "half": weight[0].half(), "brain": weight[1].bfloat16(), "none": weight[:0]},
        "ema": {"weight": weight * 0.5, "exact": weight[2].double()},
        "optim": {
            "step": torch.tensor(seed),
            "bytes": torch.randint(0, 256, (7,), generator=draw).to(torch.uint8),
            "flags": weight > 0,
        },
    }


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    """All that a tensor is: dtype, shape and bytes, so that NaNs and signed zeros compare as well."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), raw.tolist()


def are_same(left: Mapping[str, Mapping[str, Tensor]], right: Mapping[str, Mapping[str, Tensor]]) -> bool:
    def described(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, object]]:
        return {name: {key: bits(tensor) for key, tensor in group.items()} for name, group in state.items()}

    return described(left) == described(right)


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a checkpoint's manifest as a forger would: with a digest that fits."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    manifest["digest"] = digest_of(manifest)
    file.write_text(json.dumps(manifest))


@pytest.fixture
def state() -> Callable[[int], State]:
    return make_state


@pytest.fixture
def same() -> Callable[[Mapping[str, Mapping[str, Tensor]], Mapping[str, Mapping[str, Tensor]]], bool]:
    return are_same


@pytest.fixture
def forge() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    return edit_manifest


@pytest.fixture
def child_env() -> dict[str, str]:
    """The environment of a child process that imports the st_fast under test."""
    source = str(Path(str(st_fast.__file__)).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
