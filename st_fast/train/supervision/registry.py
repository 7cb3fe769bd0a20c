"""From a stage's settings to the method that implements them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal

import torch

from st_fast.kernels import KernelTable
from st_fast.model import SiT
from st_fast.model.encoders import ImageEncoder
from st_fast.model.side_stream import Branches, batched
from st_fast.recipe.schema import Model, Stage
from st_fast.train.optim import EmaModel
from st_fast.train.supervision.protocol import Supervision


@dataclass(frozen=True)
class Parts:
    """What a method may be built from."""

    config: Model
    kernels: KernelTable
    teacher: SiT | None
    """Frozen, in eval mode, on the device; there if the method names a teacher."""
    average: EmaModel | None = None
    """The student's own weight average; there if the method learns from it."""
    feature_widths: tuple[int, ...] = ()
    """D_j of each image encoder that the method names."""
    path: Literal["linear", "cosine"] = "linear"
    seed: int = 0
    """The run's, of a method's own draws."""
    branches: Branches = batched
    """How a guided teacher runs with the labels and with the null label."""
    encoders: tuple[ImageEncoder, ...] = ()
    """The image encoders themselves, where they run live."""


def create(stage: Stage, parts: Parts, seed: int) -> Supervision:
    """The stage's method, its heads drawn from `seed` without touching the global generator."""
    module, _, name = stage.method.implementation.partition(":")
    implementation = getattr(importlib.import_module(module), name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return implementation(stage.method, parts)
