"""Which model a stage learnt from or began with, and whether what lies there now is still that. Imports no torch."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import CHUNK, Entry, inside, open_regular, parse_header, read_exactly, read_json
from st_fast.report import words
from st_fast.report.arms import Arm
from st_fast.report.collect import ModelKey, RunLog, Taken

GROUPS = {"raw": "model", "ema": "ema"}
"""The group of a checkpoint that holds these weights."""
SHORT = 12
"""Characters of a hash that are shown."""


def described(arm: Arm, key: ModelKey) -> str:
    """“align at step 800, raw weights, SHA-256 3fa9c2d1b04e”; the name alone where the log doesn't say, "" without."""
    name, taken = arm.stage.model(key), arm.stage.taken(key)
    if name is None:
        return ""
    if taken is None or not str(taken):
        return short(name)
    return f"{short(name)}{' at' if taken.step else ','} {taken}"


def short(name: str) -> str:
    """A stage's name or a path, without the folders far above it."""
    return name if len(name) <= 60 else f"…/{'/'.join(Path(name).parts[-2:])}"[-200:]


def origins(arms: Sequence[Arm]) -> list[str]:
    """What each stage that did not start from noise began from, a sentence each."""
    return [f"“{arm.label}” began from {told}." for arm in arms if (told := described(arm, "init"))]


def of_all(arms: Sequence[Arm]) -> str:
    """The teachers of arms with the same settings: one text where all have the same, otherwise one an arm."""
    told = {arm.label: described(arm, "teacher") for arm in arms}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"{label}: {text}" for label, text in told.items())


def warnings(arms: Sequence[Arm], beat: Callable[[], None] = lambda: None) -> list[str]:
    """Sentences on teachers of one name that were not one model, and on such that are another model now.

    `beat` is called while files are read.
    """
    found = _differing(arms)
    hashes: dict[tuple[Path, str], str | None] = {}
    for arm in arms:
        try:
            now = _changed(arm, hashes, beat)
        except (UserError, OSError, ValueError):
            now = "its folder can't be read now"
        if now:
            found.append(f"“{arm.label}” was taught by {described(arm, 'teacher')}; {now}.")
    return list(dict.fromkeys(found))


def _differing(arms: Sequence[Arm]) -> list[str]:
    """Where arms name one folder or file outside their run as their teacher, and it was not the same for all."""
    by_name: dict[str, dict[str, Taken]] = {}
    for arm in arms:
        name, taken = arm.stage.model("teacher"), arm.stage.teacher
        if name is not None and taken is not None and all(stage != name for stage in arm.run.planned):
            by_name.setdefault(str(Path(name)), {})[arm.label] = taken
    found = []
    for name, taught in by_name.items():
        digests = [{taken.sha256 for taken in taught.values() if taken.weights == kind} - {""} for kind in GROUPS]
        if len({taken.step for taken in taught.values()}) > 1 or max(map(len, digests)) > 1:
            each = "; ".join(f"“{label}” at {taken}" for label, taken in taught.items())
            found.append(f"These stages name the same teacher, {short(name)}, but learnt from different ones: {each}.")
    return found


def _folder(run: RunLog, name: str) -> Path | None:
    """Where a model lies: the folder of its checkpoints, or one checkpoint; None where there is no such folder.

    A stage of the same run is looked for in the run's folder, which may have moved since.
    """
    bases = [run.path] if name in run.planned else [Path.cwd(), run.path, run.path.parent]
    place = next((base / name for base in bases if (base / name).is_dir()), None)
    return place / "checkpoints" if place is not None and (place / "checkpoints").is_dir() else place


def _changed(arm: Arm, hashes: dict[tuple[Path, str], str | None], beat: Callable[[], None]) -> str:
    """What an arm's teacher is now, where it is another than it was; "" where it isn't, or where nobody can tell."""
    name, taken = arm.stage.model("teacher"), arm.stage.teacher
    folder = _folder(arm.run, name) if name is not None and taken is not None else None
    if folder is None or taken is None:
        return ""
    numbered = [path for path in folder.iterdir() if path.name.isdecimal() and (path / "manifest.json").is_file()]
    newest = max(numbered, key=lambda path: int(path.name), default=folder)
    if not (newest / "manifest.json").is_file():
        return ""
    manifest = read_json(newest / "manifest.json")
    if type(step := manifest.get("step")) is int and step != taken.step:
        return f"its folder now holds step {words.count(step)}"
    group = GROUPS.get(taken.weights)
    if group is None or not taken.sha256:
        return ""
    if (newest, group) not in hashes:
        hashes[newest, group] = weights_hash(newest, manifest, group, beat)
    now = hashes[newest, group]
    return "" if now in (None, taken.sha256) else f"its folder now holds {str(now)[:SHORT]} at that step"


def weights_hash(
    folder: Path, manifest: Mapping[str, object], group: str, beat: Callable[[], None] = lambda: None
) -> str | None:
    """SHA-256 over names, shapes and float32 values of a group of a checkpoint's tensors, as start records have it.

    None where it lies in several files, or in types that aren't read here. BadFile for a damaged file.
    """
    groups = manifest.get("groups")
    said = groups.get(group) if isinstance(groups, dict) else None
    name = said.get("file") if isinstance(said, dict) else None
    if not isinstance(name, str):
        return None
    path, digest = inside(folder, name), hashlib.sha256()
    with open_regular(path) as file:
        entries, _ = parse_header(file, path)
        if not {entry.dtype for entry in entries.values()} <= {"F32", "F16", "BF16", "F64"}:
            return None
        for key, entry in sorted(entries.items()):
            digest.update(f"{key}{entry.shape}".encode())
            file.seek(entry.start)
            for start in range(entry.start, entry.stop, CHUNK):
                beat()
                data = bytearray(min(CHUNK, entry.stop - start))
                read_exactly(file, memoryview(data), path)
                digest.update(_as_float32(data, entry))
    return digest.hexdigest()


def _as_float32(data: bytearray, entry: Entry) -> bytes | bytearray:
    """The values of a piece of a tensor, little-endian."""
    if entry.dtype == "F32":
        return data
    if entry.dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).tobytes()
    return np.frombuffer(data, {"F16": "<f2", "F64": "<f8"}[entry.dtype]).astype("<f4").tobytes()
