"""A checkpoint of several ranks: the same tensors whatever the number that wrote it, or nothing at all."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from st_fast.core.checkpoint import groups, latest, load, read_manifest, save, valid
from st_fast.core.checkpoint.store import awaited
from st_fast.core.files import BadFile
from st_fast.core.ranks import rows
from tests.core.checkpoint.sharded import save_sharded
from tests.core.checkpoint.test_checkpoint_fuzz import assert_forged_manifests_are_true_or_refused
from tests.fuzz import blocks


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_every_tensor_comes_back_bit_by_bit_from_any_number_of_ranks(
    count: int, tmp_path: Path, state: Any, same: Any
) -> None:
    """Also where ranks have no row of a tensor; the groups that are asked for, and their rows of no other."""
    got, errors = save_sharded(tmp_path, 4, state(3), {"seed": 3}, count)
    assert got == [tmp_path / "00000004"] * count and errors == []
    found = load(tmp_path / "00000004")
    assert same(found.groups, state(3)) and found.step == 4 and found.meta == {"seed": 3}
    assert same(load(tmp_path / "00000004", ["ema"]).groups, {"ema": state(3)["ema"]})
    expected = {f"{group}.rank-{rank}-of-{count}.safetensors" for group in state(3) for rank in range(count)}
    assert {path.name for path in found.path.iterdir()} == expected | {"manifest.json"}
    assert valid(found.path) is None
    newest = latest(tmp_path, pytest.fail, groups=())
    assert newest is not None and newest.groups == {}


def test_each_rank_writes_its_own_rows_and_no_more(tmp_path: Path) -> None:
    state = {"g": {"rows": torch.arange(40_000.0).reshape(100, 400), "count": torch.tensor(3)}}
    (path, *_), _ = save_sharded(tmp_path, 1, state, {}, 4)
    assert path is not None
    sizes = [(path / f"g.rank-{rank}-of-4.safetensors").stat().st_size for rank in range(4)]
    assert max(sizes) < 40_000 + 500 and sum(sizes) < 160_000 + 2_000


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "words"), [(Path.unlink, "missing"), (cut, "bytes, found"), (flip, "SHA-256 expected")]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_without_any_ranks_file_the_checkpoint_before_is_taken(
    harm: Callable[[Path], None], words: str, rank: int, tmp_path: Path, state: Any, same: Any
) -> None:
    """FAULT 24, and 23 of a rank's file: named, passed over, and nothing is deleted."""
    for step in (1, 2):
        save_sharded(tmp_path, step, state(step), {})
    harm(tmp_path / "00000002" / f"ema.rank-{rank}-of-2.safetensors")
    lines: list[str] = []
    found = latest(tmp_path, lines.append)
    assert found is not None and found.step == 1 and same(found.groups, state(1))
    assert len(lines) == 1 and f"ema.rank-{rank}-of-2.safetensors" in lines[0] and words in lines[0]
    assert len(list((tmp_path / "00000002").iterdir())) == (6 if words == "missing" else 7)
    with pytest.raises(BadFile, match="ema"):
        load(tmp_path / "00000002")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_disk_is_full_costs_that_save_on_all_and_nothing_else(
    victim: int, tmp_path: Path, state: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULT 22: told once, by the first rank; the next save works."""
    save_sharded(tmp_path, 1, state(1), {})
    real = os.write

    def full(descriptor: int, data: Any) -> int:
        if f"rank-{victim}-of-2" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        got, errors = save_sharded(tmp_path, 2, state(2), {})
    assert got == [None, None] and len(errors) == 1
    assert f"00000002: not saved (rank {victim}: No space left on device); earlier" in errors[0]
    assert os.listdir(tmp_path) == ["00000001"]
    save_sharded(tmp_path, 2, state(2), {})
    found = latest(tmp_path, pytest.fail)
    assert found is not None and found.step == 2 and same(found.groups, state(2))


def test_where_no_folder_can_be_made_all_ranks_give_the_save_up(tmp_path: Path, state: Any) -> None:
    (tmp_path / "file").touch()
    got, errors = save_sharded(tmp_path / "file", 1, state(1), {})
    assert got == [None, None] and len(errors) == 1 and "not saved (" in errors[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["groups"]["model"].update(parts=[]), "parts is empty, expected one file a rank"),
        (lambda m: m["groups"]["model"]["parts"].reverse(), "part 0 is .*rank-1-of-2"),
        (lambda m: m["groups"]["model"]["parts"].pop(), "part 0 is .*rank-0-of-2.*expected …\\.rank-0-of-1"),
        (lambda m: m["groups"]["model"]["parts"][1].update(file="../model.rank-1-of-2.safetensors"), "stay inside"),
        (lambda m: m["groups"]["model"]["parts"][1].update(bytes=1.5), "bytes is 1.5, expected int"),
        (lambda m: m["groups"]["model"]["tensors"].pop("weight"), "tensors are not as the manifest says"),
        (lambda m: m["groups"]["model"]["tensors"]["weight"].update(shape=[2**62, 5]), "not as the manifest says"),
        (lambda m: m["groups"]["model"]["tensors"]["weight"].update(shape=[5, 6]), "not as the manifest says"),
        (lambda m: m["groups"]["model"]["tensors"]["weight"].update(shape=-1), "shape is -1, expected list"),
        (lambda m: m["groups"]["model"]["tensors"]["weight"].update(placement="shard(1)"), "placement 'shard\\(1\\)'"),
        (lambda m: m["groups"]["model"]["tensors"]["weight"].update(placement="replicate"), "not as the manifest"),
        (lambda m: m["groups"]["optim"]["tensors"]["step"].update(placement="shard(0)"), "of shape \\[\\]"),
        (lambda m: m.update(version=1), "expected an object with file, sha256"),
        (lambda m: m.update(version=3), "written by a newer st_fast"),
    ],
)
def test_a_forged_manifest_of_shards_is_one_clear_line(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path, state: Any, forge: Any
) -> None:
    save_sharded(tmp_path, 5, state(0), {})
    forge(tmp_path / "00000005", change)
    with pytest.raises(BadFile, match=message) as caught:
        load(tmp_path / "00000005")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", blocks(3, 14))
def test_mutated_manifests_of_shards_are_true_or_refused(
    part: int, tmp_path: Path, state: Any, same: Any, forge: Any
) -> None:
    draw = random.Random(5000 + part)
    save_sharded(tmp_path, 5, state(0), {"seed": 3})
    assert_forged_manifests_are_true_or_refused(tmp_path / "00000005", state(0), draw, same, forge)


def test_a_replacing_save_sets_whole_files_of_the_same_step_aside(tmp_path: Path, state: Any, same: Any) -> None:
    save(tmp_path, 3, state(1), {})
    save_sharded(tmp_path, 3, state(2), {})
    assert sorted(os.listdir(tmp_path)) == ["00000003", "00000003.aside-1"]
    assert same(load(tmp_path / "00000003").groups, state(2)) and same(
        load(tmp_path / "00000003.aside-1").groups, state(1)
    )


@pytest.mark.parametrize("writers", [1, 2, 3, 9])
@pytest.mark.parametrize("readers", [1, 4, 5])
def test_any_number_of_ranks_reads_its_rows_and_no_more(
    writers: int, readers: int, tmp_path: Path, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what any number has written; tensors that are not split are read whole by each."""
    save_sharded(tmp_path, 4, state(3), {}, writers)
    path, read = tmp_path / "00000004", list[int]()
    real = groups.read_exactly

    def counted(file: Any, into: memoryview, path: Path) -> None:
        read.append(len(into))
        real(file, into, path)

    monkeypatch.setattr(groups, "read_exactly", counted)
    manifest = read_manifest(path)
    for name, record in manifest.groups.items():
        whole, parts = state(3)[name], []
        for rank in range(readers):
            read.clear()
            parts.append(record.read_rows(path, lambda _, shape, r=rank: rows(shape[0], r, readers) if shape else None))
            assert sum(read) == sum(t.nbytes for t in parts[-1].values())
        for key, tensor in whole.items():
            found = torch.cat([part[key] for part in parts]) if tensor.ndim else parts[0][key]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    hollow = load(path, hollow=True)
    assert all(t.is_meta for group in hollow.groups.values() for t in group.values())
    assert {g: {k: (t.shape, t.dtype) for k, t in ts.items()} for g, ts in hollow.groups.items()} == {
        g: {k: (t.shape, t.dtype) for k, t in ts.items()} for g, ts in state(3).items()
    }


@pytest.mark.parametrize("harm", [cut, flip])
def test_what_is_read_by_parts_is_checked_before(harm: Callable[[Path], None], tmp_path: Path, state: Any) -> None:
    save_sharded(tmp_path, 4, state(3), {}, 2)
    harm(tmp_path / "00000004" / "model.rank-1-of-2.safetensors")
    with pytest.raises(BadFile, match=r"model\.rank-1"):
        load(tmp_path / "00000004", hollow=True)


def test_a_checkpoint_that_shows_late_is_waited_for(tmp_path: Path, state: Any) -> None:
    (path, *_), _ = save_sharded(tmp_path / "here", 4, state(3), {}, 1)
    assert path is not None
    digest, late = read_manifest(path).digest, tmp_path / "late"
    with pytest.raises(BadFile, match="there is no checkpoint"):
        awaited(late, digest, patience=0.1)
    timer = threading.Timer(0.3, lambda: os.rename(path, late))
    timer.start()
    assert awaited(late, digest, patience=30).step == 4
    with pytest.raises(BadFile, match="another checkpoint than the one that the first rank has read"):
        awaited(late, "0" * 64, patience=0.1)
