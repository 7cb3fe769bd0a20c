"""A family's folder in another project: copied as it is with what the families share, and a namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from st_fast import kernels
from st_fast.kernels.common.registry import LAUNCHERS
from tests import warm

SOURCE = Path(str(kernels.__file__)).parent

NAMESPACE = """
import torch

NAME = "{package}"
ops = torch.ops.{package}


def add_op_namespace_prefix(name):
    return f"{{NAME}}::{{name}}"
"""

PROGRAM = """
import json, sys, traceback, torch
from importlib import import_module

def check(package, family, launchers):
    trial = import_module(f"{package}.common.trial")
    declared = import_module(f"{package}.{family}.op").DECLARED
    for name, op in declared.items():
        if op.trial is None:
            continue
        found = []
        for call in (op.call, op.definition):
            inputs = op.trial(trial.Draw(torch.device("cpu"), torch.float32, 0), trial.Size(2, 3, 20, 2))
            outs = call(*inputs.args)
            outs = outs if isinstance(outs, tuple) else (outs,)
            found.append([*outs, *inputs.backward(outs)])
        for ours, theirs in zip(*found):
            torch.testing.assert_close(ours, theirs)
    assert not any(name.split(".")[0] == "st_fast" for name in sys.modules)
    for name in launchers:
        assert callable(getattr(import_module(f"{package}.{family}.triton"), name))
    assert hasattr(getattr(torch.ops, package), next(iter(declared)))

for package, (family, launchers) in json.loads(sys.argv[1]).items():
    try:
        check(package, family, launchers)
        print(package)
    except Exception:
        traceback.print_exc()
"""


def launchers(family: str) -> list[str]:
    """The ops of a family that have a Triton kernel."""
    found = [op for op, of in kernels.OPS.items() if of == family and kernels.declared(op) and op in LAUNCHERS]
    assert bool(found) == (SOURCE / family / "triton.py").is_file()
    return found


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A process with a package for each family, which has its folder, what the families share, and its own namespace.

    It prints the name of each package that works, and the traceback of the others.
    """
    root, packages = tmp_path_factory.mktemp("lifted"), {}
    for family in kernels.FAMILIES:
        package = root / f"lifted_{family}"
        for folder in (family, "common"):
            shutil.copytree(SOURCE / folder, package / folder)
        (package / "__init__.py").touch()
        (package / "_ops.py").write_text(NAMESPACE.format(package=package.name))
        packages[package.name] = family, launchers(family) if find_spec("triton") else []
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return warm.run("-c", PROGRAM, json.dumps(packages), cwd=root, env=env)


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_a_folder_works_where_it_is_copied_to(family: str, lifted: subprocess.CompletedProcess[str]) -> None:
    if launchers(family):
        pytest.importorskip("triton")
    assert f"lifted_{family}" in lifted.stdout.splitlines(), lifted.stderr


def test_adaln_s_kernels_run_where_they_are_copied_to(tmp_path: Path) -> None:
    """Under Triton's interpreter, without the op that registers them."""
    pytest.importorskip("triton")
    package = tmp_path / "lifted"
    for folder in ("adaln", "common"):
        shutil.copytree(SOURCE / folder, package / folder)
    (package / "__init__.py").touch()
    program = """
import torch
from lifted.adaln import definition, triton
x, a, gate, shift, scale = torch.randn(2, 3, 20), torch.randn(2, 3, 20), *torch.randn(3, 2, 20)
x_out, y, mean, rstd = triton.gate_residual_norm_modulate(x, a, gate, shift, scale, 1e-6)
for ours, theirs in zip((x_out, y), definition.gate_residual_norm_modulate(x, a, gate, shift, scale)):
    torch.testing.assert_close(ours, theirs)
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}
    done = warm.run("-c", program, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr


def test_kernels_on_a_cpu_s_tensors_say_how_to_interpret_them(tmp_path: Path) -> None:
    """Every launch, whatever of the kernel's arguments are tensors of this process's own."""
    pytest.importorskip("triton")
    families = [family for family in kernels.FAMILIES if (SOURCE / family / "triton.py").is_file()]
    for folder in (*families, "common"):
        shutil.copytree(SOURCE / folder, tmp_path / "lifted" / folder)
    (tmp_path / "lifted" / "__init__.py").touch()
    program = f"""
import torch
from importlib import import_module

def meta(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)

for family in {families}:
    module = import_module(f"lifted.{{family}}.triton")
    for name, call in module.resource_calls(meta, 64):
        try:
            call()
        except ValueError as error:
            print(family, str(error).replace("\\n", "|"))
"""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = warm.run("-c", program, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == set(families)
    assert all("_kernel: tensors on the CPU" in line and "TRITON_INTERPRET=1" in line for line in lines)
