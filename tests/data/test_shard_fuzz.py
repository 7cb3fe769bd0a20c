"""Damaged shards, 500 with ST_FAST_FUZZ=full: refused in one line or, where nothing is changed, read as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from st_fast.data.shards import open_data
from tests.core.checkpoint.test_checkpoint_fuzz import damaged_bytes
from tests.fuzz import blocks, watched

from .conftest import MakeSet


@pytest.mark.parametrize("block", blocks(2, 10))
def test_a_damaged_shard_is_refused_in_one_line_or_read_as_it_was(block: int, make_set: MakeSet) -> None:
    folder, draw = make_set(), random.Random(4000 + block)
    expected = open_data(folder).gather(np.arange(50))
    paths = sorted(folder.glob("*.safetensors"))
    for number in range(50):
        path = draw.choice(paths)
        good = path.read_bytes()
        path.write_bytes(damaged_bytes(good, draw))
        with watched("shards", len(good)):
            found = open_data(folder, verify=bool(number % 2)).gather(np.arange(50))
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        path.write_bytes(good)
