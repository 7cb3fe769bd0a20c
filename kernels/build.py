"""Compiles csrc into `_csrc_<kind>_<digest>.so`: by `setup.py`, by `python kernels/build.py`, or at the first import.

A fresh `pip install -e .` prepares this package before torch is there, so the compiler often runs at the first import:
once, under a lock, written aside and renamed. The digest covers sources and flags, so a stale file is never loaded.
The stable ABI of LibTorch makes one file serve torch ≥ 2.11 and any Python. Nothing here imports torch, so it works
inside pip's isolated build too. Two kinds: `cpu` needs a C++17 compiler, `cuda` also nvcc and a torch built with CUDA.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

KINDS = ("cpu", "cuda")
USUALLY = {"cpu": "usually 30 to 90 seconds", "cuda": "usually 1 to 5 minutes"}
OLDEST_TORCH = (2, 11)
CUDA_ARCHS = (80, 90, 100)
NVCC_PLACES = ("nvcc", "/usr/local/cuda/bin/nvcc")

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
TORCH = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
ARITHMETIC = ["-O3", "-fno-math-errno", "-ffp-contract=off"]  # one rounding per operation, on every instruction set
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISAS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}


class BuildError(Exception):
    """Why there is no compiled file, in one line."""


def package_dir() -> Path:
    """The folder of the package st_fast, whether this file was imported as part of it or run from the repository."""
    parent = Path(os.path.abspath(__file__)).parent.parent
    return parent / "st_fast" if (parent / "st_fast").is_dir() else parent


def source_dir() -> Path | None:
    """csrc in the repository, or the copy that an installed package carries; None if there is neither."""
    package = package_dir()
    places = (package.parent / "csrc", package / "csrc")
    return next((place for place in places if (place / "cpu" / "kernels.h").is_file()), None)


def torch_dir() -> Path:
    """Where torch's headers and libraries are, found without importing torch. Raises BuildError."""
    spec = importlib.util.find_spec("torch")
    found = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]  # from an isolated build
    for place in found:
        if (place / "version.py").is_file():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (place / "version.py").read_text())
            if version is None or (int(version[1]), int(version[2])) < OLDEST_TORCH:
                raise BuildError(f"torch in {place} is older than {'.'.join(map(str, OLDEST_TORCH))}")
            return place
    raise BuildError("torch is not installed yet")


def tool(variable: str, *names: str) -> str:
    """$variable, or the first of `names` on the path. Raises BuildError naming what was looked for."""
    named = os.environ.get(variable)
    if named and not shutil.which(named):
        raise BuildError(f"${variable} = {named!r} is not a program")
    for path in map(shutil.which, [named] if named else names):
        if path:
            return path
    raise BuildError(f"no compiler: none of {', '.join(names)} is on the path, nor named by ${variable}")


def _torch_cuda(torch: Path) -> str:
    """The version of CUDA that torch is built for, as in "13.0". Raises BuildError where there is none."""
    version = re.search(r"^cuda\b.*= '(\d+\.\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    if version is None:
        raise BuildError("torch is built without CUDA")
    return version[1]


def _nvcc(torch: Path) -> str:
    """$NVCC, or the one found, if it is not of an older CUDA than torch. Raises BuildError saying what to do.

    Within a major version any toolkit serves any torch (CUDA's minor version compatibility).
    """
    wanted, named = _torch_cuda(torch), os.environ.get("NVCC")
    remedy = f"install the toolkit of CUDA {wanted}, which torch is built for, or name its nvcc by $NVCC"
    nvcc = next(filter(None, map(shutil.which, (named,) if named else NVCC_PLACES)), None)
    if nvcc is None:
        raise BuildError(f"$NVCC = {named!r} is not a program" if named else f"no CUDA toolkit (nvcc): {remedy}")
    release = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]))
    if release is None:
        raise BuildError(f"{nvcc} --version names no release: {remedy}")
    if int(release[1].split(".")[0]) < int(wanted.split(".")[0]):
        raise BuildError(f"CUDA toolkit {release[1]} ({nvcc}) is older than torch's CUDA {wanted}: {remedy}")
    return nvcc


def cxx_compile(compiler: str, source: Path, target: Path, torch: Path) -> list[str]:
    """The command that compiles one .cpp file that includes torch's headers."""
    flags = ["-O2", *TORCH, "-isystem", str(torch / "include")]
    return [compiler, *COMMON, str(source), *flags, "-c", "-o", str(target)]


def nvcc_compile(nvcc: str, source: Path, target: Path, archs: tuple[int, ...], torch: Path) -> list[str]:
    """The command that compiles one .cu file. -fmad=false: the same roundings as on the CPU."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags = ["-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA", *TORCH, "-isystem", str(torch / "include")]
    return [nvcc, *flags, *codes, "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c", str(source), "-o", str(target)]


def _cpu_commands(csrc: Path, torch: Path, work: Path) -> tuple[list[list[str]], list[str]]:
    """The compilations, which may run at once, and the link without its output."""
    compiler = tool("CXX", "g++", "c++", "clang++")
    isas = ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    kernels = csrc / "cpu" / "kernels_isa.cpp"  # torch-free, once for each instruction set
    sources = [source for source in sorted(kernels.parent.glob("*.cpp")) if source != kernels]
    flags = [*COMMON, *ARITHMETIC, str(kernels), "-c"]
    commands = [[compiler, *flags, f"-DST_ISA=st_{isa}", *isas[isa], "-o", str(work / f"{isa}.o")] for isa in isas] + [
        cxx_compile(compiler, source, work / f"{source.stem}.o", torch) for source in sources
    ]
    objects = [command[-1] for command in commands]
    return commands, [compiler, "-shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu"]


def _cuda_commands(csrc: Path, torch: Path, work: Path) -> tuple[list[list[str]], list[str]]:
    nvcc = _nvcc(torch)
    compiler = tool("CXX", "g++", "c++", "clang++")
    sources = sorted((csrc / "cuda").glob("*.cu"))
    commands = [nvcc_compile(nvcc, source, work / f"{source.stem}.o", CUDA_ARCHS, torch) for source in sources]
    objects = [command[-1] for command in commands]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
    return commands, [nvcc, "-ccbin", compiler, "-shared", "-cudart=static", *objects, *libraries]


def file_name(kind: str) -> str:
    """The name of the file that this source tree makes on this kind of machine. Raises BuildError without sources."""
    csrc = source_dir()
    if csrc is None:
        raise BuildError("the folder csrc is not here")
    digest = hashlib.sha256(platform.machine().encode())
    sources = sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
    for path in [*sources, Path(os.path.abspath(__file__))]:
        digest.update(path.name.encode() + path.read_bytes())
    return f"_csrc_{kind}_{digest.hexdigest()[:12]}.so"


def run(command: list[str]) -> str:
    """What it prints. Raises BuildError with its first error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} can't be run: {error.strerror}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{Path(command[0]).name} failed: {lines[0]}")
    return done.stdout


def tell(text: str, end: str = "\n") -> None:
    """Writes to stderr at once, where there is one."""
    if sys.stderr:
        print(text, end=end, file=sys.stderr, flush=True)


def run_all(commands: list[list[str]], label: str) -> None:
    """Runs commands, as many at once as there are cores. Raises BuildError with the first error of one.

    A terminal on stderr shows how many are done and the seconds since the start, each second, in one line that goes.
    """
    start, erase = time.monotonic(), "\r\033[K" if sys.stderr and sys.stderr.isatty() else ""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        waiting = {pool.submit(run, command) for command in commands}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1 if erase else None, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                if erase:
                    progress = f"{len(commands) - len(waiting)} of {len(commands)} files"
                    tell(f"{erase}{label}: {progress}, {time.monotonic() - start:.0f} s", end="")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            tell(erase, end="")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process a folder at a time; the others wait, and find what it made."""
    lock = os.open(folder, os.O_RDONLY)  # the folder itself: no file to leave behind
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def build(kind: str, folder: Path) -> Path:
    """Compile `kind` into `folder` unless it is there, and remove what older sources made. Raises BuildError.

    Takes up to minutes, and says so on stderr: a line before, a line after, between them progress on a terminal.
    """
    name = file_name(kind)
    target, csrc = folder / name, source_dir()
    assert csrc is not None
    torch = torch_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if target.is_file():
            return target
        for left in folder.glob(".csrc-*"):  # by a build that a signal ended
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".csrc-", dir=folder) as made:
            work = Path(made)
            commands, link = (_cpu_commands if kind == "cpu" else _cuda_commands)(csrc, torch, work)
            tell(
                f"st_fast: compiling csrc ({kind}), the C++ kernels, into {folder}: once after an installation or a "
                f"change, {USUALLY[kind]}, longer on a busy machine"
            )
            start = time.monotonic()
            run_all(commands, f"st_fast: csrc ({kind})")
            run([*link, "-o", str(work / name)])
            os.replace(work / name, target)
            tell(f"st_fast: csrc ({kind}) compiled in {time.monotonic() - start:.0f} s")
        if folder != _cache_dir():  # which several versions may share
            for stale in folder.glob(f"_csrc_{kind}_*.so"):
                if stale.name != name:
                    stale.unlink(missing_ok=True)
    return target


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st_fast"


def find(kind: str) -> Path | None:
    """The file that fits the sources, if it was built; without sources, whichever came with the package."""
    try:
        name = file_name(kind)
    except BuildError:
        return next(iter(sorted(package_dir().glob(f"_csrc_{kind}_*.so"))), None)
    return next((path for path in (package_dir() / name, _cache_dir() / name) if path.is_file()), None)


def ensure(kind: str) -> Path:
    """The compiled file, built now if need be: beside the package, or in the user's cache where that is read-only.

    Raises BuildError with the reason where it can't be had.
    """
    found = find(kind)
    if found:
        return found
    folder = package_dir() if os.access(package_dir(), os.W_OK) else _cache_dir()
    try:
        return build(kind, folder)
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror}") from error


def main() -> None:
    """Build what this machine can, one line each."""
    for kind in KINDS:
        try:
            print(f"csrc ({kind}): {ensure(kind)}")
        except BuildError as error:
            print(f"csrc ({kind}): not built, {error}")


if __name__ == "__main__":
    main()
