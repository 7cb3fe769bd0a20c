"""Compiles every Triton kernel for GPUs that are not here, and keeps what they use in one table.

    python -m st_fast.kernels.resources            compare with tests/kernels/resources.json; exit code 1 on a breach
    python -m st_fast.kernels.resources --write    write the table

The launchers run on meta tensors with the launch itself replaced by a recorder, so what is compiled is what they would
launch: the same constants, warps, and specialisation of sizes and strides (divisible by 16, equal to 1).
Pointers count as 16-byte aligned, as PyTorch's allocations are. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import adaln, adamw, guidance, qknorm

TABLE = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "resources.json"
ARCHITECTURES = (80, 90, 100)
WIDTHS = (384, 768, 1024, 1152)
HEAD_WIDTHS = (64, 72)

CEILINGS = {
    "adaln.forward": 80, "adaln.plain_forward": 64, "adaln.backward": 168, "adaln.plain_backward": 128,
    "adaln.gate_forward": 64, "adaln.gate_backward": 64, "adaln.add_partials": 40,
    "guidance.mse": 64, "guidance.cosine": 64, "guidance.normalized_mse": 64, "guidance.align": 64,
    "guidance.feature_loss_total": 40, "guidance.extrapolate": 32,
    "qknorm.forward": 72, "qknorm.backward": 128, "qknorm.add_rows": 32,
    "adamw.grad_norm": 32, "adamw.step": 80,
}  # fmt: skip
"""Registers a thread. 64 of them leave 32 warps on a multiprocessor, 128 leave 16, 168 leave 12."""

NARROW = ("qknorm.add_rows",)
"""Kernels without a 16-byte load: it adds 288 columns with 128 threads."""


@dataclass(frozen=True)
class Use:
    """What one compiled kernel uses; widest_load in bytes a thread, of all its global loads."""

    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    float64: int
    widest_load: int


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel with its arguments by name, and its compile options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


def record(run: Callable[[], object]) -> list[Launch]:
    """The Triton launches that `run` makes, none of which is carried out."""
    launches = []

    def recorder(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options: dict[str, int] = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        launches.append(Launch(self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, options))

    with patch.object(JITFunction, "run", recorder):
        run()
    return launches


def compile_for(launch: Launch, architecture: int) -> Any:
    """The kernel compiled for sm_<architecture>, specialised as Triton's own launcher would."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + POINTEES[value.dtype]
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


POINTEES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}


def _widest_load(ptx: str) -> int:
    """Bytes of the widest load from global memory, plain or asynchronous."""
    plain = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x(\w+)", ptx)
    return max([int(v or 1) * int(bits) // 8 for v, bits in plain] + [int(size, 16) for size in copies], default=0)


def measure(launch: Launch, architecture: int) -> Use:
    """Compile and read registers, stack and local memory off the cubin, the rest off the PTX."""
    compiled = compile_for(launch, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"{launch.kernel.__name__}: cuobjdump reports no resources for sm_{architecture}: {report}")
    registers, stack, local = map(int, found.groups())
    ptx = compiled.asm["ptx"]
    metadata = compiled.metadata
    return Use(metadata.num_warps, registers, stack, local, metadata.shared, ptx.count(".f64"), _widest_load(ptx))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _adaln_calls(width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """At the shapes of training: 256 tokens, a batch of 256, modulation as views of one (B, 6D) tensor."""
    x, statistic = _meta(256, 256, width), _meta(256, 256, dtype=torch.float32)
    gate, shift, scale = _meta(256, 6 * width).chunk(6, 1)[2:5]
    yield "forward", lambda: adaln.gate_residual_norm_modulate(x, x, gate, shift, scale, 1e-6)
    yield "plain_forward", lambda: adaln.norm_modulate(x, shift, scale, 1e-6)
    yield (
        "backward",
        lambda: adaln.gate_residual_norm_modulate_backward(x, x, x, x, gate, scale, statistic, statistic),
    )
    yield "plain_backward", lambda: adaln.norm_modulate_backward(x, x, scale, statistic, statistic)
    yield "gate_forward", lambda: adaln.gate_residual(x, x, gate)
    yield "gate_backward", lambda: adaln.gate_residual_backward(x, x, gate)


def _guidance_calls(width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """77 of 256 samples in range, as a t-range of 0.3 gives."""
    q, f = _meta(256, 256, width), _meta(77, 256, width)
    weight, index = _meta(77, dtype=torch.float32), _meta(77, dtype=torch.int64)
    for loss in ("mse", "cosine", "normalized_mse"):
        yield loss, lambda loss=loss: guidance.guided_feature_loss(q, f, f, weight, 30.0, loss, index)  # type: ignore[misc]
    yield "align", lambda: guidance.align(q, q, _meta(256, dtype=torch.float32))


def _qknorm_calls(width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    qkv, weight = _meta(256, 256, 3, 16, width), _meta(width, dtype=torch.float32)
    grad, stats = _meta(256, 16, 256, width), _meta(4, 256, 16, 256, dtype=torch.float32)
    yield "forward", lambda: qknorm.qk_norm(qkv, weight, weight, weight, weight, 1e-6)
    yield "backward", lambda: qknorm.qk_norm_backward(grad, grad, grad, qkv, weight, weight, stats)


def _adamw_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    p, low = [_meta(1 << 20, dtype=torch.float32)], [_meta(1 << 20)]
    scalar = _meta(dtype=torch.float32)
    yield "grad_norm", lambda: adamw.grad_norm(low)
    yield (
        "step",
        lambda: adamw.adamw_ema_(p, p, p, p, p, low, scalar, scalar, scalar, 0.9, 0.999, 1e-8, 0.0, 0.9999, 1.0),
    )


def launches() -> Iterator[tuple[str, str, Launch]]:
    """Every kernel under its name and the width it is compiled for; kernels that do not depend on a width once."""
    sources = [("adaln", _adaln_calls, WIDTHS), ("guidance", _guidance_calls, WIDTHS),
               ("qknorm", _qknorm_calls, HEAD_WIDTHS)]  # fmt: skip
    helpers = {}
    for file, calls, widths in sources:
        for width in widths:
            for name, run in calls(width):
                first, *others = record(run)
                yield f"{file}.{name}", f"D={width}", first
                for other in others:
                    helpers[f"{file}.{other.kernel.__name__[1:].removesuffix('_kernel')}"] = other
    for name, launch in helpers.items():
        yield name, "any", launch
    for name, run in _adamw_calls():
        yield f"adamw.{name}", "any", record(run)[0]
    cond = _meta(256, 256, 1152)
    yield "guidance.extrapolate", "any", record(lambda: guidance.cfg_extrapolate(cond, cond, 30.0))[0]


Table = dict[str, dict[str, dict[str, dict[str, int]]]]  # kernel → width → architecture → the fields of Use


def measure_all(architectures: Sequence[int] = ARCHITECTURES) -> Table:
    """Compiles everything: about a minute on one core the first time, seconds from Triton's cache."""
    table: Table = {}
    for name, width, launch in launches():
        row = table.setdefault(name, {}).setdefault(width, {})
        row.update({f"sm_{arch}": asdict(measure(launch, arch)) for arch in architectures})
    return table


def breaches(measured: Table, written: Table | None) -> list[str]:
    """One line for each kernel that spills, computes in float64, loads narrowly, takes too many registers, or has
    changed from what is written (None: another Triton wrote it, so figures may differ)."""
    found = []
    for name, widths in measured.items():
        for width, architectures in widths.items():
            for arch, use in architectures.items():
                where = f"{name} {width} {arch}"
                found += [f"{where}: {field} = {use[field]}; 0 is allowed" for field in ("stack", "local", "float64")
                          if use[field]]  # fmt: skip
                if use["registers"] > CEILINGS[name]:
                    found.append(f"{where}: {use['registers']} registers; at most {CEILINGS[name]} are allowed")
                if use["widest_load"] < 16 and name not in NARROW:
                    found.append(f"{where}: widest load {use['widest_load']} bytes; 16 are needed")
                before = written and written.get(name, {}).get(width, {}).get(arch)
                if written is not None and before != use:
                    found.append(f"{where}: {use}, but the table has {before}; --write renews it")
    return found


def written_table() -> Table | None:
    """The table in the repository, or None if another Triton wrote it."""
    content = json.loads(TABLE.read_text())
    return content["kernels"] if content["triton"] == triton.__version__ else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m st_fast.kernels.resources", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead of comparing with it")
    arguments = parser.parse_args()
    measured = measure_all()
    found = breaches(measured, None if arguments.write else written_table())
    print("\n".join(found) or f"{len(measured)} kernels: no stack, no float64, 16-byte loads, under their ceilings")
    if arguments.write:
        TABLE.write_text(json.dumps({"triton": triton.__version__, "kernels": measured}, indent=1) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
