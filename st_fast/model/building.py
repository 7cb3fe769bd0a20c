"""Builds the network that a recipe's [model] describes."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from st_fast.kernels import KernelTable
from st_fast.model.attention import BACKENDS, Attend
from st_fast.model.mmdit import MMDiT
from st_fast.model.own import OwnNetwork
from st_fast.model.sit import SiT
from st_fast.model.transformer import DiffusionTransformer
from st_fast.recipe.schema import Model

NETWORKS: dict[str, type[SiT | MMDiT | OwnNetwork]] = {"sit": SiT, "mmdit": MMDiT, "own": OwnNetwork}
"""By `model.network`."""


def network(config: Model, kernels: KernelTable, attend: Attend = BACKENDS["sdpa"].attend) -> DiffusionTransformer:
    """The network, drawn from the global generator."""
    return NETWORKS[config.network](config, kernels, attend)


def build(
    config: Model, kernels: KernelTable, seed: int, attend: Attend = BACKENDS["sdpa"].attend
) -> DiffusionTransformer:
    """The network, drawn from `seed` without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network(config, kernels, attend)


def unfilled(
    config: Model, kernels: KernelTable, device: torch.device, dtype: torch.dtype,
    attend: Attend = BACKENDS["sdpa"].attend,
) -> DiffusionTransformer:  # fmt: skip
    """A network on `device` whose weights are not drawn, for one that takes all of them over: it costs no time.

    A module of one's own is built as it builds itself: its buffers may be more than memory.
    """
    if config.network == "own":
        return build(config, kernels, 0, attend).to(device, dtype)
    with torch.device("meta"), _NothingDrawn():
        model = network(config, kernels, attend)
    return model.to(dtype).to_empty(device=device)


class _NothingDrawn(TorchFunctionMode):
    """Leaves nn.init out: of a weight without memory there is nothing to fill, and normal_ would import a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))
