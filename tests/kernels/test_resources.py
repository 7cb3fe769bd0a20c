"""Every Triton kernel compiled for sm_80, sm_90 and sm_100: no spills, no float64, wide loads, few registers."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from st_fast.kernels import resources
from st_fast.kernels.adaln import triton as adaln
from st_fast.kernels.feature_loss import triton as feature_loss
from st_fast.kernels.mlp import triton as mlp
from st_fast.kernels.optimiser import triton as optimiser
from st_fast.kernels.qknorm import triton as qknorm

USE = {"warps": 4, "registers": 64, "stack": 0, "local": 0, "shared": 0, "float64": 0, "widest_load": 16,
       "source": "3c"}  # fmt: skip
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def _add_kernel(x_ptr, y_ptr):
    at = tl.arange(0, 16)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)  # a place
    tl.store(x_ptr + at, x + y)
"""


def skip_without_tools() -> None:
    import triton

    if not Path(triton.knobs.nvidia.cuobjdump.path).exists():
        pytest.skip("this Triton has no cuobjdump")


@pytest.fixture(scope="module")
def measured() -> resources.Table:
    """sm_90 afresh, the others where the kernel is not what the table was written from."""
    skip_without_tools()
    return resources.measure_all((90, 80, 100), resources.written_table())


def test_kernels_use_what_the_table_says_and_no_more_than_allowed(measured: resources.Table) -> None:
    assert resources.breaches(measured, resources.written_table()) == []


def test_every_kernel_is_compiled_at_every_width(measured: resources.Table) -> None:
    assert measured.keys() == resources.ceilings().keys()
    for family, module in resources.kernels().items():
        for width in module.WIDTHS:
            for name, _ in module.resource_calls(resources._meta, width):
                assert (f"D={width}" if width else "any") in measured[f"{family}.{name}"], name
    kernels = {launch.kernel.__name__ for _, _, launch in resources.launches()}
    written = {f"_{line.split('_', 1)[1].split('(')[0]}" for module in resources.kernels().values()
               for file in Path(str(module.__file__)).parent.glob("*.py") for line in file.read_text().splitlines()
               if line.startswith("def _") and "_kernel(" in line}  # fmt: skip
    assert kernels == written


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stack", 8, "stack = 8; 0 is allowed"),
        ("local", 16, "local = 16"),
        ("float64", 1, "float64 = 1"),
        ("registers", 255, "255 registers; at most 80"),
        ("widest_load", 2, "widest load 2 bytes; 16 are needed"),
        ("warps", 8, "but the table has"),
    ],
)
def test_each_kind_of_breach_is_reported(field: str, value: int, message: str) -> None:
    table = {"adaln.forward": {"D=1152": {"sm_90": dict(USE)}}}
    worse = deepcopy(table)
    worse["adaln.forward"]["D=1152"]["sm_90"][field] = value
    assert resources.breaches(table, table) == []
    assert any(message in line for line in resources.breaches(worse, table))


def test_other_architectures_are_compiled_where_the_source_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def measure(launch: resources.Launch, architecture: int) -> resources.Use:
        compiled.append((launch.kernel.__name__, architecture))
        return resources.Use(**USE)

    monkeypatch.setattr(resources, "measure", measure)
    launches = [row for row in resources.launches() if row[0] in ("adaln.forward", "mlp.forward")][:2]
    monkeypatch.setattr(resources, "launches", lambda: iter(launches))
    (name, width, _), (_, other, _) = launches
    known = resources.measure_all()
    assert len(compiled) == 6
    known[name][other]["sm_100"]["source"] = "another"
    known[name][width]["sm_80"]["registers"] = 65
    compiled.clear()
    table = resources.measure_all((90, 80, 100), known)
    assert [architecture for _, architecture in compiled] == [90, 90, 100]
    assert (table[name][width]["sm_80"]["registers"], table[name][other]["sm_100"]["source"]) == (65, "3c")
    assert resources.measure_all() != known and len(compiled) == 9


@pytest.mark.parametrize(
    ("old", "new", "same"), [("# a place", "# another place", True), ("x + y", "x - y", False), ("", "\n\n", True)]
)
def test_a_digest_is_of_what_is_computed_and_not_of_where_it_stands(
    old: str, new: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_tools()
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for name, text in (("first_kernel", KERNEL), ("second_kernel", KERNEL.replace(old, new, 1))):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        launcher = import_module(name)._add_kernel[(1,)]
        (launch,) = resources.record(partial(launcher, meta(16), meta(16)))
        digests.append(resources.measure(launch, 90).source)
        assert resources.measure(replace(launch, options={"num_warps": 8}), 90).source != digests[-1]
    assert (digests[0] == digests[1]) == same


def test_a_kernel_that_computes_in_float64_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same launch on float64 tensors: the recorder and the count see it."""
    skip_without_tools()
    monkeypatch.setitem(resources.POINTEES, torch.float64, "fp64")
    x, v = (torch.empty(s, dtype=torch.float64, device="meta") for s in ((2, 3, 64), (2, 64)))
    (launch,) = resources.record(lambda: adaln.norm_modulate(x, v, v, 1e-6))
    assert resources.measure(launch, 90).float64 > 0


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(1, 1, 1, 1), (1, 1, 1, 7), (3, 40, 2, 100)])
def test_sizes_of_one_and_odd_sizes_compile_too(batch: int, tokens: int, heads: int, width: int) -> None:
    """Triton's launcher makes constants of sizes and strides of one, which the interpreter does not do."""
    skip_without_tools()
    x, v, weight = meta(batch, tokens, width), meta(batch, width), meta(batch, dtype=torch.float32)
    s, stats = meta(batch, tokens, dtype=torch.float32), meta(4, batch, tokens, heads, dtype=torch.float32)
    index, qkv = meta(batch, dtype=torch.int64), meta(batch, tokens, 3, heads, width)
    head, affine, p = meta(batch, heads, tokens, width), meta(width), [meta(width, dtype=torch.float32)]
    scalar, table = meta(dtype=torch.float32), None if width % 2 else meta(1, tokens, width, dtype=torch.float32)
    calls = [
        lambda: adaln.gate_residual_norm_modulate(x, x, v, v, v, 1e-6),
        lambda: adaln.norm_modulate(x, v, v, 1e-6),
        lambda: adaln.gate_residual_norm_modulate_backward(x, x, x, x, v, v, s, s),
        lambda: adaln.gate_residual_norm_modulate_backward(x, x, x, x, v, v, s, s, meta(width)),
        lambda: adaln.norm_modulate_backward(x, x, v, s, s),
        lambda: adaln.gate_residual_norm_modulate(x, x, v, v, v, 1e-6, rms=True),
        lambda: adaln.gate_residual_norm_modulate_backward(x, x, x, x, v, v, s[:0], s, rms=True),
        lambda: adaln.gate_residual(x, x, v),
        lambda: adaln.gate_residual_backward(x, x, v),
        lambda: feature_loss.align(x, x, weight),
        lambda: feature_loss.guided_feature_loss(x, x, x, weight, 0.0, "cosine", index),
        lambda: feature_loss.guided_feature_loss(x, x[:0], x[:0], weight[:0], 1.0, "mse", index[:0]),
        lambda: feature_loss.cfg_extrapolate(x, x, 1.0),
        lambda: mlp.gelu_tanh(x),
        lambda: mlp.gelu_tanh_backward(x, x),
        lambda: mlp.gelu_tanh_backward(x, x, meta(width)),
        lambda: mlp.swiglu(meta(batch, tokens, 2 * width)),
        lambda: mlp.swiglu_backward(x, meta(batch, tokens, 2 * width)),
        lambda: mlp.swiglu_backward(x, meta(batch, tokens, 2 * width), meta(2 * width)),
        lambda: qknorm.qk_norm(qkv, affine, affine, affine, affine, 1e-6),
        lambda: qknorm.qk_norm_backward(head, head, head, qkv, affine, affine, None, stats),
        lambda: qknorm.qk_norm_backward(head, head, head, qkv, affine, affine, qkv[0, 0].flatten(), stats),
        lambda: qknorm.qk_norm(qkv, affine, None, affine, None, 1e-6, False, "rms", table),
        lambda: qknorm.qk_norm_backward(
            head, head, head, qkv, None, None, qkv[0, 0].flatten(), stats[:0], "none", table
        ),
        lambda: optimiser.grad_norm(p),
        lambda: optimiser.adamw_ema_(p, p, p, p, [], [], scalar, scalar, scalar, 0.9, 0.99, 1e-8, 0.0, 0.9, 1.0),
    ]
    for call in calls:
        for launch in resources.record(call):
            use = resources.measure(launch, 90)
            assert (use.stack, use.local, use.float64) == (0, 0, 0), launch.kernel.__name__
