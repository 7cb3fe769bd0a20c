"""Muon is torch.optim.Muon beside AdamW, with what every optimiser here has: average, copies, skipping, resuming."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from st_fast import kernels
from st_fast.convert.__main__ import main as convert
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.model import build, stored
from st_fast.recipe import RecipeError, cost, load, muon_cost
from st_fast.recipe.schema import Model, Optim
from st_fast.train import muon
from st_fast.train.muon import Matrix, Muon, orthogonalized, shared_out
from st_fast.train.optim import Optimizer
from st_fast.train.run import run
from tests import tiny
from tests.train.supervision.resuming import assert_it_resumes_bit_exactly_and_learns
from tests.train.test_training import signals  # noqa: F401

MODEL = Model(
    "custom", depth=2, width=20, heads=2, patch=2, channels=3, latent_size=4, num_classes=5, mlp_ratio=2.3
)  # an MLP of 46 channels
SETTINGS = Optim(
    name="muon", lr=2e-3, weight_decay=0.05, grad_clip=0.3, ema_decay=0.97, warmup_steps=12, muon_lr=1.3e-3,
    muon_momentum=0.93, muon_weight_decay=0.1, muon_precision="fp32",
)  # fmt: skip
BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ONE_STAGE = '[[stage]]\nname = "{name}"\nsupervision = "velocity_head"\nsteps = 6\ndepth = 1\nhidden = 16\n'


def network(model: Model = MODEL) -> nn.Module:
    """With weights from which every matrix gets a gradient."""
    found = build(model, kernels.select({}, torch.device("cpu")), 0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return found


def optimizer(model: nn.Module, settings: Optim = SETTINGS, dtype: torch.dtype = torch.float32) -> Optimizer:
    return Optimizer(model, nn.Identity(), settings, dtype, kernels.adamw_ema_, kernels.grad_norm)


def learn(model: Any, step: int) -> None:
    """Gradients of a denoising loss."""
    generator = torch.Generator().manual_seed(step)
    x, t = torch.randn(6, 3, 4, 4, generator=generator), torch.rand(6, generator=generator)
    velocity, _ = model(x, t, torch.randint(0, 5, (6,), generator=generator), 1)
    (velocity.float() - x.roll(1, 0)).square().mean().backward()


class Rival:
    """torch.optim.Muon, torch.optim.AdamW, clip_grad_norm_ and LambdaLR on a model of its own."""

    def __init__(self, settings: Optim) -> None:
        self.settings, self.model = settings, network()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        matrices = [name for name in self.trained if name.endswith(tuple(f"{layer}.weight" for layer in BLOCK))]
        s, rest = settings, [p for name, p in self.trained.items() if name not in matrices]
        self.both: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                [self.trained[name] for name in matrices], s.muon_lr, s.muon_weight_decay, s.muon_momentum,
                adjust_lr_fn=s.muon_adjust,
            ),
            torch.optim.AdamW(rest, s.lr, s.betas, s.eps, s.weight_decay),
        ]  # fmt: skip
        warmed = [
            torch.optim.lr_scheduler.LambdaLR(one, lambda done: min(1.0, (done + 1) / max(s.warmup_steps, 1)))
            for one in self.both
        ]
        self.schedules = warmed

    def update(self, grads: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.grad = grads[name].clone()
        nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings.grad_clip)
        for one in (*self.both, *self.schedules):
            one.step()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def worst(ours: nn.Module, theirs: dict[str, Tensor]) -> dict[str, float]:
    found = {name: p.detach() for name, p in ours.named_parameters()}
    return {name: float((found[name] - p.detach()).abs().max() / p.detach().abs().max()) for name, p in theirs.items()}


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.optim.Muon casts to bfloat16 in one place; all else of it stays as it is."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    yield


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_200_steps_are_those_of_torchs_muon_and_adamw(adjust, in_float32):
    """From the same gradients: of this trajectory. Clipped at some steps and not at others."""
    settings = replace(SETTINGS, muon_adjust=adjust)
    model = network()
    ours, theirs, clipped = optimizer(model, settings), Rival(settings), []
    first = {name: p.detach().clone() for name, p in theirs.trained.items()}
    for step in range(200):
        learn(model, step)
        theirs.update(gradients(model))
        clipped.append(float(ours.update()) > settings.grad_clip)
    assert {*clipped} == {True, False}
    found = worst(model, theirs.trained)
    assert max(found.values()) <= 1e-6, max(found.items(), key=lambda item: item[1])
    assert min(worst(model, first).values()) > 0.01  # all have moved


def test_in_bfloat16_a_step_is_torchs_to_bfloat16s_rounding():
    settings = replace(SETTINGS, muon_precision="bf16", warmup_steps=0)
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours, theirs = optimizer(model, settings), Rival(settings)
    learn(model, 0)
    theirs.update(gradients(model))
    ours.update()
    for name in ours.muon.names:
        moved, expected = (p.detach() - before[name] for p in (model.get_parameter(name), theirs.trained[name]))
        assert float((moved - expected).norm() / expected.norm()) < 0.03, name


def exact(x: Tensor) -> Tensor:
    """By its singular value decomposition in float64: five steps are a polynomial of each singular value."""
    u, s, vh = torch.linalg.svd(x.double() / x.double().norm(), full_matrices=False)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def of_rank(rank: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, rank) @ torch.randn(rank, columns)


@pytest.mark.parametrize("rank", [0, 5, 21])
@pytest.mark.parametrize(("rows", "columns"), [(21, 21), (21, 25), (25, 21), (21, 67), (67, 21), (96, 400)])
def test_every_matrix_of_a_batch_is_orthogonalised_as_exactly_as_torch_does_it(rows, columns, rank, in_float32):
    torch.manual_seed(rows + columns + rank)
    batch = torch.stack([scale * (of_rank(rank, rows, columns) if rank else torch.randn(rows, columns))
                         for scale in (1.0, 3e-4, 70.0)])  # fmt: skip
    ours = orthogonalized(batch.clone())
    for one, x in zip(ours, batch, strict=True):
        torchs = torch.optim._muon._zeropower_via_newtonschulz(x, muon.COEFFICIENTS, muon.STEPS, muon.EPS)
        expected = exact(x)
        error, theirs = ((found.double() - expected).norm() / expected.norm() for found in (one, torchs))
        assert error <= max(2 * theirs, 5e-6)  # a thousandth of bfloat16's rounding


@pytest.mark.parametrize(
    ("shape", "dtype", "products"),
    [
        ((12, 384, 1536), torch.float32, 60),  # x·xᵀ and what it makes of x twice, 14 products of the short side
        ((12, 1152, 384), torch.float32, 52),
        ((12, 384, 384), torch.float32, 30),
        ((5, 384, 1536), torch.bfloat16, 90),
    ],
)
def test_a_long_matrix_takes_its_steps_on_its_short_side_in_float32(shape, dtype, products):
    """In FLOPs over 384³ a matrix: 30 of a square one, and torch's 70 and 90 of the long ones."""
    with FlopCounterMode(display=False) as found:
        orthogonalized(torch.empty(shape, device="meta", dtype=dtype))
    assert found.get_total_flops() == products * shape[0] * 384**3


def test_no_gradient_is_no_direction():
    assert torch.equal(orthogonalized(torch.zeros(2, 5, 9)), torch.zeros(2, 5, 9))


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        ("blocks.0.attn.qkv.weight", (36, 12), 3),
        ("blocks.1.adaLN_modulation.1.weight", (72, 12), 6),
        ("joint_blocks.1.context_block.adaLN_modulation.1.weight", (24, 12), 2),
        ("blocks.3.mlp.w12.weight", (46, 12), 2),
        ("blocks.3.mlp.w3.weight", (12, 23), 1),
        ("blocks.0.attn.proj.weight", (12, 12), 1),
    ],
)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_a_fused_matrix_that_is_split_moves_as_its_parts_alone(name, shape, parts, adjust, in_float32):
    torch.manual_seed(3)
    weight, grads = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    assert muon_cost.fused(name, shape[1], shape[0]) == parts
    settings = replace(SETTINGS, muon_split=True, muon_adjust=adjust, grad_clip=0.0)
    ours, alone = weight.clone(), [nn.Parameter(part.clone()) for part in weight.chunk(parts)]
    ema, rate = weight.clone(), torch.tensor(settings.muon_lr)
    one = Muon([name], [ours], settings, None)
    rival = torch.optim.Muon(
        alone, settings.muon_lr, settings.muon_weight_decay, settings.muon_momentum, adjust_lr_fn=adjust
    )
    for grad in grads:
        one.update([ours], [grad], one.momentum_buffers, [ema], [], torch.ones(()), grad.norm(), rate)
        for parameter, part in zip(alone, grad.chunk(parts), strict=True):
            parameter.grad = part
        rival.step()
    torch.testing.assert_close(ours, torch.cat([p.detach() for p in alone]), rtol=0, atol=1e-6)
    whole = weight.clone()
    fused = Muon([name], [whole], replace(settings, muon_split=False), None)
    for grad in grads:
        fused.update([whole], [grad], fused.momentum_buffers, [ema], [], torch.ones(()), grad.norm(), rate)
    assert torch.allclose(whole, ours, rtol=0, atol=1e-5) == (parts == 1)


SPRINT = replace(MODEL, depth=4, fusion_first=1, fusion_last=3)
MODERN = replace(
    MODEL, mlp="swiglu", norm="rms_affine", position="both", qk_norm="rms", value_residual=True, registers=2
)  # fmt: skip
TEXT = replace(MODEL, network="mmdit", num_classes=1000, text_width=6, text_length=7)


@pytest.mark.parametrize("adaln", [False, True])
@pytest.mark.parametrize("model", [MODEL, SPRINT, MODERN, TEXT], ids=["sit", "fusion", "modern", "mmdit"])
def test_it_has_the_matrices_within_the_blocks_and_a_fusions_and_recipes_count_them(model, adaln):
    settings = replace(SETTINGS, muon_adaln=adaln)
    found = network(model)
    names = muon.updated(found, settings)
    layers = (*BLOCK, *["adaLN_modulation.1"] * adaln)
    if model is MODERN:
        layers = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", *layers[4:])
    if model is TEXT:
        expected = [f"joint_blocks.0.{side}_block.{layer}" for side in ("context", "x") for layer in layers]
        expected += [f"joint_blocks.1.x_block.{layer}" for layer in layers]
        expected += [f"joint_blocks.1.context_block.{layer}" for layer in ("attn.qkv", *layers[4:])]  # there it ends
    else:
        expected = [f"blocks.{number}.{layer}" for number in range(model.depth) for layer in layers]
        expected += ["fusion_proj"] * (model is SPRINT)
    assert sorted(names) == sorted(f"{name}.weight" for name in expected)
    assert muon_cost.muon_parameters(model, settings) == sum(found.get_parameter(name).numel() for name in names)
    assert muon_cost.muon_parameters(model, Optim()) == 0 and muon.updated(found, Optim()) == []
    frozen = found.get_parameter(names[0]).requires_grad_(False)
    assert frozen.ndim == 2 and muon.updated(found, settings) == names[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_bit_and_the_next_one_is_as_if_it_had_not_been(dtype, wrong):
    ends = []
    for broken in (False, True):
        model = network()
        ours = optimizer(model, dtype=dtype)
        for step in range(4):
            for repeat in range(1 + (broken and step == 2)):
                generator = torch.Generator().manual_seed(step)
                for parameter in ours.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
                if broken and step == 2 and repeat == 0:
                    before = {f"{g}.{n}": t.clone() for g, ts in ours.state().items() for n, t in ts.items()}
                    model.get_parameter("blocks.1.mlp.fc1.weight").grad[3, 5] = wrong
                    ours.update()
                    after = {f"{g}.{n}": t for g, ts in ours.state().items() for n, t in ts.items()}
                    assert all(torch.equal(before[key], after[key]) for key in before)
                else:
                    ours.update()
        ends.append({f"{g}.{n}": t.clone() for g, ts in ours.state().items() for n, t in ts.items()})
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("warmup", [False, True])
def test_in_bfloat16_the_masters_move_and_averages_and_copies_follow(warmup):
    model = network()
    ours = optimizer(model, replace(SETTINGS, ema_warmup=warmup, ema_decays=(0.6,)), torch.bfloat16)
    name = "blocks.0.mlp.fc2.weight"
    averages = {"ema": (0.97, ours.state()["ema"][name].clone()), "ema-0.6": (0.6, ours.state()["ema"][name].clone())}
    for step in range(3):
        for parameter in ours.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        ours.update()
        master = ours.state()["model"][name]
        for group, (decay, average) in averages.items():
            average += max(1 - decay, 9 / (10 + step) if warmup else 0.0) * (master - average)
            torch.testing.assert_close(ours.state()[group][name], average, rtol=1e-6, atol=1e-8)
        assert master.dtype == torch.float32 and model.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(model.get_parameter(name).detach(), master.bfloat16())
    optim = ours.state()["optim"]
    assert optim[f"model.momentum_buffer.{name}"].dtype == torch.float32
    assert f"model.exp_avg.{name}" not in optim and "model.exp_avg.blocks.0.mlp.fc2.bias" in optim


def test_work_is_shared_out_so_that_no_rank_has_much_more_than_another():
    shapes = [(90, 30), (30, 30), (120, 30), (30, 120)] * 5
    matrices = [Matrix(at, *shape, parts=1) for at, shape in enumerate(shapes)]
    for count, most in ((1, 10**9), (3, 10**9), (4, 12_000), (2, 1)):
        rounds = shared_out(matrices, count, most)
        assert sorted(m.position for owners in rounds for owner in owners for m in owner) == list(range(20))
        for owners in rounds:
            flat = [m for owner in owners for m in owner]
            assert len(owners) == count
            assert sum(m.rows * m.columns for m in flat) <= most or len(flat) == 1
    (owners,) = shared_out(matrices, 3, 10**9)
    loads = [sum(m.macs for m in owner) for owner in owners]
    assert max(loads) - min(loads) <= max(m.macs for m in matrices)
    shapes_of = [[m.shape for m in owner] for owner in owners]
    assert all(sorted(shapes, key=shapes.index) == shapes for shapes in shapes_of)  # equal ones side by side


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two stages of six steps, the second as the first."""
    path = tiny.write_recipe(tmp_path / "t.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out")
    text = path.read_text().replace("[optim]", '[optim]\nname = "muon"\nmuon_lr = 0.02\nwarmup_steps = 3')
    path.write_text(text.split("[[stage]]")[0] + ONE_STAGE.format(name="first"))
    return path


def test_a_run_resumes_bit_by_bit_learns_and_says_what_it_updates(
    recipe,
    tmp_path,
    monkeypatch,
    signals,  # noqa: F811
    one_thread,
    capsys,
):
    assert_it_resumes_bit_exactly_and_learns(recipe, tmp_path, monkeypatch)
    line = "first: Muon updates 12 matrices (attn.qkv, attn.proj, mlp.fc1, mlp.fc2; 0.04 M parameters)"
    assert line in capsys.readouterr().out


def refusal(recipe: Path, *options: str) -> str:
    with pytest.raises((UserError, RecipeError)) as caught:
        run(load(recipe, options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


ADAMW = ("--optim.name=adamw", "--optim.muon_lr=0.001")


def test_another_optimiser_can_neither_resume_nor_take_its_state_over_but_muon_can(recipe, one_thread, tmp_path):
    run(load(recipe))
    longer = "--stage.first.steps=7"
    assert 'optim.name: "muon" → "adamw"' in refusal(recipe, longer, *ADAMW)
    told = f'\ninit = "{tmp_path}/out"\ninit_weights = "state"\n'
    second = tmp_path / "second.toml"
    text = recipe.read_text().split("[[stage]]")[0].replace(f'"{tmp_path}/out"', f'"{tmp_path}/second"')
    second.write_text(text + ONE_STAGE.format(name="next") + told)
    line = refusal(second, *ADAMW)
    assert "Muon has updated 12 of its matrices, and would update 0 here (optim.name = 'adamw'" in line
    assert "would update 15 here" in refusal(second, "--optim.muon_adaln=true")
    run(
        load(second, ["--optim.lr=1e-30", "--optim.muon_lr=1e-30", "--optim.muon_momentum=0.9", "--stage.next.steps=1"])
    )
    before, after = (
        checkpoint.latest(tmp_path / out / name / "checkpoints", pytest.fail).groups
        for out, name in (("out", "first"), ("second", "next"))
    )
    key = "model.momentum_buffer.blocks.1.mlp.fc1.weight"
    grad = (after["optim"][key] - 0.9 * before["optim"][key]) / 0.1
    assert torch.equal(after["model"]["blocks.1.mlp.fc1.weight"], before["model"]["blocks.1.mlp.fc1.weight"])
    assert 0 < grad.norm() < 1.001  # clipped: nothing else was added to what was taken over
    assert after["optim"]["model.step"] == 7


def test_a_run_of_adamw_is_not_gone_on_with_by_muon(recipe, one_thread):
    run(load(recipe, ADAMW))
    longer = ("--stage.first.steps=7", "--optim.muon_lr=0.02")
    assert 'optim.name: "adamw" → "muon"' in refusal(recipe, *longer)
    with pytest.raises(UserError) as caught:  # what is accepted all the same lacks Muon's state
        run(load(recipe, longer), accept_changes=True)
    line = str(caught.value)
    assert "\n" not in line and "12 missing: 'model.momentum_buffer.blocks.0.attn.qkv.weight'" in line


def test_a_converted_stage_keeps_the_state_and_another_projects_file_has_none(recipe, tmp_path, one_thread, capsys):
    run(load(recipe))
    convert([str(tmp_path / "out"), str(tmp_path / "stage")])
    assert "Muon's and AdamW's state, for st_fast only, after 6 updates" in capsys.readouterr().out
    theirs, ours = (stored.read_model(tmp_path / name, print).loaded for name in ("out", "stage"))
    assert len(ours.momentum_buffer) == 12
    assert all(torch.equal(ours.momentum_buffer[key], tensor) for key, tensor in theirs.momentum_buffer.items())
    convert([str(tmp_path / "out"), str(tmp_path / "repa.pt"), "--to", "repa"])
    content = torch.load(tmp_path / "repa.pt", weights_only=False)
    assert "opt" not in content and "model" in content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--optim.name=adamw"],
            'optim.muon_lr = 0.02; allowed: left out, or optim.name = "muon"',
        ),
        (["--optim.name=sgd"], 'optim.name = "sgd"'),
        (["--optim.muon_lr=-0.5"], "optim.muon_lr = -0.5"),
        (["--optim.muon_momentum=1"], "optim.muon_momentum = 1"),
        (["--optim.muon_adjust=rms"], 'optim.muon_adjust = "rms"'),
        (["--optim.muon_weight_decay=-1e-3"], "optim.muon_weight_decay = -0.001"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(options, words, recipe):
    assert words in refusal(recipe, *options)


def test_a_model_without_a_matrix_in_a_block_is_told_in_one_line():
    with pytest.raises(UserError) as caught:
        optimizer(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    assert str(caught.value) == "optim.name = 'muon': none of the model's 1 trained matrices lies in a block"


@pytest.mark.parametrize("options", [{}, {"muon_split": True, "muon_adaln": True}], ids=str)
@pytest.mark.parametrize("model", [MODERN, TEXT, SPRINT], ids=lambda model: model.network)
def test_its_flops_are_those_of_torchs_products(model, options):
    settings = replace(SETTINGS, **options)
    found = network(model)
    with FlopCounterMode(display=False) as counter:
        for name in muon.updated(found, settings):
            weight = found.get_parameter(name).detach()
            parts = muon_cost.fused(name, weight.shape[1], weight.shape[0]) if settings.muon_split else 1
            for part in weight.chunk(parts):
                torch.optim._muon._zeropower_via_newtonschulz(part, muon.COEFFICIENTS, muon.STEPS, muon.EPS)
    assert counter.get_total_flops() == muon_cost.muon_flops(model, settings) > 0
    assert muon_cost.muon_flops(model, Optim()) == 0


def test_an_update_counts_beside_the_step(recipe):
    ours, theirs = load(recipe), load(recipe, ADAMW)
    more = cost.stage_flops(ours, ours.stages[0], 2, 7) - cost.stage_flops(theirs, theirs.stages[0], 2, 7)
    assert more == pytest.approx(5 * muon_cost.muon_flops(ours.model, ours.optim))


def test_its_state_takes_four_bytes_less_a_parameter(recipe):
    """In memory and in checkpoints, of what AdamW takes."""
    ours, theirs = load(recipe), load(recipe, ADAMW)
    count = muon_cost.muon_parameters(ours.model, ours.optim)
    assert count == 3 * 12 * 32 * 32
    assert cost.saved_bytes(theirs, 1) - cost.saved_bytes(ours, 1) == 4 * count
    (before, same), (after, as_before) = (cost.memory_bytes(one, 1, False) for one in (theirs, ours))
    assert before - after == 4 * count and same == as_before


@pytest.mark.parametrize("implementation", ["st_fast", "torch"])
def test_adamws_part_may_be_anyones(implementation, recipe, one_thread):
    options = [f"--optim.implementation={implementation}", f"--run.out={recipe.parent / implementation}"]
    run(load(recipe, options))
    losses = [r["denoise"] for r in tiny.records(recipe.parent / implementation, "train")]
    run(load(recipe))
    assert losses == pytest.approx([r["denoise"] for r in tiny.records(recipe.parent / "out", "train")], rel=1e-5)
