"""The ops' namespace: `ops` is `torch.ops.st_fast`, whose compiled kernels are loaded by importing this.

A copy of a family in another project, and the tree that `hub.py` writes, have a file of their own in this one's place.
"""

from __future__ import annotations

import torch

from . import native

NAME = "st_fast"
ops = getattr(torch.ops, NAME)


def add_op_namespace_prefix(name: str) -> str:
    """An op's full name."""
    return f"{NAME}::{name}"


native.load()
