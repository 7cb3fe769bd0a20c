"""HASTE's trigger: the cosine against float64 written out anew, runs that stop by it, and resume across the stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from st_fast.core import checkpoint
from st_fast.core.errors import Interrupted
from st_fast.core.ranks import Ranks
from st_fast.model import build
from st_fast.model.side_stream import Future
from st_fast.recipe import RecipeError, cost, load
from st_fast.recipe.methods import Repa, SelfTranscendence
from st_fast.recipe.schema import Optim, Recipe, Stage
from st_fast.train.early_stop import at_time, cosines, cut_at, gradients, mean_cosine, scalar_products
from st_fast.train.run import run
from st_fast.train.step import Step
from st_fast.train.supervision import NoisyBatch, Parts, create
from tests import tiny
from tests.train.supervision.encoders import write_encoder, write_set
from tests.train.supervision.test_losses import BATCH, MODEL, TABLE, fill, noisy
from tests.train.test_training import STOP, signals, stop_at  # noqa: F401
from tests.truth import program

TIMES = (0.02, 0.1, 0.5, 0.8)
SETTING = program.Setting(
    depth=3, heads=2, patch=2, channels=4, classes=5, dropout=0.0, qk_norm=True, path="cosine", batch=BATCH, scale=1.0,
    lr=0.0, warmup=0, betas=(0.0, 0.0), eps=0.0, decay=0.0, clip=0.0, ema=0.0,
)  # fmt: skip
CPU = torch.device("cpu")
DIRECTION = 0.3


def made(depth: int) -> tuple[Step, Repa, NoisyBatch]:
    """A step in float64 of a network and heads with general weights, and a batch with one encoder's features."""
    method = Repa(("a",), depth, weight=0.7, hidden=24, stop_below=-0.05)
    stage = Stage("s", method, 10)
    supervision = create(stage, Parts(MODEL, TABLE, None, feature_widths=(6,)), seed=1)
    fill(supervision.heads, 4)
    step = object.__new__(Step)
    step.direction = DIRECTION
    step.model, step.supervision = fill(build(MODEL, TABLE, 3), 3), supervision
    step.model.pos_embed.data.copy_(program.positions(MODEL.width, 2))
    step.recipe = Recipe(MODEL, (stage,), optim=Optim(batch_size=BATCH))
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(BATCH, 2, 2, 6, generator=generator, dtype=torch.float64)
    return step, method, replace(noisy(method.selection), features=(features,))


def true_gradients(step: Step, depth: int, batch: NoisyBatch, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Of both losses with respect to the stream after a block, by the program that knows nothing of st_fast."""
    weights, heads = (program.as_float64(part.state_dict()) for part in (step.model, step.supervision.heads))
    weights = {key: tensor.requires_grad_(key != "pos_embed") for key, tensor in weights.items()}
    times = torch.full((BATCH,), t, dtype=torch.float64)
    x_t, velocity = program.path(SETTING, batch.x, batch.noise, times)
    predicted, streams = program.network(SETTING, weights, x_t, times, batch.student_condition)
    lengths = predicted.square().sum(1).sqrt() * velocity.square().sum(1).sqrt()
    off = (1 - (predicted * velocity).sum(1) / lengths).mean()
    denoise = (predicted - velocity).square().mean() + DIRECTION * off  # both are asked of the velocity
    aux = program.minus_cosine(program.mlp(heads, "projectors.0", streams[depth]), batch.features[0].flatten(1, 2))
    pair = (torch.autograd.grad(loss, streams[depth], retain_graph=True)[0] for loss in (denoise, aux.mean()))
    return tuple(gradient.numpy() for gradient in pair)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("t", TIMES)
def test_both_gradients_to_the_stream_are_the_whole_ones(depth: int, t: float) -> None:
    """The last block's stream is read by the final layer alone, the others' by the next block twice."""
    step, _, batch = made(depth)
    seen = at_time(batch, t, "cosine")
    ours = gradients(step, seen, Future(step.supervision.target(seen), None))
    for mine, true in zip(ours, true_gradients(step, depth, batch, t), strict=True):
        assert np.linalg.norm(true) > 1e-4
        assert np.linalg.norm(mine.numpy() - true) < 2e-5 * np.linalg.norm(true)
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_the_mean_of_the_cosines_over_the_times_however_the_batch_is_split() -> None:
    step, method, batch = made(2)
    expected = []
    for t in TIMES:
        a, b = (gradient.ravel() for gradient in true_gradients(step, 2, batch, t))
        expected.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert np.std(expected) > 0.005
    ranks = Ranks(0, 1, CPU)
    assert mean_cosine(step, method, [batch], "cosine", ranks) == pytest.approx(np.mean(expected), abs=2e-5)
    parts = [part(batch, slice(0, 4)), part(batch, slice(4, BATCH))]
    found = mean_cosine(step, method, parts, "cosine", ranks)
    # A part's supervision is weighed by 1 / its size, the whole one's by 1 / BATCH: unequal parts would weigh apart.
    equal = [part(batch, slice(0, 6)), part(batch, slice(6, BATCH))]
    assert mean_cosine(step, method, equal, "cosine", ranks) == pytest.approx(np.mean(expected), abs=2e-5) != found


def part(batch: NoisyBatch, rows: slice) -> NoisyBatch:
    names = ("x", "x_t", "velocity", "noise", "t", "condition", "student_condition", "ordinals")
    cut = {name: getattr(batch, name)[rows] for name in names}
    return replace(batch, **cut, features=tuple(one[rows] for one in batch.features))


def test_cosines_in_numpy_and_that_of_no_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 5, 7, generator=generator).bfloat16() for _ in range(2))
    rows = torch.stack([scalar_products(a, b), scalar_products(a, -b), scalar_products(a, 0 * b)])
    x, y = (one.double().numpy().ravel() for one in (a, b))
    true = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    np.testing.assert_allclose(cosines(rows).numpy(), [true, -true, 0.0], rtol=1e-5)
    assert not float(cosines(torch.tensor([[float("nan"), 1.0, 1.0]]))) < 1.0


def test_the_network_runs_its_blocks_as_before_after_a_cut() -> None:
    step, _, _ = made(2)
    run_block = step.model.run_block
    with pytest.raises(RuntimeError, match="stop"), cut_at(step.model, 2):
        assert step.model.run_block is not run_block
        raise RuntimeError("stop")
    assert step.model.run_block is run_block
    with pytest.raises(ValueError, match="one block"), cut_at(step.model, (1, 2)):
        pass


def test_only_times_with_supervision_are_compared_and_some_must_be() -> None:
    method = SelfTranscendence(teacher="t", stop_below=-0.05)
    assert method.stop_times == (0.5,) and Repa().stop_times == TIMES
    assert replace(method, t_range=(0.1, 1.0)).stop_times == TIMES[1:]
    with pytest.raises(RecipeError, match=r"stage\.s\.stop_below"):
        replace(method, t_range=(0.2, 0.4)).check("s")
    replace(method, t_range=(0.2, 0.4), stop_below="off").check("s")


def test_gradients_are_compared_at_multiples_while_supervision_lasts() -> None:
    method = Repa(stop_below=0.0, stop_every=3, stop_step=7)
    assert [step for step in range(12) if method.compares(step)] == [3, 6]
    assert not any(map(replace(method, stop_below="off").compares, range(12)))


STAGE = """
[[stage]]
name = "repa"
supervision = "repa"
steps = 10
encoders = ["one"]
depth = 2
hidden = 16
stop_every = 3
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("haste")
    return write_set(folder / "data", write_encoder(folder / "one"))


def recipe_of(data: Path, folder: Path, name: str, *options: str, stage: str = STAGE) -> Recipe:
    path = tiny.write_recipe(folder / f"{name}.toml", data, folder / name)
    path.write_text(path.read_text().split("[[stage]]")[0] + stage)
    return load(path, options)


def state(out: Path, stage: str = "repa") -> dict[str, Tensor]:
    found = checkpoint.latest(out / stage / "checkpoints", print)
    assert found is not None
    return {f"{group}/{name}": t for group, tensors in found.groups.items() for name, t in tensors.items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


ALWAYS, NEVER = "--stage.repa.stop_below=1", "--stage.repa.stop_below=-1"


def test_a_run_that_stops_by_itself_trains_as_one_that_is_told_the_step(data, tmp_path, one_thread) -> None:
    run(recipe_of(data, tmp_path, "itself", ALWAYS))
    run(recipe_of(data, tmp_path, "told", "--stage.repa.stop_step=3"))
    run(recipe_of(data, tmp_path, "never", NEVER))
    run(recipe_of(data, tmp_path, "off"))
    assert same(state(tmp_path / "itself"), state(tmp_path / "told"))
    assert same(state(tmp_path / "never"), state(tmp_path / "off"))  # looking changes nothing
    assert not same(state(tmp_path / "itself"), state(tmp_path / "off"))
    supervised = [record["aux"] != 0 for record in tiny.records(tmp_path / "itself", "train")]
    assert supervised == [True] * 3 + [False] * 7
    (found,) = tiny.records(tmp_path / "itself", "gradients")
    assert found["step"] == 3 and found["stopped"] is True and -1 < found["cosine"] < 1
    compared = tiny.records(tmp_path / "never", "gradients")
    assert [(record["step"], record["stopped"]) for record in compared] == [(3, False), (6, False), (9, False)]
    assert compared[0]["cosine"] == found["cosine"] and not tiny.records(tmp_path / "off", "gradients")
    newest = checkpoint.latest(tmp_path / "itself" / "repa" / "checkpoints", print)
    assert newest is not None and newest.said.stopped_at == 3


def test_comparisons_are_counted_with_the_cost(data, tmp_path, one_thread) -> None:
    for name, options, count in (("itself", [ALWAYS], 1), ("never", [NEVER, "--stage.repa.stop_step=9"], 2)):
        recipe = recipe_of(data, tmp_path, name, *options)
        run(recipe)
        (stage,) = recipe.stages
        told = replace(stage, method=stage.method.ending(3)) if name == "itself" else stage
        each = cost.comparison_flops(recipe, stage)
        (encoder,) = (data / "features").glob("*")
        last, first = (tiny.records(tmp_path / name, kind)[-1]["flops"] for kind in ("end", "train"))
        beforehand = tiny.records(tmp_path / name, "train")[0]["flops"] - cost.stage_flops(recipe, told, 0, 1)
        assert each > 0 and last == first and encoder.is_dir()
        assert last == pytest.approx(beforehand + cost.stage_flops(recipe, told, 0, 10) + count * each, rel=1e-12)
    model = recipe.model
    macs = 2 * cost.trunk_macs(model) - cost.trunk_macs(model, 2)
    assert each == 8 * 4 * 2 * (macs + 2 * 4 * (32 * 16 + 16 * 16 + 16 * 32))


def test_comparisons_are_counted_before_and_after_a_routes_end(data, tmp_path, one_thread) -> None:
    route = 'route = "tread"\nroute_first = 1\nroute_last = 3\ndense_after = 6\n'
    recipe = recipe_of(data, tmp_path, "routed", NEVER, stage=STAGE + route)
    run(recipe)
    (stage,) = recipe.stages
    routed, dense = (cost.comparison_flops(recipe, stage, step=step) for step in (3, 6))
    first, *_, last = (record["flops"] for record in tiny.records(tmp_path / "routed", "train"))
    trained = cost.stage_flops(recipe, stage, 1, 10)
    assert dense > routed and last - first == pytest.approx(trained + routed + 2 * dense, rel=1e-12)


@pytest.mark.parametrize("option", ["--run.prefetch=false", "--run.prefetch=true"])
def test_interrupted_at_every_step_it_resumes_bit_exactly_across_the_stop(
    option: str,
    data,
    tmp_path,
    monkeypatch,
    signals,  # noqa: F811
    one_thread,
) -> None:
    run(recipe_of(data, tmp_path, "whole", ALWAYS))
    again, stops = recipe_of(data, tmp_path, "again", ALWAYS, option, "--run.streams=auto"), 0
    while True:
        with monkeypatch.context() as patch:
            stop_at(patch, 1)
            STOP.name = None
            try:
                run(again)
                break
            except Interrupted:
                stops += 1
    assert stops == 10 and same(state(tmp_path / "again"), state(tmp_path / "whole"))
    compared = [tiny.records(tmp_path / name, "gradients") for name in ("again", "whole")]
    assert [[(r["step"], r["cosine"], r["stopped"]) for r in records] for records in compared] == [
        [(3, compared[1][0]["cosine"], True)]
    ] * 2
    ours, theirs = (tiny.records(tmp_path / name, "end")[-1]["flops"] for name in ("again", "whole"))
    assert ours == theirs


TAUGHT = "".join(tiny.RECIPE.partition("[[stage]]")[1:]).format()


@pytest.mark.parametrize(
    "option",
    ["--run.teacher_placement=before", "--run.teacher_placement=ahead", "--run.supervised_rows=padded",
     "--run.checkpointing=block", "--optim.accumulation=2"],
)  # fmt: skip
def test_stage_2_stops_by_itself_in_any_schedule_and_resumes(
    option: str,
    data,
    tmp_path,
    monkeypatch,
    signals,  # noqa: F811
    one_thread,
) -> None:
    stop = ("--stage.transcend.stop_below=1", "--stage.transcend.stop_every=4", "--run.streams=auto", option)
    whole = recipe_of(data, tmp_path, "whole", *stop, "--stage.align.steps=3", stage=TAUGHT)
    run(whole)
    again = recipe_of(data, tmp_path, "again", *stop, "--stage.align.steps=3", stage=TAUGHT)
    with monkeypatch.context() as patch:
        stop_at(patch, 8)  # the fifth step of stage 2, before which gradients are compared
        with pytest.raises(Interrupted):
            run(again)
    STOP.name = None
    run(again)
    assert same(state(tmp_path / "again", "transcend"), state(tmp_path / "whole", "transcend"))
    lines = [r for r in tiny.records(tmp_path / "whole", "train") if r["stage"] == "transcend"]
    assert any(r["aux"] != 0 for r in lines[:4]) and all(r["aux"] == 0 for r in lines[4:])
    assert [r["step"] for r in tiny.records(tmp_path / "again", "gradients")] == [4]
