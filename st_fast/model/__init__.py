"""The networks (SiT, MMDiT), their attention, and what it takes to build one."""

from st_fast.model.building import build, network, unfilled
from st_fast.model.mmdit import MMDiT
from st_fast.model.sit import SiT
from st_fast.model.transformer import DiffusionTransformer

__all__ = ["DiffusionTransformer", "MMDiT", "SiT", "build", "network", "unfilled"]
