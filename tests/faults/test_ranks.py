"""The number of ranks changes nothing but the speed: FAULT 27 and the proof of exactness."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core import checkpoint
from st_fast.core.errors import EXIT_USAGE
from st_fast.core.ranks import Ranks
from st_fast.data.loader import make_loader
from st_fast.data.shards import open_data
from st_fast.recipe import load
from st_fast.recipe.schema import Recipe
from st_fast.train.batches import BatchIterator
from st_fast.train.run import run
from tests import tiny, tiny_shapes, tiny_text
from tests.faults.ranks import finish, torchrun
from tests.faults.restarts import killed_again_and_again
from tests.train.supervision.test_dispersive import STAGE as DISPERSIVE_STAGE
from tests.train.supervision.test_dual_times import DUAL_STAGE, SELF_FLOW_STAGE
from tests.train.supervision.test_internal_guidance import STAGE as INTERNAL_STAGE
from tests.train.supervision.test_sra2 import STAGE as SRA2_STAGE

TOLERANCE = 2e-5
"""Relative, of losses and gradient norms over 20 steps: only the order of float32 sums differs between rank counts."""
KEYS = ("denoise", "aux", "grad_norm")


def plain(name: str, keys: str) -> str:
    return f'\n[[stage]]\nname = "{name}"\nsupervision = "none"\nsteps = 8\n{keys}'


TREAD = 'route = "tread"\nroute_first = 1\nroute_last = 2\n'
SPRINT = 'route = "sprint"\nroute_first = 1\nroute_last = 2\npath_drop = 0.4\n'
ALL_AT_ONCE = SRA2_STAGE.replace('"sra2"', '"all_at_once"', 1) + TREAD + "contrast = 0.1\n"
METHOD_STAGES = "".join(
    (
        SELF_FLOW_STAGE, DUAL_STAGE, INTERNAL_STAGE, SRA2_STAGE, plain("contrast", "contrast = 0.2\n"),
        plain("tread", f"{TREAD}dense_after = 10\n"), plain("sprint", f"{SPRINT}dense_after = 10\n"), ALL_AT_ONCE,
    )
)  # fmt: skip


def sample_stream(recipe: Recipe, count: int) -> dict[int, str]:
    """A digest of everything that is drawn for each sample, by ordinal, as all of `count` ranks see it."""
    shards = open_data(Path(recipe.data.path), verify=False)
    found = {}
    for rank in range(count):
        ranks = Ranks(rank, count, torch.device("cpu"))
        loader = make_loader("resident", shards, ranks.device, print)
        iterator = BatchIterator(recipe, recipe.stages[0], loader, shards, ranks)
        for batches in iterator.steps(0, 10):
            for batch in batches:
                weight = torch.zeros(len(batch.t)).index_copy(0, batch.rows.index, batch.rows.weight)
                parts = (batch.x, batch.noise, batch.x_t, batch.condition, batch.student_condition, batch.t, weight)
                for place, ordinal in enumerate(batch.ordinals.tolist()):
                    digest = hashlib.sha256(b"".join(part[place].numpy().tobytes() for part in parts))
                    assert ordinal not in found
                    found[ordinal] = digest.hexdigest()
    return found


def test_every_method_without_an_encoder_goes_on_with_other_ranks_bit_for_bit(data, tmp_path, nursery):
    """20 steps on one rank with two passes each, beside 12 of them so, 4 on two ranks, and the rest on one again."""
    names = re.findall('name = "(.*)"', METHOD_STAGES)
    whole, parts = (tiny.write_recipe(tmp_path / f"{n}.toml", data, tmp_path / n) for n in ("whole", "parts"))
    for recipe in (whole, parts):
        recipe.write_text(recipe.read_text().split("[[stage]]")[0] + METHOD_STAGES)
    assert finish(nursery.start(1, whole, "--optim.accumulation=2", *steps_of(names, 20))) == [0]
    for count, steps in ((1, 12), (2, 16), (1, 20)):
        passes = f"--optim.accumulation={2 // count}"
        assert finish(nursery.start(count, parts, passes, *steps_of(names, steps))) == [0] * count
    for name in names:
        found = [checkpoint.latest(tmp_path / out / name / "checkpoints", pytest.fail) for out in ("whole", "parts")]
        theirs, ours = (one.groups for one in found)
        assert [one.step for one in found] == [20, 20] and ours.keys() == theirs.keys()
        for group, tensors in theirs.items():
            assert all(torch.equal(ours[group][key], tensor) for key, tensor in tensors.items()), (name, group)


def steps_of(names: Sequence[str], steps: int) -> list[str]:
    return [f"--stage.{name}.steps={steps}" for name in names]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_sample_its_noise_time_and_dropped_label_are_bit_for_bit_those_of_one_rank(count, accumulation, recipe):
    one = sample_stream(load(recipe), 1)
    assert sorted(one) == list(range(80)) and len(set(one.values())) == 80
    assert sample_stream(load(recipe, [f"--optim.accumulation={accumulation}"]), count) == one


def test_so_they_are_where_latents_have_several_shapes(tmp_path):
    data = tiny_shapes.write_data(tmp_path / "data")
    recipe = load(tiny_shapes.write_recipe(tmp_path / "t.toml", data, tmp_path / "out"))
    one = sample_stream(recipe, 1)
    assert sorted(one) == list(range(40)) and len(set(one.values())) == 40
    assert sample_stream(recipe, 2) == sample_stream(recipe, 4) == one


def test_the_samples_named_for_a_step_are_those_the_ranks_saw(recipe):
    settings = load(recipe)
    shards = open_data(Path(settings.data.path), verify=False)
    seen: dict[int, list[int]] = {}
    for rank in range(4):
        iterator = BatchIterator(settings, settings.stages[0], None, shards, Ranks(rank, 4, torch.device("cpu")))
        seen[rank] = np.concatenate(list(iterator._requests(5, 6))).tolist()
    ordinals, records = iterator.samples(5, [1, 3])
    assert ordinals == [42, 43, 46, 47] and records == seen[1] + seen[3]
    assert iterator.samples(5, [])[1] == [record for rank in range(4) for record in seen[rank]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--optim.lr=0.5", "--run.out=elsewhere"], ["rank 1 has optim.lr = 0.5, rank 0 0.01", "run.out = elsewhere"]),
        (["--optim.batch_size=7"], ["rank 1: ", "optim.batch_size = 7"]),
        (["--data.path=/nowhere"], ["rank 1: data.path = '/nowhere'"]),
    ],
)
def test_ranks_that_were_given_other_commands_end_with_the_same_line(options, words, one_stage, nursery):
    ranks = nursery.start(2, one_stage, last=options)
    assert finish(ranks) == [EXIT_USAGE] * 2
    lines = [[line for line in rank.text.splitlines() if line.startswith("st_fast:")] for rank in ranks]
    assert lines[0] == lines[1] and len(lines[0]) == 1 and all(word in lines[0][0] for word in words), lines
    assert not (one_stage.parent / "out" / "align").exists()


def test_a_rank_killed_under_torchrun_is_restarted_and_the_run_ends_with_the_same_bits(recipe, pair, states, tmp_path):
    def begun() -> bool:
        return any((recipe.parent / "out").glob("*/checkpoints/[0-9]*"))

    log, save = tmp_path / "log.txt", "--run.save_every=2"
    code, killed = killed_again_and_again(recipe, log, [60.0], random.Random(0), save, sooner=begun)
    assert (code, killed) == (0, 1), (tmp_path / "log.txt").read_text()
    ours, theirs = states(recipe.parent / "out"), states(pair)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def close(ours: list[dict], theirs: list[dict]) -> None:
    assert [(r["stage"], r["step"]) for r in ours] == [(r["stage"], r["step"]) for r in theirs]
    for left, right in zip(ours, theirs, strict=True):
        assert [left[key] for key in KEYS] == pytest.approx([right[key] for key in KEYS], rel=TOLERANCE, abs=1e-6)


def test_four_ranks_under_torchrun_train_as_one_does(recipe, alone):
    job = torchrun(4, recipe)
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 0, output
    close(tiny.records(recipe.parent / "out", "train"), tiny.records(alone, "train"))


def test_two_ranks_with_accumulation_train_as_one_does(recipe, alone, nursery):
    assert finish(nursery.start(2, recipe, "--optim.accumulation=2")) == [0, 0]
    close(tiny.records(recipe.parent / "out", "train"), tiny.records(alone, "train"))


def test_two_ranks_that_look_a_step_ahead_train_as_one_that_does_not(recipe, alone, nursery):
    schedule = ("--run.streams=auto", "--run.teacher_placement=ahead", "--run.prefetch=true")
    assert finish(nursery.start(2, recipe, *schedule, "--run.supervised_rows=padded")) == [0, 0]
    close(tiny.records(recipe.parent / "out", "train"), tiny.records(alone, "train"))


def test_supervision_ends_by_itself_at_the_same_step_on_any_number_of_ranks(recipe, nursery, tmp_path):
    """On one rank, on two, and on two in shards."""
    stop = ("--stage.transcend.stop_below=0.999", "--stage.transcend.stop_every=4", "--stage.transcend.steps=6")
    ways = {"one": (1, ()), "two": (2, ()), "shards": (2, ("--run.sharding=fsdp2",))}
    for name, (count, options) in ways.items():
        out = f"--run.out={tmp_path / name}"
        assert finish(nursery.start(count, recipe, *stop, *options, out)) == [0] * count
    one, *others = ([*tiny.records(tmp_path / name, "train")] for name in ways)
    (first,) = tiny.records(tmp_path / "one", "gradients")
    assert first["stopped"] and [r["aux"] != 0 for r in one[-6:]][4:] == [False] * 2
    for name, records in zip(list(ways)[1:], others, strict=True):
        close(records, one)
        (found,) = tiny.records(tmp_path / name, "gradients")
        assert (found["step"], found["stopped"]) == (4, True)
        assert found["cosine"] == pytest.approx(first["cosine"], abs=1e-4)


def test_a_run_goes_on_with_another_number_of_ranks_on_the_same_stream(one_stage, alone, nursery):
    """FAULT 27: 2 ranks, then 1, then 4."""
    for count, steps in ((2, 4), (1, 7), (4, 10)):
        assert finish(nursery.start(count, one_stage, f"--stage.align.steps={steps}")) == [0] * count
    theirs = [r for r in tiny.records(alone, "train") if r["stage"] == "align"]
    close(tiny.records(one_stage.parent / "out", "train"), theirs)


def test_two_ranks_train_bit_for_bit_as_one_that_takes_their_passes_on_several_shapes_and_after_one(
    states, nursery, tmp_path, one_thread
):
    """One rank with two passes a step adds the gradients that two ranks have, in their order."""
    data, recipes = tiny_shapes.write_data(tmp_path / "data"), {}
    for name in ("alone", "ranks"):
        recipes[name] = tiny_shapes.write_recipe(tmp_path / f"{name}.toml", data, tmp_path / name)
    run(load(recipes["alone"], ["--optim.accumulation=2"]))
    both = recipes["ranks"].read_text()
    recipes["ranks"].write_text(both[: both.rindex("[[stage]]")])
    run(load(recipes["ranks"], ["--optim.accumulation=2", "--stage.align.steps=3"]))
    recipes["ranks"].write_text(both)
    assert finish(nursery.start(2, recipes["ranks"])) == [0, 0]
    ours, theirs = (states(tmp_path / name) for name in ("ranks", "alone"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    lines = [tiny.records(tmp_path / name, "train") for name in ("ranks", "alone")]
    assert len(lines[0]) == 20
    for left, right in zip(*lines, strict=True):
        assert [left[key] for key in ("stage", "step", *KEYS)] == [right[key] for key in ("stage", "step", *KEYS)]


def test_two_ranks_with_a_contrast_train_bit_for_bit_as_one_that_takes_their_passes(one_stage, nursery, tmp_path):
    """Also the mean latent, which the first rank alone computes; a negative may be another rank's sample."""
    options = ["--stage.align.contrast=0.2", "--stage.align.steps=5"]
    run(load(one_stage, [*options, "--optim.accumulation=2", f"--run.out={tmp_path / 'alone'}"]))
    assert finish(nursery.start(2, one_stage, *options)) == [0, 0]
    found = [checkpoint.latest(tmp_path / name / "align" / "checkpoints", pytest.fail) for name in ("out", "alone")]
    ours, theirs = (one.groups for one in found)
    assert ours.keys() == theirs.keys() and "mean_latents" in ours
    for group, tensors in theirs.items():
        assert all(torch.equal(ours[group][name], tensor) for name, tensor in tensors.items()), group


@pytest.mark.parametrize("options", [(), ("--run.sharding=fsdp2",)])
def test_two_ranks_push_the_samples_of_the_whole_batch_apart_as_one_does(options, recipe, nursery, tmp_path):
    recipe.write_text(recipe.read_text().split("[[stage]]")[0] + DISPERSIVE_STAGE)
    slowly = "--optim.lr=2e-4"  # or AdamW makes steps of what rounding leaves of gradients that vanish
    run(load(recipe, [slowly, f"--run.out={tmp_path / 'alone'}"]))
    assert finish(nursery.start(2, recipe, slowly, *options)) == [0, 0]
    ours, theirs = (tiny.records(tmp_path / name, "train") for name in ("out", "alone"))
    close(ours, theirs)
    assert theirs[-1]["aux"] < theirs[0]["aux"] < 0


def test_a_run_on_several_shapes_goes_on_with_other_ranks_and_in_shards_through_both_stages(nursery, tmp_path):
    data, recipes = tiny_shapes.write_data(tmp_path / "data"), []
    for name in ("alone", "ranks"):
        recipes.append(tiny_shapes.write_recipe(tmp_path / f"{name}.toml", data, tmp_path / name))
    run(load(recipes[0]))
    both = recipes[1].read_text()
    one = both[: both.rindex("[[stage]]")]
    for count, text, options in (
        (2, one, ("--stage.align.steps=3",)),
        (1, both, ("--stage.transcend.steps=5",)),
        (2, both, ("--run.sharding=fsdp2", "--run.shard_teacher=true")),
    ):
        recipes[1].write_text(text)
        assert finish(nursery.start(count, recipes[1], *options)) == [0] * count
    close(tiny.records(tmp_path / "ranks", "train"), tiny.records(tmp_path / "alone", "train"))


def test_internal_guidance_goes_on_with_other_ranks_and_in_shards(nursery, tmp_path):
    data, recipes = tiny.write_data(tmp_path / "data"), []
    stage = '[[stage]]\nname = "internal"\nsupervision = "internal_guidance"\nsteps = {}\ndepth = 2\n'
    for name in ("alone", "ranks"):
        recipes.append(tiny.write_recipe(tmp_path / f"{name}.toml", data, tmp_path / name))
        text = recipes[-1].read_text().partition("[[stage]]")[0]
        recipes[-1].write_text(f"{text}{stage.format(9)}target_guidance = 0.5\n")
    run(load(recipes[0]))
    for count, options in (
        (2, ("--stage.internal.steps=3",)),
        (1, ("--stage.internal.steps=5",)),
        (2, ("--run.sharding=fsdp2",)),
    ):
        assert finish(nursery.start(count, recipes[1], *options)) == [0] * count
    close(tiny.records(tmp_path / "ranks", "train"), tiny.records(tmp_path / "alone", "train"))
    ours, theirs = (
        checkpoint.latest(tmp_path / name / "internal" / "checkpoints", print).groups["ema"]
        for name in ("ranks", "alone")
    )
    assert ours.keys() == theirs.keys() and "final_layer_xr.linear.weight" in ours
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-4) for key in theirs)


def test_a_run_on_captions_goes_on_with_other_ranks_and_in_shards_through_both_stages(nursery, tmp_path):
    data = tiny_text.make_data(tmp_path / "data")
    recipes = []
    for name in ("alone", "ranks"):
        recipes.append(tmp_path / f"{name}.toml")
        recipes[-1].write_text(tiny_text.RECIPE.format(data=data, out=tmp_path / name))
    run(load(recipes[0]))
    align = recipes[1].read_text().rindex("[[stage]]")
    both, one = recipes[1].read_text(), recipes[1].read_text()[:align]
    # Two ranks, then one, in the first stage; one, then two with their weights in shards, in the second.
    for count, text, options in (
        (2, one, ("--stage.align.steps=4",)),
        (1, both, ("--stage.transcend.steps=4",)),
        (2, both, ("--run.sharding=fsdp2",)),
    ):
        recipes[1].write_text(text)
        assert finish(nursery.start(count, recipes[1], *options)) == [0] * count
    close(tiny.records(tmp_path / "ranks", "train"), tiny.records(tmp_path / "alone", "train"))


def test_a_run_under_routes_goes_on_with_other_ranks_and_in_shards(nursery, tmp_path):
    """TREAD, then SPRINT, whose fusion lies outside of the blocks; each past the route's end."""
    from tests.train import test_routes

    data, recipes = tiny_shapes.write_bucket_of_squares(tmp_path), []
    for name in ("alone", "ranks"):
        recipes.append(test_routes.write_recipe(tmp_path / f"{name}.toml", data, tmp_path / name))
    run(load(recipes[0]))
    text = recipes[1].read_text()
    first = text[: text.index("[[stage]]", text.index("[[stage]]") + 1)]
    for count, stages, options in (
        (2, first, ("--stage.plain.steps=5",)),
        (1, text[: text.rindex("[[stage]]")], ("--stage.plain.steps=8",)),
        (2, text, ("--run.sharding=fsdp2",)),
    ):
        recipes[1].write_text(stages)
        assert finish(nursery.start(count, recipes[1], *options)) == [0] * count
    close(tiny.records(tmp_path / "ranks", "train"), tiny.records(tmp_path / "alone", "train"))
