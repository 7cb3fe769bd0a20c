"""How the compiled file comes about: once, under a lock, keyed by the sources; and what is said where it can't."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from st_fast.kernels import build

COMPILER = any(map(shutil.which, ("g++", "c++", "clang++")))
REPOSITORY = Path(build.__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (REPOSITORY / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package's kernels and csrc, without anything compiled."""
    shutil.copytree(REPOSITORY / "kernels", tmp_path / "st_fast" / "kernels", ignore=shutil.ignore_patterns("__pyc*"))
    shutil.copytree(REPOSITORY / "csrc", tmp_path / "csrc")
    (tmp_path / "st_fast" / "__init__.py").touch()
    return tmp_path


def start(checkout: Path, *command: str, env: Mapping[str, str] = {}) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ST_FAST")}
    clean |= {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(checkout / "cache")}
    return subprocess.Popen([sys.executable, *command], env=clean | dict(env), cwd=checkout, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


IMPORT = "import st_fast.kernels as k, torch; print(k.native.available(), k.norm_modulate(*map(torch.ones, "
IMPORT += "((1, 2, 4), (1, 4), (1, 4)))).sum().item())"


@pytest.mark.skipif(not COMPILER, reason="no compiler here")
def test_two_first_imports_at_once_compile_once_and_both_work(checkout: Path) -> None:
    stale = checkout / "st_fast" / "_csrc_cpu_000000000000.so"
    stale.write_bytes(b"of older sources")
    children = [start(checkout, "-c", IMPORT) for _ in range(2)]
    said = [child.communicate(timeout=300) for child in children]
    assert [out for out, _ in said] == ["True 8.0\n"] * 2, said
    assert "".join(err for _, err in said).count("compiling csrc (cpu)") == 1
    left = sorted(path.name for path in (checkout / "st_fast").glob("*csrc*"))
    assert len(left) == 1 and left[0] != stale.name


def test_without_a_compiler_one_line_says_so_and_the_reference_serves(checkout: Path) -> None:
    out, err = start(checkout, "-c", IMPORT, env={"PATH": str(checkout), "CXX": ""}).communicate(timeout=120)
    assert out == "False 8.0\n"
    assert err.splitlines() == [
        "st_fast: compiled CPU ops not in use, no compiler: none of g++, c++, clang++ is on the path, nor named by"
        " $CXX; the reference takes over."
    ]


def test_a_failing_compiler_is_named_and_leaves_nothing_behind(checkout: Path) -> None:
    broken = checkout / "broken-cxx"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    out, err = start(checkout, "-c", IMPORT, env={"CXX": str(broken)}).communicate(timeout=120)
    assert out == "False 8.0\n"
    assert "broken-cxx failed: x.cpp:1:1: error: no such thing" in err and "Traceback" not in err
    assert not list((checkout / "st_fast").glob("*csrc*"))


def test_st_fast_csrc_empty_leaves_it_out_silently(checkout: Path) -> None:
    out, err = start(checkout, "-c", IMPORT, env={"ST_FAST_CSRC": ""}).communicate(timeout=120)
    assert (out, err) == ("False 8.0\n", "")


def test_a_file_that_does_not_load_is_reported_and_the_reference_serves(checkout: Path) -> None:
    bad = checkout / "_csrc_cpu_bad.so"
    bad.write_bytes(b"not a library")
    out, err = start(checkout, "-c", IMPORT, env={"ST_FAST_CSRC": str(bad)}).communicate(timeout=120)
    assert out == "False 8.0\n" and "the reference takes over" in err and len(err.splitlines()) == 1


def test_command_says_what_it_built_and_what_not(checkout: Path) -> None:
    child = start(checkout, "st_fast/kernels/build.py", env={"PATH": str(checkout), "CXX": ""})
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert re.match(r"csrc \(cpu\): not built, no compiler.*\ncsrc \(cuda\): not built, ", out)


def test_name_changes_with_any_source_and_with_the_flags(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    monkeypatch.setattr(build, "__file__", str(checkout / "st_fast" / "kernels" / "build.py"))
    names = {build.file_name("cpu")}
    for file in ("csrc/cpu/simd.h", "csrc/cuda/adamw_ema.cu", "st_fast/kernels/build.py"):
        path = checkout / file
        path.write_text(path.read_text() + "\n")
        names.add(build.file_name("cpu"))
    assert len(names) == 4


def test_read_only_package_is_built_in_the_cache(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    monkeypatch.setattr(build, "__file__", str(checkout / "st_fast" / "kernels" / "build.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(checkout / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    folders: list[Path] = []

    def record(kind: str, folder: Path) -> Path:
        folders.append(folder)
        return folder

    monkeypatch.setattr(build, "build", record)
    build.ensure("cpu")
    assert folders == [checkout / "cache" / "st_fast"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
@pytest.mark.parametrize("source", ["adamw_ema.cu", "grad_norm.cu"])
def test_nvcc_compiles_for_every_architecture_without_spills(source: str, tmp_path: Path) -> None:
    """On a machine without a GPU too: the CPU wheel of torch ships the headers that the stable ABI needs."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    file = REPOSITORY / "csrc" / "cuda" / source
    command = build.nvcc_compile(nvcc, file, tmp_path / "out.o", build.CUDA_ARCHS, build.torch_dir())
    done = subprocess.run([*command, "-Xptxas", "-v", "--threads=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for arch in build.CUDA_ARCHS:
        assert f"'sm_{arch}'" in done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert spills and set(spills) == {("0", "0")}
