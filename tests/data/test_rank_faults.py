"""When one rank's loader gives up, every rank stops and none hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from st_fast.core.errors import UserError
from st_fast.core.files import read_header
from st_fast.recipe import load
from st_fast.train.run import run
from tests import tiny


def test_damaged_record_found_in_training_ends_both_ranks_and_is_named(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    shard = data / "latents-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[read_header(shard)["moments"].start + 5 * 256] ^= 1
    shard.write_bytes(content)
    recipe = tiny.write_recipe(tmp_path / "recipe.toml", data, tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "st_fast.train", str(recipe), "--data.verify=false", "--data.loader=torch"]
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "st_fast: " in done.stderr, done.stderr
    assert "latents-00001.safetensors: record 5 (number 21 of the set): its CRC-32" in done.stderr
    assert time.monotonic() - start < 100


def test_resuming_on_edited_data_is_refused_by_the_trainer(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    recipe = tiny.write_recipe(tmp_path / "recipe.toml", data, tmp_path / "run")
    run(load(recipe, ("--stage.align.steps=4", "--stage.transcend.steps=1"), 1))
    tiny.write_data(data, count=31)
    with pytest.raises(UserError, match=r"trained on data with digest|data changed") as caught:
        run(load(recipe, ("--stage.align.steps=6", "--stage.transcend.steps=1"), 1))
    assert "\n" not in str(caught.value)
