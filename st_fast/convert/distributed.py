"""`convert` from a checkpoint to a folder of PyTorch's Distributed Checkpoint and back, on one rank or several."""

import argparse
from pathlib import Path

from st_fast.core.checkpoint.dcp import is_dcp, read_dcp, write_dcp
from st_fast.core.checkpoint.store import candidates, read_manifest
from st_fast.core.errors import UserError
from st_fast.core.ranks import process_group
from st_fast.model.stored import newest_stage
from st_fast.recipe import load_run

PATIENCE = 24 * 3_600.0
"""Seconds a rank waits for the others, which may write to slow storage."""


def convert(given: argparse.Namespace) -> None:
    """The command where one side is DCP's. UserError for what does not go together."""
    for name in ("layout", "heads", "num_classes", "internal_head", "vae", "empty_context", "push"):
        if getattr(given, name, None):
            option = "from" if name == "layout" else name.replace("_", "-")
            raise UserError(f"--{option}: a checkpoint and a DCP folder hold all of a model, as it is")
    back = is_dcp(given.source)
    if back and given.to not in (None, "stage"):
        raise UserError(f"--to {given.to}: {given.source} is a DCP folder, of which a stage folder is made")
    source = given.source if back else checkpoint_of(given.source, given.stage)
    if given.target is None:
        print(f"{source}: a DCP folder; with a target it becomes a stage folder")
        return
    if given.dry_run:
        print(f"{given.target}: would be written as {'stage' if back else 'dcp'} from {source}")
        return
    with process_group("cpu", PATIENCE) as ranks:
        if back:
            written = read_dcp(source, given.target / "checkpoints", ranks)
        else:
            write_dcp(source, given.target, ranks)
            written = given.target
        if ranks.first:
            print(f"{written}: written as {'a checkpoint' if back else 'dcp'} by {ranks.count} ranks")


def checkpoint_of(path: Path, stage: str | None) -> Path:
    """The newest sound checkpoint of a run's stage, of a stage, or the checkpoint itself."""
    if (path / "recipe.toml").is_file():
        path = path / newest_stage(path, load_run(path), stage)
    elif stage:
        raise UserError(f"--stage {stage}: {path} is no run")
    if (path / "manifest.json").is_file():
        return path
    found = candidates(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if not found:
        raise UserError(f"{path}: no run, stage or checkpoint of st_fast: only these become a DCP folder")
    read_manifest(found[0].path)
    return found[0].path
