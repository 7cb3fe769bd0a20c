"""Every loader gives the same batches for the same requests, needs no state to resume, and outlives bad storage."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from st_fast.core.errors import RunFailed, how_to_install
from st_fast.core.files import BadFile, read_header
from st_fast.core.machine import container_limit
from st_fast.core.random import RecordOrder
from st_fast.data import ahead as ahead_module
from st_fast.data import loader as loader_module
from st_fast.data.ahead import Patience, ReadAhead, RecordSet
from st_fast.data.loader import DaliLoader, Loader, ResidentLoader, dali_missing, kept_bytes, make_loader, trial_rate
from st_fast.data.shards import ShardSet, open_data

from .conftest import MakeSet, random_moments

CPU = torch.device("cpu")
IMPATIENT = Patience(timeout=0.2, attempts=3, pause=0.01)

needs_dali = pytest.mark.skipif(bool(dali_missing()), reason="DALI isn't installed")
KINDS = ["resident", "torch", pytest.param("dali", marks=needs_dali)]


@pytest.fixture
def records(make_set: MakeSet) -> Iterator[ShardSet]:
    shards = open_data(make_set(), verify=False)
    yield shards
    shards.close()


def quiet(text: str) -> None:
    """Takes a notice and drops it."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_batches_are_the_requested_records_bit_for_bit(make_set: MakeSet, kind: str, dtype: str) -> None:
    loader = make_loader(kind, open_data(make_set(dtype=dtype)), CPU, quiet)
    truth = random_moments(50, (4, 3, 5)).to(getattr(torch, dtype))
    rng = np.random.default_rng(1)
    requests = [rng.integers(0, 50, size) for size in (7, 7, 1, 30, 7, 64)]
    answers = list(loader.stream(iter(requests)))
    assert len(answers) == len(requests)
    for request, (moments, labels) in zip(requests, answers, strict=True):
        assert moments.dtype == truth.dtype and torch.equal(moments, truth[request])
        assert labels.dtype == torch.int64 and labels.tolist() == (request % 7).tolist()
    loader.close()


@pytest.mark.parametrize(("part", "reads"), [(1, 50), (3, 17), (60, 1)])
def test_a_resident_set_is_read_in_parts_of_bounded_size(records: ShardSet, part: int, reads: int, monkeypatch) -> None:
    sizes, stream, closed = [], ReadAhead.stream, []

    def counted(self: ReadAhead, requests: list[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        sizes.extend(map(len, requests))
        return stream(self, requests)

    monkeypatch.setattr(ReadAhead, "stream", counted)
    monkeypatch.setattr(ReadAhead, "close", lambda self: closed.append(True))
    monkeypatch.setattr(loader_module, "PART_BYTES", part * records.manifest.record_bytes - (part == 1))
    loader = ResidentLoader(records, CPU, count=50 if part < 60 else 41)
    assert len(sizes) == reads and max(sizes) <= part and closed == [True]
    assert len(loader._labels) == len(loader._moments) == sum(sizes)
    everything = np.arange(sum(sizes))
    ((moments, labels),) = loader.stream([everything])
    assert torch.equal(moments, random_moments(50, (4, 3, 5)).to(moments.dtype)[: sum(sizes)])
    assert labels.tolist() == (everything % 7).tolist()
    loader.close()
    assert loader._moments.numel() == loader._labels.numel() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_serves_one_stream_after_another(records: ShardSet, kind: str) -> None:
    loader = make_loader(kind, records, CPU, quiet)
    request = np.array([3, 1, 4])
    first = next(iter(loader.stream(iter([request] * 9))))  # given up with batches still read ahead
    again = list(loader.stream([request]))
    assert len(again) == 1 and torch.equal(first[0], again[0][0])
    assert list(loader.stream([])) == []
    loader.close()


def seen(kind: str, records: RecordSet, ranks: int, stops: list[int]) -> str:
    """A hash of what all ranks see in 12 steps of 10 over 50 records, with a new loader after each stop."""
    digest, batch, steps = hashlib.sha256(), 10, 12
    per_step: list[list[torch.Tensor]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        part = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
        for first, last in zip([0, *stops], [*stops, steps], strict=True):
            order = RecordOrder(11, len(records))
            requests = (order(np.arange(step * batch, (step + 1) * batch))[part] for step in range(first, last))
            loader = make_loader(kind, records, CPU, quiet)
            for step, (moments, labels) in enumerate(loader.stream(requests), first):
                per_step[step] += [moments, labels]
            loader.close()
    for tensors in per_step:
        for kind_of in (torch.float16, torch.int64):
            digest.update(torch.cat([t for t in tensors if t.dtype == kind_of]).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_mid_epoch_twice_and_changing_ranks_keeps_the_sample_stream(records: ShardSet, kind: str) -> None:
    truth = seen("resident", records, ranks=1, stops=[])
    assert seen(kind, records, ranks=1, stops=[]) == truth
    assert seen(kind, records, ranks=1, stops=[2, 3]) == truth
    assert seen(kind, records, ranks=2, stops=[2, 7]) == truth


class Troubled:
    """A set whose reads go wrong as told; everything else is the set's own."""

    def __init__(self, records: ShardSet, trouble: Callable[[np.ndarray], None]) -> None:
        self._records, self._trouble = records, trouble
        self.manifest, self.labels, self.digest = records.manifest, records.labels, records.digest
        self.gather, self.verify, self.close = records.gather, records.verify, records.close

    def __len__(self) -> int:
        return len(self._records)

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        self._trouble(indices)
        self._records.read_into(indices, out)


class Fails:
    """Raises the error the first `times` times that record 5 is asked for."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left = error, times

    def __call__(self, indices: np.ndarray) -> None:
        if 5 in indices and self.left > 0:
            self.left -= 1
            raise self.error


def test_a_set_is_known_by_its_manifests_digest_and_has_as_many_records_as_it_says(records: ShardSet) -> None:
    assert re.fullmatch("[0-9a-f]{64}", records.manifest.digest)
    assert records.digest == records.manifest.digest and len(records) == records.manifest.count == 50


def torch_loader(records: RecordSet, device: torch.device, patience: Patience) -> Loader:
    return ReadAhead(records, patience=patience)


Streaming = Callable[..., Loader]
STREAMING = [torch_loader, pytest.param(DaliLoader, marks=needs_dali)]
REQUESTS = [np.arange(i, i + 4) for i in range(0, 40, 4)]


@pytest.mark.parametrize("kind", STREAMING)
def test_a_read_that_fails_twice_is_repeated_and_nothing_is_lost(records: ShardSet, kind: Streaming) -> None:
    troubled = Troubled(records, Fails(OSError(5, "Input/output error"), 2))
    loader = kind(troubled, CPU, patience=IMPATIENT)
    answers = [moments for moments, _ in loader.stream(REQUESTS)]
    assert torch.equal(torch.cat(answers), records.gather(np.arange(40))[0])


@pytest.mark.parametrize("kind", STREAMING)
def test_a_read_that_keeps_failing_ends_with_the_records_and_the_reason(records: ShardSet, kind: Streaming) -> None:
    loader = kind(Troubled(records, Fails(OSError(5, "Input/output error"), 99)), CPU, patience=IMPATIENT)
    with pytest.raises(RunFailed, match=r"4 records from 4 on .* in 3 attempts .*Input/output error.*storage"):
        list(loader.stream(REQUESTS))


@pytest.mark.parametrize("kind", STREAMING)
def test_damage_is_told_as_damage_after_a_second_look(records: ShardSet, kind: Streaming) -> None:
    loader = kind(Troubled(records, Fails(BadFile("shard 7: record 5: bits flipped"), 99)), CPU, patience=IMPATIENT)
    with pytest.raises(BadFile, match="record 5: bits flipped"):
        list(loader.stream(REQUESTS))


@pytest.mark.parametrize("kind", STREAMING)
def test_a_stalled_read_is_taken_over_by_another_thread(records: ShardSet, kind: Streaming) -> None:
    release, first = threading.Event(), threading.Event()

    def stall(indices: np.ndarray) -> None:
        if 5 in indices and not first.is_set():
            first.set()
            release.wait(30)

    loader = kind(Troubled(records, stall), CPU, patience=IMPATIENT)
    start = time.monotonic()
    answers = [moments for moments, _ in loader.stream(REQUESTS)]
    release.set()
    assert time.monotonic() - start < 10
    assert torch.equal(torch.cat(answers), records.gather(np.arange(40))[0])


@pytest.mark.parametrize("kind", STREAMING)
def test_more_stalled_reads_than_threads_are_taken_over_too(records: ShardSet, kind: Streaming) -> None:
    release, stalled = threading.Event(), []

    def stall(indices: np.ndarray) -> None:
        if len(stalled) < 4:
            stalled.append(indices)
            release.wait(30)

    loader = kind(Troubled(records, stall), CPU, patience=Patience(timeout=0.3, attempts=6, pause=0.01))
    answers = [moments for moments, _ in loader.stream(REQUESTS)]
    release.set()
    assert torch.equal(torch.cat(answers), records.gather(np.arange(40))[0])


def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that would have been made between tries, while none is made."""
    pauses: list[float] = []
    monkeypatch.setattr(ahead_module, "time", SimpleNamespace(sleep=pauses.append))
    return pauses


@pytest.mark.parametrize("patience", [Patience(), Patience(timeout=7.0, attempts=4, pause=0.3)], ids=["none", "given"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BadFile("bits flipped")], ids=["disk", "damage"])
def test_each_try_of_a_read_waits_as_long_and_each_pause_twice_as_long(
    records: ShardSet, patience: Patience, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word about it a minute a try, three tries, and half a second and a second between them."""
    fails, waits, result = Fails(error, 99), [], Future.result

    def waited(future: Future[object], timeout: float | None = None) -> object:
        waits.append(timeout)
        return result(future, timeout)

    monkeypatch.setattr(Future, "result", waited)
    pauses = slept(monkeypatch)
    given = {} if patience == Patience() else {"patience": patience}
    ahead = ReadAhead(Troubled(records, fails), **given)
    with pytest.raises(RunFailed if isinstance(error, OSError) else BadFile):
        list(ahead.stream([np.array([5])]))
    ahead.close()
    tries, timeout = (4, 7.0) if given else (3, 60.0)
    assert 99 - fails.left == tries and waits == [timeout] * tries
    assert pauses == pytest.approx([0.3, 0.6, 1.2] if given else [0.5, 1.0])


def test_the_last_try_counts(records: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    slept(monkeypatch)
    for error in (OSError(5, "Input/output error"), BadFile("bits flipped")):
        ahead = ReadAhead(Troubled(records, Fails(error, 2)))
        ((moments, _),) = ahead.stream([np.array([5, 7])])
        ahead.close()
        assert torch.equal(moments, records.gather(np.array([5, 7]))[0])


def threads_of(ahead: ReadAhead) -> list[threading.Thread]:
    """The threads that read for it."""
    mine = [one for one in threading.enumerate() if getattr(one, "_target", None) == ahead._work]
    assert all(one.daemon and one.name == "st_fast data" for one in mine)
    return mine


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_closing_ends_every_thread_also_those_that_took_over(
    records: ShardSet, workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept(monkeypatch)
    release, stuck, result = threading.Event(), threading.Event(), Future.result

    def stall(indices: np.ndarray) -> None:
        if not stuck.is_set():
            stuck.set()
            release.wait(30)

    def impatient(future: Future[object], timeout: float | None = None) -> object:
        if not tries:
            tries.append(stuck.wait(30))
            raise TimeoutError
        return result(future, timeout)

    tries: list[bool] = []
    monkeypatch.setattr(Future, "result", impatient)
    ahead = ReadAhead(Troubled(records, stall), **({} if workers is None else {"workers": workers}))
    threads = threads_of(ahead)
    assert len(threads) == (workers or 2)
    assert len(list(ahead.stream([np.array([5])]))) == 1
    threads = threads_of(ahead)
    assert len(threads) == (workers or 2) + 1  # only the one that may be stuck is replaced
    ahead.close()
    ahead.close()
    release.set()
    for one in threads:
        one.join(10)
    assert not threads_of(ahead) and ahead._tasks.empty()


def test_a_stream_that_is_given_up_leaves_nothing_to_read(records: ShardSet) -> None:
    go, read = threading.Semaphore(1), []

    def held(indices: np.ndarray) -> None:
        go.acquire(timeout=30)
        read.append(int(indices[0]))

    ahead = ReadAhead(Troubled(records, held), workers=1, depth=3)
    stream = ahead.stream([np.array([i]) for i in range(9)])
    next(stream)
    stream.close()
    for _ in range(9):
        go.release()
    list(ahead.stream([np.array([40])]))
    ahead.close()
    assert read in ([0, 40], [0, 1, 40])  # record 1 may have been begun


@pytest.mark.parametrize("depth", [None, 1, 6])
def test_so_many_requests_are_read_ahead_as_told(records: ShardSet, depth: int | None) -> None:
    asked: list[int] = []

    def requests() -> Iterator[np.ndarray]:
        for i in range(10):
            asked.append(i)
            yield np.array([i])

    ahead = ReadAhead(records, **({} if depth is None else {"depth": depth}))
    stream = ahead.stream(requests())
    for taken in range(1, 11):
        next(stream)
        assert len(asked) == min(taken + (depth or 4), 10)
    assert list(stream) == []
    ahead.close()


@pytest.mark.parametrize("kind", STREAMING)
def test_a_read_that_stalls_for_good_is_an_error_in_bounded_time(records: ShardSet, kind: Streaming) -> None:
    release = threading.Event()
    loader = kind(Troubled(records, lambda indices: release.wait(30)), CPU, patience=IMPATIENT)
    start = time.monotonic()
    with pytest.raises(RunFailed, match=r"no answer within 0.2 s.*storage stalls"):
        list(loader.stream(REQUESTS))
    assert time.monotonic() - start < 10
    release.set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_damaged_shard_is_named_by_every_loader(make_set: MakeSet, kind: str, damage: str) -> None:
    folder = make_set()
    shard = folder / "latents-00001.safetensors"
    shards = open_data(folder, verify=False)
    if damage == "bit":
        with open(shard, "r+b") as file:
            file.seek(read_header(shard)["moments"].start + 5 * 120)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 4]))
    else:
        os.truncate(shard, read_header(shard)["moments"].start + 5 * 120 + 7)
    with pytest.raises(BadFile, match=r"latents-00001\.safetensors: record 5 \(number 21 of the set\): "):
        list(make_loader(kind, shards, CPU, quiet).stream([np.array([1, 21, 3])]))


def test_an_error_is_told_once_the_good_batches_before_it_were_given(records: ShardSet) -> None:
    ahead = ReadAhead(Troubled(records, Fails(BadFile("bad"), 99)), patience=IMPATIENT)
    stream = ahead.stream(REQUESTS)
    assert torch.equal(next(stream)[0], records.gather(np.arange(4))[0])
    with pytest.raises(BadFile):
        next(stream)


def test_without_dali_the_torch_loader_serves_with_one_line_of_notice(
    records: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "dali_missing", lambda: "No module named 'nvidia'")
    said: list[str] = []
    loader = make_loader("dali", records, CPU, said.append)
    assert isinstance(loader, ReadAhead)
    assert len(said) == 1 and how_to_install("data") in said[0] and "\n" not in said[0]


def test_auto_keeps_a_set_that_fits_in_memory_and_says_so(records: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert isinstance(make_loader("auto", records, CPU, said.append), ResidentLoader)
    assert "loader = resident" in said[0]
    monkeypatch.setattr(loader_module, "free_memory", lambda device: 1_000)
    monkeypatch.setattr(loader_module, "dali_missing", lambda: "not there")
    assert isinstance(make_loader("auto", records, CPU, said.append), ReadAhead)
    assert "loader = torch" in said[1]


def test_the_estimate_reckons_with_a_set_that_may_stay_on_the_device(
    records: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sum(np.asarray(row).nbytes for row in records.gather(np.arange(len(records)))[0].numpy())
    assert kept_bytes("resident", records, CPU) == (whole, whole) and kept_bytes("auto", records, CPU) == (0, whole)
    assert kept_bytes("dali", records, CPU) == kept_bytes("torch", records, CPU) == (0, 0)
    monkeypatch.setattr(loader_module, "free_memory", lambda device: 1_000)
    assert kept_bytes("resident", records, CPU) == (whole, whole) and kept_bytes("auto", records, CPU) == (0, 0)


@pytest.mark.parametrize(("text", "limit"), [("1048576\n", 2**20), ("max\n", 2**63), (None, 2**63)])
def test_a_containers_memory_limit_counts(tmp_path: Path, text: str | None, limit: int) -> None:
    if text is not None:
        (tmp_path / "memory.max").write_text(text)
    assert container_limit(tmp_path / "memory.max") == limit


def test_rates_are_measured_on_what_a_loader_delivers(records: ShardSet) -> None:
    class Slow:
        def stream(self, requests: Iterator[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for request in requests:
                time.sleep(0.002)
                yield torch.zeros(len(request)), torch.zeros(len(request))

        def close(self) -> None:
            pass

    assert trial_rate(Slow(), 50, CPU) < 50 / 0.002
    assert trial_rate(ResidentLoader(records, CPU), 50, CPU) > 50 / 0.002


@needs_dali
def test_dali_runs_on_the_cpu_without_a_gpu(make_set: MakeSet) -> None:
    folder: Path = make_set(count=300, shape=(8, 32, 32), shard_size=100)
    loader = DaliLoader(open_data(folder), CPU)
    requests = [np.random.default_rng(i).permutation(300)[:256] for i in range(5)]
    truth = random_moments(300, (8, 32, 32)).half()
    for request, (moments, _) in zip(requests, loader.stream(requests), strict=True):
        assert torch.equal(moments, truth[request])
