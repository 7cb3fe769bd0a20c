"""ImageNet's 1,281,167 records: opened fast, ordered in little memory, read without memory growing."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from st_fast.core.errors import UserError
from st_fast.core.random import RecordOrder, epoch_order
from st_fast.data.ahead import ReadAhead
from st_fast.data.manifest import Manifest, ShardEntry, VaeInfo, read_manifest, write_manifest
from st_fast.data.shards import open_data
from st_fast.prepare.writing import SHARD_SIZE, shard_name

COUNT = 1_281_167
SHAPE = (8, 32, 32)


def sparse_shard(path: Path, labels: np.ndarray) -> ShardEntry:
    """A true shard of all-zero moments that takes up no room on the disk."""
    count, record = len(labels), 2 * int(np.prod(SHAPE))
    zeros = bytes(record)
    crcs = np.array([zlib.crc32(zeros, label) for label in range(1000)], np.uint32)[labels]
    sizes = {"labels": 8 * count, "crc32": 4 * count, "moments": record * count}
    kinds = {"labels": ("I64", [count]), "crc32": ("U32", [count]), "moments": ("F16", [count, *SHAPE])}
    header, position = {}, 0
    for name, size in sizes.items():
        kind, shape = kinds[name]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + labels.tobytes() + crcs.tobytes())
        file.truncate(8 + len(text) + position)
    return ShardEntry(path.name, count, path.stat().st_size, hashlib.sha256(b"not computed").hexdigest())


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    labels = np.random.default_rng(0).integers(0, 1000, COUNT)
    parts = [labels[start : start + SHARD_SIZE] for start in range(0, COUNT, SHARD_SIZE)]
    entries = tuple(sparse_shard(folder / shard_name(n), part) for n, part in enumerate(parts))
    write_manifest(
        folder, Manifest(COUNT, SHAPE, "float16", 0.18215, VaeInfo("sd-vae-ft-mse"), "sparse", 1000, shards=entries)
    )
    return folder


def test_opening_takes_at_most_two_seconds(imagenet: Path) -> None:
    start = time.process_time()
    assert read_manifest(imagenet).count == COUNT
    shards = open_data(imagenet, verify=False)
    assert time.process_time() - start <= 2
    assert len(shards) == COUNT and len(shards.manifest.shards) == 157
    shards.close()


def test_a_low_limit_on_open_files_is_raised_for_157_shards(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A worker of a test run may hold hundreds already; the limit leaves fewer free than there are shards.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, before[1]))
    try:
        shards = open_data(imagenet, verify=False)
        assert shards.gather(np.array([0, COUNT - 1]))[0].shape == (2, *SHAPE)
        shards.close()
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (200, 300))
        with pytest.raises(UserError, match=r"^157 data files and .* a limit of \d{3,4} open files; here it is 300"):
            open_data(imagenet, verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_files_that_are_open_already_count_towards_the_limit(imagenet: Path) -> None:
    before, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    try:
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(500)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, before[1]))
        shards = open_data(imagenet, verify=False)
        assert len(shards) == COUNT
        shards.close()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_epochs_order_takes_a_second_and_32_megabytes() -> None:
    start = time.process_time()
    order = epoch_order(0, 3, COUNT)
    seconds = time.process_time() - start
    assert len(np.unique(order)) == COUNT
    tracemalloc.start()
    lookup = RecordOrder(0, COUNT)
    assert np.array_equal(lookup(np.arange(4 * COUNT - 5, 4 * COUNT)), order[-5:])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds <= 1 and peak <= 32e6


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_while_an_epoch_is_read(imagenet: Path) -> None:
    """400 MB of records out of random places of the 21 GB; a memory map's pages would be counted here."""
    shards = open_data(imagenet, verify=False)
    ahead = ReadAhead(shards)
    order = epoch_order(0, 0, COUNT)
    requests = [order[start : start + 256] for start in range(0, 100 * 256, 256)]
    levels = []
    for number, (moments, labels) in enumerate(ahead.stream(requests)):
        assert labels.tolist() == shards.labels[requests[number]].tolist()
        levels.append(resident_bytes())
        del moments
    warm = max(levels[:40])  # buffers for what is read ahead, wherever the allocator puts them
    assert max(levels[60:]) - warm < 80e6  # of the 250 MB read since; what there is, is the allocator's mood
    ahead.close()
    shards.close()
