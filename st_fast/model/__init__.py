"""The network (SiT), its attention, and what it takes to build one."""

from st_fast.model.sit import SiT, build, unfilled

__all__ = ["SiT", "build", "unfilled"]
