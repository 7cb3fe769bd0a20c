"""The newest whole checkpoint is found behind broken ones, and nothing is deleted that could still be needed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from st_fast.core.checkpoint import latest, save, store, valid
from st_fast.core.checkpoint.store import prune, sweep
from st_fast.core.errors import RunFailed, Unreadable


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5)


def flip(path: Path) -> None:
    file = path / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x10
    file.write_bytes(data)


def lose_group(path: Path) -> None:
    (path / "optim.safetensors").unlink()


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("")


def flip_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"step": 30', '"step": 31'))


def manifest_a_folder(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


DAMAGES: dict[Callable[[Path], None], str] = {
    cut: r"model\.safetensors: expected \d+ bytes, found \d+",
    flip: r"ema\.safetensors: SHA-256 expected",
    lose_group: r"optim\.safetensors: missing",
    lose_manifest: r"manifest\.json is missing",
    empty_manifest: r"manifest\.json: not valid JSON",
    flip_manifest: r"manifest\.json: digest expected",
    manifest_a_folder: r"manifest\.json: not a regular file",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_newest_is_named_passed_over_and_kept(
    damage: Callable[[Path], None], tmp_path: Path, state: Any, same: Any
) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, state(step), {})
    damage(tmp_path / "00000030")
    before = sorted(tmp_path.rglob("*"))
    lines: list[str] = []
    found = latest(tmp_path, lines.append)
    assert found is not None and found.step == 20 and same(found.groups, state(20))
    assert len(lines) == 1 and lines[0].startswith("checkpoint 00000030 is broken, kept")
    assert re.search(DAMAGES[damage], lines[0])
    assert prune(tmp_path, keep=2) == [] and sorted(tmp_path.rglob("*")) == before


def says_the_same(one: bytes, other: bytes) -> bool:
    """Whether two JSON texts differ in whitespace only."""
    try:
        return one.split() == other.split() and json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_any_single_flipped_bit_in_any_file_is_noticed(tmp_path: Path, state: Any) -> None:
    path = save(tmp_path, 1, state(1), {"a": 1})
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 60)):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            file.write_bytes(bad)
            harmless = file.suffix == ".json" and says_the_same(bytes(bad), good)
            assert (valid(path) is None) == harmless, f"{file.name} byte {position}"
        file.write_bytes(good)
    assert valid(path) is None


def test_no_checkpoint_is_none_and_where_none_loads_nothing_begins_anew(tmp_path: Path, state: Any) -> None:
    lines: list[str] = []
    assert latest(tmp_path / "nowhere", lines.append) is None and lines == []
    cut(save(tmp_path, 1, state(1), {}))
    flip(save(tmp_path, 2, state(2), {}))
    with pytest.raises(RunFailed, match=r"none of its 2 checkpoints can be read: .*00000002.*; .*00000001.*move"):
        latest(tmp_path, lines.append)
    assert len(lines) == 2 and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("what", ["manifest.json", "model.safetensors", "the folder"])
def test_storage_that_fails_is_no_damage(what: str, number: int, tmp_path: Path, state: Any, monkeypatch: Any) -> None:
    for step in (1, 2):
        save(tmp_path, step, state(step), {})
    real, names, failing = os.open, os.listdir, [True] * 2

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if failing and str(path).endswith(f"00000002/{what}"):
            raise OSError(number, os.strerror(number), path)
        return real(path, *rest, **more)

    def refuse_names(path: Any) -> list[str]:
        if failing and what == "the folder" and Path(path) == tmp_path:
            raise OSError(number, os.strerror(number), path)
        return names(path)

    monkeypatch.setattr("os.open", refuse)
    monkeypatch.setattr("os.listdir", refuse_names)
    monkeypatch.setattr("st_fast.core.checkpoint.store.PAUSES", (0.0, 0.0))
    lines: list[str] = []
    with pytest.raises(Unreadable, match=f"cannot be .*{os.strerror(number)}"):
        latest(tmp_path, lines.append)
    assert lines == []
    failing.clear()
    found = latest(tmp_path, lines.append)
    assert found is not None and found.step == 2


def test_storage_that_fails_for_a_moment_is_asked_again(tmp_path: Path, state: Any, monkeypatch: Any) -> None:
    save(tmp_path, 1, state(1), {})
    save(tmp_path, 2, state(2), {})
    real, failures = os.open, [errno.EIO, errno.ESTALE]

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if failures and str(path).endswith("00000002/manifest.json"):
            raise OSError(failures.pop(), "for a moment", path)
        return real(path, *rest, **more)

    monkeypatch.setattr("os.open", refuse)
    monkeypatch.setattr("st_fast.core.checkpoint.store.PAUSES", (0.0, 0.0))
    found = latest(tmp_path, pytest.fail)
    assert found is not None and found.step == 2 and not failures


def nowhere(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("not-mounted")


def a_file(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.write_text("")


@pytest.mark.parametrize("at", ["run", "run/stage", "run/stage/checkpoints", "run/stage/checkpoints/00000002"])
def test_checkpoints_behind_a_link_to_nowhere_are_not_taken_for_none(at: str, tmp_path: Path, state: Any) -> None:
    root = tmp_path / "run/stage/checkpoints"
    for step in (1, 2):
        save(root, step, state(step), {})
    nowhere(tmp_path / at)
    with pytest.raises(Unreadable, match=rf"{at}: a link to not-mounted, where nothing is"):
        latest(root, pytest.fail)
    (tmp_path / at).unlink()
    (tmp_path / at).with_name("elsewhere").rename(tmp_path / at)
    found = latest(root, pytest.fail)
    assert found is not None and found.step == 2


def test_what_is_no_folder_is_not_taken_for_no_checkpoint(tmp_path: Path, state: Any) -> None:
    a_file(save(tmp_path / "one", 1, state(1), {}))
    with pytest.raises(RunFailed, match=r"none of its 1 checkpoints .*00000001: not a checkpoint; expected a folder"):
        latest(tmp_path / "one", lambda line: None)
    save(tmp_path / "two", 1, state(1), {})
    a_file(save(tmp_path / "two", 2, state(2), {}))
    lines: list[str] = []
    found = latest(tmp_path / "two", lines.append)
    assert found is not None and found.step == 1 and "00000002: not a checkpoint" in lines[0]
    a_file(tmp_path / "two")
    with pytest.raises(Unreadable, match=r"two: can't be looked into \(Not a directory\)"):
        latest(tmp_path / "two", pytest.fail)


def test_one_that_a_running_training_deletes_while_it_is_read_gives_way_to_a_newer(
    tmp_path: Path, state: Any, same: Any, monkeypatch: Any
) -> None:
    save(tmp_path, 1, state(1), {})
    save(tmp_path, 2, state(2), {})
    real, trained = store.read_manifest, [False]

    def read(path: Path) -> store.Manifest:
        found = real(path)
        if not trained[0]:
            trained[0] = True
            save(tmp_path, 3, state(3), {})
            save(tmp_path, 4, state(4), {})
            assert len(prune(tmp_path, keep=2)) == 2
        return found

    monkeypatch.setattr(store, "read_manifest", read)
    found = latest(tmp_path, pytest.fail)
    assert found is not None and found.step == 4 and same(found.groups, state(4))


def test_some_steps_are_taken_before_newer_ones_and_the_others_where_there_are_none(tmp_path: Path, state: Any) -> None:
    for step in (4, 6, 8, 9):
        save(tmp_path, step, state(step), {})

    def taken(before: int) -> int:
        found = latest(tmp_path, lambda line: None, before=before, first=lambda step: step % 4 == 0)
        assert found is not None
        return found.step

    assert taken(10) == 8 and taken(9) == 8 and taken(8) == 4
    flip(tmp_path / "00000004")
    assert taken(8) == 6


def test_a_checkpoint_renamed_to_another_step_is_not_believed(tmp_path: Path, state: Any) -> None:
    save(tmp_path, 1, state(1), {})
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000009")
    lines: list[str] = []
    found = latest(tmp_path, lines.append)
    assert found is not None and found.step == 1 and "its manifest says step 1" in lines[0]


def test_prune_keeps_the_last_k_every_nth_and_whatever_is_broken(tmp_path: Path, state: Any) -> None:
    for step in range(10, 110, 10):
        save(tmp_path, step, state(step), {})
    flip(tmp_path / "00000020")
    cut(tmp_path / "00000080")
    cut(tmp_path / "00000100")
    deleted = prune(tmp_path, keep=2, keep_every=50)
    assert sorted(os.listdir(tmp_path)) == [f"{step:08d}" for step in (20, 50, 70, 80, 90, 100)]
    assert [path.name for path in deleted] == [f"{step:08d}" for step in (60, 40, 30, 10)]


def test_prune_deletes_nothing_while_no_successor_is_whole(tmp_path: Path, state: Any) -> None:
    for step in (1, 2, 3):
        flip(save(tmp_path, step, state(step), {}))
    assert prune(tmp_path, keep=1) == [] and len(os.listdir(tmp_path)) == 3
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, keep=0)


def test_saving_a_step_again_keeps_the_old_one_until_prune(tmp_path: Path, state: Any, same: Any) -> None:
    save(tmp_path, 1, state(1), {})
    save(tmp_path, 1, state(2), {})
    found = latest(tmp_path, pytest.fail)
    assert found is not None and same(found.groups, state(2))
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000001.aside-1"]
    assert [path.name for path in prune(tmp_path, keep=3)] == ["00000001.aside-1"]


def test_a_broken_step_saved_again_is_kept_aside(tmp_path: Path, state: Any) -> None:
    cut(save(tmp_path, 1, state(1), {}))
    save(tmp_path, 1, state(1), {})
    assert prune(tmp_path, keep=1) == [] and valid(tmp_path / "00000001") is None
    assert valid(tmp_path / "00000001.aside-1") is not None


def test_what_was_set_aside_is_used_when_its_successor_is_broken(tmp_path: Path, state: Any, same: Any) -> None:
    save(tmp_path, 1, state(1), {})
    cut(save(tmp_path, 1, state(2), {}))
    lines: list[str] = []
    found = latest(tmp_path, lines.append)
    assert found is not None and same(found.groups, state(1)) and len(lines) == 1


def test_sweep_removes_leftovers_of_a_killed_process_only(tmp_path: Path, state: Any) -> None:
    save(tmp_path, 1, state(1), {})
    for name in ("00000002.partial-77", "00000000.deleted-9", "notes.partial-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["00000001", "notes.partial-3"]
