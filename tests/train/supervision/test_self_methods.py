"""LayerSync and SRA: their losses against NumPy float64, where gradients flow, a teacher that follows the student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core import random
from st_fast.core.errors import Interrupted
from st_fast.core.random import Purpose
from st_fast.model import build
from st_fast.recipe import load
from st_fast.recipe.methods import LayerSync, SelfRepresentation
from st_fast.recipe.schema import Optim, Stage
from st_fast.train import trainer
from st_fast.train.optim import EmaModel
from st_fast.train.run import run
from st_fast.train.supervision import Parts, create
from tests import tiny
from tests.train.supervision.test_losses import BATCH, MODEL, TABLE, fill, hidden, noisy, silu, weights_of
from tests.train.test_training import STOP, signals, stop_at  # noqa: F401

SRA_STAGE = """
[[stage]]
name = "sra"
supervision = "sra"
steps = 8
student_depth = 1
teacher_depth = 2
time_offset = 0.5
"""
SYNC_STAGE = """
[[stage]]
name = "sync"
supervision = "layer_sync"
steps = 8
student_depth = 1
teacher_depth = 3
"""


def cosine_loss(q: np.ndarray, f: np.ndarray) -> np.ndarray:
    """(B, N, D) twice → (B,): mean over tokens of −cos."""
    return -((q * f).sum(-1) / np.linalg.norm(q, axis=-1) / np.linalg.norm(f, axis=-1)).mean(1)


def smooth_l1(difference: np.ndarray, beta: float) -> np.ndarray:
    size = np.abs(difference)
    return np.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def made_sra(**settings):
    method = SelfRepresentation(student_depth=1, teacher_depth=2, **settings)
    average = EmaModel(fill(build(MODEL, TABLE, 3), 3))
    parts = Parts(MODEL, TABLE, None, average, path="cosine", seed=5)
    supervision = create(Stage("s", method, 10), parts, seed=1)
    fill(supervision.heads, 4)
    return supervision, method


def test_layer_sync_equals_the_formula_in_numpy_and_pulls_only_the_shallow_block():
    method = LayerSync(student_depth=1, teacher_depth=3, weight=0.2)
    supervision = create(Stage("s", method, 10), Parts(MODEL, TABLE, None), seed=1)
    batch, shallow, deep = noisy(method.selection), hidden(1), hidden(2)
    assert len(batch.rows.index) == BATCH and supervision.target(batch) == ()
    loss = supervision.loss((shallow, deep), supervision.target(batch), batch)
    expected = 0.2 * cosine_loss(shallow.detach().numpy(), deep.detach().numpy()).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert shallow.grad.abs().sum() > 0 and deep.grad is None
    assert not list(supervision.heads.parameters())


def test_a_tuple_of_taps_gives_the_streams_that_single_taps_give():
    model, batch = fill(build(MODEL, TABLE, 3), 3), noisy(None)
    velocity, streams_of = model(batch.x_t, batch.t, batch.condition, (1, 3, 0))
    for tap, stream in zip((1, 3, 0), streams_of, strict=True):
        alone, expected = model(batch.x_t, batch.t, batch.condition, tap)
        assert torch.equal(stream, expected) and torch.equal(velocity, alone)
    assert torch.equal(model.features(batch.x_t, batch.t, batch.condition, 3), streams_of[1])


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
def test_sra_equals_the_formula_in_numpy(loss):
    supervision, method = made_sra(loss=loss, time_offset=0.3, weight=0.7)
    batch, h = replace(noisy(method.selection), student_condition=torch.full((BATCH,), 5)), hidden()
    u = random.uniform(5, Purpose.TEACHER_TIME, batch.ordinals)[:, 0].numpy()
    t = np.maximum(batch.t.numpy() - np.float32(0.3) * u, 0)
    assert (t == 0).any() or (t > 0).all()
    angle = (np.pi / 2 * t)[:, None, None, None]
    x_t = np.cos(angle) * batch.x.numpy() + np.sin(angle) * batch.noise.numpy()
    teacher = supervision.average()
    _, f = teacher(torch.from_numpy(x_t), torch.from_numpy(t), batch.student_condition, tap=2)
    w = weights_of(supervision.heads)
    q = h.detach().numpy() @ w["ap_head.linear1.weight"].T + w["ap_head.linear1.bias"]
    q = silu(q) @ w["ap_head.linear2.weight"].T + w["ap_head.linear2.bias"]
    assert q.shape[-1] == 16 and w["ap_head.linear1.weight"].shape == (32, 16)
    target = supervision.target(batch)
    torch.testing.assert_close(target[0], f, rtol=1e-5, atol=1e-5)
    f = target[0].numpy()
    losses = cosine_loss(q, f) if loss == "cosine" else smooth_l1(q - f, 0.05).mean((1, 2))
    assert supervision.loss(h, target, batch).item() == pytest.approx(0.7 * losses.mean(), rel=1e-6)


def test_sra_trains_the_head_and_the_student_but_not_the_teacher():
    supervision, method = made_sra()
    batch, h = noisy(method.selection), hidden()
    supervision.loss(h, supervision.target(batch), batch).backward()
    assert h.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in supervision.heads.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in supervision.average().parameters())


def test_the_teachers_times_lie_below_the_students_and_never_below_zero():
    supervision, method = made_sra(time_offset=0.9)
    batch = noisy(method.selection)
    t = supervision.teacher_times(batch)
    assert (t <= batch.t).all() and (t >= 0).all() and (t < batch.t).any()
    moved = supervision.teacher_times(replace(batch, ordinals=batch.ordinals + 1))
    assert not torch.equal(moved, t)


def test_the_published_decay_takes_a_tenth_off_in_the_stated_steps():
    method = SelfRepresentation(decay_start=100, decay_steps=50)
    assert [method.factor(step) for step in (0, 100)] == [1.0, 1.0]
    assert method.factor(150) == pytest.approx(0.1) and method.factor(200) == pytest.approx(0.01)
    assert SelfRepresentation().factor(10**9) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_the_optimisers_ema_without_a_copy_in_float32(dtype):
    from st_fast.kernels import reference
    from st_fast.train.optim import Optimizer

    student = build(MODEL, TABLE, 3)
    settings = Optim(ema_decay=0.5, lr=0.1)
    optimizer = Optimizer(student, torch.nn.Module(), settings, dtype, reference.adamw_ema_, reference.grad_norm)
    average = EmaModel(build(MODEL, TABLE, 7).to(dtype))
    emas = optimizer.state()["ema"]
    average.follow(emas)
    for _ in range(2):
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.update()
        expected = {name: tensor.clone() for name, tensor in emas.items()}
        assert not average().training
        assert all(torch.equal(emas[name], tensor) for name, tensor in expected.items())
        for name, parameter in average().named_parameters():
            assert torch.equal(parameter, emas[name].to(dtype)) and not parameter.requires_grad
            assert (parameter.data_ptr() == emas[name].data_ptr()) == (dtype == torch.float32)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    data = tiny.write_data(tmp_path / "data")
    path = tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    head = path.read_text().split("[[stage]]")[0]
    path.write_text(head + SRA_STAGE + SYNC_STAGE)
    return path


def states(out: Path) -> dict[str, torch.Tensor]:
    from st_fast.core import checkpoint

    found = {name: checkpoint.latest(out / name / "checkpoints", print) for name in ("sra", "sync")}
    return {f"{s}/{g}/{k}": t for s, c in found.items() for g, ts in c.groups.items() for k, t in ts.items()}


def test_an_interrupted_run_with_an_average_as_teacher_resumes_bit_exactly(recipe, tmp_path, monkeypatch, signals):  # noqa: F811
    torch.set_num_threads(1)
    run(load(recipe))
    whole = states(tmp_path / "out")
    again = load(recipe, [f"--run.out={tmp_path / 'again'}"])
    for step in (3, 8):  # within the first stage, then within the second
        STOP.name = None
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Interrupted):
                run(again)
    STOP.name = None
    run(again)
    resumed = states(tmp_path / "again")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[k], whole[k]) for k in whole)
    logged = tiny.records(tmp_path / "out", "train")
    assert all(record["aux"] > 0 for record in logged if record["stage"] == "sra")
    assert any(record["aux"] != 0 for record in logged if record["stage"] == "sync")


def test_the_teacher_of_a_run_is_the_weight_average_before_and_after_a_resume(recipe, monkeypatch):
    seen, call = [], trainer.Step.__call__

    def checking(self, step, batches):
        if self.supervision.tap == 1:  # SRA's stage
            emas, masters = self.optimizer.state()["ema"], self.optimizer.state()["model"]
            weights = dict(self.supervision.average().named_parameters())
            assert weights.keys() == emas.keys()
            assert all(weights[name].data_ptr() == emas[name].data_ptr() for name in emas)
            seen.append(any(not torch.equal(weights[name], masters[name]) for name in masters))
        return call(self, step, batches)

    monkeypatch.setattr(trainer.Step, "__call__", checking)
    run(load(recipe, ["--stage.sra.steps=3", "--stage.sync.steps=1"]))
    run(load(recipe, ["--stage.sra.steps=5", "--stage.sync.steps=1"]))
    assert seen == [False, True, True, True, True]  # at the start they are equal


def test_accumulated_micro_batches_see_the_same_teacher_as_one_batch(recipe, tmp_path):
    run(load(recipe))
    run(load(recipe, [f"--run.out={tmp_path / 'parts'}", "--optim.accumulation=4"]))
    pairs = zip(tiny.records(tmp_path / "out", "train"), tiny.records(tmp_path / "parts", "train"), strict=True)
    for ours, theirs in pairs:
        assert ours["aux"] == pytest.approx(theirs["aux"], rel=2e-3)
