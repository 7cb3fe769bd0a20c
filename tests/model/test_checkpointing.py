"""Activation checkpointing: the same bits, less kept, and what is computed twice is as many FLOPs as we say."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from st_fast import kernels
from st_fast.model import SiT, build
from st_fast.model.attention import BACKENDS, Attend
from st_fast.model.compiling import CompiledBlocks, checkpoint_activations
from st_fast.recipe import cost, load
from st_fast.recipe.schema import Model
from st_fast.train.run import run
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ("none", "attention", "block")
SMALL = Model("custom", depth=4, width=64, heads=2, patch=2, channels=4, latent_size=16, num_classes=5)
BATCH = 4
FUSED = {"qk_norm": "fused", "gelu_mlp": "fused"}  # every op that keeps something for its backward
TABLE = kernels.select(FUSED, torch.device("cpu"))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def model_with_life(what: str, compiled: bool = False, attend: Attend = BACKENDS["sdpa"].attend) -> SiT:
    """The same trained-looking weights for every mode."""
    model = build(SMALL, TABLE, 0, attend)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if compiled:
        model.run_block = CompiledBlocks(pytest.fail, dynamic=False)
    checkpoint_activations(model, what)
    return model


def forward(model: SiT) -> Tensor:
    """A loss that reads the output and a tapped block."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 4, 16, 16, generator=generator)
    velocity, tapped = model(x, torch.linspace(0.1, 0.9, BATCH), torch.arange(BATCH) % 5, 2)
    return velocity.square().mean() + tapped.square().mean()


def loss_and_gradients(model: SiT) -> list[Tensor]:
    model.zero_grad()
    loss = forward(model)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("what", ["attention", "block"])
def test_checkpointing_gives_the_same_bits(what):
    expected, found = (loss_and_gradients(model_with_life(mode)) for mode in ("none", what))
    assert len(found) == len(expected) > 40
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_blocks_are_checkpointed_in_one_graph_and_keep_less(fresh_compiler, monkeypatch):
    partitioned = functools.partial(torch.compile, backend="aot_eager_decomp_partition")  # as Inductor does it
    monkeypatch.setattr(torch, "compile", partitioned)
    attend = BACKENDS["flash"].attend  # chosen by a context manager, which must not break the graph
    kept = {what: model_with_life(what, True, attend) for what in MODES}
    results = {what: loss_and_gradients(model) for what, model in kept.items()}
    # Around a compiled block: its bits. Inside it: another graph, which the compiler may add up in another order.
    assert all(torch.equal(a, b) for a, b in zip(results["block"], results["none"], strict=True))
    for ours, theirs in zip(results["attention"], results["none"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    measured = {what: saved_bytes(model) for what, model in kept.items()}
    assert measured["block"] < 0.25 * measured["none"]
    assert measured["block"] < measured["attention"] < 0.85 * measured["none"], measured


def saved_bytes(model: SiT) -> int:
    """Bytes of distinct memory, weights aside, that the graph of one forward pass holds for its backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)


def test_what_is_kept_shrinks_as_the_estimate_says():
    measured = {what: saved_bytes(model_with_life(what)) for what in MODES}
    for what, found in measured.items():
        # Of what is computed again in one block, nothing is kept while the forward pass runs.
        estimate = BATCH * cost.activation_bytes(SMALL, bf16=False, checkpointing=what)
        one_block = BATCH * SMALL.tokens * 4 * 21 * SMALL.width
        assert estimate - one_block <= found <= 1.3 * estimate, (what, found, estimate)
    assert measured["block"] < 0.25 * measured["none"]
    assert measured["block"] < measured["attention"] < 0.8 * measured["none"]


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("what", ["attention", "block"])
def test_what_is_computed_twice_is_what_the_formula_says(what):
    plain, again = (model_with_life(mode) for mode in ("none", what))
    extra = counted(lambda: loss_and_gradients(again)) - counted(lambda: loss_and_gradients(plain))
    assert extra == pytest.approx(2 * BATCH * cost.recomputed_macs(SMALL, what), rel=0.01)


def test_a_run_with_checkpointing_has_the_same_losses_to_the_last_bit(tmp_path):
    data, records = tiny.write_data(tmp_path / "data"), []
    for mode in MODES:
        out = tmp_path / mode
        recipe = tiny.write_recipe(tmp_path / f"{mode}.toml", data, out)
        run(load(recipe, [f"--run.checkpointing={mode}", "--stage.align.steps=2", "--stage.transcend.steps=2"]))
        records.append([[r[k] for k in ("denoise", "aux", "grad_norm", "flops")] for r in tiny.records(out, "train")])
    assert len(records[0]) == 4 and records[0] == records[1] == records[2]
