"""The student's weight average (EMA) as a live, frozen model: what methods learn from that teach the student itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from st_fast.model import SiT
from st_fast.train.sharding import is_sharded, local


class Average:
    """A model whose weights are those of the EMA at every call.

    In float32 its parameters are the optimiser's EMA tensors themselves: no memory, no copying. In a lower precision
    they are copies, brought up to date at each call by one pass over the EMA (6 bytes of traffic a parameter, little
    beside a forward pass), as they are in shards. Autocast would move as much for each use, and the fused ops, which
    want one dtype throughout, would not run under it.
    """

    def __init__(self, model: SiT) -> None:
        self._model = model.eval().requires_grad_(False)
        self._sources: list[Tensor] = []
        self._copies: list[Tensor] = []

    def follow(self, emas: Mapping[str, Tensor]) -> None:
        """Follows these tensors, all of the model's by name, from now on. They must be updated in place."""
        sharded = is_sharded(self._model)
        for name, parameter in self._model.named_parameters():
            if parameter.dtype == emas[name].dtype and not sharded:
                parameter.data = emas[name]
            else:
                self._sources.append(local(emas[name]))
                self._copies.append(local(parameter.data))

    @torch.no_grad()
    def __call__(self) -> SiT:
        """The model, up to date. It keeps no state of its own, so there is nothing to save or to restore."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._sources)
        return self._model
