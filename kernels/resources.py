"""Compiles every Triton kernel for GPUs that are not here, and keeps what they use in one table.

    python -m st_fast.kernels.resources            compare with tests/kernels/resources.json; exit code 1 on a breach
    python -m st_fast.kernels.resources --write    write the table

The launchers run on meta tensors with the launch itself replaced by a recorder, so what is compiled is what they would
launch: the same constants, warps, and specialisation of sizes and strides (divisible by 16, equal to 1).
Pointers count as 16-byte aligned, as PyTorch's allocations are. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import FAMILIES

TABLE = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "resources.json"
ARCHITECTURES = (80, 90, 100)
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
"""Of a launch, what the compiler gets."""


@dataclass(frozen=True)
class Use:
    """What one compiled kernel uses; widest_load in bytes a thread, of all its global loads; source: see `digest`."""

    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    float64: int
    widest_load: int
    source: str


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
        options: dict[str, int] = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
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


def digest(launch: Launch, ttir: str) -> str:
    """Of what the stages that know the GPU are given: Triton's IR, without the places in the source, and options."""
    bare = re.sub(r"^#loc.*\n|\s*loc\(#?\w*\)|\s*loc\(unknown\)", "", ttir, flags=re.MULTILINE)
    return hashlib.sha256(f"{sorted(launch.options.items())}{bare}".encode()).hexdigest()[:16]


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
    ptx, source = compiled.asm["ptx"], digest(launch, compiled.asm["ttir"])
    metadata, doubles = compiled.metadata, ptx.count(".f64")
    return Use(metadata.num_warps, registers, stack, local, metadata.shared, doubles, _widest_load(ptx), source)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kernels() -> dict[str, ModuleType]:
    """The families with Triton kernels."""
    found = {}
    for family in FAMILIES:
        if (Path(__file__).parent / family / "triton.py").is_file():
            found[family] = import_module(f".{family}.triton", __package__)
    return found


def launches() -> Iterator[tuple[str, str, Launch]]:
    """Every kernel under its name and the width it is compiled for; kernels that do not depend on a width once."""
    for family, module in kernels().items():
        helpers = {}
        for width in module.WIDTHS:
            for name, run in module.resource_calls(_meta, width):
                first, *others = record(run)
                yield f"{family}.{name}", f"D={width}" if width else "any", first
                for other in others:
                    helpers[f"{family}.{other.kernel.__name__[1:].removesuffix('_kernel')}"] = other
        for name, launch in helpers.items():
            yield name, "any", launch


def ceilings() -> dict[str, int]:
    """The most registers a thread may take in each kernel: 64 of them leave 32 warps on a multiprocessor, 128 leave 16,
    168 leave 12."""
    return {f"{family}.{name}": most for family, module in kernels().items() for name, most in module.CEILINGS.items()}


def narrow() -> set[str]:
    """Kernels that need no 16-byte load."""
    return {f"{family}.{name}" for family, module in kernels().items() for name in getattr(module, "NARROW", ())}


Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # kernel → width → architecture → the fields of Use


def measure_all(architectures: Sequence[int] = ARCHITECTURES, known: Table | None = None) -> Table:
    """Compiles everything: about a minute on one core the first time, seconds from Triton's cache.

    known: a table of this Triton's. Where its source is what the first architecture has shown, the others' figures are
    taken from it: the same compiler makes the same of it.
    """
    table: Table = {}
    for name, width, launch in launches():
        row = table.setdefault(name, {}).setdefault(width, {})
        written = known.get(name, {}).get(width, {}) if known else {}
        for number, arch in enumerate(f"sm_{architecture}" for architecture in architectures):
            same = number and written.get(arch, {}).get("source") == row[f"sm_{architectures[0]}"]["source"]
            row[arch] = dict(written[arch]) if same else asdict(measure(launch, architectures[number]))
    return table


def breaches(measured: Table, written: Table | None) -> list[str]:
    """One line for each kernel that spills, computes in float64, loads narrowly, takes too many registers, or has
    changed from what is written (None: another Triton wrote it, so figures may differ)."""
    found, most, thin = [], ceilings(), narrow()
    for name, widths in measured.items():
        for width, architectures in widths.items():
            for arch, use in architectures.items():
                where = f"{name} {width} {arch}"
                found += [f"{where}: {field} = {use[field]}; 0 is allowed" for field in ("stack", "local", "float64")
                          if use[field]]  # fmt: skip
                if use["registers"] > most[name]:
                    found.append(f"{where}: {use['registers']} registers; at most {most[name]} are allowed")
                if use["widest_load"] < 16 and name not in thin:
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
