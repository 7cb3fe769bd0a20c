"""FSDP2: the same training in shards, on the CPU with gloo, and checkpoints that any number of ranks goes on from."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from st_fast import kernels
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.data.shards import open_data
from st_fast.data.statistics import mean_latents
from st_fast.model import stored
from st_fast.recipe import load
from tests import tiny, warm
from tests.faults.ranks import Nursery, finish
from tests.faults.test_ranks import close
from tests.train.supervision.test_dual_times import DUAL_STAGE
from tests.train.supervision.test_self_methods import SRA_STAGE

SHARDED = "--run.sharding=fsdp2"
GROUPS = ("--run.sharding=hsdp", "--run.shard_ranks=2")
LONG = 300.0
"""Seconds that a run may take on a machine that has much else to do."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each of three ranks saw (see `sharding_child.py`)."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = ("-m", "tests.faults.sharding_child", folder)
    children = [warm.start(*command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "012"]
    said = [child.communicate(LONG) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in "012"]


@pytest.mark.parametrize(
    ("case", "norms", "states"),
    [("float32", 1e-6, 2e-3), ("compiled", 1e-6, 2e-3), ("bfloat16", 5e-3, 0.2), ("muon", 1e-6, 2e-3)],
)
def test_shards_hold_what_one_rank_would_hold_after_two_steps(case, norms, states, seen):
    """Also where rows do not divide, where a rank has none of a tensor, and where a head got no gradient."""
    assert len({str(rank[case]["norms"]) for rank in seen}) == 1  # bit for bit
    for rank in seen:
        assert rank[case]["same"] and rank[case]["worst"] < states
        assert rank[case]["norms"] == pytest.approx(rank[case]["expected norms"], rel=norms)


def test_every_rank_holds_a_third_of_all_but_the_positions_and_counts(seen):
    for case, most in (("float32", 0.335), ("muon", 0.351)):  # of 20 rows 7
        for rank in seen:
            assert rank[case]["whole"] == ["ema/pos_embed", "model/pos_embed", "optim/heads.step", "optim/model.step"]
        shares = [rank[case]["share"] for rank in seen]
        assert sum(shares) == pytest.approx(1) and max(shares) < most


def test_gradients_are_reduced_once_a_step_in_the_last_micro_batch_only(seen):
    """Seven groups: three blocks, their modulations, the rest, two heads; the second step leaves one head out."""
    step = [["last", *["reduce"] * count, "finish"] for count in (7, 6)]
    assert all(rank["float32"]["events"] == step[0] + step[1] for rank in seen)


def test_blocks_are_compiled_whole_between_the_hooks_that_gather_them(seen):
    """Two graphs, as unsharded: the last block's next modulation has another width."""
    assert all(rank["graphs"] == 2 for rank in seen)


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory) -> Path:
    """The recipe of a finished sharded run of two ranks and one stage."""
    home = tmp_path_factory.mktemp("shards")
    recipe = tiny.write_recipe(home / "t.toml", data, home / "out")
    text = recipe.read_text()
    recipe.write_text(text[: text.rindex("[[stage]]")])
    kept = Nursery(home)
    assert finish(kept.start(2, recipe, SHARDED, "--stage.align.steps=4"), timeout=LONG) == [0, 0]
    kept.close()
    return recipe


@pytest.mark.parametrize(
    ("sharding", "count", "accumulation", "again"),
    [((SHARDED,), 2, 2, "none"), ((SHARDED,), 4, 1, "block"), (GROUPS, 4, 2, "none")],
)
def test_sharded_ranks_train_as_one_does(sharding, count, accumulation, again, recipe, alone, nursery):
    options = (
        *sharding,
        "--run.shard_teacher=true",
        f"--optim.accumulation={accumulation}",
        f"--run.checkpointing={again}",
    )
    assert finish(nursery.start(count, recipe, *options), timeout=LONG) == [0] * count
    close(tiny.records(recipe.parent / "out", "train"), tiny.records(alone, "train"))


MUON = ("--optim.name=muon", "--optim.muon_lr=5e-3", "--optim.muon_split=true")


@pytest.mark.parametrize(("count", "options"), [(2, ()), (4, ()), (2, (SHARDED,)), (4, (SHARDED,))])
def test_muon_shares_its_work_among_ranks_and_trains_as_one_does(count, options, recipe, alone_with_muon, nursery):
    assert finish(nursery.start(count, recipe, *MUON, *options), timeout=LONG) == [0] * count
    close(tiny.records(recipe.parent / "out", "train"), tiny.records(alone_with_muon, "train"))


@pytest.fixture(scope="module")
def alone_with_muon(data, tmp_path_factory) -> Path:
    """The run folder of one rank."""
    home = tmp_path_factory.mktemp("muon")
    recipe, kept = tiny.write_recipe(home / "t.toml", data, home / "out"), Nursery(home)
    assert finish(kept.start(1, recipe, *MUON), timeout=LONG) == [0]
    kept.close()
    return home / "out"


@pytest.mark.parametrize(("count", "options"), [(2, ()), (2, (SHARDED,)), (4, GROUPS)])
def test_muon_on_several_ranks_goes_on_bit_for_bit(count, options, data, tmp_path, nursery):
    ends = []
    for name, parts in (("whole", (8,)), ("parts", (3, 8))):
        home = tmp_path / name
        home.mkdir()
        recipe = tiny.write_recipe(home / "t.toml", data, home / "out")
        recipe.write_text(recipe.read_text()[: recipe.read_text().rindex("[[stage]]")])
        for steps in parts:
            ranks = nursery.start(count, recipe, *MUON, *options, f"--stage.align.steps={steps}")
            assert finish(ranks, timeout=LONG) == [0] * count
        ends.append(checkpoint.load(home / "out" / "align" / "checkpoints" / "00000008").groups)
    assert all(torch.equal(ends[1][group][key], t) for group, tensors in ends[0].items() for key, t in tensors.items())
    assert sum("momentum_buffer" in key for key in ends[0]["optim"]) == 12


@pytest.mark.parametrize("stage", [SRA_STAGE, DUAL_STAGE])
def test_an_average_that_teaches_is_sharded_with_its_student(stage, data, tmp_path, nursery):
    losses = []
    for name, count in (("one", 1), ("two", 2)):
        home = tmp_path / name
        home.mkdir()
        recipe = tiny.write_recipe(home / "t.toml", data, home / "out")
        recipe.write_text(recipe.read_text().split("[[stage]]")[0] + stage)
        assert finish(nursery.start(count, recipe, SHARDED), timeout=LONG) == [0] * count
        losses.append(tiny.records(home / "out", "train"))
    close(losses[1], losses[0])


def test_the_mean_latent_of_a_contrast_is_whole_in_a_sharded_checkpoint(data, tmp_path, nursery):
    recipe = tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    recipe.write_text(recipe.read_text()[: recipe.read_text().rindex("[[stage]]")])
    options = (SHARDED, "--stage.align.contrast=0.2", "--stage.align.steps=2")
    assert finish(nursery.start(2, recipe, *options), timeout=LONG) == [0, 0]
    found = stored.read_weights(tmp_path / "out" / "align" / "checkpoints", load(recipe).model, "ema")
    expected = mean_latents(open_data(data, verify=False))
    assert found.mean_latents.keys() == expected.keys() == {"4x4x4"}
    assert torch.equal(found.mean_latents["4x4x4"], expected["4x4x4"])


def test_a_teacher_is_loaded_from_shards_as_from_whole_files(shards):
    settings, table = load(shards), kernels.select({}, torch.device("cpu"))
    root = stored.checkpoint_root(settings, "align")
    frozen = stored.load_frozen(root, settings.model, "ema", table, torch.device("cpu"), torch.float32)
    ema = checkpoint.latest(root, pytest.fail).groups["ema"]
    assert all(torch.equal(tensor, ema[name]) for name, tensor in frozen.state_dict().items())
    assert frozen.blocks[0].attn.qkv.weight.shape == (96, 32)


def test_any_number_of_ranks_takes_up_every_bit_of_shards_and_of_whole_files(shards, nursery):
    """FAULT 27, sharded: 2 ranks' shards taken up and saved again by 4 sharded ranks, 1, two groups of 2, and 2."""
    root = shards.parent / "out" / "align" / "checkpoints"
    stop = {"at": "step", "do": "nan"}  # a skipped step leaves every tensor untouched
    expected = checkpoint.load(root / "00000004").groups
    for step, count, sharding in ((5, 4, (SHARDED,)), (6, 1, (SHARDED,)), (7, 4, GROUPS), (8, 2, (SHARDED,))):
        ranks = nursery.start(count, shards, *sharding, f"--stage.align.steps={step}", breaks=stop)
        assert finish(ranks, timeout=LONG) == [0] * count
        found = checkpoint.load(root / f"{step:08d}").groups
        assert found.keys() == expected.keys()
        for group, tensors in expected.items():
            assert all(torch.equal(found[group][name], tensor) for name, tensor in tensors.items())
        if count > 1:  # of two groups the first writes
            parts = 2 if sharding == GROUPS else count
            assert len(list((root / f"{step:08d}").glob(f"model.rank-*-of-{parts}.safetensors"))) == parts


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (("--run.shard_teacher=true",), "run.shard_teacher"),
        ((SHARDED, "--model.modulation=one"), "model.modulation"),
        ((SHARDED, "--run.cuda_graphs=true"), "run.cuda_graphs"),
        ((SHARDED, "--run.shard_teacher=true", "--run.teacher_placement=beside"), "run.teacher_placement"),
        (GROUPS[:1], "run.shard_ranks"),
        ((GROUPS[0], "--run.shard_ranks=4"), "run.shard_ranks"),
        ((SHARDED, "--run.shard_ranks=2"), "run.shard_ranks"),
        ((SHARDED, "--run.shard_teacher=true", "--run.teacher_branches=streams"), "run.teacher_branches"),
    ],
)
def test_what_does_not_go_with_shards_is_refused_by_its_key(options, key, recipe):
    with pytest.raises(UserError, match=rf"{key} = .*") as caught:
        load(recipe, options, 2)
    assert "\n" not in str(caught.value)
