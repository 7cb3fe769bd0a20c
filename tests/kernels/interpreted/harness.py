"""Puts the Triton launchers behind the CPU's dispatch, under the interpreter, with poisoned memory.

Imported only in the process that test_interpreted.py starts with TRITON_INTERPRET=1 and without csrc, because both
are settled when Triton and the ops are imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from csrc_cases import Case, error, evaluate
from torch import Tensor
from triton.runtime import interpreter

from st_fast import kernels
from st_fast.kernels import OPS, declared, native, reference
from st_fast.kernels.common import registry

assert os.environ.get("TRITON_INTERPRET") == "1" and not native.available()
torch.set_num_threads(1)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLACK = 2 * torch.finfo(torch.float32).eps  # two roundings of float32: what is below is not told apart
LAUNCHED: set[str] = set()


_convert_float = interpreter._convert_float


def _as_hardware_rounds(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """float32 → bfloat16 to nearest even, as `cvt.rn.bf16` does; the interpreter itself truncates."""
    if (source.name, target.name) != ("fp32", "bf16"):
        return _convert_float(values, source, target, rounding)
    rounded = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


interpreter._convert_float = _as_hardware_rounds

_patch_lang, _seen = interpreter._patch_lang, set[str]()


def _patched_once(function: Any) -> Any:
    """Triton's language is put in the interpreter's form once for each module that speaks it, and stays so; by itself
    the interpreter looks through all of it again at every call of a function within a kernel, half of its time."""
    if function.__module__ not in _seen:
        _seen.add(function.__module__)
        _patch_lang(function)
    return interpreter._LangPatchScope()


if hasattr(interpreter, "_LangPatchScope"):  # from Triton 3.7 on
    interpreter._patch_lang = _patched_once

# Integers are looked at for overflow only to be thrown away without `debug`: a quarter of the interpreter's time.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

_get_np_dtype, _dtypes = interpreter._get_np_dtype, dict[str, Any]()


def _looked_up_once(of: Any) -> Any:
    """numpy's type for one of Triton's, for which the interpreter writes down the table of all at every operation."""
    if of.name not in _dtypes:
        _dtypes[of.name] = _get_np_dtype(of)
    return _dtypes[of.name]


interpreter._get_np_dtype = _looked_up_once


def _poisoned(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher with every torch.empty full of NaN, so that what a kernel does not write is seen."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        new = empty(*args, **kwargs)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    def call(*args: Any) -> Any:
        LAUNCHED.add(name)
        with patch.object(torch, "empty", filled):
            return launch(*args)

    return call


for _op in OPS:
    declared(_op)  # registers it
for _name, _module in registry.LAUNCHERS.items():
    registry.LIBRARY.impl(_name, _poisoned(_name, getattr(import_module(_module), _name)), "CPU")


def assert_as_exact_as_eager(case: Case, dtype: torch.dtype, strides: str = "plain") -> None:
    """Every output and gradient within twice the error that plain PyTorch makes at this dtype, both against float64."""
    LAUNCHED.clear()
    truth = evaluate(case, reference, torch.float64, strides)
    eager, ours = (evaluate(case, ops, dtype, strides) for ops in (reference, kernels))
    assert LAUNCHED, "no launcher was called"
    assert ours.keys() == truth.keys() == eager.keys()
    for name in truth:
        assert ours[name].dtype == eager[name].dtype, name
        assert error(ours[name], truth[name]) <= 2 * error(eager[name], truth[name]) + SLACK, name


def assert_nan_comes_through(case: Case) -> None:
    """Wherever the reference's outputs and gradients turn NaN from one NaN in the first leaf, so do these."""
    first = next(iter(case.leaves))
    value = case.leaves[first].clone()
    value.view(-1)[0] = torch.nan
    bad = Case(case.name, case.leaves | {first: value}, case.call, case.frozen)
    truth, ours = (evaluate(bad, ops, torch.float32) for ops in (reference, kernels))
    assert truth["out0"].isnan().any()
    for name in truth:
        assert ours[name][truth[name].isnan()].isnan().all(), name
