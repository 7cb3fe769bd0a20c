"""The choice, per op, between the fused op and the reference."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from st_fast import kernels
from st_fast.kernels import defaults, native, ops, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_table_has_the_ops_that_can_be_chosen() -> None:
    assert tuple(field.name for field in fields(kernels.KernelTable)) == defaults.OPS
    assert all(table.keys() <= set(defaults.OPS) for table in defaults.DEFAULTS.values())
    assert all(set(table.values()) <= {"fused", "reference"} for table in defaults.DEFAULTS.values())


@pytest.mark.parametrize("op", defaults.OPS)
def test_each_op_is_chosen_on_its_own(op: str) -> None:
    everything = dict.fromkeys(defaults.OPS, "reference")
    table = kernels.select(everything | {op: "fused"}, CPU)
    for other in defaults.OPS:
        assert getattr(table, other) is getattr(ops if other == op else reference, other)


def test_auto_is_what_the_defaults_say_and_what_nothing_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(defaults.DEFAULTS, "cuda", {"align": "fused", "qk_norm": "reference"})
    table = kernels.select({"align": "auto"}, CUDA)
    assert table == kernels.select({}, CUDA)
    assert (table.align, table.qk_norm, table.gate_residual) == (ops.align, reference.qk_norm, reference.gate_residual)
    assert kernels.select({}, torch.device("meta")).align is reference.align


def test_auto_on_a_cpu_without_compiled_ops_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(defaults.DEFAULTS, "cpu", {"align": "fused"})
    for there in (True, False):
        monkeypatch.setattr(native, "available", lambda kind="cpu", there=there: there)
        assert kernels.select({}, CPU).align is (ops if there else reference).align


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"'norm_modulat' is unknown; allowed: norm_modulate,.*mean 'norm_modulate'"):
        kernels.select({"norm_modulat": "fused"}, CPU)
    with pytest.raises(ValueError, match=r"kernels.align: 'fussed' is unknown; allowed: auto.*did you mean 'fused'"):
        kernels.select({"align": "fussed"}, CPU)


def test_a_table_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        kernels.select({}, CPU).align = reference.align  # type: ignore[misc]
