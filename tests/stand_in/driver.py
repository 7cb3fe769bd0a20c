"""Builds the stand-in for one Python with a CUDA build of torch, runs processes on it, and reads its counters.

    python -m tests.stand_in.driver      prints the variables, for `env $(python -m tests.stand_in.driver) python …`

`ST_FAST_CUDA_PYTHON` names the Python, where that of the caller has no CUDA build of torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).resolve().parent / "c"
LIBRARY = "libcuda.so.1"
PYTHON_VARIABLE = "ST_FAST_CUDA_PYTHON"
OLDEST_CUDA = 13
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Werror")
TORCH_LIBRARIES = ("c10_cuda", "torch_cuda", "torch_cuda_linalg", "torch_python", "torch_nvshmem")
ANSWERED = re.compile(r"(Set|Get|Create|Destroy|Version)")
"""cuBLAS functions with such a word in their names compute nothing."""


class Unavailable(Exception):
    """Why there is no stand-in here, in one line."""


@dataclass(frozen=True)
class Installation:
    """A Python and its torch."""

    python: str
    torch: Path
    cuda: str
    """The version that torch is built with."""


@cache
def installation() -> Installation:
    """This Python if its torch is built with CUDA, else the one that ST_FAST_CUDA_PYTHON names. Raises Unavailable."""
    tried = []
    for python in filter(None, (sys.executable, os.environ.get(PYTHON_VARIABLE))):
        try:
            found = _look_at(python)
        except (OSError, subprocess.CalledProcessError, json.JSONDecodeError) as error:
            tried.append(f"{python} fails ({type(error).__name__})")
            continue
        if found is not None and int(found.cuda.split(".")[0]) >= OLDEST_CUDA:
            return found
        tried.append(f"{python} has no torch built with CUDA {OLDEST_CUDA} or newer")
    raise Unavailable(f"no CUDA build of torch: {'; '.join(tried)} (${PYTHON_VARIABLE} may name a Python with one)")


def _look_at(python: str) -> Installation | None:
    code = "import importlib.util as u, json; print(json.dumps(list(u.find_spec('torch').submodule_search_locations)))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=_clean()).stdout
    folder = Path(json.loads(said)[0])
    version = re.search(r"^cuda.*= '([\d.]+)'", (folder / "version.py").read_text(), re.MULTILINE)
    return Installation(python, folder, version[1]) if version else None


def headers() -> Path:
    """The folder of CUDA's headers: $CUDA_HOME's, nvcc's or the usual one. Raises Unavailable."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parents[1]), "/usr/local/cuda"]
    for home in filter(None, homes):
        folder = Path(home) / "include"
        if (folder / "cuda_runtime_api.h").is_file() and (folder / "crt" / "host_defines.h").is_file():
            return folder
    raise Unavailable("no CUDA headers: neither $CUDA_HOME nor nvcc on the path leads to cuda_runtime_api.h")


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.c"))


def build(found: Installation) -> Path:
    """The folder with the library, made now unless it is there. Raises Unavailable with the compiler's first error."""
    include = headers()
    digest = hashlib.sha256(f"{include} {found.torch} {found.cuda}".encode())
    for path in [*sorted(SOURCES.iterdir()), Path(__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st_fast"
    folder = cached / f"stand_in-{digest.hexdigest()[:12]}"
    if not (folder / LIBRARY).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rest = folder / f"rest.{os.getpid()}.c"
        made = folder / f"{LIBRARY}.{os.getpid()}"
        try:
            _compile(made, [], include)
            rest.write_text("\n".join(['#include "stand_in.h"', *_rest(found, made)]) + "\n")
            _compile(made, [rest], include)
            os.replace(made, folder / LIBRARY)  # as a whole or not at all
        finally:
            rest.unlink(missing_ok=True)
            made.unlink(missing_ok=True)
    return folder


def _compile(target: Path, more: list[Path], include: Path) -> None:
    files = [*map(str, sources()), *map(str, more)]
    command = ["gcc", *FLAGS, "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}", f"-I{SOURCES}"]
    _run([*command, "-isystem", str(include), *files, "-o", str(target), "-ldl", "-lpthread"])


def _rest(found: Installation, library: Path) -> list[str]:
    """Entry points that this torch's libraries need and the sources lack: products of cuBLAS launch, others say so."""
    there = _symbols(library, "--defined-only")
    names: set[str] = set()
    for stem in TORCH_LIBRARIES:
        path = found.torch / "lib" / f"lib{stem}.so"
        names |= _symbols(path, "--undefined-only") if path.is_file() else set()
    wanted = sorted(name for name in names - there if re.match(r"(__)?cuda[A-Z]|cublas", name))
    return [f"{_kind(name)}({name})" for name in wanted]


def _kind(name: str) -> str:
    if not name.startswith("cublas"):
        return "UNSUPPORTED"
    return "ACCEPTED" if ANSWERED.search(name) else "BLAS_LAUNCH"


def _symbols(library: Path, which: str) -> set[str]:
    lines = _run(["nm", "-D", which, str(library)]).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_clean())
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise Unavailable(f"{command[0]} failed: {errors[0]}")
    return done.stdout


def _clean() -> dict[str, str]:
    """The environment without a stand-in that this process itself may run on."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def csrc(found: Installation, folder: Path) -> str:
    """The value of ST_FAST_CSRC on the stand-in: csrc's files in `folder`, made now unless they are there.

    csrc has libcudart within itself, which no stand-in can get between; so it is linked with the shared one here, and
    for one architecture. A kind that does not compile is left out, with a line that says why.
    """
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "kernels" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    files = []
    for kind, commands in (("cpu", build._cpu_commands), ("cuda", build._cuda_commands)):
        target = folder / build.file_name(kind)
        failed = target.with_suffix(".failed")
        if not target.is_file() and not failed.is_file():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                try:
                    compilations, link = commands(build.source_dir(), found.torch, Path(work))
                    for command in compilations:
                        build.run([part for part in command if not re.match("-gencode.*sm_(?!90)", part)])
                    shared = ["-cudart=shared" if part == "-cudart=static" else part for part in link]
                    build.run([*shared, "-o", f"{work}/{target.name}"])
                    os.replace(Path(work) / target.name, target)
                except build.BuildError as error:
                    failed.write_text(str(error))
        if target.is_file():
            files.append(str(target))
        else:
            print(f"stand-in CUDA: csrc ({kind}) is left out: {failed.read_text()}", file=sys.stderr)
    return os.pathsep.join(files)


def environment(
    found: Installation, gib: float | None = None, fail_after: float | None = None, event_ms: float | None = None
) -> dict[str, str]:
    """Variables for a process of `found` on the stand-in, on top of this process's own. Raises Unavailable.

    `gib` is the size of the device's memory, `fail_after` the number of launches after which every call fails as on a
    device that has met an illegal address (0: never), `event_ms` the time between any two events.
    """
    folder = build(found)
    variables = {
        "ST_FAST_CSRC": csrc(found, folder),
        "LD_PRELOAD": str(folder / LIBRARY),
        "TRITON_LIBCUDA_PATH": str(folder),
        # What is tuned on the stand-in says nothing about a GPU: it has caches of its own.
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        # Inductor's pool of compilers now and then does not end when its process does, which then waits 300 s for it.
        "TORCHINDUCTOR_COMPILE_THREADS": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "1"),
    }
    settings = {"GIB": gib, "FAIL_AFTER": fail_after or None, "EVENT_MS": event_ms}
    given = {f"ST_FAST_STAND_IN_{name}": str(value) for name, value in settings.items() if value is not None}
    return variables | given


def inside() -> bool:
    """Whether this process runs on a stand-in."""
    return LIBRARY in os.environ.get("LD_PRELOAD", "")


class Counters:
    """The stand-in's own counts, read from within a process on it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        for name in ("stand_in_used_bytes", "stand_in_pinned_bytes"):
            getattr(self._library, name).restype = ctypes.c_size_t
        self._library.stand_in_count.restype = ctypes.c_ulonglong
        self._library.stand_in_name.restype = ctypes.c_char_p

    def read(self) -> dict[str, int]:
        """launches, captured, graph_launches, copies, pageable_copies, syncs, allocations, host_allocations, events."""
        found, number = {}, 0
        while (name := self._library.stand_in_name(number)) is not None:
            found[name.decode()] = self._library.stand_in_count(number)
            number += 1
        return found

    def since(self, before: Mapping[str, int]) -> dict[str, int]:
        """What was added to an earlier reading."""
        return {name: value - before[name] for name, value in self.read().items()}

    @property
    def used_bytes(self) -> int:
        """Device memory that is allocated, the allocator's reserve included."""
        return int(self._library.stand_in_used_bytes())

    @property
    def pinned_bytes(self) -> int:
        return int(self._library.stand_in_pinned_bytes())

    def resize(self, total: int) -> None:
        """Gives the device so many bytes of memory."""
        self._library.stand_in_set_bytes(ctypes.c_size_t(total))

    def fail_after(self, launches: int) -> None:
        """The device fails after so many more launches; 0: it does not."""
        self._library.stand_in_fail_after(ctypes.c_longlong(launches))


def main() -> None:
    try:
        variables = environment(installation())
    except Unavailable as error:
        raise SystemExit(f"stand-in CUDA: {error}") from None
    print(*(f"{name}={value}" for name, value in variables.items()))


if __name__ == "__main__":
    main()
