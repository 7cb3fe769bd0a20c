"""csrc compiles against the headers of every torch that it serves, also where only the newest is installed.

ST_FAST_TORCH_INCLUDES names torch folders of further versions (colon separated, each with include/ and version.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from st_fast.kernels import build

CSRC = Path(build.__file__).resolve().parents[1] / "csrc"
SOURCES = sorted([*(CSRC / "cpu").glob("op_*.cpp"), *(CSRC / "cuda").glob("*.cu")])
STABLE = Path("include") / "torch" / "csrc" / "stable"
NEWER_MACRO, OLDER_MACRO = "STABLE_TORCH_ERROR_CODE_CHECK", "TORCH_ERROR_CODE_CHECK"
MACROS = "#include <torch/csrc/stable/macros.h>"  # in torch 2.11 no other header has this line
INSTEAD = "#include <torch/csrc/stable/c/shim.h>\n#include <torch/headeronly/util/shim_utils.h>"

pytestmark = pytest.mark.skipif(not SOURCES, reason="the sources are not here")


def problem(source: Path, torch: Path, made: Path) -> str:
    """The compiler's first error, if any: g++ looks at the syntax, nvcc compiles for sm_90 as far as PTX."""
    if source.suffix == ".cpp":
        tool = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
        if tool is None:
            pytest.skip("no C++ compiler here")
        command = [*build.cxx_compile(tool, source, made, torch), "-fsyntax-only"]
    else:
        tool = shutil.which("nvcc")
        if tool is None:
            pytest.skip("no nvcc here")
        command = build.nvcc_compile(tool, source, made, (90,), torch)
        command[command.index("-c")] = "-ptx"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "error" in done.stderr, done.stderr
    return next((line for line in done.stderr.splitlines() if "error" in line), "")


def linked(source: Path, target: Path, replaced: Path) -> None:
    """`target` as a folder of links to what `source` holds, but for the folder `replaced` and those above it."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry == replaced:
            continue
        if entry in replaced.parents:
            linked(entry, target / entry.name, replaced)
        else:
            (target / entry.name).symlink_to(entry)


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed torch's headers, less what torch 2.11 lacks of the names that csrc may be tempted to use."""
    torch, made = build.torch_dir(), tmp_path_factory.mktemp("oldest") / "torch"
    linked(torch, made, torch / STABLE)
    shutil.copytree(torch / STABLE, made / STABLE)
    for header in (made / STABLE).rglob("*.h"):
        text = re.sub(rf"#define {NEWER_MACRO}\b(?:.*\\\n)*.*\n", "", header.read_text())
        header.write_text(text.replace(NEWER_MACRO, OLDER_MACRO).replace(MACROS, INSTEAD))
    return made


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_source_compiles_with_what_the_oldest_torch_has(source: Path, oldest: Path, tmp_path: Path) -> None:
    assert problem(source, oldest, tmp_path / "made") == ""


@pytest.mark.parametrize("name", [NEWER_MACRO, "STD_CUDA_KERNEL_LAUNCH_CHECK"])
def test_these_headers_lack_what_torch_2_11_lacks(name: str, oldest: Path, tmp_path: Path) -> None:
    source = tmp_path / "uses.cpp"
    headers = "".join(f"#include <torch/csrc/stable/{header}.h>\n" for header in ("library", "ops", "tensor"))
    source.write_text(f"{headers}#ifdef {name}\n#error {name} is there\n#endif\n")
    assert problem(source, oldest, tmp_path / "made") == ""


NAMED = [Path(folder) for folder in os.environ.get("ST_FAST_TORCH_INCLUDES", "").split(os.pathsep) if folder]


BY_OTHERS = ("adamw_ema.cu", "grad_norm.cu")
"""What test_csrc_build compiles with the installed torch, besides every .cpp."""


@pytest.mark.parametrize(
    ("torch", "source"),
    [(None, source) for source in SOURCES if source.suffix == ".cu" and source.name not in BY_OTHERS]
    + [(torch, source) for torch in NAMED or ["further"] for source in SOURCES],
    ids=lambda value: value.name if isinstance(value, Path) and value.suffix else str(value),
)
def test_every_source_compiles_with_each_torch_at_hand(torch: Path | str | None, source: Path, tmp_path: Path) -> None:
    """None: the installed torch."""
    if torch == "further":
        pytest.skip("ST_FAST_TORCH_INCLUDES names no other version's torch folder")
    folder = build.torch_dir() if torch is None else Path(torch)
    assert (folder / STABLE).is_dir(), f"ST_FAST_TORCH_INCLUDES: {folder} has no {STABLE}"
    assert problem(source, folder, tmp_path / "made") == ""
