"""Sharded checkpoints without a process group: rows cut by hand, and ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from st_fast.core.checkpoint import Team
from st_fast.core.checkpoint.groups import described
from st_fast.core.checkpoint.store import SaveFailed

Groups = Mapping[str, Mapping[str, Tensor]]


def pieces(groups: Groups, rank: int, count: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """What `together.split` gives for a state that is sharded but for its 0-dim tensors, by `torch.chunk`."""
    mine: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, Any]] = {}
    for group, tensors in groups.items():
        mine[group], whole[group] = {}, {}
        for key, tensor in tensors.items():
            if tensor.dim():
                chunks = tensor.chunk(count)
                mine[group][key] = chunks[rank] if rank < len(chunks) else tensor[:0]
            elif rank == 0:
                mine[group][key] = tensor
            whole[group][key] = described(key, tensor) | {"placement": "shard(0)" if tensor.dim() else "replicate"}
    return mine, whole


class Box(dict[str, str]):
    """Letters between threads."""

    def write(self, key: str, letter: str) -> None:
        assert self.get(key) in (None, ""), f"{key} is written twice"
        self[key] = letter

    def read(self, key: str) -> str | None:
        return self.get(key)


def save_sharded(
    root: Path, step: int, groups: Groups, meta: Mapping[str, Any], count: int = 2
) -> tuple[list[Path | None], list[str]]:
    """Saves as `count` ranks do; what each got, and the errors of the first."""
    box, got, errors = Box(), [None] * count, list[str]()

    def work(rank: int) -> None:
        try:
            team = Team(rank, count, box, "t", over=lambda: False)
            got[rank] = team.save(root, step, *pieces(groups, rank, count), meta)  # type: ignore[call-overload]
        except SaveFailed as error:
            errors.append(f"{rank}: {error}")

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return got, errors
