"""The tree for Hugging Face's `kernels`: what kernel-builder asks of it, and its builds loaded by the package itself.

The package is looked for among the installed distributions: `pip install -c constraints.txt kernels`.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from st_fast.kernels import build, hub
from tests import warm

REPO = "someone/st-fast-kernels"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled with less optimisation, in half of the time: its arithmetic is fixed by other flags."""
    out = tmp_path_factory.mktemp("hub") / "tree"
    compiler = next(filter(None, map(shutil.which, ("g++", "c++"))), None)
    with pytest.MonkeyPatch.context() as patch:
        if compiler:
            quick = out.parent / "quick-cxx"
            quick.write_text(
                f'#!/bin/sh\ncase "$*" in *isa_*) exec {compiler} "$@" -O1;; *) exec {compiler} "$@" -O0;; esac\n'
            )
            quick.chmod(0o755)
            patch.setenv("CXX", str(quick))
        hub.export(out, REPO)
    return out


@pytest.fixture(scope="module")
def compiled(tree: Path) -> list[Path]:
    """The compiled builds, of which the first is this machine's."""
    found = sorted((tree / "build").glob("torch-stable-abi*"))
    if not found:
        pytest.skip("no C++ compiler or no Python.h here")
    return found


def child(tree: Path, program: str, *arguments: object, **env: str) -> str:
    """What a process outside this repository prints that has the Hugging Face package and not st_fast.

    It imports torch itself where the program hides numpy from it.
    """
    try:
        package = metadata.distribution("kernels").locate_file("")
    except metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's kernels isn't installed")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ST_FAST")}
    clean |= {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    if program is OPS:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        done = subprocess.run(command, cwd=tree, env=clean, capture_output=True, text=True, timeout=400)
    else:
        done = warm.run("-c", program, *arguments, cwd=tree, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below that is not part of an annotation."""
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, ast.AST):
                    yield each
                    yield from at_run_time(each)


def newer_than_3_9(module: ast.Module) -> list[str]:
    """Unions of types at run time, and zip's `strict`."""
    found = []
    for node in at_run_time(module):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = [ast.unparse(side) for side in (node.left, node.right)]
            found += [" | ".join(sides)] if {"None", "Tensor", "int", "float", "str"} & set(sides) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "zip" and node.keywords:
            found.append(ast.unparse(node))
    return found


def not_there(path: Path, module: ast.Module) -> list[str]:
    """Modules of the package that a file imports and the tree lacks; `_ops` comes with a build."""
    wanted = []
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
            wanted += [path.parents[node.level - 1] / name for name in names if name not in ("_ops", "FAMILIES")]
    return [str(place) for place in wanted if not place.is_dir() and not place.with_suffix(".py").is_file()]


def test_every_file_is_of_python_3_9_and_the_package_imports_torch_and_itself_only(tree: Path) -> None:
    sources = [path for path in tree.rglob("*.py") if "build" not in path.relative_to(tree).parts]
    assert len(sources) > 50
    for path in sources:
        module = ast.parse(path.read_text(), filename=str(path), feature_version=(3, 9))
        assert newer_than_3_9(module) == [], path
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(module)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            str(node.module).split(".")[0]
            for node in ast.walk(module)
            if isinstance(node, ast.ImportFrom) and node.level == 0
        }
        assert "st_fast" not in imported, path
        if "torch-ext" in path.parts:
            assert imported <= sys.stdlib_module_names | {"torch", "triton"}, path
            assert not_there(path, module) == [], path


def test_a_union_at_run_time_is_seen() -> None:
    text = "from __future__ import annotations\ndef f(x: int | None) -> str | None: ...\nA = Tensor | None\nB = 1 | 2\n"
    assert newer_than_3_9(ast.parse(text)) == ["Tensor | None"]


def test_build_toml_has_one_framework_and_names_every_source(tree: Path) -> None:
    about = tomllib.loads((tree / "build.toml").read_text())
    assert about["torch"]["stable-abi"] == {"cpu": "2.11", "cuda": "2.11"} and "torch-noarch" not in about
    assert about["general"]["hub"]["repo-id"] == REPO
    there = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.suffix in (".h", ".cpp")}
    assert set(about["torch"]["src"]) == there and len(there) > 15
    plain = tomllib.loads((tree / "noarch" / "build.toml").read_text())
    assert plain["torch-noarch"] == {} and plain["general"] == about["general"] and "torch" not in plain
    packages = [path / "torch-ext" / "st_fast_kernels" for path in (tree, tree / "noarch")]
    assert all((package / "__init__.py").is_file() and not (package / "_ops.py").exists() for package in packages)


ACCEPTED = """
from pathlib import Path
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
for folder in (".", "noarch"):
    assert list(map(str, Build.open(Path(folder)).general.backends)) == ["cpu", "cuda"]
for variant in Path("build").iterdir():
    about = Metadata.read_from_file(variant / "metadata.json")
    about.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    assert about.id.startswith(f"_st_fast_kernels_{str(about.backend.backend_type).lower()}_"), about.id
"""


def test_the_package_reads_build_toml_and_metadata_and_finds_the_digests_right(tree: Path) -> None:
    child(tree, ACCEPTED)


OPS = """
import sys
sys.modules["numpy"] = None  # nothing but torch may be needed
import torch
from importlib import import_module
from pathlib import Path
from kernels import get_local_kernel

def check(kernel):
    for family in kernel.FAMILIES:
        for op in import_module(f"{kernel.__name__}.{family}.op").DECLARED.values():
            if op.trial is None:
                continue
            trial = import_module(f"{kernel.__name__}.common.trial")
            found = []
            for call in (op.call, op.definition):
                inputs = op.trial(trial.Draw(torch.device("cpu"), torch.float32, 0), trial.Size(3, 32, 64, 2))
                outs = call(*inputs.args)
                outs = outs if isinstance(outs, tuple) else (outs,)
                found.append([*outs, *inputs.backward(outs)])
            for ours, theirs in zip(*found):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

loaded = [get_local_kernel(Path(path)) for path in sys.argv[1:]]
for kernel in [*loaded, loaded[0]]:  # the first once more, after the others registered theirs
    check(kernel)
    full = kernel._ops.add_op_namespace_prefix("norm_modulate")
    assert full == kernel.__name__ + "::norm_modulate"
    print(Path(kernel.__file__).parent.name, kernel.native.isa(),
          torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU"))
x = torch.ones(1, 2, 8, dtype=torch.float64)
for kernel in loaded:  # what csrc is given in float64 goes to its own build's definitions
    y, _, _ = kernel._ops.ops.norm_modulate(x, x[:, 0], x[:, 0], 1e-6)
    assert torch.equal(y, x)
assert not any(name.split(".")[0] == "st_fast" for name in sys.modules)
"""


def test_the_compiled_build_is_chosen_and_others_live_beside_it(tree: Path, compiled: list[Path]) -> None:
    """Three builds in one process, two of them compiled; each has its ops, its C++ and its definitions."""
    lines = child(tree, OPS, tree, compiled[1], tree / "build" / "torch-cpu").splitlines()
    isa = lines[0].split()[1]
    assert isa in ("avx512", "avx2", "baseline")
    assert lines[0] == lines[3] == f"{compiled[0].name} {isa} True"
    assert lines[1:3] == [f"{compiled[1].name} {isa} True", "torch-cpu None False"]


def test_without_a_compiled_build_the_package_loads_the_python_files(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "torch-cpu").symlink_to(tree / "build" / "torch-cpu")
    assert child(tree, OPS, tmp_path).splitlines() == ["torch-cpu None False"] * 2


TRITON = """
import torch
from importlib import import_module
from pathlib import Path
from kernels import get_local_kernel
kernel = get_local_kernel(Path("build/torch-cuda"))
x, shift, scale = torch.randn(2, 3, 20), torch.randn(2, 20), torch.randn(2, 20)
y, _, _ = import_module(f"{kernel.__name__}.adaln.triton").norm_modulate(x, shift, scale, 1e-6)
torch.testing.assert_close(y, kernel.reference.norm_modulate(x, shift, scale, 1e-6))
"""


def test_the_triton_kernels_come_along(tree: Path) -> None:
    pytest.importorskip("triton")
    child(tree, TRITON, TRITON_INTERPRET="1")


@pytest.mark.parametrize("variant", ["compiled", "torch-cpu"])
def test_the_trees_own_tests_pass(variant: str, tree: Path, request: pytest.FixtureRequest) -> None:
    """Ops and gradients, torch.compile, and kernelize with use_fallback=False on a plain DiT block."""
    build = request.getfixturevalue("compiled")[0] if variant == "compiled" else tree / "build" / variant
    said = child(tree, warm.PYTEST, "-q", "-p", "no:cacheprovider", "tests", LOCAL_KERNELS=f"{REPO}={build}")
    assert re.search(r"\b2\d passed", said) and "skipped" not in said, said


EXAMPLE = """
import dit_block, functools, runpy
dit_block.compare = functools.partial(dit_block.compare, rounds=1)
runpy.run_path("example.py")
"""


def test_the_cards_ten_lines_run(tree: Path) -> None:
    lines = (tree / "example.py").read_text().strip()
    assert len(lines.splitlines()) == 10
    assert [path.name for path in tree.rglob("*.md")] == ["CARD.md"], "one page, which becomes the README"
    text = (tree / "CARD.md").read_text()
    assert text.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert f"```python\n{lines}\n```" in text and REPO in text
    assert re.search(r"\| norm_modulate \| .* \| \d+\.\d\d \| \d+\.\d\d× \|", text) and "@" not in text
    assert not re.search(r"{[{%#]", text)  # kernel-builder fills CARD.md in as a template
    said = child(tree, EXAMPLE)
    assert re.fullmatch(r"[\d.]+ ms plain, [\d.]+ ms with the kernels: [\d.]+ times as fast\n", said)


def test_another_projects_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "mine").touch()
    assert hub.main([str(tmp_path)]) == 1
    assert f"{tmp_path} is not empty and not a tree of st-fast-kernels" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["build", "mine"]


def test_without_a_compiler_there_are_builds_of_python_files_and_a_second_call_replaces_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*names: str) -> str:
        raise build.BuildError("no compiler")

    monkeypatch.setattr(build, "tool", missing)
    assert hub.export(tmp_path, REPO) == ["torch-cpu", "torch-cuda"]
    hub.write(tmp_path, {"build/stale/a.py": "", "tests/mine.py": "", "notes.md": ""})
    with (tmp_path / ".written").open("a") as written:
        written.write("build/stale/a.py\n")
    assert hub.main([str(tmp_path)]) == 0
    assert capsys.readouterr().err.splitlines() == ["st_fast.kernels.hub: Python files only, no compiler"] * 2
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["torch-cpu", "torch-cuda"]
    assert (tmp_path / "notes.md").is_file() and (tmp_path / "tests" / "mine.py").is_file()
    assert (tmp_path / "tests" / "test_kernels.py").is_file()


@pytest.mark.parametrize("repo_id", ["", "name", 'a"b/c', "a/b/c"])
def test_a_repository_has_an_owner_and_a_name(repo_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hub.main([str(tmp_path / "out"), "--repo-id", repo_id]) == 1
    assert "owner/name is needed" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_namespace_changes_with_the_content() -> None:
    files = {"a.py": "1", "b.py": "2"}
    names = {hub.identifier("cpu", files), hub.identifier("cuda", files), hub.identifier("cpu", files | {"b.py": "3"})}
    assert len(names) == 3 and all(re.fullmatch(r"_st_fast_kernels_(cpu|cuda)_[0-9a-f]{10}", name) for name in names)
