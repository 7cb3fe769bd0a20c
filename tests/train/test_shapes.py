"""Training on latents of several shapes, and of one that is no square."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from st_fast import kernels
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.core.random import Purpose, normal, uniform
from st_fast.core.ranks import Ranks
from st_fast.data.buckets import write_index
from st_fast.data.loader import make_loader
from st_fast.data.shards import open_data
from st_fast.data.text import captions_bytes
from st_fast.model import flow, network
from st_fast.prepare import __main__ as prepare
from st_fast.prepare.writing import write_shards
from st_fast.recipe import cost, load
from st_fast.sample import __main__ as sample
from st_fast.train.batches import BatchIterator, record_order
from st_fast.train.conditions import open_conditions
from st_fast.train.graphs import refusal
from st_fast.train.run import run
from st_fast.train.shapes import check_shapes, with_largest_shape
from tests import tiny, tiny_shapes, tiny_text

STEPS = 10


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """Sums are added up in one order."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_shapes.write_data(tmp_path_factory.mktemp("shapes") / "latents")


def trained(folder: Path, data: Path, *options: str) -> Path:
    """The run folder of a run in this process."""
    folder.mkdir(exist_ok=True)
    run(load(tiny_shapes.write_recipe(folder / "t.toml", data, folder / "out"), options))
    return folder / "out"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    keep = ("--run.save_every=1", "--run.keep=20", "--optim.lr=3e-2")
    return trained(tmp_path_factory.mktemp("whole"), data, *keep)


def newest(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of both stages' newest checkpoints."""
    found = {stage: checkpoint.latest(out / stage / "checkpoints", pytest.fail) for stage in ("align", "transcend")}
    return {f"{s}/{g}/{k}": t for s, c in found.items() for g, ts in c.groups.items() for k, t in ts.items()}


def losses(out: Path, stage: str = "align") -> list[tuple[float, float, float]]:
    return [(r["denoise"], r["aux"], r["grad_norm"]) for r in tiny.records(out, "train") if r["stage"] == stage]


def first_bucket(data: Path, seed: int, tmp_path: Path) -> str:
    recipe = load(tiny_shapes.write_recipe(tmp_path / "f.toml", data, tmp_path), [f"--run.seed={seed}"])
    return list(tiny_shapes.SIDES)[record_order(recipe, open_data(data, verify=False)).bucket_at(0)[0]]


def test_a_step_on_several_shapes_has_the_losses_bit_for_bit_of_a_run_on_that_shape_alone(data, tmp_path):
    """The first steps, with the same weights: of each of three seeds whose first batch is of another shape."""
    seeds: dict[str, int] = {}
    for seed in range(40):
        seeds.setdefault(first_bucket(data, seed, tmp_path), seed)
    assert set(seeds) == set(tiny_shapes.SIDES)
    for name, seed in seeds.items():
        options = (f"--run.seed={seed}", "--stage.align.steps=1", "--stage.transcend.steps=1")
        options += ("--flow.time=stratified",)  # so that some sample is supervised
        one = tmp_path / name
        tiny_shapes.write_data(one / "data", name)
        three = trained(tmp_path / f"three-{name}", data, *options)
        alone = trained(one, one / "data", *options)
        assert losses(three) == losses(alone) and losses(three)[0][1] > 0
        assert losses(three, "transcend")[0][0] == losses(alone, "transcend")[0][0]
        ours, theirs = newest(three), newest(alone)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_every_steps_loss_is_that_of_its_weights_on_its_batch(whole, data):
    """Read from the files, with noise, times and labels by their definitions: none of the loaders or iterators."""
    recipe = load(whole / "recipe.toml")
    table = kernels.select(dict.fromkeys(("norm_modulate", "qk_norm"), "reference"), torch.device("cpu"))
    model, order = network(recipe.model, table), record_order(recipe, open_data(data, verify=False))
    seed, size, seen = recipe.run.seed, recipe.optim.batch_size, set()
    for step in range(1, STEPS):
        found = next(c for c in checkpoint.candidates(whole / "align" / "checkpoints") if c.step == step)
        model.load_state_dict(load_file(found.path / "model.safetensors"))
        bucket, _ = order.bucket_at(step)
        name = list(tiny_shapes.SIDES)[bucket]
        seen.add(name)
        shards = [load_file(path) for path in sorted((data / name).glob("*.safetensors"))]
        moments, labels = (torch.cat([shard[key] for shard in shards]) for key in ("moments", "labels"))
        ordinals = torch.arange(step * size, (step + 1) * size)
        records = torch.from_numpy(order(ordinals.numpy())) - sum(list(tiny_shapes.COUNTS.values())[:bucket])
        mean, std = moments[records].float().chunk(2, dim=1)
        x = 0.75 * (mean + std * normal(seed, Purpose.POSTERIOR, ordinals, mean.shape[1:]))
        noise = normal(seed, Purpose.NOISE, ordinals, mean.shape[1:])
        t = flow.sample_times(seed, step, np.arange(size), size, recipe.flow.time, recipe.flow.path)
        x_t = (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * noise
        dropped = uniform(seed, Purpose.CLASS_DROPOUT, ordinals)[:, 0] < recipe.model.class_dropout
        with torch.no_grad():
            velocity, _ = model(x_t, t, torch.where(dropped, 5, labels[records]))
        expected = float((velocity - (noise - x)).square().mean())
        assert losses(whole)[step][0] == pytest.approx(expected, rel=2e-6), (step, name)
    assert seen == set(tiny_shapes.SIDES)


def test_logged_flops_are_of_the_shapes_as_often_as_each_is_trained_on(whole, data):
    recipe = load(whole / "recipe.toml")
    start, *_ = tiny.records(whole, "start")
    (last,) = [line for line in tiny.records(whole, "train") if (line["stage"], line["step"]) == ("align", STEPS)]
    macs, stage = 0.0, recipe.stages[0]
    for name, (height, width) in tiny_shapes.SIDES.items():
        model = replace(recipe.model, latent_size=(height, width))
        heads = sum(layer.macs for layer in stage.method.head_layers(model)) * cost.supervised_share(
            recipe, stage.method
        )
        macs += tiny_shapes.COUNTS[name] * (cost.trunk_macs(model) + heads)
    an_image = 6 * macs / sum(tiny_shapes.COUNTS.values())
    assert start["flops_per_image"] == pytest.approx(an_image)
    assert last["flops"] == pytest.approx(an_image * STEPS * recipe.optim.batch_size)
    assert an_image < cost.stage_cost(recipe, stage).total * 0.995  # 36 tokens, which a third of the images lack one of


def test_a_run_that_was_stopped_at_an_odd_step_goes_on_bit_for_bit(whole, data, tmp_path):
    """The first stage in three pieces, then the second."""
    recipe = tiny_shapes.write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    both = recipe.read_text()
    recipe.write_text(both[: both.rindex("[[stage]]")])
    for steps in (3, 7, 10):
        run(load(recipe, [f"--stage.align.steps={steps}", "--optim.lr=3e-2"]))
    recipe.write_text(both)
    run(load(recipe, ["--optim.lr=3e-2"]))
    ours, theirs = newest(tmp_path / "out"), newest(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for stage in ("align", "transcend"):
        assert losses(tmp_path / "out", stage) == losses(whole, stage)


@pytest.mark.parametrize("options", [("--data.loader=torch", "--run.prefetch=true", "--run.streams=off"),
                                     ("--model.modulation=one",)])  # fmt: skip
def test_loaders_and_schedules_change_no_bit(options, whole, data, tmp_path):
    out = trained(tmp_path, data, "--optim.lr=3e-2", *options)
    exact = options[0].startswith("--data")
    for ours, theirs in zip(losses(out), losses(whole), strict=True):
        assert ours == theirs if exact else ours == pytest.approx(theirs, rel=1e-4)


def test_accumulation_and_checkpointed_activations_work_on_several_shapes(whole, data, tmp_path):
    out = trained(tmp_path, data, "--optim.lr=3e-2", "--optim.accumulation=2", "--run.checkpointing=block")
    for ours, theirs in zip(losses(out), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


METHODS = {
    "sra": 'supervision = "sra"\nsteps = 4\nstudent_depth = 1\nteacher_depth = 2',
    "sra_dual": 'supervision = "sra_dual"\nsteps = 4\nstudent_depth = 1\nteacher_depth = 2',
    "self_flow": 'supervision = "self_flow"\nsteps = 4\nstudent_depth = 1\nteacher_depth = 2',
    "layer_sync": 'supervision = "layer_sync"\nsteps = 4\nstudent_depth = 1\nteacher_depth = 2',
    "contrastive": 'supervision = "none"\nsteps = 4\ncontrast = 0.1',
    "dispersive": 'supervision = "dispersive"\nsteps = 4\ndepth = 2',
    "sra2": 'supervision = "sra2"\nsteps = 4\ndepth = 2\nhidden = 16',
    "none": 'supervision = "none"\nsteps = 4',
}


def with_method(recipe: Path, method: str) -> Path:
    text = recipe.read_text()
    recipe.write_text(text[: text.index("[[stage]]")] + f'[[stage]]\nname = "only"\n{method}\n')
    return recipe


@pytest.mark.parametrize("method", METHODS)
def test_every_method_without_image_features_trains_on_several_shapes(method, data, tmp_path):
    recipe = with_method(tiny_shapes.write_recipe(tmp_path / "t.toml", data, tmp_path / "out"), METHODS[method])
    run(load(recipe))
    found = losses(tmp_path / "out", "only")
    assert len(found) == 4 and all(torch.isfinite(torch.tensor(found)).flatten())


def test_one_shape_that_is_no_square_trains_alone(tmp_path):
    tiny_shapes.write_bucket(tmp_path, "144x64")
    out = trained(tmp_path / "run", tmp_path / "144x64", "--model.latent_size=[18, 8]")
    assert len(losses(out)) == STEPS and load(out / "recipe.toml").model.latent_size == (18, 8)
    state = newest(out)
    assert state["align/model/pos_embed"].shape == (1, 36, 32)
    told = r"latents are \(4, 18, 8\), .*model.latent_size = \[8, 18\] .* need \(4, 8, 18\); --model.channels=4 "
    with pytest.raises(UserError, match=told + r"--model.latent_size=\[18,8\] fit the data$"):
        trained(tmp_path / "turned", tmp_path / "144x64", "--model.latent_size=[8, 18]")


def test_another_shapes_checkpoint_is_no_teacher_and_no_start(tmp_path):
    """Both have 36 tokens, which no weight's shape tells apart."""
    tiny_shapes.write_bucket(tmp_path, "144x64")
    out = trained(tmp_path / "run", tmp_path / "144x64", "--model.latent_size=[18, 8]")
    others = tiny_shapes.write_data(tmp_path / "square", "96x96")
    differs = r"another architecture: latent_size \[18, 8\] \(this recipe: 12\)"
    with pytest.raises(UserError, match=differs):
        trained(tmp_path / "a", others / "96x96", f"--stage.transcend.teacher={out}/align")
    with pytest.raises(UserError, match=differs):
        trained(tmp_path / "b", others / "96x96", f"--stage.align.init={out}/align")
    fresh = (f"--stage.align.init={out}/align", '--stage.align.init_fresh=["pos_embed"]', "--stage.align.steps=2")
    again = trained(tmp_path / "c", others / "96x96", *fresh, "--stage.transcend.steps=1")
    positions = checkpoint.latest(again / "align" / "checkpoints", pytest.fail).groups["model"]["pos_embed"]
    assert torch.equal(
        positions, network(load(again / "recipe.toml").model, kernels.select({}, torch.device("cpu"))).pos_embed
    )


def write_odd(folder: Path, sides: Sequence[int]) -> Path:
    """One bucket more, of these sides, beside those there are."""
    made = open_data(folder / "96x96", verify=False).manifest
    moments = torch.rand(8, 8, *sides, generator=torch.Generator().manual_seed(1)).half()
    name = f"{8 * sides[0]}x{8 * sides[1]}"
    write_shards(folder / name, [(moments, torch.zeros(8, dtype=torch.int64))],
                 replace(made, count=0, shards=(), shape=(8, *sides), source="odd"))  # fmt: skip
    write_index(folder, [*tiny_shapes.SIDES, name])
    return folder


@pytest.mark.parametrize(
    ("sides", "options", "words"),
    [
        ((9, 16), (), r"model.patch = 2 does not divide latents of 72x128 \(9 x 16\)"),
        ((10, 12), (), r"= 12 with patch 2 makes 36 tokens; more than 15 % from it are 80x96 \(5 x 6 = 30\): set"),
        ((14, 12), (), r"more than 15 % from it are 112x96 \(7 x 6 = 42\)"),
        ((12, 12), ("--optim.batch_size=8", "--model.channels=3"), r"latents are \(4, 12, 12\), model.channels = 3"),
        ((10, 14), ("--optim.batch_size=16",), r"80x112 has 13, 144x64 has 10.*take a smaller batch, or prepare"),
        ((10, 14), ("--run.device=auto", "--run.cuda_graphs=true"), "a graph is of one shape|CUDA graphs need a CUDA"),
        ((10, 14), ("--data.loader=dali",), r'data.loader = "dali": .* has latents of 3 shapes; allowed: "auto", "t'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_before_anything_is_trained(sides, options, words, tmp_path):
    data = tiny_shapes.write_data(tmp_path / "data")
    (tmp_path / "run").mkdir()
    if sides not in tiny_shapes.SIDES.values():
        write_odd(data, sides)
    with pytest.raises(UserError, match=words) as caught:
        trained(tmp_path / "run", data, *options)
    assert "\n" not in str(caught.value) and [path.name for path in (tmp_path / "run").iterdir()] == ["t.toml"]


def test_tokens_may_be_15_percent_more_or_fewer_and_a_side_no_odd_multiple_of_the_patch(tmp_path):
    recipe = load(tiny_shapes.write_recipe(tmp_path / "t.toml", tmp_path, tmp_path), ["--model.latent_size=[50, 80]"])

    def told(**sides: tuple[int, int]) -> str:
        sets = {name: SimpleNamespace(manifest=SimpleNamespace(shape=(8, *two))) for name, two in sides.items()}
        try:
            check_shapes(recipe, SimpleNamespace(folder="set", sets=sets, parts=list(sets.values())))
        except UserError as error:
            return str(error)
        return ""

    assert recipe.model.tokens == 1000 and told(a=(50, 80), b=(2300, 2), c=(2, 1700), d=(2, 2300)) == ""
    apart = "more than 15 % from it are b (1151 x 1 = 1151), c (1 x 849 = 849): set"
    assert apart in told(a=(50, 80), b=(2302, 2), c=(2, 1698), d=(2300, 2))
    odd = "model.patch = 2 does not divide latents of "
    assert told(a=(10, 9)).endswith(f"{odd}a (10 x 9)") and told(b=(11, 8)).endswith(f"{odd}b (11 x 8)")
    assert told(a=(10, 8), b=(10, 9), c=(9, 9)).endswith(f"{odd}b (10 x 9), c (9 x 9)")


def test_image_features_are_refused_with_the_folders_that_can_have_them(data, tmp_path):
    method = 'supervision = "repa"\nsteps = 4\ndepth = 1\nencoders = ["dinov2"]'
    recipe = with_method(tiny_shapes.write_recipe(tmp_path / "t.toml", data, tmp_path / "out"), method)
    with pytest.raises(
        UserError, match=r"stage.only, which learns from image features, takes one: name one of .*96x96"
    ):
        run(load(recipe))


def test_captions_are_those_of_each_batchs_records(tmp_path):
    data = tiny_shapes.write_data(tmp_path / "data")
    captions = [[f"picture {i}", *(f"once more {i} {k}" for k in range(i % 3))] for i in range(44)]
    (data / "captions.jsonl").write_bytes(captions_bytes(captions))
    tiny_text.write_states(data)
    recipe = tiny_shapes.RECIPE.format(data=data, out=tmp_path / "out")
    text = f'network = "mmdit"\ntext_width = {tiny_text.WIDTH}\ntext_length = {tiny_text.LENGTH}'
    (tmp_path / "t.toml").write_text(recipe.replace("num_classes = 5", text))
    settings = load(tmp_path / "t.toml", ["--stage.align.steps=4", "--stage.transcend.steps=3"])
    run(settings)
    assert len(losses(tmp_path / "out")) == 4 and len(losses(tmp_path / "out", "transcend")) == 3
    records = open_data(data, verify=False)
    conditions = open_conditions(settings, records)
    conditions.open(torch.device("cpu"), print)
    loader = make_loader("torch", records, torch.device("cpu"), print)
    batches = BatchIterator(settings, settings.stages[0], loader, records, Ranks(0, 1, torch.device("cpu")),
                            conditions=conditions)  # fmt: skip
    for step, (batch,) in enumerate(batches.steps(0, 8)):
        _, seen = batches.samples(step, [])
        for record, states in zip(seen, batch.condition, strict=True):
            assert any(torch.equal(states, own) for own in tiny_text.states_of(captions[record]))
    conditions.close()


def test_graphs_are_left_out_and_memory_is_that_of_the_largest_shape(data, tmp_path):
    recipe = load(tiny_shapes.write_recipe(tmp_path / "t.toml", data, tmp_path))
    ranks = Ranks(0, 1, torch.device("cuda"))
    assert refusal(recipe, recipe.stages[0], ranks, 3) == "latents of 3 shapes"
    assert with_largest_shape(recipe, open_data(data)).model.tokens == 36
    small = load(tmp_path / "t.toml", ["--model.latent_size=[10, 14]"])
    assert with_largest_shape(small, open_data(data)).model.latent_sides == (12, 12)
    assert with_largest_shape(
        load(tmp_path / "t.toml", ["--model.latent_size=[10, 16]"]), open_data(data)
    ).model.latent_sides == (10, 16)
    assert with_largest_shape(recipe, open_data(data / "80x112")) is recipe
    with pytest.raises(UserError, match=r"run.cuda_graphs = true: a graph is of one shape, .* has latents of 3 shapes"):
        check_shapes(replace(recipe, run=replace(recipe.run, cuda_graphs=True)), open_data(data))
    with pytest.raises(UserError, match=r'run.fp8 = "tensorwise": .* 3 shapes, whose tokens need not be multiples'):
        check_shapes(replace(recipe, run=replace(recipe.run, fp8="tensorwise")), open_data(data))
    check_shapes(recipe, open_data(data))


def test_the_choice_of_passes_leaves_the_recipes_own_shape(data, tmp_path):
    out = trained(tmp_path, data, "--model.latent_size=[10, 14]", '--optim.micro_batch="auto"', "--stage.align.steps=1",
                  "--stage.transcend.steps=1")  # fmt: skip
    assert load(out / "recipe.toml").model.latent_size == (10, 14)
    meta = checkpoint.latest(out / "align" / "checkpoints", pytest.fail).meta
    assert meta["architecture"]["latent_size"] == [10, 14] and "latent_size = [10, 14]" in meta["recipe"]
    assert json.loads(json.dumps(meta["architecture"])) == load(out / "recipe.toml").model.architecture()


def test_from_images_of_three_ratios_to_samples_of_another_shape(tmp_path):
    for number, size in enumerate([(40, 40), (60, 42), (42, 60)] * 4):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 60).convert("RGB").save(path)
    options = ["--size", "12", "--buckets", "1:1,4:3,3:4", "--vae", "pixels", "--device", "cpu"]
    prepare.main([str(tmp_path / "images"), str(tmp_path / "data"), *options])
    sampled = ("--model.channels=3", "--sample.num=3", "--sample.steps=2", "--model.num_classes=2")
    out = trained(tmp_path / "run", tmp_path / "data", "--stage.transcend.steps=2", "--stage.align.steps=2", *sampled)
    picture = Image.open(out / "transcend" / "samples" / "00000002.png")
    assert picture.width * 16 == picture.height * (10 * 14 + 2)
    sample.main([str(out), "-n", "2", "--npz", "--size", "8x16", "--steps", "2", "--out", str(tmp_path / "set")])
    assert np.load(tmp_path / "set" / "samples.npz")["arr_0"].shape == (2, 8, 16, 3)
