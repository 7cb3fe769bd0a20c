"""The kernels in another project: one file and its reference, copied, without st_fast."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from st_fast.kernels import reference

SOURCE = Path(reference.__file__).parent

PROGRAM = """
import sys, torch
from lifted import adaln, reference
x, a, gate, shift, scale = torch.randn(2, 3, 20), torch.randn(2, 3, 20), *torch.randn(3, 2, 20)
x_out, y, mean, rstd = adaln.gate_residual_norm_modulate(x, a, gate, shift, scale, 1e-6)
for ours, theirs in zip((x_out, y), reference.gate_residual_norm_modulate(x, a, gate, shift, scale), strict=True):
    torch.testing.assert_close(ours, theirs)
assert not any(name.split(".")[0] == "st_fast" for name in sys.modules)
"""


@pytest.mark.parametrize(
    ("files", "program"),
    [
        (("adaln", "reference"), PROGRAM),
        (("guidance", "adaln", "reference"), "from lifted import guidance, reference"),
        (("qknorm", "reference"), "from lifted import qknorm, reference"),
        (("adamw", "reference"), "from lifted import adamw, reference"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_file_works_where_it_is_copied_to_with_its_reference(
    files: tuple[str, ...], program: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    package = tmp_path / "lifted"
    package.mkdir()
    (package / "__init__.py").touch()
    for file in files:
        shutil.copy(SOURCE / f"{file}.py", package)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
