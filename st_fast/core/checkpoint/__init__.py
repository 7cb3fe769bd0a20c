"""Checkpoints: a folder of safetensors files and a manifest, written aside and renamed, checked in full when loaded.

`<root>/<step:08d>/` holds one `<group>.safetensors` a group ("model", "ema", "optim", …) and `manifest.json` with the
shape and dtype of every tensor, the SHA-256 of every file, the metadata and its own digest. Nothing is ever pickled.
A sharded run writes one file a group and rank, `<group>.rank-<r>-of-<n>.safetensors`; what is loaded is always whole.
"""

from st_fast.core.checkpoint.saver import Saver
from st_fast.core.checkpoint.store import (
    Checkpoint,
    candidates,
    latest,
    load,
    match_strictly,
    read_manifest,
    save,
    valid,
)
from st_fast.core.checkpoint.together import Team

__all__ = [
    "Checkpoint",
    "Saver",
    "Team",
    "candidates",
    "latest",
    "load",
    "match_strictly",
    "read_manifest",
    "save",
    "valid",
]
