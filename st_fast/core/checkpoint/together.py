"""All ranks write one checkpoint together, each its own part, from threads: so by messages, not by collectives.

The first rank makes the folder, the others write their files into it and send their sizes and hashes; then the first
writes the manifest and renames. A rank that can't write sends the reason instead, and nothing of the save is left.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from st_fast.core.checkpoint.groups import BY_ROWS, REPLICATE, Described, described, file_name, write_group
from st_fast.core.checkpoint.store import SaveFailed, check_names, write_manifest
from st_fast.core.files import write_folder
from st_fast.core.ranks import Rendezvous, sharded

Groups = Mapping[str, Mapping[str, Tensor]]
Whole = Mapping[str, Described]
"""Every tensor of every rank, by group."""

PATIENCE = 20.0
"""Seconds that a save under way may still take after the training has given up."""


class Gone(Exception):
    """Another rank will not answer any more."""


class Team:
    """This rank's part in the saves of one stage; all ranks save the same steps in the same order."""

    def __init__(self, rank: int, count: int, messages: Rendezvous, name: str, over: Callable[[], bool]) -> None:
        """over: whether this rank's training has given up, so that a save waits for others no longer than PATIENCE."""
        self.rank, self.count, self.first = rank, count, rank == 0  # the first writes the manifest, prunes and sweeps
        self._messages, self._name, self._over, self._number = messages, name, over, 0

    def save(self, root: Path, step: int, groups: Groups, whole: Whole, meta: Mapping[str, Any]) -> Path | None:
        """Writes this rank's part of `root/<step:08d>`, as durably as `store.save`; None if other ranks failed.

        groups and whole are `split`'s results. SaveFailed on the first rank, for any rank that could not write.
        """
        self._number += 1
        target = Path(root) / f"{step:08d}"
        if self.first:
            return self._lead(target, step, groups, whole, meta)
        return self._follow(target, groups)

    def _lead(self, target: Path, step: int, groups: Groups, whole: Whole, meta: Mapping[str, Any]) -> Path:
        check_names(groups, step)
        called = saved = False
        try:
            with write_folder(target, replace=True, keep_replaced=True) as folder:
                called = True
                self._send("folder", folder.name)
                answers = [self._write(folder, groups)]
                answers += [json.loads(self._await(f"part/{rank}")) for rank in range(1, self.count)]
                if wrong := [f"rank {rank}: {one['error']}" for rank, one in enumerate(answers) if "error" in one]:
                    raise SaveFailed(target, "; ".join(wrong))
                content = {name: {"tensors": whole[name], "parts": [one[name] for one in answers]} for name in groups}
                write_manifest(folder, 2, step, content, meta)
            saved = True
        except Gone:
            raise SaveFailed(target, "another rank is gone") from None
        except OSError as error:
            raise SaveFailed(target, error.strerror or str(error)) from error
        finally:
            if not called:
                self._send("folder", "")
            self._send("end", "saved" if saved else "")
        return target

    def _follow(self, target: Path, groups: Groups) -> Path | None:
        try:
            if name := self._await("folder"):
                answer = self._write(target.with_name(name), groups)
                self._send(f"part/{self.rank}", json.dumps(answer))
            return target if self._await("end") else None
        except Gone:
            return None

    def _write(self, folder: Path, groups: Groups) -> dict[str, Any]:
        """File, SHA-256 and bytes by group, or {"error": why not}."""
        found = {}
        try:
            for name, tensors in groups.items():
                written = write_group(folder / file_name(name, self.rank, self.count), tensors)
                found[name] = {"file": written.file, "sha256": written.sha256, "bytes": written.bytes}
        except OSError as error:
            return {"error": error.strerror or str(error)}
        return found

    def _send(self, key: str, message: str) -> None:
        self._messages.write(f"{self._name}/{self._number}/{key}", message)

    def _await(self, key: str) -> str:
        pause, waited_in_vain = 0.005, 0.0
        while (message := self._messages.read(f"{self._name}/{self._number}/{key}")) is None:
            if waited_in_vain > PATIENCE:
                raise Gone
            time.sleep(pause)
            waited_in_vain += pause if self._over() else 0.0
            pause = min(2 * pause, 0.5)
        return message


def split(groups: Groups, rank: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, dict[str, object]]]]:
    """The tensors that this rank writes (its rows of sharded ones; the first rank all others too), and those of all."""
    mine: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    whole: dict[str, dict[str, dict[str, object]]] = {group: {} for group in groups}
    for group, tensors in groups.items():
        for key, tensor in tensors.items():
            by_rows = sharded(tensor)
            whole[group][key] = described(key, tensor) | {"placement": BY_ROWS if by_rows else REPLICATE}
            if by_rows or rank == 0:
                mine[group][key] = tensor.to_local() if sharded(tensor) else tensor
    return mine, whole
