"""Opens a data folder, whichever of the two layouts it has."""

from __future__ import annotations

from pathlib import Path

from st_fast.data.manifest import Manifest, read_manifest
from st_fast.data.repa import RepaSet, is_repa
from st_fast.data.shards import RecordSet, Say, check_size, open_shards


def open_data(folder: Path, verify: bool = True, at_least: int = 1, say: Say | None = None) -> RecordSet:
    """The records of a folder of shards, or of a folder in REPA's layout, read in place. See `open_shards`."""
    if not is_repa(folder):
        return open_shards(folder, verify, at_least, say)
    records = RepaSet(folder)
    check_size(folder, records.manifest, at_least)
    if verify:
        records.verify()
        if say:
            say(f"data: {len(records):,} latents in REPA's layout verified")
    return records


def read_any_manifest(folder: Path) -> Manifest:
    """What a data folder of either layout says of itself; no latent is read."""
    if not is_repa(folder):
        return read_manifest(folder)
    records = RepaSet(folder)
    records.close()
    return records.manifest
