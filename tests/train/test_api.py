"""The Python API: one's own module, data, supervision and callbacks in a run, and what can be done with it."""

import inspect
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import st_fast
from st_fast import RunFailed, Trainer, UserError
from st_fast.model import own, own_facts
from st_fast.recipe import RecipeError, cost
from st_fast.train import api
from tests import warm
from tests.train.own_module import STAGES, Items, Net, recipe, tapped, tensors

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(out: Path, stage: str = "transcend") -> dict[str, Tensor]:
    """All that the stage's newest checkpoint holds, by group and name."""
    newest = sorted((out / stage / "checkpoints").iterdir())[-1]
    files = sorted(newest.glob("*.safetensors"))
    return {f"{file.stem} {name}": value for file in files for name, value in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Raising:
    """A callback that raises at a step of a stage, once."""

    def __init__(self, stage: str, step: int) -> None:
        self.at: tuple[str, int] | None = (stage, step)

    def __call__(self, event: st_fast.Event) -> None:
        if event.kind == "step" and self.at == (event.stage, event.step):
            self.at = None
            raise ValueError("no such thing\nand more")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An own module, with dropout, and an own dataset, trained without interruption."""
    out = tmp_path_factory.mktemp("api") / "whole"
    torch.set_num_threads(1)
    Trainer(recipe(out), model=tapped, data=Items()).fit()
    return out


@pytest.mark.parametrize(("stage", "step"), [("align", 1), ("align", 3), ("transcend", 2)])
def test_a_callback_that_raises_is_named_and_the_run_goes_on_to_the_same_bits(whole, tmp_path, stage, step) -> None:
    out, callback = tmp_path / "run", Raising(stage, step)
    with pytest.raises(RunFailed) as failed:
        Trainer(recipe(out), model=tapped, data=Items(), callbacks=[callback]).fit()
    text = str(failed.value)
    assert "\n" not in text and f"callback Raising raised ValueError at {stage} step {step}: no such thing;" in text
    assert f"{stage} is saved at step {step}" in text
    Trainer(recipe(out), model=tapped, data=Items()).fit()
    assert same(weights(out), weights(whole)) and same(weights(out, "align"), weights(whole, "align"))


@pytest.mark.parametrize(("data", "workers"), [(Items(), 2), (tensors(), 0), (tuple(t.numpy() for t in tensors()), 0)])
def test_processes_that_read_a_dataset_and_tensors_of_its_items_give_the_same(whole, tmp_path, data, workers) -> None:
    Trainer(recipe(tmp_path / "run"), model=tapped, data=data, workers=workers).fit()
    assert same(weights(tmp_path / "run"), weights(whole))


def test_a_module_with_weights_of_its_own_starts_every_stage_from_them_also_after_a_resume(tmp_path) -> None:
    out, first, other = tmp_path / "run", tapped(), tapped()
    before = {name: value.clone() for name, value in first.state_dict().items()}
    with pytest.raises(RunFailed):
        Trainer(recipe(out), model=first, data=Items(), callbacks=[Raising("align", 2)]).fit()
    Trainer(recipe(out), model=other, data=Items()).fit()  # another process draws other weights
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())  # it was copied
    Trainer(recipe(tmp_path / "once"), model=first, data=Items()).fit()
    assert same(weights(out), weights(tmp_path / "once"))


def test_two_ranks_that_draw_other_weights_train_the_first_ranks_as_one_does(tmp_path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = ("-m", "tests.train.own_module", tmp_path / "two")
    children = [warm.start(*command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    said = [child.communicate(200) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    net = Net(dropout=0.0)
    net.load_state_dict(load_file(tmp_path / "two" / own.START))
    one = Trainer(recipe(tmp_path / "one"), model=st_fast.tap(net, "blocks"), data=Items()).fit()
    two = st_fast.open_run(tmp_path / "two")
    for a, b in zip(one.log("train"), two.log("train"), strict=True):
        assert [b[key] for key in ("loss", "aux", "grad_norm")] == pytest.approx(
            [a[key] for key in ("loss", "aux", "grad_norm")], rel=2e-3
        )


@pytest.mark.parametrize("data", [Items(), tensors()])
def test_own_modules_are_validated_on_given_records_that_are_held_out(data, tmp_path) -> None:
    validated = {"every": 2, "share": 0.25, "bins": 2, "num": 8}
    run = Trainer(recipe(tmp_path / "run", STAGES[:1], validate=validated), model=tapped, data=data).fit()
    found = run.log("validate")
    assert [record["step"] for record in found] == [2, 3] and all(len(record["by_time"]) == 2 for record in found)


class Fourier(Net):
    """Draws features of the time that are neither trained nor in its state, as score models do."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.register_buffer("waves", torch.randn(8), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, torch.sin(t[:, None] * self.waves).mean(1), y)


@pytest.mark.parametrize("made", [Fourier, Fourier()])
def test_buffers_that_are_drawn_are_the_same_in_all_networks_of_a_run_and_later(made, tmp_path) -> None:
    out, seen = tmp_path / "run", []
    look = lambda event: seen.append(event.model.plain.waves.clone()) if event.kind == "step" else None  # noqa: E731
    seeded = recipe(out, STAGES[:1], run={"seed": 3})
    run = Trainer(seeded, model=lambda_or(made), data=Items(), callbacks=[look]).fit()
    again = st_fast.open_run(out, model=lambda_or(made) if made is Fourier else st_fast.tap(Fourier(), "blocks"))
    assert torch.equal(run.model().waves, seen[0]) and torch.equal(again.model().waves, seen[0])
    assert torch.equal(run.sample(3, steps=2)[0], again.sample(3, steps=2)[0])


def lambda_or(made: Any) -> Any:
    return st_fast.tap(made, "blocks") if isinstance(made, nn.Module) else lambda: st_fast.tap(made(), "blocks")


def test_what_was_trained_is_read_again_in_its_own_class(whole) -> None:
    run = st_fast.open_run(whole, model=tapped)
    module, saved = run.model(), weights(whole)
    assert type(module) is Net and not module.training and not any(p.requires_grad for p in module.parameters())
    for name, value in module.named_parameters():
        assert torch.equal(value, saved[f"ema {name}"])
    assert torch.equal(run.model(weights="raw").time.weight, saved["model time.weight"])
    assert {record["kind"] for record in run.log()} >= {"start", "train", "save", "end"} and run.report.is_file()
    with pytest.raises(UserError, match=r"model.name = 'Net': somebody's own module.*st_fast.open_run"):
        st_fast.open_run(whole).model()


def test_samples_follow_from_seed_and_weights_and_no_other_thing(whole) -> None:
    run = st_fast.open_run(whole, model=tapped)
    latents, labels = run.sample(7, labels=[3, 1], steps=3, cfg_scale=1.5)
    assert latents.shape == (7, 3, 4, 4) and labels.tolist() == [3, 1, 3, 1, 3, 1, 3]
    again, _ = run.sample(7, labels=[3, 1], steps=3, cfg_scale=1.5, batch_size=2)
    torch.testing.assert_close(latents, again, rtol=0, atol=1e-5)
    assert not torch.allclose(latents, run.sample(7, labels=[3, 1], steps=3, cfg_scale=1.5, seed=1)[0])
    net = run.model()
    noise = run.sample(1, labels=[2], steps=1, sampler="euler", cfg_scale=1.0)[0]
    from st_fast.sample.draw import draw_of, read_labels, starting_noise

    draw = draw_of(read_labels("2", 5), 0, 0, 1, torch.device("cpu"))
    x = starting_noise(draw, run.recipe.model)
    with torch.no_grad():  # one step of Euler's method, by hand
        torch.testing.assert_close(noise, x - net(x, torch.ones(1), torch.tensor([2])))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"stepz": 3}, r"sample.stepz is unknown \(did you mean steps\?\)"),
        ({"steps": 0}, "sample.steps = 0"),
        ({"internal_guidance": 2.0}, "sample.internal_guidance = 2.0: the network has nothing that it could guide by"),
        ({"guidance": "path_drop"}, "sample.guidance"),
        ({"labels": [5]}, r"5: .*classes of 0\.\.4"),
        ({"stage": "nope"}, "nope: the run has align"),
        ({"weights": "best"}, "best"),
    ],
)
def test_samples_that_can_not_be_drawn_are_told_in_one_line(whole, settings, told) -> None:
    with pytest.raises(UserError, match=told) as error:
        st_fast.open_run(whole, model=tapped).sample(2, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_a_callback_that_would_end_the_program_is_told_like_others(error, tmp_path) -> None:
    def ends(event: st_fast.Event) -> None:
        if event.kind == "step" and event.step == 2:
            raise error

    with pytest.raises(RunFailed, match=f"raised {type(error).__name__} at align step 2"):
        Trainer(recipe(tmp_path / "run"), model=tapped, data=Items(), callbacks=[ends]).fit()
    assert (tmp_path / "run" / "align" / "checkpoints" / "00000002").is_dir()


def test_events_are_the_steps_and_the_records_of_the_log(tmp_path) -> None:
    seen: list[st_fast.Event] = []
    run = Trainer(recipe(tmp_path / "run", STAGES[:1]), model=tapped, data=Items(), callbacks=[seen.append]).fit()
    assert [(event.step, event.stage) for event in seen if event.kind == "step"] == [(n, "align") for n in (1, 2, 3)]
    assert all(isinstance(event.model, nn.Module) for event in seen if event.kind == "step")
    told = [{"kind": e.kind, "stage": e.stage, "step": e.step} | e.values for e in seen if e.kind != "step"]
    assert told == run.log() and {"train", "save", "end"} <= {record["kind"] for record in told}


class MeanSquare(nn.Module):
    """A supervision of somebody's own: the tapped tokens' mean should tell the time."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 1)

    def forward(self, hidden: Tensor, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.25 * (self.head(hidden.mean(1))[:, 0] - t).square().mean()


OWN = [{"name": "own", "supervision": "given", "student_depth": 2, "steps": 3}]


def test_a_supervision_of_ones_own_is_trained_and_saved_and_split_like_any(tmp_path) -> None:
    run = Trainer(recipe(tmp_path / "one", OWN), model=lambda: quiet(), data=Items(), supervision=MeanSquare).fit()
    halves = recipe(tmp_path / "two", OWN, optim={"batch_size": 8, "accumulation": 2})
    Trainer(halves, model=lambda: quiet(), data=Items(), supervision=MeanSquare).fit()
    assert "heads head.weight" in weights(tmp_path / "one", "own")
    records = run.log("train"), st_fast.open_run(tmp_path / "two").log("train")
    for one, two in zip(*records, strict=True):
        assert one["aux"] > 0 and one["loss"] == pytest.approx(one["denoise"] + one["aux"])
        assert [one[key] for key in ("aux", "denoise", "grad_norm")] == pytest.approx(
            [two[key] for key in ("aux", "denoise", "grad_norm")], rel=1e-3
        )


def quiet() -> own.Tapped:
    return st_fast.tap(Net(dropout=0.0), "blocks")


def test_bfloat16_is_autocast_with_weights_in_float32(tmp_path) -> None:
    seen = []

    class Looking(Net):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), self.time.weight.dtype))
            return super().forward(x, t, y)

    made = recipe(tmp_path / "run", [{"name": "plain", "supervision": "none", "steps": 2}], run={"precision": "bf16"})
    Trainer(made, model=Looking, data=Items()).fit()
    assert set(seen[-2:]) == {(True, torch.float32)}
    assert weights(tmp_path / "run", "plain")["model time.weight"].dtype == torch.float32


def test_pictures_are_what_the_given_function_decodes(tmp_path) -> None:
    made = recipe(tmp_path / "run", STAGES[:1], sample={"num": 4})
    run = Trainer(made, model=tapped, data=Items(), decode=lambda z: (z > 0).to(torch.uint8) * 255).fit()
    assert [record["file"] for record in run.log("sample")] == ["align/samples/00000003.png"]
    assert set(run.decode(torch.randn(2, 3, 4, 4)).unique().tolist()) == {0, 255}
    silent = Trainer(recipe(tmp_path / "without", STAGES[:1], sample={"num": 4}), model=tapped, data=Items()).fit()
    assert silent.log("sample") == []
    with pytest.raises(UserError, match="its data were given"):
        silent.decode(torch.zeros(1, 3, 4, 4))


# What is found out about a module


def test_multiply_adds_are_those_of_the_blocks_and_features_stop_at_theirs() -> None:
    model = described(tapped, [2])
    tokens, d = 4, 16
    block = tokens * d * (3 * d + d + 40 + 40) + 2 * tokens**2 * d
    embedding = tokens * d * 12 + d  # patches and the time
    assert model.own_macs == (*(embedding + n * block for n in (1, 2, 3, 4)), embedding + 4 * block + tokens * d * 12)
    assert model.own_parameters == sum(p.numel() for p in Net().parameters())
    assert (model.depth, model.width, model.patch) == (4, 16, 2)
    assert [cost.trunk_macs(model, depth) for depth in (2, None)] == [model.own_macs[1], model.own_macs[-1]]

    def compiled() -> own.Tapped:
        module = quiet()
        for each in module.inner.blocks:
            each.compile(backend="aot_eager")
        return module

    assert described(compiled, [2]).own_macs == model.own_macs

    ran = []
    net = Net(dropout=0.0)
    for number, each in enumerate(net.blocks):
        each.register_forward_hook(lambda *_, number=number: ran.append(number))
    x, t, y = torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([1, 5])
    module = st_fast.tap(net, "blocks.1", "blocks.2")
    found = module.features(x, t, y, 1)
    assert ran == [0, 1]
    velocity, streams = module(x, t, y, (2, 1))
    assert torch.equal(streams[1], found) and torch.equal(velocity, net(x, t, y)) and not torch.equal(*streams)
    assert not net.blocks[1]._forward_hooks.keys() - list(net.blocks[1]._forward_hooks)[:1]  # none is left behind


def described(make: Any, blocks: list[int]) -> Any:
    model = recipe(Path("unused")).model
    token = own.GIVEN.set(own.Given(make))
    try:
        return own_facts.described(model, blocks)
    finally:
        own.GIVEN.reset(token)


class Channels(Net):
    """Gives its blocks' output as an image of channels, and its result as diffusers does."""

    def __init__(self) -> None:
        super().__init__()
        self.as_image = nn.Identity()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        h = self.as_image(self.patches(x) + self.label(y)[:, :, None, None])

        class Output:
            sample = self.pixels(h)

        return Output()


def test_outputs_may_be_images_of_channels_and_diffusers_objects() -> None:
    assert described(lambda: st_fast.tap(Channels(), "as_image"), [1]).width == 16


class WithTap(Net):
    """Returns both, as st_fast's own networks do."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, tap: Any = 0) -> Any:
        taps = tap if isinstance(tap, tuple) else (tap,)
        h, found = self.patches(x).flatten(2).transpose(1, 2) + self.label(y)[:, None], {0: None}
        for number, block in enumerate(self.blocks, 1):
            found[number] = h = block(h)
        streams = tuple(found[number] for number in taps)
        return self.pixels(h.transpose(1, 2).unflatten(2, (2, 2))), streams if isinstance(tap, tuple) else streams[0]


def test_a_module_with_the_parameter_tap_needs_no_names(tmp_path) -> None:
    run = Trainer(recipe(tmp_path / "run"), model=WithTap, data=Items()).fit()
    assert type(run.model()) is WithTap and len(run.log("end")) == 2


class Changing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(self.norm(x), t, y)


class Token(Net):
    """One token more than patches."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        self.blocks[0](torch.cat((h, h[:, :1]), dim=1))
        return x


SHARED = Net()


@pytest.mark.parametrize(
    ("make", "blocks", "told"),
    [
        (tapped, [7], "Net: the recipe reads block 7, but 4 are named: blocks.0, blocks.1, blocks.2, blocks.3"),
        (Net, [1], r"Net: the recipe reads block 1, but forward has no parameter tap; st_fast.tap\(module"),
        (Changing, [], "Changing: its buffer norm.running_mean changes in training"),
        (lambda: st_fast.tap(Token(), "blocks"), [1], "Token: blocks.0 gives 5 tokens, which are no grid of"),
        (lambda: st_fast.tap(Net(classes=4), "blocks"), [1], "Net: forward raised IndexError: .*; labels are 0 … 5"),
        (lambda: nn.Linear(3, 3), [], r"Linear: forward\(x, t, condition\) raised TypeError"),
        (lambda: 3, [], "model: int was made; an nn.Module is needed"),
        (lambda: Net().requires_grad_(False), [], "Net: none of its parameters is trained; requires_grad_"),
        (lambda: SHARED, [], "Net: the function that was given as model returns the same module each time"),
        (lambda: st_fast.tap(nn.Sequential(nn.Linear(1, 1)), "0"), [], "Sequential: forward.* raised TypeError"),
    ],
)  # fmt: skip
def test_a_module_that_does_not_fit_is_told_in_one_line(make, blocks, told) -> None:
    with pytest.raises(UserError, match=told) as error:
        described(make, blocks)
    assert "\n" not in str(error.value)


def test_a_block_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(
        UserError, match=r"tap: Net has no block named 'block.1' \(did you mean blocks.1\?\); it has pat"
    ):
        st_fast.tap(Net(), "block.1")
    with pytest.raises(UserError, match="no block is named"):
        st_fast.tap(Net())


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"model": {"mlp": "swiglu"}}, 'model.mlp = "swiglu": model.network = "own": your module is what it is'),
        ({"optim": {"name": "muon"}}, "optim.name"),
        ({"run": {"sharding": "fsdp2"}}, "run.sharding"),
        ({"run": {"compile": "on"}}, "run.compile"),
        ({"run": {"checkpointing": "block"}}, "run.checkpointing"),
        ({"sample": {"guidance": "path_drop"}}, "sample.guidance"),
        ({"stages": [STAGES[0] | {"route": "tread", "route_first": 1, "route_last": 2}]}, "route"),
        ({"stages": [STAGES[0], STAGES[0] | {"name": "more", "init": "align"}]}, "stage.more.init"),
        ({"stages": [{"name": "a", "supervision": "internal_guidance", "steps": 1}]}, "it changes the network"),
        ({"stages": [{"name": "a", "supervision": "self_flow", "steps": 1}]}, "it changes the network"),
        ({"stages": [STAGES[0], STAGES[1] | {"stop_below": 0.0}]}, "stop_below"),
    ],
)
def test_what_only_st_fasts_own_networks_have_is_refused_in_one_line(tables, told, tmp_path) -> None:
    with pytest.raises(RecipeError, match=re.escape(told)) as error:
        recipe(tmp_path, **tables)
    assert "\n" not in str(error.value)


# Data that are given


def test_a_dataset_whose_length_changes_is_told_and_what_was_trained_is_saved(tmp_path) -> None:
    items, out = Items(), tmp_path / "run"

    def shrink(event: st_fast.Event) -> None:
        if event.kind == "step" and event.step == 2:
            items.count = 39

    with pytest.raises(UserError, match=r"data: Items has 39 items now and had 40 when.*; align is saved at step 2"):
        Trainer(recipe(out), model=tapped, data=items, callbacks=[shrink]).fit()
    with pytest.raises(UserError, match="the data changed since"):
        Trainer(recipe(out), model=tapped, data=items).fit()
    items.count = 40
    assert len(Trainer(recipe(out), model=tapped, data=items).fit().log("end")) == 2


class Odd(Items):
    """Has one item that is not like the others."""

    def __init__(self, item: Any) -> None:
        super().__init__()
        self.item = item

    def __getitem__(self, number: int) -> Any:
        if number != 20:
            return super().__getitem__(number)
        if isinstance(self.item, Exception):
            raise self.item
        return self.item


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (Odd((torch.zeros(3, 4, 4), 5)), "data: item 20 of Odd: label 5, allowed are 0 … 4"),
        (Odd((torch.zeros(3, 4, 5), 1)), r"data: item 20 of Odd is \(3, 4, 5\), others are \(3, 4, 4\)"),
        (Odd((torch.zeros(3, 4, 4, dtype=torch.uint8), 1)), r"data: item 20 of Odd is torch.uint8 \(3, 4, 4\)"),
        (Odd((torch.zeros(3, 4, 4), "cat")), "data: item 20 of Odd: its label is str"),
        (Odd({"image": 1}), "data: item 20 of Odd is dict"),
        (Odd(RuntimeError("broken\nfile")), "data: item 20 of Odd: RuntimeError: broken"),
        (Items(0), "data: Items has no items"),
        (Items(7), "data: 7 items, the global batch needs 8"),
        ((torch.zeros(9, 3, 4, 4), torch.full((9,), 5)), "data: item 0: label 5, allowed are 0 … 4"),
        ((torch.zeros(9, 3, 4, 4), torch.zeros(8, dtype=torch.int64)), r"data: labels \(8,\) of torch.int64; 9 whole"),
        ((torch.zeros(9, 3, 4, 4), torch.zeros(9)), "9 whole numbers are needed"),
        ((torch.full((9, 3, 4, 4), torch.nan), torch.zeros(9, dtype=torch.int64)), "data: item 0: NaN or Inf"),
        ((torch.zeros(9, 4, 4, 4), torch.zeros(9, dtype=torch.int64)), "--model.channels=4 --model.latent_size=4 fit"),
        (torch.utils.data.DataLoader(Items()), "data = DataLoader: the order is the trainer's"),
        ((item for item in ()), "data = generator:.*a map-style Dataset"),
        ("folder", "data = str: "),
    ],
)
def test_data_that_do_not_fit_are_told_in_one_line(data, told, tmp_path) -> None:
    with pytest.raises(UserError, match=told) as error:
        Trainer(recipe(tmp_path / "run"), model=tapped, data=data).fit()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "recipe.toml").exists()


# Recipes


def test_a_recipe_of_another_version_is_told_in_one_line(tmp_path) -> None:
    made = recipe(tmp_path / "run")
    old = replace(made)
    run = replace(made.run)
    object.__delattr__(run, "keep_every")  # as pickle restores what another version has pickled
    object.__setattr__(old, "run", run)
    with pytest.raises(UserError, match=r"recipe: \[run\] differs in keep_every from this version of st_fast"):
        Trainer(old, model=tapped, data=Items())
    object.__setattr__(run, "keep_every", 0)
    object.__setattr__(run, "gone", 0)
    with pytest.raises(UserError, match=r"recipe: \[run\] differs in gone from this version"):
        Trainer(old, model=tapped, data=Items())
    for wrong in ({}, None, 3):
        with pytest.raises(UserError, match=f"recipe = {type(wrong).__name__}: a Recipe of this version"):
            Trainer(wrong, model=tapped, data=Items())


def test_a_recipe_is_made_of_a_file_with_tables_over_it(tmp_path) -> None:
    file = Path(__file__).parents[2] / "recipes" / "digits.toml"
    made = st_fast.make_recipe(
        file,
        run={"out": str(tmp_path), "log_every": 7},
        sample={"cfg_range": [0.1, 0.5]},
        stage={"align": {"steps": 5}},
    )
    assert (made.run.out, made.run.log_every, made.sample.cfg_range) == (str(tmp_path), 7, (0.1, 0.5))
    assert made.stage("align").steps == 5
    with pytest.raises(RecipeError, match=r"run\.log_evry is unknown"):
        st_fast.make_recipe(file, run={"log_evry": 7})
    with pytest.raises(RecipeError, match="optm"):
        recipe(tmp_path, optm={"lr": 1.0})


def test_what_needs_python_is_refused_without_it(tmp_path, whole) -> None:
    made = recipe(tmp_path / "run")
    with pytest.raises(UserError, match=r"the module is given as Trainer\(recipe, model=...\)"):
        Trainer(made, data=Items())
    from st_fast.sample.__main__ import main as draw
    from st_fast.train.__main__ import main

    for command, arguments in ((main, [str(whole / "recipe.toml")]), (draw, [str(whole)])):
        with pytest.raises(UserError) as error:
            command(arguments)
        assert "st_fast." in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no run: there is no recipe\.toml"):
        st_fast.open_run(tmp_path / "nothing")


def test_the_api_is_typed_explained_and_listed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    for name in st_fast.__all__:
        thing = getattr(st_fast, name)
        assert inspect.getdoc(thing) and f"`{name}" in page, name
        functions = (
            [thing, *(f for n, f in vars(thing).items() if inspect.isfunction(f) and n[0] != "_")]
            if isinstance(thing, type)
            else [thing]
        )
        for function in functions:
            annotated = inspect.get_annotations(function.__init__ if isinstance(function, type) else function)
            if thing.__module__ in (api.__name__, own.__name__):
                assert inspect.getdoc(function) and "return" in annotated, function
    with pytest.raises(AttributeError, match="no attribute 'Trianer'"):
        st_fast.Trianer  # noqa: B018
