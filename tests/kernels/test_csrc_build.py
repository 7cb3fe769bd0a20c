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
from tests import warm

COMPILER = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
REPOSITORY = Path(build.__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (REPOSITORY / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package's kernels and csrc, without anything compiled."""
    shutil.copytree(REPOSITORY / "kernels", tmp_path / "st_fast" / "kernels", ignore=shutil.ignore_patterns("__pyc*"))
    shutil.copytree(REPOSITORY / "csrc", tmp_path / "csrc")
    (tmp_path / "st_fast" / "__init__.py").touch()
    return tmp_path


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def start(checkout: Path, *command: str, env: Mapping[str, str] = {}) -> warm.Process:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ST_FAST")}
    clean |= {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(checkout / "cache")}
    return warm.start(*command, env=clean | dict(env), cwd=checkout)


IMPORT = "import st_fast.kernels as k, torch; print(k.native.available(), k.norm_modulate(*map(torch.ones, "
IMPORT += "((1, 2, 4), (1, 4), (1, 4)))).sum().item())"


@pytest.mark.skipif(not COMPILER, reason="no compiler here")
def test_two_first_imports_at_once_compile_once_and_both_work(checkout: Path) -> None:
    stale = checkout / "st_fast" / "_csrc_cpu_000000000000.so"
    stale.write_bytes(b"of older sources")
    whole = build.ensure("cpu")  # of the same sources: who compiles is asked here, not what
    link = f'for word; do [ "$last" = -o ] && out=$word; last=$word; done; cp {whole} "$out"'
    quick = program(checkout / "quick-cxx", f'#!/bin/sh\ncase "$*" in *-shared*) {link};; *) sleep 0.2;; esac\n')
    children = [start(checkout, "-c", IMPORT, env={"CXX": str(quick)}) for _ in range(2)]
    said = [child.communicate(timeout=300) for child in children]
    assert [out for out, _ in said] == ["True 8.0\n"] * 2, said
    told = "".join(err for _, err in said)
    assert told.count("compiling csrc (cpu)") == 1 and len(re.findall(r"csrc \(cpu\) compiled in \d+ s\n", told)) == 1
    assert " of 11 files" not in told  # no terminal, no progress
    left = sorted(path.name for path in (checkout / "st_fast").glob("*csrc*"))
    assert len(left) == 1 and left[0] != stale.name


PROGRESS = """
from st_fast.kernels import build
try:
    build.run_all([["true"], ["sh", "-c", "sleep 1.2; exit %d"], ["sleep", "2.2"]], "csrc")
except build.BuildError as error:
    build.tell(str(error))
"""


@pytest.mark.parametrize(("code", "seen"), [(0, r"1 of 3 .*2 of 3 .*3 of 3 files, [2-9] s"), (1, "1 of 3 files, 0 s")])
def test_a_terminal_shows_how_many_files_are_compiled_and_for_how_long(code: int, seen: str) -> None:
    ours, theirs = os.openpty()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "ST_FAST_CSRC": ""}
    child = subprocess.Popen([sys.executable, "-c", PROGRESS % code], stderr=theirs, env=environment)
    assert child.wait(timeout=120) == 0
    told = os.read(ours, 4096).decode()
    os.close(ours)
    os.close(theirs)
    assert re.search(seen, told), told
    assert told.rsplit("\033[K", 1)[1].strip() == ("sh failed: ?" if code else "")  # the line of progress is gone


def test_without_stderr_nothing_is_told_and_commands_run() -> None:
    program = "from st_fast.kernels import build; build.run_all([['true']], 'csrc'); build.tell('lost')"
    command = ["sh", "-c", '"$0" "$@" 2>&-', sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "ST_FAST_CSRC": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, b"")


def test_without_a_compiler_one_line_says_so_and_the_reference_serves(checkout: Path) -> None:
    out, err = start(checkout, "-c", IMPORT, env={"PATH": str(checkout), "CXX": ""}).communicate(timeout=120)
    assert out == "False 8.0\n"
    assert err.splitlines() == [
        "st_fast: compiled CPU ops not in use, no compiler: none of g++, c++, clang++ is on the path, nor named by"
        " $CXX; the reference takes over."
    ]


def test_a_failing_compiler_is_named_and_leaves_nothing_behind(checkout: Path) -> None:
    broken = program(checkout / "broken-cxx", "#!/bin/sh\necho 'x.cpp:1:1: error: no such thing' >&2\nexit 1\n")
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


@pytest.fixture
def torch_for_cuda_13(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed torch as far as the build reads it before it compiles, and no CUDA toolkit."""
    folder = tmp_path / "torch"
    folder.mkdir()
    text = "from typing import Optional\n__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n"
    (folder / "version.py").write_text(text)
    monkeypatch.setattr(build, "torch_dir", lambda: folder)
    monkeypatch.setattr(build, "NVCC_PLACES", (str(tmp_path / "toolkit" / "nvcc"),))
    monkeypatch.delenv("NVCC", raising=False)
    return folder


REMEDY = "install the toolkit of CUDA 13.0, which torch is built for, or name its nvcc by $NVCC"
RELEASE = "#!/bin/sh\necho 'Cuda compilation tools, release {}, V{}.93'\n"


def refusal(tmp_path: Path) -> str:
    with pytest.raises(build.BuildError) as error:
        build.build("cuda", tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())
    return str(error.value)


def test_no_cuda_toolkit_is_said_with_what_to_do(torch_for_cuda_13: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"no CUDA toolkit (nvcc): {REMEDY}"


def test_an_nvcc_named_but_not_there_is_not_replaced_by_another(
    torch_for_cuda_13: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "toolkit" / "nvcc", RELEASE.format("13.0", "13.0"))
    monkeypatch.setenv("NVCC", str(tmp_path / "gone" / "nvcc"))
    assert refusal(tmp_path) == f"$NVCC = '{tmp_path}/gone/nvcc' is not a program"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RELEASE.format("12.8", "12.8"), f"CUDA toolkit 12.8 ({{nvcc}}) is older than torch's CUDA 13.0: {REMEDY}"),
        (RELEASE.format("9.2", "9.2"), f"CUDA toolkit 9.2 ({{nvcc}}) is older than torch's CUDA 13.0: {REMEDY}"),
        ("#!/bin/sh\necho hello\n", f"{{nvcc}} --version names no release: {REMEDY}"),
        ("#!/bin/sh\necho broken >&2\nexit 3\n", "nvcc failed: broken"),
        ("no program at all", "{nvcc} can't be run: Exec format error"),
    ],
)
def test_a_cuda_toolkit_that_cannot_serve_this_torch_is_refused_before_it_compiles(
    text: str, words: str, torch_for_cuda_13: Path, tmp_path: Path
) -> None:
    nvcc = program(tmp_path / "toolkit" / "nvcc", text)
    assert refusal(tmp_path) == words.format(nvcc=nvcc)


@pytest.mark.parametrize("release", ["13.0", "13.2", "14.1"])
def test_a_cuda_toolkit_of_torchs_major_version_or_newer_compiles(
    release: str, torch_for_cuda_13: Path, tmp_path: Path
) -> None:
    """With an nvcc that fails as soon as it is asked for more than its version."""
    text = RELEASE.format(release, release) + '[ "$1" = --version ] || { echo "x.cu: error: asked" >&2; exit 1; }\n'
    program(tmp_path / "toolkit" / "nvcc", text)
    assert refusal(tmp_path) == "nvcc failed: x.cu: error: asked"


def test_the_next_build_removes_what_a_killed_one_left(torch_for_cuda_13: Path, tmp_path: Path) -> None:
    killed = tmp_path / "made" / ".csrc-killed"
    killed.mkdir(parents=True)
    (killed / "op.o").write_bytes(b"half")
    program(tmp_path / "toolkit" / "nvcc", "#!/bin/sh\nexit 3\n")
    assert refusal(tmp_path) == "nvcc failed: ?"


def test_torch_without_cuda_needs_no_toolkit(torch_for_cuda_13: Path, tmp_path: Path) -> None:
    (torch_for_cuda_13 / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert refusal(tmp_path) == "torch is built without CUDA"


@pytest.mark.parametrize(("named", "lines"), [(None, 2), ("", 0)])
def test_on_a_machine_with_a_cuda_device_one_line_says_why_triton_serves(
    named: str | None, lines: int, checkout: Path
) -> None:
    pretend = "import torch; torch.version.cuda = '13.0'; torch.cuda.is_available = lambda: True; "
    env = {"PATH": str(checkout), "CXX": "", "NVCC": "/gone"} | ({} if named is None else {"ST_FAST_CSRC": named})
    out, err = start(checkout, "-c", pretend + IMPORT, env=env).communicate(timeout=120)
    said = [line for line in err.splitlines() if "No CUDA runtime" not in line]  # torch's CUDA build says so itself
    assert out == "False 8.0\n" and len(said) == lines, err
    if said:
        reasons = "(torch is built without CUDA|.NVCC = '/gone' is not a program)"
        assert re.fullmatch(f"st_fast: compiled CUDA ops not in use, {reasons}; Triton and PyTorch take over.", said[1])


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
