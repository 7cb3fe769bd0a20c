"""Routes in training: runs resume and split exactly, a route ends where it should, and follows each batch's shape.

What is computed, every loss and gradient, is compared with a program of its own in `tests/truth`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core import checkpoint
from st_fast.core.errors import Interrupted
from st_fast.recipe import load
from st_fast.train.run import run
from tests import tiny, tiny_shapes
from tests.train.test_training import STOP, signals, stop_at  # noqa: F401

STAGES = """
[[stage]]
name = "plain"
supervision = "none"
steps = 8
route = "tread"
route_first = 1
route_last = 2
dense_after = 5
[[stage]]
name = "align"
supervision = "velocity_head"
steps = 6
depth = 2
hidden = 16
t_range = [0.0, 1.0]
route = "tread"
route_rate = 0.75
route_first = 1
route_last = 3
route_select = "structured"
"""
SPRINT = """
[[stage]]
name = "sprint"
supervision = "none"
steps = 6
route = "sprint"
route_first = 1
route_last = 2
path_drop = 0.4
dense_after = 4
"""
STAGES += SPRINT
NAMES = ("plain", "align", "sprint")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_shapes.write_bucket_of_squares(tmp_path_factory.mktemp("data"))


def write_recipe(path: Path, data: Path, out: Path) -> Path:
    tiny.write_recipe(path, data, out)
    path.write_text(path.read_text().replace("latent_size = 4", "latent_size = 12").split("[[stage]]")[0] + STAGES)
    return path


def states(out: Path) -> dict[str, torch.Tensor]:
    found = {name: checkpoint.latest(out / name / "checkpoints", print) for name in NAMES}
    return {f"{s}/{g}/{k}": t for s, c in found.items() for g, ts in c.groups.items() for k, t in ts.items()}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The run folder of a run that nobody interrupted."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run(load(write_recipe(folder / "t.toml", data, folder / "out")))
    return folder / "out"


def test_runs_interrupted_before_and_after_the_routes_end_resume_bit_exactly(
    whole, data, tmp_path, monkeypatch, signals  # noqa: F811
) -> None:  # fmt: skip
    recipe = load(write_recipe(tmp_path / "t.toml", data, tmp_path / "out"))
    for step in (3, 2, 2, 4, 6):  # of each process: to 3, 5 (the route's end) and 7 of 8, and to 3 of the others
        STOP.name = None
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Interrupted):
                run(recipe)
    STOP.name = None
    run(recipe)
    ours, theirs = states(tmp_path / "out"), states(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


KEYS = ("denoise", "aux", "grad_norm")


def losses(out: Path) -> list[list[float]]:
    return [[record[key] for key in KEYS] for record in tiny.records(out, "train")]


@pytest.mark.parametrize(
    "options",
    [
        ("--optim.accumulation=4",), ("--run.checkpointing=block",), ("--run.checkpointing=attention",),
        ("--model.modulation=one", "--data.loader=torch"), ("--run.supervised_rows=padded", "--optim.accumulation=2"),
    ],
)  # fmt: skip
def test_splits_and_schedules_train_as_the_run_without_them(options, whole, data, tmp_path) -> None:
    run(load(write_recipe(tmp_path / "t.toml", data, tmp_path / "out"), list(options)))
    for ours, theirs in zip(losses(tmp_path / "out"), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_the_route_ends_where_the_recipe_says_and_its_flops_with_it(whole, data, tmp_path) -> None:
    starts = {r["stage"]: r for r in tiny.records(whole, "start")}
    flops = [r["flops"] for r in tiny.records(whole, "train") if r["stage"] == "plain"]
    steps = np.diff([0.0, *flops])
    assert steps[:5] == pytest.approx([8 * starts["plain"]["flops_per_image"]] * 5)
    assert steps[5:] == pytest.approx([steps[-1]] * 3) and steps[-1] > 1.1 * steps[0]
    run(load(write_recipe(tmp_path / "t.toml", data, tmp_path / "out"), ["--stage.plain.dense_after=0"]))
    ours, theirs = losses(tmp_path / "out"), losses(whole)
    assert ours[:5] == theirs[:5] and ours[5] != theirs[5]


def test_what_is_drawn_of_a_run_is_drawn_with_all_tokens(whole, data) -> None:
    """A network that was trained under a route is the plain one, with the same keys."""
    from st_fast import kernels
    from st_fast.model import SiT

    found = checkpoint.latest(whole / "plain" / "checkpoints", print)
    assert found is not None
    model = SiT(load(whole / "recipe.toml").model, kernels.select({}, torch.device("cpu")))
    model.load_state_dict(found.groups["ema"])
    assert found.said.architecture == model.config.architecture()
    assert not any("route" in key for key in found.said.architecture)


def test_a_route_follows_each_batchs_own_shape(tmp_path) -> None:
    data = tiny_shapes.write_data(tmp_path / "data")
    path = tiny_shapes.write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    stage = '[[stage]]\nname = "only"\nsupervision = "layer_sync"\nsteps = 5\nstudent_depth = 1\nteacher_depth = 2\n'
    route = 'route = "tread"\nroute_first = 1\nroute_last = 2\n'
    path.write_text(path.read_text().split("[[stage]]")[0] + stage + route)
    run(load(path))
    assert len(losses(tmp_path / "out")) == 5 and np.isfinite(losses(tmp_path / "out")).all()
    squares = ["--stage.only.route_select=structured", "--stage.only.route_rate=0.75"]
    with pytest.raises(Exception, match="there are 5 x 7") as caught:
        run(load(path, [*squares, f"--run.out={tmp_path / 'squares'}"]))
    assert "\n" not in str(caught.value)


def test_a_fused_stages_checkpoint_has_the_fusion_and_is_taken_over(whole, data, tmp_path) -> None:
    found = checkpoint.latest(whole / "sprint" / "checkpoints", print)
    assert found is not None
    assert {"mask_token", "fusion_proj.weight", "fusion_proj.bias"} <= found.groups["ema"].keys()
    assert found.groups["model"]["mask_token"].abs().sum() > 0
    assert {key: found.said.architecture[key] for key in ("fusion_first", "fusion_last")} == {
        "fusion_first": 1, "fusion_last": 2
    }  # fmt: skip
    path = write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    path.write_text(path.read_text().split("[[stage]]")[0] + SPRINT)
    run(load(path, [f"--stage.sprint.init={whole}/sprint", "--stage.sprint.steps=5"]))
    assert len(losses(tmp_path / "out")) == 5


def test_mmdits_image_tokens_take_a_route(tmp_path) -> None:
    from tests import tiny_text

    path = tmp_path / "t.toml"
    text = tiny_text.RECIPE.format(data=tiny_text.make_data(tmp_path / "data"), out=tmp_path / "out")
    stage = '[[stage]]\nname = "only"\nsupervision = "velocity_head"\nsteps = 4\ndepth = 2\nhidden = 16\n'
    path.write_text(text.split("[[stage]]")[0] + stage + 'route = "tread"\nroute_first = 1\nroute_last = 2\n')
    run(load(path))
    assert len(losses(tmp_path / "out")) == 4 and np.isfinite(losses(tmp_path / "out")).all()
