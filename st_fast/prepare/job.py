"""Jobs that make a folder of shards piece by piece: resumable, and shared by any number of processes.

Shard k is made by process k mod world alone, so no process waits for another. Beside each finished shard lies a note of
its content; the process that finds all notes complete writes the manifest and removes them. What the work was begun
with stays in job.json: the same command with anything else is refused, before the end and after it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from st_fast.core.comparison import check_same
from st_fast.core.errors import RunFailed, UserError, counted
from st_fast.core.files import BadFile, make_folder, read_json, shown, write_json_atomic
from st_fast.core.machine import rank, rank_count
from st_fast.core.writing import WRONG_PLACE, cannot_write
from st_fast.data.labels import NULL_LABEL
from st_fast.data.manifest import FILE_NAME, Manifest, ShardEntry, crop_of, read_manifest, write_manifest
from st_fast.prepare.writing import shard_name, write_shard

JOB_FILE = "job.json"
"""Everything that the folder's content depends on, in unfinished and in finished work."""
SKIPPED_FILE = "skipped.json"
"""The images that were left out, by name with the reason, beside the manifest; there only if there are any.

Files that are no images stand there too, LISTED of them at most.
"""
LISTED = 1_000
ONLY_THEN = ("images", "content", "count")
"""Where none of these differs, the name of the source is none of its content: it may have moved."""
Progress = Callable[[int], object]
"""Called with the number of images or records done since the last call."""
Produced = tuple[np.ndarray, np.ndarray, dict[str, str]]
"""Moments (n, 2C, H, W) float16 or float32, labels (n,) int64, and the images left out, by name with the reason."""


class Producer(Protocol):
    """Makes the content of numbered shards, always the same for the same number."""

    shards: int
    """Number of shards."""
    template: Manifest
    """The manifest without count and shards."""
    fingerprint: dict[str, Any]
    """Everything that the content depends on: work is continued only where it is the same."""
    left_out: Mapping[str, str]
    """Files of the source that are no images, by name with the reason."""

    def produce(self, number: int, progress: Progress) -> Produced:
        """The content of shard `number`."""
        ...


def own_share() -> slice:
    """Those of all shards that this process makes, of the processes that torchrun started."""
    return slice(rank(), None, rank_count())


def run_job(folder: Path, producer: Producer, max_bad: int, progress: Progress) -> bool:
    """Makes this process's missing shards, and the manifest if those of all processes are there: then it gives True.

    UserError when the folder was begun with other settings, or more than `max_bad` images had to be skipped;
    RunFailed when writing fails, as on a full disk. Finished shards stay: the same command goes on from there.
    """
    if (folder / FILE_NAME).is_file():
        check_finished(folder, producer.fingerprint)
        return False
    try:
        make_folder(folder)
        if not (folder / JOB_FILE).is_file() and any(folder.glob("*.safetensors")):
            raise UserError(f"{folder}: it holds shards of something else; name an empty or a new folder")
        check_unfinished(folder, producer.fingerprint)
        for number in range(producer.shards)[own_share()]:
            if is_done(folder, number):
                continue
            for partial in folder.glob(f"{shard_name(number)}.partial-*"):  # of this shard's killed maker
                partial.unlink()
            moments, labels, skipped = producer.produce(number, progress)
            entry = ShardEntry(shard_name(number), 0, 0, "")
            if len(labels):
                entry = write_shard(folder / entry.file, moments, labels, producer.template)
            write_json_atomic(_note(folder, number), asdict(entry) | {"skipped": skipped})
            _check_skipped(_notes(folder, producer.shards), folder, max_bad)
        return _finish(folder, producer, max_bad)
    except OSError as error:
        done = sum(is_done(folder, number) for number in range(producer.shards))
        if not done and error.errno in WRONG_PLACE:
            raise cannot_write(folder, error) from error
        raise RunFailed(
            f"{folder}: {error.strerror or error}; {done} of {producer.shards} shards are complete and stay, "
            "and the same command goes on from there"
        ) from error


def check_unfinished(folder: Path, wanted: Mapping[str, Any]) -> None:
    """`check_begun`, where the folder may be of an older version that wrote fewer settings, or not be there yet."""
    there = read_json(folder / JOB_FILE) if (folder / JOB_FILE).is_file() else wanted
    _compare(there, wanted, f"{folder}: begun with")
    if folder.is_dir() and not (folder / JOB_FILE).is_file():
        write_json_atomic(folder / JOB_FILE, wanted)


def check_finished(folder: Path, wanted: Mapping[str, Any]) -> None:
    """UserError naming the settings that differ from those a finished folder was made with, as far as it tells them.

    One of an older version, without job.json, tells what its manifest does.
    """
    if (folder / JOB_FILE).is_file():
        there = read_json(folder / JOB_FILE)
    else:
        manifest = read_manifest(folder)
        there = {
            "dtype": manifest.dtype, "flip": manifest.flip, "num_classes": manifest.num_classes,
            "class_names": list(manifest.class_names), "size": crop_of(manifest.source),
        }  # fmt: skip
        if there["size"] is None:
            del there["size"]
        skipped = len(read_json(folder / SKIPPED_FILE)) if (folder / SKIPPED_FILE).is_file() else 0
        if "count" in wanted and not skipped:  # nor did the oldest versions list what they skipped
            there["count"] = manifest.count // (1 + manifest.flip)
    _compare(there, wanted, f"{folder}: complete, but made with")


def _compare(there: Mapping[str, Any], wanted: Mapping[str, Any], found: str) -> None:
    both = [key for key in wanted if key in there]
    if all(there[key] == wanted[key] for key in ONLY_THEN if key in both):
        both = [key for key in both if key != "source"]
        names = [side.get("class_names") for side in (there, wanted)]
        if "images" in both and wanted.get("num_classes", 1) > 1 and not all(names):
            both = [key for key in both if key != "class_names"]  # of the same labels; a card came or went
    remedy = "use those, or name another folder to write"
    check_same({key: there[key] for key in both}, {key: wanted[key] for key in both}, found, remedy)


def check_begun(folder: Path, wanted: Mapping[str, Any], advice: str) -> None:
    """Writes job.json, or compares it: UserError naming the settings that differ from those the work began with."""
    if not (folder / JOB_FILE).is_file():
        if any(folder.glob("*.safetensors")):
            raise UserError(f"{folder}: it holds shards and no {JOB_FILE} that tells of what; {advice}")
        write_json_atomic(folder / JOB_FILE, wanted)
    check_same(read_json(folder / JOB_FILE), wanted, f"{folder}: begun with", advice)


def _note(folder: Path, number: int) -> Path:
    return folder / f"{shard_name(number)}.json"


def is_done(folder: Path, number: int) -> bool:
    """Whether shard `number` of unfinished work is complete."""
    note, shard = _note(folder, number), folder / shard_name(number)
    if not note.is_file():
        return False
    size = read_json(note)["bytes"]
    return size == 0 or (shard.is_file() and shard.stat().st_size == size)


def _check_skipped(notes: list[dict[str, Any]], folder: Path, max_bad: int) -> dict[str, str]:
    """The images that were left out, by name with the reason; UserError where they are more than `max_bad`."""
    skipped = {name: why for note in notes for name, why in note["skipped"].items()}
    if (count := len(skipped)) > max_bad:
        name, why = next(iter(skipped.items()))
        raise UserError(
            f"{folder}: {count} images can't be used, --max-bad allows {max_bad}; the first is {name} ({why})"
        )
    return skipped


def skipped_in(folder: Path, producer: Producer) -> int:
    """How many of its images a finished folder lacks; 0 while it is not finished."""
    if not ((folder / FILE_NAME).is_file() and (folder / SKIPPED_FILE).is_file()):
        return 0
    return sum(name not in producer.left_out for name in read_json(folder / SKIPPED_FILE))


def _notes(folder: Path, shards: int) -> list[dict[str, Any]]:
    return [read_json(path) for path in (_note(folder, number) for number in range(shards)) if path.is_file()]


def _finish(folder: Path, producer: Producer, max_bad: int) -> bool:
    """Writes the manifest if the shards of all processes are there. Two processes that both do write the same.

    Whether it did.
    """
    missing = [number for number in range(producer.shards) if not is_done(folder, number)]
    notes = _notes(folder, producer.shards)
    if (folder / FILE_NAME).is_file():  # another process finished meanwhile and removed notes
        return False
    if missing:
        tqdm.write(f"{folder}: {len(missing)} of {producer.shards} shards are still to come, from other processes")
        return False
    skipped = _check_skipped(notes, folder, max_bad)
    entries = tuple(ShardEntry(**{k: v for k, v in note.items() if k != "skipped"}) for note in notes if note["count"])
    count = sum(entry.count for entry in entries)
    if not count:
        raise UserError(f"{folder}: not one usable image")
    if skipped or producer.left_out:
        listed = dict(itertools.islice(producer.left_out.items(), LISTED))
        write_json_atomic(
            folder / SKIPPED_FILE, {name: f"not an image: {why}" for name, why in listed.items()} | skipped
        )
    write_manifest(folder, replace(producer.template, count=count, shards=entries))
    for number in range(producer.shards):
        _note(folder, number).unlink(missing_ok=True)
    left_out = f"; {counted(len(skipped), 'image')} skipped" if skipped else ""
    latents = " × ".join(map(str, (producer.template.channels, *producer.template.shape[1:])))
    what = f"latents of {latents}, {(n := producer.template.num_classes)} class{'es' * (n != 1)}"
    tqdm.write(f"{folder}: {count:,} records in {counted(len(entries), 'shard')}: {what}{left_out}")
    return True


def reopened(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """How `open_source` is to open the source of a set's images again: by which columns, and without labels.

    Where images were skipped for lack of a label there are labels, though a single class. `BadFile` for a job.json
    whose columns are no text.
    """
    skipped = read_json(folder / SKIPPED_FILE) if (folder / SKIPPED_FILE).is_file() else {}
    if manifest.num_classes == 1 and not manifest.class_names and NULL_LABEL not in skipped.values():
        return {"unlabelled": True} | _columns(folder, ("image_column",))
    return _columns(folder, ("image_column", "label_column"))


def _columns(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    made = read_json(folder / JOB_FILE) if (folder / JOB_FILE).is_file() else {}
    found = {name: made[name] for name in names if name in made}
    for name, value in found.items():
        if type(value) is not str:
            raise BadFile(f"{folder / JOB_FILE}: {name} = {shown(value)}: text is needed")
    return found
