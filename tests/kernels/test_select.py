"""The choice, per op, between the fused op and the reference."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from st_fast import kernels
from st_fast.kernels import SWITCHES, TABLE, native, reference, table

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_table_has_the_switches_but_the_optimiser() -> None:
    assert tuple(field.name for field in fields(kernels.KernelTable)) == (*TABLE, "bias_gradients")
    assert {*TABLE, "adamw_ema", "bias_gradients"} == set(SWITCHES)
    assert set().union(*table.SLOWER.values(), *table.FOR_BIASES.values()) <= set(TABLE)


@pytest.mark.parametrize("op", TABLE)
def test_each_op_is_chosen_on_its_own(op: str) -> None:
    everything = dict.fromkeys(TABLE, "reference")
    found = kernels.select(everything | {op: "fused"}, CPU)
    for other in TABLE:
        assert getattr(found, other) is getattr(kernels if other == op else reference, other)


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    assert {"ops", "patch", "layers", "select", *kernels.OPS} <= {*dir(kernels)}
    for name in dir(kernels):
        assert getattr(kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kernels.nothing  # noqa: B018


@pytest.mark.parametrize("op", kernels.OPS)
def test_the_compiler_may_choose_the_strides_of_an_ops_inputs(op: str) -> None:
    """Otherwise it copies each one to the strides that it had while tracing."""
    names = [name for name in dir(kernels.ops) if name in (op, f"{op}_backward")]
    assert names
    for name in names:
        tags = getattr(kernels.ops, name).default.tags
        assert {torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag} <= {*tags}


def test_auto_is_the_op_that_has_a_kernel_there_and_was_not_measured_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.SLOWER, "cuda", ("qk_norm",))
    found = kernels.select({"align": "auto"}, CUDA)
    assert found == kernels.select({}, CUDA)
    assert (found.align, found.gate_residual) == (kernels.align, kernels.gate_residual)
    assert (found.qk_norm, found.linear) == (reference.qk_norm, reference.linear)
    assert kernels.select({}, torch.device("meta")).align is reference.align


@pytest.mark.parametrize("op", ["gelu_tanh", "swiglu"])
def test_auto_sums_bias_gradients_in_the_ops_on_cuda_and_takes_an_activation_for_that_alone(op: str) -> None:
    fused, plain = getattr(kernels, op), getattr(reference, op)
    summed = kernels.select({}, CUDA)
    assert summed.bias_gradients and getattr(summed, op) is fused
    for device, choices in ((CUDA, {"bias_gradients": "reference"}), (CPU, {}), (CPU, {"bias_gradients": "fused"})):
        found = kernels.select(choices, device)
        assert found.bias_gradients == ("fused" in choices.values())
        assert getattr(found, op) is (fused if device == CPU and native.available() else plain)
    alone = kernels.select({"bias_gradients": "reference", op: "fused"}, CUDA)
    assert getattr(alone, op) is fused


def test_auto_on_a_cpu_without_compiled_ops_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(native, "available", lambda kind="cpu", there=there: there)
        fused = there and torch._C._dispatch_has_kernel_for_dispatch_key("st_fast::align", "CPU")
        assert kernels.select({}, CPU).align is (kernels if fused else reference).align


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"'norm_modulat' is unknown; allowed: norm_modulate,.*mean 'norm_modulate'"):
        kernels.select({"norm_modulat": "fused"}, CPU)
    with pytest.raises(ValueError, match=r"'bias_gradient' is unknown.*did you mean 'bias_gradients'"):
        kernels.select({"bias_gradient": "fused"}, CPU)
    with pytest.raises(ValueError, match=r"kernels.bias_gradients: 'on' is unknown; allowed: auto, fused, reference"):
        kernels.select({"bias_gradients": "on"}, CPU)
    with pytest.raises(ValueError, match=r"kernels.align: 'fussed' is unknown; allowed: auto.*did you mean 'fused'"):
        kernels.select({"align": "fussed"}, CPU)


def test_a_table_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        kernels.select({}, CPU).align = reference.align  # type: ignore[misc]
