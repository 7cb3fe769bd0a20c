"""Checkpoint folders: saved whole or not at all, loaded with every check; the newest of a stage, and pruning."""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from st_fast.core.checkpoint.groups import Group, fields, parse_group, write_group
from st_fast.core.checkpoint.meta import Meta, read_meta
from st_fast.core.errors import RunFailed, UserError, unreadable
from st_fast.core.files import (
    JSON_LIMIT,
    BadFile,
    Unreadable,
    durable_file,
    inside,
    is_pickle,
    json_bytes,
    printable,
    read_json,
    shown,
    write_all,
    write_folder,
)

FORMAT = "st_fast.checkpoint"
VERSION = 2
"""The newest that is read. 1: a file a group; 2: a file a group and rank, written only where sharded."""
MANIFEST = "manifest.json"
PAUSES = (0.2, 1.0)
"""Seconds between the tries to read a checkpoint from storage that fails."""
T = TypeVar("T")
_NAME = re.compile(r"(\d{8,})(?:\.aside-(\d+))?")
_LEFTOVER = re.compile(r"\d{8,}(\.aside-\d+)?\.(partial|deleted)-\d+")


class NewerFormat(BadFile):
    """The checkpoint is fine, but only a newer st_fast can read it."""


class SaveFailed(RunFailed):
    """A checkpoint could not be written (disk full, say); nothing of it is left and earlier ones are untouched."""

    def __init__(self, target: Path, why: str) -> None:
        super().__init__(f"{target}: not saved ({why}); earlier checkpoints are untouched")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: groups of named tensors on the CPU, and the metadata given to `save`."""

    step: int
    groups: Mapping[str, Mapping[str, Tensor]]
    meta: Mapping[str, Any]
    path: Path
    said: Meta
    """The metadata as training writes it, checked."""


class Manifest(NamedTuple):
    """A manifest whose digest and types were checked; the files it names were not."""

    step: int
    groups: Mapping[str, Group]
    meta: Mapping[str, Any]
    said: Meta
    digest: str
    """Of the manifest, and with it of every file's hash."""


def save(root: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> Path:
    """Writes `root/<step:08d>` and returns it: after any crash the old state or the new is there, never half of one.

    A checkpoint of the same step that is there already is set aside (`prune` deletes it once it may).

    Raises:
        SaveFailed: the file system refused; nothing has changed.
        ValueError: a group's name is no plain file name, a dtype can't be saved, or `meta` is not finite JSON.
    """
    check_names(groups, step)
    target = Path(root) / f"{step:08d}"
    try:
        with write_folder(target, replace=True, keep_replaced=True) as folder:
            files = {name: write_group(folder / f"{name}.safetensors", group) for name, group in groups.items()}
            write_manifest(folder, 1, step, {name: asdict(file) for name, file in files.items()}, meta)
    except OSError as error:
        raise SaveFailed(target, error.strerror or str(error)) from error
    return target


def check_names(groups: Iterable[str], step: int) -> None:
    """ValueError for a group that can't be a file's name, or a negative step."""
    for name in groups:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(f"group {name!r}: only letters, digits, '_', '-' and '.' are allowed")
    if step < 0:
        raise ValueError(f"step is {step}, it must not be negative")


def load(
    path: Path, groups: Sequence[str] | None = None, verify: bool = True, optional: Sequence[str] = (),
    hollow: bool = False,
) -> Checkpoint:  # fmt: skip
    """Loads all groups or those named, on the CPU; `BadFile` if anything is not as the manifest says.

    Beside those named, the `optional` ones where they are there. hollow: every byte is checked and none kept; tensors
    are on the meta device, and `read_rows` reads the parts that are wanted.

    The hashes of the loaded groups are checked with `verify`; of the others only existence, size and header.
    """
    path = Path(path)
    manifest = read_manifest(path)
    wanted = list(manifest.groups) if groups is None else [*groups, *(n for n in optional if n in manifest.groups)]
    if lacking := [name for name in wanted if name not in manifest.groups]:
        raise BadFile(f"{path}: has no group {', '.join(lacking)}; it has {shown(list(manifest.groups))}")
    for name, group in manifest.groups.items():
        if name not in wanted:
            group.check(path, deep=False)
    if hollow:
        for name in wanted:
            manifest.groups[name].check(path, deep=verify)
    loaded = {
        name: manifest.groups[name].hollow() if hollow else manifest.groups[name].read(path, verify) for name in wanted
    }
    return Checkpoint(manifest.step, loaded, manifest.meta, path, manifest.said)


def awaited(path: Path, digest: str, patience: float) -> Manifest:
    """The manifest of a checkpoint that another rank has checked, once this one sees it as well.

    A network file system may show new files late: for `patience` seconds. BadFile where it still is another one then.
    """
    end = time.monotonic() + patience
    while True:
        try:
            if (manifest := read_manifest(path)).digest == digest:
                return manifest
            problem = BadFile(f"{path}: another checkpoint than the one that the first rank has read")
        except BadFile as error:
            problem = error
        if time.monotonic() > end:
            raise problem
        time.sleep(0.2)


def valid(path: Path, deep: bool = True) -> str | None:
    """None if the checkpoint is whole, otherwise what is wrong with it; reads every byte unless `deep` is False."""
    try:
        for group in read_manifest(Path(path)).groups.values():
            group.check(Path(path), deep)
    except BadFile as error:
        return str(error)
    return None


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder: format, version, digest, types and metadata checked."""
    if not _there(path):
        raise BadFile(f"{path}: there is no checkpoint here")
    if not os.path.isdir(path):
        _no_link_to_nowhere(path)
        if is_pickle(path):
            raise BadFile(f"{path}: a pickle or zip file (torch.save), which is never opened; a checkpoint is a folder")
        raise BadFile(f"{path}: not a checkpoint; expected a folder with {MANIFEST}")
    file = inside(path, MANIFEST)
    if not _there(file):
        raise BadFile(f"{path}: not a checkpoint, {MANIFEST} is missing")
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise BadFile(f"{file}: format is {shown(content.get('format'))}, expected {FORMAT!r}")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise BadFile(f"{file}: version is {shown(version)}, expected a whole number from 1 to {VERSION}")
    if version > VERSION:
        raise NewerFormat(f"{file}: written by a newer st_fast (format {shown(version)}; this one reads {VERSION})")
    types = {"format": str, "version": int, "step": int, "groups": dict, "meta": dict, "digest": str}
    fields(str(file), content, types)
    try:
        digest = digest_of(content)
    except RecursionError:
        raise BadFile(f"{file}: nested too deeply") from None
    if content["digest"] != digest:
        raise BadFile(f"{file}: digest expected {shown(content['digest'])}, found {digest} (its content was changed)")
    if content["step"] < 0:
        raise BadFile(f"{file}: step is {content['step']}, expected a whole number from 0")
    groups = {name: parse_group(name, value, file, version) for name, value in content["groups"].items()}
    said = read_meta(content["meta"], content["step"], f"{file}: meta")
    return Manifest(content["step"], groups, content["meta"], said, digest)


def _there(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, "read", error) from None
    return True


def _no_link_to_nowhere(path: Path) -> None:
    """`Unreadable` where the path is a link whose target is not there, as on a disk that is not mounted."""
    if os.path.islink(path) and not os.path.lexists(os.path.realpath(path)):
        raise Unreadable(f"{path}: a link to {printable(os.readlink(path))}, where nothing is (a disk not mounted?)")


def digest_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content (without its own digest), independent of its layout."""
    text = json.dumps({key: manifest[key] for key in manifest if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(
    folder: Path, version: int, step: int, groups: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]
) -> None:
    """Writes a checkpoint's manifest durably; ValueError for what could not be read back, OSError on a full disk."""
    content = {"format": FORMAT, "version": version, "step": step, "groups": groups, "meta": dict(meta)}
    content = json.loads(json_bytes(content))  # as it will be read: tuples are lists, every key is a string
    data = json_bytes({**content, "digest": digest_of(content)})
    if len(data) > JSON_LIMIT:
        raise ValueError(f"the manifest would have {len(data)} bytes, at most {JSON_LIMIT} can be read back")
    with durable_file(folder / MANIFEST) as file:
        write_all(file, data)


class Candidate(NamedTuple):
    """A folder named like a checkpoint; `aside` is 0, or counts folders that a save of the same step set aside."""

    step: int
    aside: int
    path: Path


def candidates(root: Path) -> list[Candidate]:
    """All that is named like a checkpoint, newest step first, unchecked; of one step the regular one comes first.

    None where there is no `root`. `Unreadable` where it, or a folder above it, is no folder or a link to nowhere.
    """
    named = [(match, path) for path in _entries(root) if (match := _NAME.fullmatch(path.name))]
    found = [Candidate(int(match[1]), int(match[2] or 0), path) for match, path in named]
    # Between the two renames of a replacing save only the folder set aside exists, so these count as well.
    return sorted(found, key=lambda c: (-c.step, c.aside != 0, -c.aside))


def _entries(root: Path) -> list[Path]:
    root = Path(root)
    try:
        return list(root.iterdir())
    except NotADirectoryError as error:
        raise Unreadable(f"{root}: can't be looked into ({error.strerror})") from None
    except FileNotFoundError:
        for path in (root, *root.absolute().parents):
            _no_link_to_nowhere(path)
        return []
    except OSError as error:
        raise unreadable(root, "read", error) from None


def latest(
    root: Path,
    warn: Callable[[str], None],
    groups: Sequence[str] | None = None,
    before: int | None = None,
    first: Callable[[int], bool] = lambda step: True,
    optional: Sequence[str] = (),
    hollow: bool = False,
) -> Checkpoint | None:
    """The newest checkpoint that loads with every check; each broken one is named to `warn` and left where it is.

    With `before`, of fewer completed steps than that; with `first`, of steps for which it is true where there are such.
    `groups`, `optional` and `hollow` are as in `load`.

    None if there is none. Where there are some and none loads, RunFailed with each one's reason: to begin anew beside
    them would throw work away. Nor is one broken that can't be read for a reason that says nothing of its content
    (`Unreadable`, after a few tries), or that is of a newer format (`NewerFormat`): these are raised.
    """
    failed: dict[Path, str] = {}

    def left() -> list[Candidate]:
        found = (one for one in candidates(root) if one.path not in failed and (before is None or one.step < before))
        return sorted(found, key=lambda one: not first(one.step))

    while untried := left():  # listed anew: a run that goes on meanwhile saves new ones and deletes old ones
        candidate = untried[0]
        try:
            checkpoint = patiently(partial(load, candidate.path, groups, optional=optional, hollow=hollow))
            if checkpoint.step != candidate.step:
                raise BadFile(f"{candidate.path}: its manifest says step {checkpoint.step}")
            return checkpoint
        except (NewerFormat, Unreadable):
            raise
        except BadFile as error:
            failed[candidate.path] = str(error)
            if os.path.lexists(candidate.path):
                warn(f"checkpoint {candidate.path.name} is broken, kept as it is and passed over: {error}")
    if failed:
        raise RunFailed(
            f"{root}: none of its {len(failed)} checkpoints can be read: {'; '.join(failed.values())}; "
            "nothing begins anew beside them: mend them, or move the folder away"
        )
    return None


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns, tried again where storage fails for a moment."""
    for pause in PAUSES:
        try:
            return read()
        except Unreadable:
            time.sleep(pause)
    return read()


def prune(root: Path, keep: int, keep_every: int = 0, also: Callable[[int], bool] = lambda step: False) -> list[Path]:
    """Deletes old checkpoints, keeping the last `keep` and every step divisible by `keep_every`; returns the deleted.

    Of the steps for which `also` is true the last `keep` are kept, however many others came after them.
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
        due = due or (also(candidate.step) and sum(map(also, kept)) < keep)
        if due and candidate.step not in kept and valid(candidate.path, deep=False) is None:
            kept.add(candidate.step)
        elif valid(candidate.path) is None:
            # Renamed first: a kill half-way must not leave something that looks like a broken checkpoint.
            doomed = candidate.path.with_name(f"{candidate.path.name}.deleted-{os.getpid()}")
            os.rename(candidate.path, doomed)
            shutil.rmtree(doomed)
            deleted.append(candidate.path)
    return deleted


def sweep(root: Path) -> None:
    """Removes what a killed process left half written or half deleted; call it only while holding the run's lock."""
    for path in _entries(root):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def match_strictly(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str, limit: int = 8) -> None:
    """Raises a UserError listing every missing key, unexpected key and shape or dtype that differs; `what` names it.

    Of each kind, `limit` are written out and the rest counted.
    """

    def kind(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

    both = [key for key in expected if key in found and kind(expected[key]) != kind(found[key])]
    problems = {
        "missing": [shown(key) for key in expected if key not in found],
        "unexpected": [shown(key) for key in found if key not in expected],
        "different": [f"{shown(k)} (expected {kind(expected[k])}, found {kind(found[k])})" for k in both],
    }
    parts = [
        f"{len(keys)} {name}: {', '.join(keys[:limit])}" + f" and {len(keys) - limit} more" * (len(keys) > limit)
        for name, keys in problems.items()
        if keys
    ]
    if parts:
        raise UserError(f"{what}: tensors do not match: {'; '.join(parts)}")
