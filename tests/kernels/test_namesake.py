"""In the root of the repository, `kernels` is what other packages mean by it: the Hugging Face package, or nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import warm

OURS = """
import torch
from st_fast.kernels import reference, select
table = select({}, torch.device("cpu"))
x, shift, scale = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
torch.testing.assert_close(table.norm_modulate(x, shift, scale, 1e-6), reference.norm_modulate(x, shift, scale, 1e-6))
"""

THEIRS = """
from diffusers.utils import import_utils as d
from transformers.utils import import_utils as t
import transformers.integrations.hub_kernels
import diffusers.models.modeling_utils
found = {d.is_kernels_available(), t.is_kernels_available()}
"""

NOT_THERE = "assert found == {False}, found\nimport kernels\nassert not hasattr(kernels, 'select')\n"

THERE = """
assert d.is_kernels_available() and d.is_kernels_version("==", "0.0.1")
from kernels import get_kernel
from kernels.layer import Mode
assert get_kernel("a/b") == "the real one's a/b" and Mode == 3
import kernels, sys
assert "elsewhere" in kernels.__file__ and not any("namesake" in name for name in sys.modules if name[0] == "k")
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with an installed distribution `kernels` 0.0.1."""
    package = tmp_path / "elsewhere" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('def get_kernel(name):\n    return f"the real one\'s {name}"\n')
    (package / "layer.py").write_text("from . import get_kernel\nMode = 3\n")
    metadata = package.parent / "kernels-0.0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n")
    return package.parent


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed packages by links, but for the Hugging Face package, where that is installed."""
    packages = tmp_path_factory.mktemp("without")
    folders = [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    entries = {entry.name: entry for folder in reversed(folders) for entry in folder.iterdir()}
    for name, entry in entries.items():
        if name != "kernels" and not name.startswith("kernels-") and entry.suffix != ".pth":
            (packages / name).symlink_to(entry)
    return packages


ALONE = """
import sys
sys.path[:] = [path for path in sys.path if not path.endswith(("site-packages", "dist-packages"))]
"""


def trouble(program: str, path: Path) -> str:
    """What a process in the repository's root that runs this has to complain of: "" where all its checks hold."""
    done = warm.run("-c", program, env=os.environ | {"PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}, timeout=200)
    return "" if done.returncode == 0 else f"{done.stderr}exit code {done.returncode}"


@pytest.mark.parametrize("ours_first", [True, False])
def test_without_the_hugging_face_package_nobody_believes_it_is_there(ours_first: bool, without: Path) -> None:
    program = OURS + THEIRS + NOT_THERE if ours_first else THEIRS + NOT_THERE + OURS
    assert trouble(ALONE + program, without) == ""


@pytest.mark.parametrize("ours_first", [True, False])
def test_with_the_hugging_face_package_it_is_what_an_import_gives(ours_first: bool, elsewhere: Path) -> None:
    assert trouble(OURS + THEIRS + THERE if ours_first else THEIRS + THERE + OURS, elsewhere) == ""
