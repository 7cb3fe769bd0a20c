"""fp8: only the blocks' products, the same parameters and checkpoints, and one line where it can't be had."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from st_fast import kernels
from st_fast.core.errors import UserError, how_to_install
from st_fast.model import SiT, build
from st_fast.model.fp8 import check_fp8, use_fp8
from st_fast.recipe import RecipeError, load
from st_fast.recipe.schema import Model, Optim
from st_fast.train.optim import Optimizer
from tests import tiny

TABLE = kernels.select({}, torch.device("cpu"))
SMALL = Model("custom", depth=2, width=32, heads=2, patch=2, channels=4, latent_size=8, num_classes=5)
SWAPPED = {f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
WANTED = ["--run.fp8=tensorwise", "--run.device=auto"]


def recipe(*options: str):
    return load(tiny.ROOT / "recipes" / "sit_xl.toml", [*WANTED, *options])


def model_with_life(fp8: bool) -> SiT:
    model = build(SMALL, TABLE, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if fp8:
        use_fp8(model, emulate=True)
    return model


def optimiser(model: SiT) -> Optimizer:
    return Optimizer(model, nn.Linear(2, 2), Optim(lr=2e-3), torch.bfloat16, kernels.adamw_ema_, kernels.grad_norm)


def loss_of(model: SiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 4, 4, 8, 8, generator=generator).unbind(0)
    prediction, _ = model(x, torch.linspace(0.1, 0.9, 4), torch.arange(4) % 5)
    return (prediction.float() - v).square().mean()


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.float8", reason="torchao is not installed")


def test_the_blocks_linear_layers_are_swapped_and_no_other_and_parameters_stay(torchao):
    plain, swapped = model_with_life(False), model_with_life(False)
    before = dict(swapped.named_parameters())
    use_fp8(swapped, emulate=True)
    changed = {n for n, m in swapped.named_modules() if type(m) is not type(plain.get_submodule(n))}
    assert changed == SWAPPED
    assert list(swapped.state_dict()) == list(plain.state_dict())
    assert all(parameter is before[name] for name, parameter in swapped.named_parameters())


def test_masters_are_float32_and_the_checkpoint_is_that_of_bf16(torchao):
    states = [optimiser(model_with_life(fp8)).state() for fp8 in (False, True)]
    described = [{g: {n: (t.shape, t.dtype) for n, t in ts.items()} for g, ts in s.items()} for s in states]
    assert described[0] == described[1]
    assert {t.dtype for ts in states[1].values() for t in ts.values()} == {torch.float32}


def test_emulated_fp8_is_near_bf16_but_not_it_and_it_trains(torchao):
    losses = {}
    for fp8 in (False, True):
        model = model_with_life(fp8)
        ours = optimiser(model)
        losses[fp8] = []
        for _ in range(12):
            loss = loss_of(model)
            loss.backward()
            ours.update()
            losses[fp8].append(loss.item())
    assert losses[True][0] != losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=0.03)
    assert losses[True][-1] < 0.9 * losses[True][0]


def test_fp8_on_the_cpu_is_one_line():
    with pytest.raises(UserError) as refusal:
        check_fp8(recipe(), torch.device("cpu"))
    assert str(refusal.value) == (
        "run.fp8 = 'tensorwise': needs a GPU of compute capability 8.9 or above, the device is cpu; "
        "--run.fp8=off trains without it"
    )
    check_fp8(recipe("--run.fp8=off"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "library", "words"),
    [
        ((8, 0), None, "needs compute capability 8.9 or above, some GPU has 8.0"),
        ((9, 0), None, f"torchao is not installed: {how_to_install('fp8')}"),
        ((9, 0), types.ModuleType("torchao.float8"), "torchao.float8 can't be used with torch"),
    ],
)
def test_what_a_gpu_lacks_is_one_line(capability, library, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao") if library else None)
    monkeypatch.setitem(sys.modules, "torchao.float8", library)
    with pytest.raises(UserError) as refusal:
        check_fp8(recipe(), torch.device("cuda"))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--run.precision=fp32"], ("run.fp8", "run.precision")),
        (["--run.device=cpu"], ("run.fp8", "run.device")),
        (["--model.name=custom", "--model.width=72", "--model.heads=1", "--model.depth=16", "--model.patch=2"],
         ("run.fp8", "multiple of 16", "72")),
        (["--model.patch=16", "--model.name=custom", "--model.width=64", "--model.heads=1", "--model.depth=16",
          "--optim.micro_batch=2"], ("run.fp8", "multiple of 16", "8 tokens")),
        (["--model.registers=3", "--optim.micro_batch=4"], ("run.fp8", "multiple of 16", "1036 tokens")),
    ],
)  # fmt: skip
def test_fp8_where_it_cannot_be_is_refused_by_the_recipe(options, words):
    with pytest.raises(RecipeError) as refusal:
        recipe(*options)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8"
)
def test_on_a_gpu_compiled_fp8_blocks_are_near_bf16(torchao):
    from st_fast.model.compiling import CompiledBlocks

    losses = []
    for fp8 in (False, True):
        model = model_with_life(False).to("cuda", torch.bfloat16)
        if fp8:
            use_fp8(model)
        model.run_block = CompiledBlocks(pytest.fail, dynamic=False)
        x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2)).cuda()
        loss = model(x, torch.linspace(0.1, 0.9, 4).cuda(), torch.arange(4).cuda())[0].float().square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]
