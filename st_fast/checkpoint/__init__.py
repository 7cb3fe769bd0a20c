"""Checkpoints: a folder of safetensors files and a manifest, written aside and renamed, checked in full when loaded.

`<root>/<step:08d>/` holds one `<group>.safetensors` a group ("model", "ema", "optim", …) and `manifest.json` with the
shape and dtype of every tensor, the SHA-256 of every file, the metadata and its own digest. Nothing is ever pickled.
"""

from st_fast.checkpoint.history import latest, prune, sweep
from st_fast.checkpoint.match import match_strictly
from st_fast.checkpoint.saver import Saver
from st_fast.checkpoint.store import Checkpoint, NewerFormat, SaveFailed, load, save, valid

__all__ = [
    "Checkpoint",
    "NewerFormat",
    "SaveFailed",
    "Saver",
    "latest",
    "load",
    "match_strictly",
    "prune",
    "save",
    "sweep",
    "valid",
]
