"""Compiled blocks compute what eager ones do, compile once, and fall back when the compiler fails."""

import functools

import pytest
import torch

from st_fast import kernels
from st_fast.model import build
from st_fast.model.compiling import CompiledBlocks
from st_fast.recipe.schema import Model

TINY = Model("custom", depth=3, width=32, heads=2, patch=2, channels=4, latent_size=4, num_classes=5)


def model_with_life(choice: str):
    table = kernels.select(dict.fromkeys(("norm_modulate", "gate_residual_norm_modulate", "qk_norm"), choice),
                           torch.device("cpu"))  # fmt: skip
    model = build(TINY, table, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def outputs(model, batch: int):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 4, 4, generator=generator)
    velocity, tapped = model(x, torch.linspace(0.1, 0.9, batch), torch.arange(batch) % 5, 2)
    model.zero_grad()
    (velocity.square().mean() + tapped.square().mean()).backward()
    return [velocity, tapped, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("choice", "backend"), [("fused", "inductor"), ("reference", "aot_eager")])
def test_compiled_blocks_equal_eager_ones_and_a_graph_serves_all_blocks_of_a_kind(choice, backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    eager, compiled = model_with_life(choice), model_with_life(choice)
    compiled.run_block = CompiledBlocks(print, dynamic=False)
    for _ in range(2):
        for ours, theirs in zip(outputs(compiled, 4), outputs(eager, 4), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)
    counters = torch._dynamo.utils.counters
    # Three blocks, two steps, two compilations: the last block's next modulation is the final layer's, (B, 2D) wide.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_a_dynamic_batch_does_not_compile_again_for_every_size():
    model = model_with_life("reference").requires_grad_(False)
    model.run_block = CompiledBlocks(print, dynamic=True)
    x, y = torch.randn(9, 4, 4, 4), torch.arange(9) % 5
    for size in (5, 3, 9, 4, 7):
        model.guided_features(x[:size], torch.full((size,), 0.5), y[:size], 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Scaled(torch.nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def run_kinds(count: int, say) -> list[float]:
    """As many networks as a run of several stages may have, each compiled into a form of its own."""
    return [CompiledBlocks(say, dynamic=False)(Scaled(factor), torch.ones(3)).sum().item() for factor in range(count)]


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=8):  # as a process begins
        yield


def test_many_students_teachers_and_encoders_are_compiled_side_by_side(capturing):
    assert run_kinds(12, pytest.fail) == [3.0 * factor for factor in range(12)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 12


def test_more_forms_than_the_compiler_allows_cost_one_line_each_and_nothing_else(capturing, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("st_fast.model.compiling.FORMS", 8)
    assert run_kinds(10, said.append) == [3.0 * factor for factor in range(10)]
    assert len(said) == 2 and all(line.startswith("torch.compile failed (FailOnRecompileLimitHit)") for line in said)


def test_a_failing_compiler_costs_one_line_and_nothing_else(monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed

    model, said = model_with_life("reference"), []
    expected = outputs(model, 3)
    model.run_block = CompiledBlocks(said.append, dynamic=False)

    def failing(*_):
        raise BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(model.run_block, "_run", failing)
    for ours, theirs in zip(outputs(model, 3), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert len(said) == 1 and said[0].startswith("torch.compile failed")
