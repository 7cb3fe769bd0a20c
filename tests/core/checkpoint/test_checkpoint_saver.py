"""Saving beside the training: what is written is the state at the call, and a failed save stops nothing."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import st_fast.core.checkpoint.saver
from st_fast.core.checkpoint import Saver, latest, load, valid


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writes wait until the event is set."""
    opened = threading.Event()
    real = st_fast.core.checkpoint.save

    def gated(*arguments: Any) -> Path:
        assert opened.wait(30)
        return real(*arguments)

    monkeypatch.setattr(st_fast.core.checkpoint.saver, "save", gated)
    return opened


def test_what_is_written_is_the_state_at_the_call(tmp_path: Path, state: Any, same: Any, gate: threading.Event) -> None:
    live, meta = state(1), {"list": [1]}
    live["model"]["strided"] = torch.arange(12.0).reshape(3, 4).T
    live["model"]["parameter"] = torch.nn.Parameter(torch.ones(3))
    expected = {name: {key: value.detach().clone() for key, value in group.items()} for name, group in live.items()}
    saver = Saver(tmp_path, pytest.fail)
    saver.save(1, live, meta)
    for group in live.values():
        for tensor in group.values():
            tensor.detach().zero_()
    meta["list"].append(2)
    gate.set()
    path = saver.wait()
    assert path == tmp_path / "00000001"
    found = load(path)
    assert same(found.groups, expected) and found.meta == {"list": [1]}


def test_one_write_is_in_flight_and_a_second_save_waits(
    tmp_path: Path, state: Any, same: Any, gate: threading.Event
) -> None:
    saver = Saver(tmp_path, pytest.fail)
    assert saver.save(1, state(1), {}) < 5
    threading.Timer(0.3, gate.set).start()
    assert saver.save(2, state(2), {}) > 0.2
    assert valid(tmp_path / "00000001") is None
    saver.wait()
    for step in (1, 2):  # the snapshot's memory was used twice
        assert same(load(tmp_path / f"{step:08d}").groups, state(step))


def test_state_may_change_its_shapes_between_saves(tmp_path: Path, same: Any) -> None:
    saver = Saver(tmp_path, pytest.fail)
    states = [{"g": {"x": torch.ones(3), "y": torch.ones(1)}}, {"g": {"x": torch.ones(2, 2).half()}, "h": {}}]
    for step, groups in enumerate(states):
        saver.save(step, groups, {})
    saver.wait()
    for step, groups in enumerate(states):
        assert same(load(tmp_path / f"{step:08d}").groups, groups)


def test_a_failed_save_is_one_line_and_the_next_works(tmp_path: Path, state: Any) -> None:
    root = tmp_path / "stage" / "checkpoints"
    lines: list[str] = []
    saver = Saver(root, lines.append)
    (tmp_path / "stage").write_text("a file where a folder is needed")
    saver.save(1, state(1), {})
    assert saver.wait() is None and len(lines) == 1
    assert "00000001: not saved (File exists)" in lines[0]
    (tmp_path / "stage").unlink()
    saver.save(2, state(2), {})
    assert saver.wait() == root / "00000002" and len(lines) == 1


def test_a_failed_save_is_tried_again_with_what_it_was_to_write(tmp_path: Path, state: Any, same: Any) -> None:
    root, live, lines = tmp_path / "stage" / "checkpoints", state(1), list[str]()
    saver = Saver(root, lines.append)
    (tmp_path / "stage").write_text("a file where a folder is needed")
    saver.save(1, live, {"step": 1})
    for group in live.values():
        for tensor in group.values():
            tensor.zero_()
    for _ in range(2):
        saver.again()
        assert saver.wait() is None and len(lines) == 1  # which is told once
    (tmp_path / "stage").unlink()
    saver.again()
    assert saver.wait() == root / "00000001" and len(lines) == 1
    found = load(root / "00000001")
    assert same(found.groups, state(1)) and found.meta == {"step": 1}
    saver.again()  # there is nothing to try again
    assert [path.name for path in root.iterdir()] == ["00000001"]


def test_mistakes_of_the_caller_are_raised_not_swallowed(tmp_path: Path) -> None:
    saver = Saver(tmp_path, pytest.fail)
    with pytest.raises(ValueError, match="not JSON compliant"):
        saver.save(1, {}, {"loss": float("inf")})
    saver.save(1, {"g": {"x": torch.zeros(1, dtype=torch.complex64)}}, {})
    with pytest.raises(ValueError, match="complex64"):
        saver.wait()
    assert saver.wait() is None


def test_old_ones_are_pruned_and_leftovers_swept(tmp_path: Path, state: Any) -> None:
    (tmp_path / "00000009.partial-1").mkdir()
    saver = Saver(tmp_path, pytest.fail, keep=2, keep_every=3)
    for step in range(1, 8):
        saver.save(step, state(step), {})
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003", "00000006", "00000007"]


def test_training_is_held_up_for_a_fraction_of_the_write(tmp_path: Path) -> None:
    groups = {name: {"x": torch.randn(4 * 2**20)} for name in ("model", "ema", "optim")}
    saver, stalls, writes = Saver(tmp_path, pytest.fail, keep=1), [], []
    for step in range(4):
        stalls.append(saver.save(step, groups, {}))
        start = time.perf_counter()
        saver.wait()
        writes.append(time.perf_counter() - start)
    assert median(stalls[1:]) < 0.7 * median(writes), (stalls, writes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_snapshot_from_cuda_is_true_and_does_not_wait_for_the_device(tmp_path: Path) -> None:
    x = torch.arange(64 * 2**20, device="cuda", dtype=torch.float32)
    expected = x.cpu()
    saver = Saver(tmp_path, pytest.fail)
    saver.save(0, {"g": {"x": x}}, {})  # allocates the page-locked memory
    saver.wait()
    start = time.perf_counter()
    torch.cuda._sleep(2 * 10**9)  # the device is busy for about a second
    stall = saver.save(1, {"g": {"x": x}}, {})
    x.zero_()
    torch.cuda.synchronize()
    busy = time.perf_counter() - start
    saver.wait()
    found = latest(tmp_path, pytest.fail)
    assert found is not None and found.step == 1 and torch.equal(found.groups["g"]["x"], expected)
    assert stall < busy / 2
