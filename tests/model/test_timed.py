"""A trial of two ways: only a right and surely faster one is taken, the same on all ranks, and kept by who goes on."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import pytest
import torch

from st_fast import kernels
from st_fast.core.ranks import Ranks
from st_fast.kernels.common.trial import Draw, Size
from st_fast.model import timed
from st_fast.model.timed import compared, seconds, timed_choices, wrong

CPU, SIZE = torch.device("cpu"), Size(3, 5, 16, 2, hidden=40)
FAST, SLOW = [1.0, 1.1, 0.9, 1.0] * 4, [1.3, 1.4, 1.2, 1.5] * 4


@dataclass(frozen=True)
class Second(Ranks):
    """The second rank of two, with what the first has to say."""

    raised: tuple[bool, ...] = ()

    def any(self, flags: list[bool]) -> list[bool]:
        return [mine or theirs for mine, theirs in zip(flags, self.raised, strict=True)]


@pytest.fixture
def there(monkeypatch) -> None:
    """Has the CPU's op taken for one with a kernel."""
    monkeypatch.setattr(timed, "has_kernel", lambda op, kind: True)


def decided(monkeypatch, times=(FAST, SLOW), ranks=Ranks(0, 1, CPU), before=None, compiled=False, **choices):  # noqa: B008
    said: list[str] = []
    monkeypatch.setattr(timed, "seconds", lambda ways, inputs, device: list(times))
    found = timed_choices(choices, SIZE, ranks, torch.bfloat16, compiled, before, said.append)
    return found, said


@pytest.mark.parametrize("compiled", [False, True])
def test_the_fused_way_is_taken_where_it_is_right_and_surely_faster(there, monkeypatch, compiled):
    assert decided(monkeypatch, compiled=compiled) == (
        {"gelu_mlp": "fused"},
        ["kernels: gelu_mlp fused, 1.32x of plain at 15 x 16"],
    )
    close = [1.0, 1.2, 0.9, 1.1] * 4
    found, (line,) = decided(monkeypatch, times=(FAST, close))
    assert found == {"gelu_mlp": "reference"}
    assert line == "kernels: gelu_mlp reference, fused is 1.05x of plain at 15 x 16, not surely faster"


def test_faster_means_more_than_the_noise_of_pairs():
    found = compared(FAST, SLOW)
    assert found.sure and found.speedup == statistics.median(s / f for f, s in zip(FAST, SLOW, strict=True))
    assert not compared(FAST, FAST).sure and not compared(SLOW, FAST).sure
    assert not compared([1.0] * 15, [1.1] * 11 + [0.9] * 4).sure and compared([1.0] * 15, [1.1] * 12 + [0.9] * 3).sure


def test_without_a_kernel_or_with_a_choice_of_its_own_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(timed, "_tried", lambda *arguments: pytest.fail("tried"))
    assert decided(monkeypatch) == ({}, [])
    monkeypatch.setattr(timed, "has_kernel", lambda op, kind: True)
    for choice in ("fused", "reference"):
        assert decided(monkeypatch, gelu_mlp=choice) == ({}, [])


@pytest.mark.parametrize("harm", ["g", "dx", "twice"])
def test_a_wrong_result_is_named_and_the_reference_taken(there, monkeypatch, harm):
    declared, calls = kernels.declared, [0]
    op = declared("gelu_mlp")

    def harmed(x, *layers):
        calls[0] += 1
        if harm == "dx":
            x = x.detach() + 1.1 * (x - x.detach())
        factor = {"g": 1.02, "dx": 1.0, "twice": 1.0 + 0.01 * calls[0]}[harm]
        return factor * op.call(x, *layers)

    monkeypatch.setattr(
        kernels, "declared", lambda name: replace(op, call=harmed) if name == "gelu_mlp" else declared(name)
    )
    found, (line,) = decided(monkeypatch)
    reason = {"g": "result 0 is off by 2.", "dx": "result 1 is off by 1.0e-01", "twice": "its results are not the same"}
    assert found == {"gelu_mlp": "reference"} and line.startswith(f"kernels: gelu_mlp reference, {reason[harm]}")


@pytest.mark.parametrize("error", [RuntimeError("no\nsuch thing"), torch.OutOfMemoryError("CUDA out of memory")])
def test_an_error_or_a_lack_of_memory_in_the_trial_is_one_line(there, monkeypatch, error):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(timed, "wrong", fails)
    found, (line,) = decided(monkeypatch)
    reason = "RuntimeError: no" if type(error) is RuntimeError else "too little memory to try it"
    assert found == {"gelu_mlp": "reference"} and line == f"kernels: gelu_mlp reference, {reason}"


def test_all_ranks_take_the_first_ranks_word_and_any_ranks_failure(there, monkeypatch):
    def second(failed, slower):
        return Second(1, 2, CPU, raised=(failed, slower))

    assert decided(monkeypatch, times=(SLOW, FAST), ranks=second(False, False))[0] == {"gelu_mlp": "fused"}
    assert decided(monkeypatch, ranks=second(False, True))[0] == {"gelu_mlp": "reference"}
    found, (line,) = decided(monkeypatch, ranks=second(True, False))
    assert found == {"gelu_mlp": "reference"} and line.endswith("it failed on another rank")


def test_a_run_that_goes_on_keeps_what_it_was_trained_with(there, monkeypatch):
    monkeypatch.setattr(timed, "_tried", lambda *arguments: pytest.fail("tried"))
    kept = ({"gelu_mlp": "fused"}, ["kernels: gelu_mlp fused, as before"])
    assert decided(monkeypatch, before={"gelu_mlp": "fused"}) == kept
    for before in ({"gelu_mlp": "reference"}, {}):  # {}: by a version without the op
        assert decided(monkeypatch, before=before) == ({"gelu_mlp": "reference"}, [])
    monkeypatch.setattr(timed, "has_kernel", lambda op, kind: False)
    found, (line,) = decided(monkeypatch, before={"gelu_mlp": "fused"})
    assert found == {"gelu_mlp": "reference"} and line == "kernels: gelu_mlp was fused before; it has no kernel here"


def test_both_ways_are_the_definition_at_the_models_own_hidden_width_and_take_turns(monkeypatch):
    op = kernels.declared("gelu_mlp")
    inputs = op.trial(Draw(CPU, torch.float32, 0), SIZE)
    assert [tuple(leaf.shape) for leaf in inputs.leaves] == [(3, 5, 16), (40, 16), (40,), (16, 40), (16,)]
    table, turns = kernels.select({"bias_gradients": "fused"}, CPU), list[str]()
    assert wrong(op.call, op.instead(table), op.definition, inputs) is None

    def way(name, call):
        return lambda *args: turns.append(name) or call(*args)

    times = seconds([way("fused", op.call), way("plain", op.instead(table))], inputs, CPU)
    assert [len(of) for of in times] == [timed.ROUNDS] * 2 and min(map(min, times)) > 0
    assert turns == ["fused", "plain"] * (timed.WARM + timed.ROUNDS)
