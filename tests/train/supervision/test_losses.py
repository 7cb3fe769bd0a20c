"""Stage 1 and stage 2 losses against the formulas of docs/method.md in NumPy float64, and the saving of the t-range."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from st_fast import kernels
from st_fast.model import build, flow
from st_fast.model.velocity_head import Head, projector
from st_fast.recipe.methods import Method, Selection, SelfTranscendence, VelocityHead
from st_fast.recipe.schema import Model, Stage
from st_fast.train.supervision import NoisyBatch, Parts, Rows, create, select_rows, sra

MODEL = Model("custom", depth=3, width=16, heads=2, patch=2, channels=4, latent_size=4, num_classes=5)
OPS = ("norm_modulate", "gate_residual_norm_modulate", "qk_norm", "guided_feature_loss")
TABLE = kernels.select(dict.fromkeys(OPS, "reference"), torch.device("cpu"))
BATCH = 12


def fill(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = parameter.data.double() + 0.3 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        )
    return module.double()


def noisy(selection: Selection | None, seed: int = 0) -> NoisyBatch:
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(BATCH, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.rand(BATCH, generator=generator)
    x_t, velocity = flow.interpolate(x, noise, t, "linear")
    labels = torch.arange(BATCH) % 5
    return NoisyBatch(
        x, x_t, velocity, noise, t, labels, labels, torch.arange(BATCH), Rows(*select_rows(t, slice(None), selection))
    )


def made(method: Method, with_teacher: bool = False):
    teacher = fill(build(MODEL, TABLE, 3), 3).eval().requires_grad_(False) if with_teacher else None
    supervision = create(Stage("s", method, 10), Parts(MODEL, TABLE, teacher), seed=1)
    fill(supervision.heads, 4)
    return supervision


def hidden(seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 4, 16, generator=generator, dtype=torch.float64).requires_grad_()


def silu(z):
    return z / (1 + np.exp(-z))


def mlp(weights: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    for layer in (0, 2, 4):
        z = z @ weights[f"projectors.{layer}.weight"].T + weights[f"projectors.{layer}.bias"]
        z = silu(z) if layer < 4 else z
    return z


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def masked_mean(losses: np.ndarray, t: torch.Tensor, selection: Selection) -> float:
    """The three masks of docs/method.md, times λ."""
    m = ((t.numpy() >= selection.t_range[0]) & (t.numpy() <= selection.t_range[1])).astype(np.float64)
    if selection.mask == "sample":
        return selection.weight * (m * losses).mean()
    if selection.mask == "sample_mean":
        return selection.weight * (m * losses).sum() / m.sum()
    # (B,) times (B, 1, 1, 1) broadcasts to every pair, so the mean is a product of means.
    return selection.weight * (m[None, :] * losses[:, None]).mean()


@pytest.mark.parametrize("mask", ["sample", "sample_mean", "released"])
@pytest.mark.parametrize("target", ["velocity", "latent"])
def test_stage_1_loss_equals_the_formula_in_numpy(mask, target):
    method = VelocityHead(depth=2, target=target, mask=mask, hidden=24)
    supervision, batch, h = made(method), noisy(method.selection), hidden()
    z = mlp(weights_of(supervision.heads), h.detach().numpy())
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    w = weights_of(supervision.heads)
    patches = z @ w["projectors_final.linear.weight"].T + w["projectors_final.linear.bias"]
    image = patches.reshape(BATCH, 2, 2, 2, 2, 4).transpose(0, 5, 1, 3, 2, 4).reshape(BATCH, 4, 4, 4)
    truth = (batch.velocity if target == "velocity" else batch.x).numpy()
    expected = masked_mean(((image - truth) ** 2).mean((1, 2, 3)), batch.t, method.selection)
    assert supervision.loss(h, supervision.target(batch), batch).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mask", ["sample", "sample_mean", "released"])
@pytest.mark.parametrize("loss", ["mse", "cosine", "normalized_mse"])
@pytest.mark.parametrize("cfg_scale", [1.0, 30.0])
def test_stage_2_loss_equals_the_formula_in_numpy(mask, loss, cfg_scale):
    method = SelfTranscendence(
        teacher="t", student_depth=1, teacher_depth=2, mask=mask, loss=loss, hidden=24, cfg_scale=cfg_scale
    )
    supervision, batch, h = made(method, with_teacher=True), noisy(method.selection), hidden()
    teacher = supervision.teacher
    null = torch.full_like(batch.condition, 5)
    f_y, f_0 = (teacher(batch.x_t, batch.t, y, tap=2)[1].numpy() for y in (batch.condition, null))
    f, q = f_0 + cfg_scale * (f_y - f_0), mlp(weights_of(supervision.heads), h.detach().numpy())
    if loss == "cosine":
        losses = -((q * f).sum(-1) / np.linalg.norm(q, axis=-1) / np.linalg.norm(f, axis=-1)).mean(1)
    else:
        f = f / np.sqrt((f**2).mean(-1, keepdims=True)) if loss == "normalized_mse" else f
        losses = ((q - f) ** 2).mean((1, 2))
    expected = masked_mean(losses, batch.t, method.selection)
    assert supervision.loss(h, supervision.target(batch), batch).item() == pytest.approx(expected, rel=1e-6)


def test_stage_1s_head_written_out_for_other_patches_and_flat_tokens():
    """A layer norm's epsilon matters where the tokens hardly differ."""
    config = replace(MODEL, patch=4, channels=3, width=10, latent_size=8)
    head = fill(Head(config, 24, TABLE), 2)
    for parameter in head.projectors[4].parameters():
        parameter.data *= 1e-3
    tokens = torch.randn(5, 6, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w, z = weights_of(head), mlp(weights_of(head), tokens.numpy())
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    patches = z @ w["projectors_final.linear.weight"].T + w["projectors_final.linear.bias"]
    np.testing.assert_allclose(head(tokens).detach().numpy(), patches, rtol=1e-9)


@pytest.mark.parametrize("head", ["projector", "velocity", "sra"])
def test_heads_begin_as_published_uniform_after_xavier_without_bias(head):
    config = replace(MODEL, width=40, channels=3)
    torch.manual_seed(0)
    made_of = {"projector": lambda: projector(40, 70, 50, TABLE), "velocity": lambda: Head(config, 70, TABLE),
               "sra": lambda: sra.Head(40)}[head]()  # fmt: skip
    layers = [module for module in made_of.modules() if isinstance(module, nn.Linear)]
    sizes = {"projector": [(40, 70), (70, 70), (70, 50)], "velocity": [(40, 70), (70, 70), (70, 40), (40, 12)],
             "sra": [(40, 80), (80, 40)]}[head]  # fmt: skip
    assert [(layer.in_features, layer.out_features) for layer in layers] == sizes
    for layer in layers:
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_methods_heads_follow_from_the_seed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, again, other = (create(Stage("s", VelocityHead(depth=2), 10), Parts(MODEL, TABLE, None), s) for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [method.heads.projectors[0].weight for method in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_t_range_holds_both_its_ends_and_a_mean_of_few_or_none_is_divided_by_as_many():
    t = torch.tensor([0.25, 0.75, 0.7500001, 0.2499999, 0.5])

    def selected(mask: str, t: torch.Tensor = t) -> tuple[list[int], list[float]]:
        index, weight = select_rows(t, slice(None), Selection((0.25, 0.75), mask, 0.5))
        return index.tolist(), weight.tolist()

    assert selected("sample") == ([0, 1, 4], pytest.approx([0.5 / 5] * 3))
    assert selected("sample_mean") == ([0, 1, 4], pytest.approx([0.5 / 3] * 3))
    assert selected("sample_mean", t[3:]) == ([1], [0.5]) and selected("released", t[3:]) == ([0, 1], [0.125] * 2)
    for mask in ("sample", "sample_mean", "released"):
        assert selected(mask, t[2:4]) == ([], [])
    assert [len(one) for one in select_rows(t, slice(None), None)] == [0, 0]


@pytest.mark.parametrize("mask", ["sample", "sample_mean"])
def test_running_the_teacher_in_range_only_changes_neither_loss_nor_gradients(mask):
    method = SelfTranscendence(teacher="t", student_depth=1, teacher_depth=2, mask=mask, hidden=24)
    supervision, batch = made(method, with_teacher=True), noisy(method.selection)
    everything = torch.zeros(BATCH)
    everything[batch.rows.index] = batch.rows.weight
    all_rows = replace(batch, rows=Rows(torch.arange(BATCH), everything))
    assert 0 < len(batch.rows.index) < BATCH

    def run(b: NoisyBatch):
        h = hidden()
        supervision.heads.zero_grad()
        loss = supervision.loss(h, supervision.target(b), b)
        loss.backward()
        return [loss.detach(), h.grad, *(p.grad.clone() for p in supervision.heads.parameters())]

    for ours, theirs in zip(run(batch), run(all_rows), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class Counting(nn.Module):
    """A teacher that counts the samples it is shown and the blocks it runs."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.samples, self.blocks = teacher, 0, 0
        run = teacher.run_block

        def counted(block, x, *rest):
            self.blocks, self.samples = self.blocks + 1, self.samples + len(x)
            return run(block, x, *rest)

        teacher.run_block = counted

    def guided_features(self, *arguments):
        return self.teacher.guided_features(*arguments)


def test_the_teacher_runs_in_range_samples_only_and_only_up_to_its_block():
    method = SelfTranscendence(teacher="t", student_depth=1, teacher_depth=2, hidden=24)
    supervision, batch = made(method, with_teacher=True), noisy(method.selection)
    supervision.teacher = counting = Counting(supervision.teacher)
    supervision.target(batch)
    assert counting.blocks == 2
    assert counting.samples == 2 * 2 * len(batch.rows.index)  # two blocks, both branches


def test_supervision_ends_at_stop_step():
    method = SelfTranscendence(teacher="t", student_depth=1, teacher_depth=2, hidden=24, stop_step=3)
    supervision = made(method, with_teacher=True)
    assert [supervision.active(step) for step in range(5)] == [True, True, True, False, False]


def test_no_sample_in_range_gives_a_zero_loss_and_zero_gradients():
    method = SelfTranscendence(teacher="t", student_depth=1, teacher_depth=2, hidden=24, t_range=(0.4, 0.7))
    supervision, batch = made(method, with_teacher=True), noisy(method.selection)
    empty = replace(batch, rows=Rows(torch.empty(0, dtype=torch.int64), torch.empty(0)))
    h = hidden()
    loss = supervision.loss(h, supervision.target(empty), empty)
    loss.backward()
    assert loss.item() == 0 and not h.grad.any()


def test_the_teacher_gets_no_gradient_and_is_not_trained():
    method = SelfTranscendence(teacher="t", student_depth=1, teacher_depth=2, hidden=24)
    supervision, batch = made(method, with_teacher=True), noisy(method.selection)
    assert not any(f.requires_grad for f in supervision.target(batch))
    trained = {id(p) for p in supervision.heads.parameters()}
    assert not trained & {id(p) for p in supervision.teacher.parameters()}


@pytest.mark.parametrize("mask", ["sample", "sample_mean", "released"])
def test_micro_batches_add_up_to_the_weights_of_the_whole_batch(mask):
    t = torch.rand(16, generator=torch.Generator().manual_seed(2))
    selection = Selection((0.4, 0.7), mask, 0.5)
    whole = torch.zeros(16)
    index, weight = select_rows(t, slice(None), selection)
    whole[index] = weight
    parts = torch.zeros(16)
    for start in (0, 4, 8, 12):
        index, weight = select_rows(t, slice(start, start + 4), selection)
        parts[start + index] = weight
    assert torch.equal(whole, parts)
