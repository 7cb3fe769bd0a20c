"""The ops' cases: all ops are there, bytes are PERFORMANCE.md's, and no figure comes without the gate."""

import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench import measure, ops, optimiser
from bench.measure import Effort
from bench.ops import Case, Size
from st_fast.kernels import TABLE, reference

CPU = torch.device("cpu")
TINY = Size("S/2", 2, 4)


def case(op: str, dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, TINY, dtype, CPU)


@pytest.mark.parametrize(
    ("op", "phase", "bytes_an_element"),
    [("gate_residual_norm_modulate", "forward", 8), ("gate_residual_norm_modulate", "backward", 12),
     ("guided_feature_loss", "both", 8)],
)  # fmt: skip
def test_floors_are_those_of_performance_md(op, phase, bytes_an_element):
    found = case(op, torch.bfloat16)
    assert getattr(found.floor, phase) == bytes_an_element * TINY.batch * TINY.tokens * TINY.width
    assert getattr(found.moved, phase) >= getattr(found.floor, phase)


@pytest.mark.parametrize("op", ["norm_modulate", "gate_residual_norm_modulate"])
def test_rms_norm_keeps_one_number_a_token_less_than_layer_norm(op):
    layer, rms = (Case(op, TINY, torch.bfloat16, CPU, kind=kind).moved for kind in ("", "rms"))
    assert layer.forward - rms.forward == layer.backward - rms.backward == 4 * TINY.batch * TINY.tokens


def test_the_optimiser_moves_forty_bytes_a_parameter_in_float32():
    (setting,) = optimiser.cases(CPU, full=False)
    assert setting.moved == 40 * setting.parameters
    assert setting.parameters == pytest.approx(33.0e6, rel=0.01)


def test_every_op_has_a_row_and_so_has_each_other_form_of_it():
    found = [c.key.partition(" | ")[0] for c in ops.cases(TINY, torch.float32, CPU)]
    adaln = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
    qk_norm = ("heads", "with rope", "rms", "rms with rope", "rope alone")
    others = {
        *(f"qk_norm {form}" for form in qk_norm),
        *(f"{op} by {kind}" for op in adaln for kind in ("groups", "tokens")),
    }
    others |= {"norm_modulate rms", "gate_residual_norm_modulate rms"}
    assert len(set(found)) == len(found) and set(found) == {*TABLE, *others}


@pytest.mark.parametrize("right", ops.cases(TINY, torch.float32, CPU), ids=lambda case: case.key)
def test_the_gate_lets_the_fused_op_pass_and_stops_one_that_is_slightly_wrong(right):
    inputs = right.inputs(0)
    measure.check(right, {"fused": right.fused}, inputs)

    def wrong(*args):
        outputs = right.eager(*args)
        return tuple(o * (1 + 1e-4) for o in outputs) if isinstance(outputs, tuple) else outputs * (1 + 1e-4)

    with pytest.raises(measure.WrongResult, match=rf"{right.op} .* fused, result 0: rms error"):
        measure.check(right, {"fused": wrong}, inputs)


def test_the_gate_sees_a_single_bad_element_of_a_gradient():
    right = case("norm_modulate", torch.bfloat16)

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            dx = dx.clone()
            dx[0, 0, 0] += 10.0
            return dx

    def wrong(x, shift, scale, eps):
        return reference.norm_modulate(Spoilt.apply(x), shift, scale, eps)

    with pytest.raises(measure.WrongResult, match=r"result 1: .* error"):
        measure.check(right, {"fused": wrong}, right.inputs(0))


def test_nan_does_not_pass_the_gate():
    right = case("gate_residual")
    with pytest.raises(measure.WrongResult):
        measure.check(right, {"fused": lambda *args: right.eager(*args) * float("nan")}, right.inputs(0))


def test_a_row_has_milliseconds_rates_and_shares_for_every_pass():
    row = ops.measure_op(case("guided_feature_loss"), Effort(rounds=3, seconds=1), with_compile=False)
    for phase in ops.PHASES:
        figures = row[phase]
        assert figures["ms"].keys() == {"fused", "eager"} and figures["speedup"].keys() == {"eager"}
        moves = phase != "backward"  # on the CPU it hands on what the forward pass made
        assert (figures["gb_per_s"] > 0) == (figures["of_copy_rate"] > 0) == moves and figures["noise"] >= 0
        assert figures["noise_of"].keys() == {"eager", "of_copy_rate", "of_floor"}
    assert row["backward"]["of_floor"] is None
    both = row["both"]
    moved = case("guided_feature_loss").moved.both
    assert both["gb_per_s"] == pytest.approx(moved / both["ms"]["fused"] / 1e6)
    assert both["of_copy_rate"] == pytest.approx(both["gb_per_s"] * 1e9 / row["copy_rate"])


def test_inputs_rotate_through_more_memory_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(ops, "cache_bytes", lambda device: 3 * case("align").inputs(0).bytes)
    sets = ops.input_sets(case("align"))
    assert sum(s.bytes for s in sets) > 2 * 3 * sets[0].bytes
    assert not torch.equal(sets[0].args[0], sets[1].args[0])


def test_the_optimisers_gate_stops_a_step_that_differs(monkeypatch):
    (setting,) = optimiser.cases(CPU, full=False)
    optimiser.check(setting)
    right = optimiser.fused_step

    def wrong(state):
        right(state)
        state.params[3].mul_(1 + 1e-5)

    monkeypatch.setattr(optimiser, "fused_step", wrong)
    with pytest.raises(measure.WrongResult, match=r"params\[3\] differs"):
        optimiser.check(setting)


def test_a_calls_overhead_is_that_of_the_call_alone(monkeypatch):
    """A call that waits for two milliseconds more costs two milliseconds more, whatever is around it.

    Where others take the processor a difference of times may be anything: one of several measurements has to show it.
    """
    monkeypatch.setattr(ops, "HOW", {"eager": ops.HOW["eager"]})
    few = Effort(rounds=3, seconds=1.0, least=3, warmup=1)
    called, sets = ops._tiny("norm_modulate", CPU)

    def slow(*arguments):
        time.sleep(2e-3)
        return called(*arguments)

    def measured(call):
        monkeypatch.setattr(ops, "_tiny", lambda op, device: (call, sets))
        return ops.measure_overhead("norm_modulate", CPU, few)["us"]["eager"]

    def right(quick, slowed):
        more = {phase: slowed[phase] - quick[phase] for phase in quick}
        return min(quick.values()) > 0 and 1_900 < more["forward"] < 4_000 and more["both"] > 1_900

    assert any(right(measured(called), measured(slow)) for _ in range(5))


@pytest.mark.parametrize("how", ops.HOW)
def test_no_call_of_a_graph_is_taken_for_another(how):
    """Equal calls would be made once, and their number would not show."""
    call, sets = ops._tiny("qk_norm", CPU)
    arguments = [inputs.args for inputs in sets], [inputs.leaves for inputs in sets]
    function = ops._summed(call, sets, with_calls=True)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        torch._dynamo.reset()
        made = ops.HOW[how](function)
        made(*arguments)
    called = [event.count for event in profiler.key_averages() if event.key == "st_fast::qk_norm"]
    assert sum(called) >= ops.CALLS
    torch.testing.assert_close(made(*arguments), function(*arguments))
