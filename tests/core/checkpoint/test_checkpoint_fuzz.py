"""750 damaged manifests and headers, 2,100 with ST_FAST_FUZZ=full: a clear error or a correct load, nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from st_fast.core.checkpoint import Checkpoint, load, save
from st_fast.core.errors import UserError
from st_fast.core.files import read_header, sha256_file
from tests.core.conftest import State
from tests.fuzz import blocks, watched

ODD_VALUES: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, 1e308, "", "..", "/", "\ud800", "a\0b",
              "x" * 300, [], {}, [[[]]], "F32", "BF16", [2**62, 4], [0, 8], [8, 0]]  # fmt: skip


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to three random edits: a byte changed, a piece dropped, doubled, moved or replaced by noise."""
    result = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at, size = draw.randrange(len(result) + 1), draw.randint(1, 12)
        piece = result[at : at + size]
        kind = draw.randrange(5)
        if kind == 0 and piece:
            result[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del result[at:]
        elif kind == 2:
            del result[at : at + size]
        elif kind == 3:
            result[at:at] = piece * draw.randint(1, 50)
        else:
            result[at:at] = draw.randbytes(size)
    return bytes(result)


def damaged_value(value: Any, draw: random.Random) -> Any:
    """The JSON value with one place in it replaced, dropped, renamed or nudged."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        changed = dict(value) if isinstance(value, dict) else list(value)
        kind = draw.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.2 and isinstance(changed, dict):
            changed[draw.choice(["", "extra", "__metadata__", "\ud800"])] = changed.pop(key)
        else:
            changed[key] = damaged_value(value[key], draw)
        return changed
    if type(value) is int and draw.random() < 0.5:
        return value + draw.choice([-8, -4, -1, 1, 4, 8, 2**40])
    return draw.choice(ODD_VALUES)


def loaded(path: Path) -> Checkpoint | None:
    found = None
    with watched("checkpoint", sum(file.stat().st_size for file in path.iterdir())):
        found = load(path)
    return found


def assert_forged_manifests_are_true_or_refused(
    path: Path, truth: State, draw: random.Random, same: Any, forge: Any
) -> None:
    """Fifty times another value in the manifest of the checkpoint at `path`, which holds `truth`."""
    data = (path / "manifest.json").read_bytes()

    def change(manifest: dict[str, Any]) -> None:
        key = draw.choice(sorted(manifest))
        manifest[key] = damaged_value(manifest[key], draw)

    for _ in range(50):
        (path / "manifest.json").write_bytes(data)
        forge(path, change)
        if found := loaded(path):
            renamed = not found.groups.keys() <= truth.keys()
            assert renamed or same(found.groups, {name: truth.get(name) for name in found.groups})


@pytest.mark.parametrize("part", blocks(5, 14))
def test_damaged_manifests(part: int, tmp_path: Path, state: Any, same: Any) -> None:
    draw = random.Random(1000 + part)
    path = save(tmp_path, 5, state(0), {"seed": 3, "nested": {"list": [1, 2, {"x": None}]}})
    good = load(path)
    file = path / "manifest.json"
    data = file.read_bytes()
    for _ in range(50):
        file.write_bytes(damaged_bytes(data, draw))
        if found := loaded(path):
            assert found.step == 5 and found.meta == good.meta and same(found.groups, good.groups)


@pytest.mark.parametrize("part", blocks(5, 14))
def test_forged_manifests(part: int, tmp_path: Path, state: Any, same: Any, forge: Any) -> None:
    """With a digest that fits, so that the checks behind the digest are reached; tensors are true or refused."""
    draw = random.Random(2000 + part)
    assert_forged_manifests_are_true_or_refused(save(tmp_path, 5, state(0), {"seed": 3}), state(0), draw, same, forge)


@pytest.mark.parametrize("part", blocks(5, 14))
def test_damaged_headers(part: int, tmp_path: Path, state: Any, forge: Any) -> None:
    """Recorded with their true hash; whatever we accept, the safetensors library accepts and reads the same way."""
    draw = random.Random(3000 + part)
    path = save(tmp_path, 5, state(0), {})
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    accepted = 0
    for number in range(50):
        if number % 2:
            file.write_bytes(damaged_bytes(data[:length], draw) + data[length:])
        else:
            text = json.dumps(damaged_value(json.loads(data[8:length]), draw)).encode()
            file.write_bytes(len(text).to_bytes(8, "little") + text + data[length:])
        forge(path, lambda m: m["groups"]["model"].update(sha256=sha256_file(file), bytes=file.stat().st_size))
        try:
            entries = read_header(file)
        except UserError as error:
            assert "\n" not in str(error) and loaded(path) is None
            continue
        accepted += 1
        found = loaded(path)
        theirs = safetensors.torch.load_file(file)
        assert {key: tuple(tensor.shape) for key, tensor in theirs.items()} == {k: e.shape for k, e in entries.items()}
        assert found is None or all(found.groups["model"][key].equal(theirs[key]) for key in theirs)
    assert accepted < 25
