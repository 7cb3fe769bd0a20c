"""Activation checkpointing (arXiv 1604.06174): what the backward pass needs is computed again instead of kept.

"block" keeps a block's two inputs (x and y) and runs the block again; "attention" keeps everything but the inside of
the attention: qkv, q, k, v and the output before its projection. Nothing is drawn at random inside a block, so both
give the same bits as keeping everything.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from st_fast.model.sit import Run, SiT, run_module


def recomputed(run: Run) -> Run:
    """`run`, keeping only what it is given."""

    def call(module: nn.Module, *inputs: Any) -> Any:
        return checkpoint(run, module, *inputs, use_reentrant=False, preserve_rng_state=False)

    return call


_recomputed_attention = recomputed(run_module)  # one for all blocks, so that they share a compiled body


def checkpoint_activations(model: SiT, what: str) -> None:
    """Sets a model that is trained to "none", "attention" or "block"; after `run_block` was set, if it is compiled.

    A compiled block is run again as a whole; the attention is run again inside the compiled block.
    """
    if what == "block":
        model.run_block = recomputed(model.run_block)
    elif what == "attention":
        model.set_run_attention(_recomputed_attention)
