"""Writes the kernels as a repository of Hugging Face's `kernels`: `python -m st_fast.kernels.hub OUT`.

OUT is the source tree that kernel-builder builds, and OUT/build what this machine can build of it without Nix, for
`kernels.get_local_kernel(OUT)`:

    torch-stable-abi211-{cpu,cu126,cu130}-x86_64-linux   csrc on the CPU and Triton on CUDA, for torch ≥ 2.11
    torch-{cpu,cuda}                                     Python only: Triton on CUDA, plain PyTorch elsewhere

A build.toml has one framework only, so what the Python-only variants are built from is a tree of its own, OUT/noarch.
Each variant's ops have a namespace named after its content, so several versions can be loaded in one process.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import FAMILIES, OPS, build

NAME, VERSION, LICENSE = "st-fast-kernels", 1, "Apache-2.0"
MODULE = NAME.replace("-", "_")
HERE = Path(__file__).resolve().parent
TREE = HERE / "hub_tree"
BACKENDS = {"cpu": ("cpu",), "cuda": ("cu126", "cu130")}
"""For which backends it is built, and how a compiled variant of it is called: CUDA's minor versions are compatible."""

WRITTEN = ".written"
"""Names the files that an export has written: the next one into the same folder removes these first."""

LEFT_OUT = {"__init__.py", "_ops.py", "build.py", "heap.py", "hub.py", "hub_tree", "namesake.py", "native.py",
            "resources.py", "table.py"}  # fmt: skip
"""What the tree has in another form, and what serves the trainer."""

ISAS = {
    "baseline": ("", ()),
    "avx2": ("avx2,fma,f16c", ("__AVX2__",)),
    "avx512": ("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl", ("__AVX2__", "__AVX512F__")),
}
"""The target of GCC's pragma, and the macros that csrc asks for it by: GCC < 13 doesn't define them for the pragma."""

CXX_FLAGS = [*build.ARITHMETIC, "-fvisibility=hidden"]
COMPILED = "torch-stable-abi" + "".join(map(str, build.OLDEST_TORCH))


class HubError(Exception):
    """Why the tree can't be written, in one line."""


def python_files() -> dict[str, str]:
    """The package's Python files by name, but for `_ops.py`, which every build has of its own."""
    paths = [path for path in sorted(HERE.rglob("*.py")) if path.relative_to(HERE).parts[0] not in LEFT_OUT]
    files = {path.relative_to(HERE).as_posix(): path.read_text() for path in paths}
    homes = {family: ", ".join(sorted(op for op in OPS if OPS[op] == family)) for family in FAMILIES}
    names = sorted([*OPS, "layers", "native", "patch", "reference"])
    lines = [
        '"""Fused ops of diffusion transformers with their gradients; `reference` says what each computes."""\n',
        f"FAMILIES = {FAMILIES}\n",
        "from . import layers, native, patch, reference",
        *(f"from .{family}.op import {ops}" for family, ops in homes.items()),
        f"\n__all__ = {toml_list(names)}\n",
    ]
    files["__init__.py"] = "\n".join(lines)
    files["native.py"] = (TREE / "native.py").read_text()
    return files


def cpp_files(csrc: Path) -> dict[str, str]:
    """csrc/cpu by name in the tree: kernels_isa.cpp, compiled once an instruction set, is a header of one file each.

    kernel-builder gives every file the same flags on every machine, so each names its instruction set itself.
    """
    files = {f"csrc/cpu/{path.name}": path.read_text() for path in sorted((csrc / "cpu").iterdir())}
    files["csrc/cpu/kernels_isa.h"] = files.pop("csrc/cpu/kernels_isa.cpp")
    for isa, (target, macros) in ISAS.items():
        lines = [f"#define ST_ISA st_{isa}", '#include "kernels_isa.h"']
        if target:
            defined = [line for macro in macros for line in (f"#ifndef {macro}", f"#define {macro} 1", "#endif")]
            lines = ["#if defined(__x86_64__)", f'#pragma GCC target("{target}")', *defined, *lines, "#endif"]
        files[f"csrc/cpu/isa_{isa}.cpp"] = "\n".join(lines) + "\n"
    files["torch-ext/torch_binding.cpp"] = (TREE / "torch-ext" / "torch_binding.cpp").read_text()
    return files


def toml_list(values: Iterable[str]) -> str:
    return "[\n" + "".join(f'    "{value}",\n' for value in values) + "]"


def build_toml(repo_id: str, framework: str) -> str:
    """Edition 5 of kernel-builder's format."""
    general = {"name": f'"{NAME}"', "version": VERSION, "edition": 5, "license": f'"{LICENSE}"'}
    lines = ["[general]", *(f"{key} = {value}" for key, value in general.items())]
    lines += [f"backends = {toml_list(BACKENDS)}", "", "[general.hub]", f'repo-id = "{repo_id}"', "", framework]
    return "\n".join(lines) + "\n"


def compiled_framework(sources: Iterable[str]) -> str:
    """The CPU ops are in [torch], not in a [kernel.*] of the CPU's, so that builds for CUDA have them too."""
    oldest = ".".join(map(str, build.OLDEST_TORCH))
    abi = "\n".join(f'{backend} = "{oldest}"' for backend in BACKENDS)
    lines = [f"src = {toml_list(sources)}", f"cxx-flags = {toml_list(CXX_FLAGS)}"]
    return "\n".join(["[torch]", *lines, "", "[torch.stable-abi]", abi])


def compile_cpu(tree: Path, files: Mapping[str, str], libraries: Iterable[Path]) -> None:
    """Compile the tree's C++ as kernel-builder would, once a library, whose name is that of module and namespace.

    Raises BuildError.
    """
    torch, python = build.torch_dir(), Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise build.BuildError(f"{python} has no Python.h: install the headers of this Python")
    compiler = build.tool("CXX", "g++", "c++")
    flags = ["-std=c++17", "-fPIC", "-fno-gnu-unique", *CXX_FLAGS, *build.TORCH, "-DPy_LIMITED_API=0x03090000"]
    flags += ["-isystem", str(torch / "include"), "-isystem", str(python)]
    with tempfile.TemporaryDirectory() as made:
        commands, links = {}, []
        for library in libraries:
            name, objects = library.name.partition(".")[0], []
            for source, text in files.items():
                if source.endswith(".cpp"):
                    named = "tensors.h" in text  # the others know nothing of the namespace
                    objects.append(f"{made}/{name if named else ''}{Path(source).stem}.o")
                    defined = [f"-DTORCH_EXTENSION_NAME={name}"] if named else []
                    commands[objects[-1]] = [compiler, *flags, *defined, "-c", str(tree / source), "-o", objects[-1]]
            links.append([compiler, "-shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(library)])
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(build.run, commands.values()))
            list(pool.map(build.run, links))


def identifier(backend: str, files: Mapping[str, str]) -> str:
    """The module's name and the ops' namespace: another one for any other content."""
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode())
    return f"_{MODULE}_{backend}_{digest.hexdigest()[:10]}"


def ops_py(name: str, compiled: bool) -> str:
    """What kernel-builder generates as `_ops.py`: the namespace of this build, after its compiled ops are loaded."""
    load = f"from . import {name}\n\n" if compiled else "\n"
    prefix = f'def add_op_namespace_prefix(op_name):\n    return f"{name}::{{op_name}}"\n'
    return f"import torch\n{load}ops = torch.ops.{name}\n\n\n{prefix}"


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_metadata(folder: Path, name: str, backend: str) -> None:
    """metadata.json, last: it has the digest of every other file."""
    files = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    about: dict[str, Any] = {"name": NAME, "id": name, "version": VERSION, "license": LICENSE, "python-depends": []}
    about |= {"backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": files}}
    write(folder, {"metadata.json": json.dumps(about, indent=2) + "\n"})


def write_variants(out: Path, python: Mapping[str, str], cpp: Mapping[str, str]) -> list[str]:
    """Everything in OUT/build that this machine can make; returns its names. A line says what can't be compiled."""
    plain = {f"torch-{backend}": (identifier(backend, python), backend) for backend in BACKENDS}
    place = f"{platform.machine()}-{platform.system().lower()}"
    compiled = {
        f"{COMPILED}-{tag}-{place}": (identifier(backend, {**python, **cpp}), backend)
        for backend, tags in BACKENDS.items()
        for tag in tags
    }
    with tempfile.TemporaryDirectory() as temporary:
        libraries = {name: Path(temporary) / f"{name}.abi3.so" for name, _ in compiled.values()}
        try:
            compile_cpu(out, cpp, libraries.values())
        except build.BuildError as error:
            print(f"st_fast.kernels.hub: Python files only, {error}", file=sys.stderr)
            compiled = {}
        for variant, (name, backend) in {**plain, **compiled}.items():
            folder = out / "build" / variant
            write(folder, {**python, "_ops.py": ops_py(name, variant in compiled)})
            if variant in compiled:
                shutil.copy2(libraries[name], folder)
            write_metadata(folder, name, backend)
    return [*plain, *compiled]


def figures() -> str:
    """What bench/ measured of the ops, a table for each device; a sentence where there is nothing."""
    tables = []
    for path in sorted((HERE.parent / "bench" / "results").glob("*.json")):
        measured = json.loads(path.read_text()).get("kernels", {})
        rows = [row for row in measured.get("rows", {}).values() if "eager" in row.get("both", {}).get("speedup", {})]
        if rows:
            tables.append(table(measured["machine"], rows))
    return "\n\n".join(tables) or "Not measured yet."


def table(machine: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    head = ("op", "size", "dtype", "ms", "against PyTorch", "against torch.compile")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        speedup, ms = row["both"]["speedup"], row["both"]["ms"]["fused"]
        cells = (row["op"], row["size"], row["dtype"], f"{ms:.2f}", f"{speedup['eager']:.2f}×")
        lines.append("| " + " | ".join((*cells, f"{speedup['compile']:.2f}×")) + " |")
    title = f"Forward and backward on {machine['device']}, torch {machine['versions']['torch']}, {machine['date']}:"
    return "\n".join([title, "", *lines])


def card(repo_id: str, python: Mapping[str, str]) -> str:
    """The tree's one page: kernel-builder uploads CARD.md as the repository's README.md."""
    layers = [node.name for node in ast.parse(python["layers.py"]).body if isinstance(node, ast.ClassDef)]
    values = {
        "NAME": NAME, "LICENSE": LICENSE.lower(), "REPO": repo_id, "VERSION": str(VERSION), "FIGURES": figures(),
        "EXAMPLE": (TREE / "example.py").read_text().strip(),
        "OPS": ", ".join(f"`{op}`" for op in OPS),
        "LAYERS": ", ".join(f"`{layer}`" for layer in layers if not layer.startswith("_")),
    }  # fmt: skip
    text = (TREE / "CARD.md").read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def export(out: Path, repo_id: str) -> list[str]:
    """Write the tree and its builds; returns the names of the builds. Raises HubError."""
    csrc = build.source_dir()
    if csrc is None:
        raise HubError("the folder csrc is not here")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise HubError(f"--repo-id {repo_id!r}: owner/name is needed")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / WRITTEN).is_file():
        raise HubError(f"{out} is not empty and not a tree of {NAME}; name another folder")
    for name in _text(out / WRITTEN).splitlines():  # and nothing else that may be there
        (out / name).unlink(missing_ok=True)
        for folder in (out / name).parents:
            if folder == out or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()
    kept = {path for path in out.rglob("*") if path.is_file()}
    python, cpp = python_files(), cpp_files(csrc)
    package = {f"torch-ext/{MODULE}/{name}": text for name, text in python.items()}
    copied = ("benchmarks/benchmark.py", "tests/conftest.py", "tests/test_kernels.py", "dit_block.py", "example.py")
    flake = {"flake.nix": (TREE / "flake.nix").read_text()}
    write(out, {**package, **cpp, **flake, "CARD.md": card(repo_id, python)})
    write(out, {name: (TREE / name).read_text() for name in copied})
    write(out, {"tests/__init__.py": "", "build.toml": build_toml(repo_id, compiled_framework(cpp))})
    write(out / "noarch", {**package, **flake, "build.toml": build_toml(repo_id, "[torch-noarch]")})
    made = write_variants(out, python, cpp)
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path not in kept)
    write(out, {WRITTEN: "\n".join(names) + "\n"})
    return made


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m st_fast.kernels.hub", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the tree")
    parser.add_argument("--repo-id", default=f"user/{NAME}", help="repository on the Hub (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        made = export(given.out, given.repo_id)
    except (HubError, OSError) as error:
        print(f"st_fast.kernels.hub: {error}", file=sys.stderr)
        return 1
    print(f"{given.out}: {', '.join(made)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
