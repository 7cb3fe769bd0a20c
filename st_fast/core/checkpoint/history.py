"""The checkpoints of a stage: which is the newest that is whole, and which may be deleted."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from st_fast.core.checkpoint.store import Checkpoint, NewerFormat, load, valid
from st_fast.core.files import BadFile

_NAME = re.compile(r"(\d{8,})(?:\.aside-(\d+))?")
_LEFTOVER = re.compile(r"\d{8,}(\.aside-\d+)?\.(partial|deleted)-\d+")


class Candidate(NamedTuple):
    """A folder named like a checkpoint; `aside` is 0, or counts folders that a save of the same step set aside."""

    step: int
    aside: int
    path: Path


def candidates(root: Path) -> list[Candidate]:
    """Folders named like checkpoints, newest step first, unchecked; of one step the regular one comes first."""
    root = Path(root)
    names = [(match, root / match.string) for name in _names(root) if (match := _NAME.fullmatch(name))]
    found = [Candidate(int(match[1]), int(match[2] or 0), path) for match, path in names if path.is_dir()]
    # Between the two renames of a replacing save only the folder set aside exists, so these count as well.
    return sorted(found, key=lambda c: (-c.step, c.aside != 0, -c.aside))


def latest(
    root: Path, warn: Callable[[str], None], groups: Sequence[str] | None = None, before: int | None = None
) -> Checkpoint | None:
    """The newest checkpoint that loads with every check; each broken one is named to `warn` and left where it is.

    With `before`, the newest of fewer completed steps than that.

    None if there is none. A checkpoint of a newer format is no broken one: falling back behind it would silently
    throw work away, so `NewerFormat` is raised.
    """
    tried = [candidate for candidate in candidates(root) if before is None or candidate.step < before]
    for candidate in tried:
        try:
            checkpoint = load(candidate.path, groups)
            if checkpoint.step != candidate.step:
                raise BadFile(f"{candidate.path}: its manifest says step {checkpoint.step}")
            return checkpoint
        except NewerFormat:
            raise
        except BadFile as error:
            warn(f"checkpoint {candidate.path.name} is broken, kept as it is and passed over: {error}")
    if tried:
        warn(f"{root}: none of its {len(tried)} checkpoints can be read")
    return None


def prune(root: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Deletes old checkpoints, keeping the last `keep` and every step divisible by `keep_every`; returns the deleted.

    Nothing is deleted before a newer one was read back in full and found whole. Broken ones are never deleted, nor do
    they count. Call it only while holding the run's lock and with no save in flight.
    """
    if keep < 1 or keep_every < 0:
        raise ValueError(f"keep is {keep} and keep_every {keep_every}; at least 1 and 0 are needed")
    found = candidates(root)
    newest = next((candidate for candidate in found if valid(candidate.path) is None), None)
    if newest is None:
        return []
    kept = {newest.step}
    deleted = []
    for candidate in found[found.index(newest) + 1 :]:
        due = len(kept) < keep or (keep_every > 0 and candidate.step % keep_every == 0)
        if due and candidate.step not in kept and valid(candidate.path, deep=False) is None:
            kept.add(candidate.step)
        elif valid(candidate.path) is None:
            _discard(candidate.path)
            deleted.append(candidate.path)
    return deleted


def sweep(root: Path) -> None:
    """Removes what a killed process left half written or half deleted; call it only while holding the run's lock."""
    for name in _names(Path(root)):
        if _LEFTOVER.fullmatch(name):
            shutil.rmtree(Path(root) / name, ignore_errors=True)


def _discard(path: Path) -> None:
    # Renamed first: a kill half-way must not leave something that looks like a broken checkpoint.
    doomed = path.with_name(f"{path.name}.deleted-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _names(root: Path) -> list[str]:
    return os.listdir(root) if root.is_dir() else []
