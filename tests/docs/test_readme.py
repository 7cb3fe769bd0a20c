"""The README tells the truth: its commands exist, its recipe is valid, its layout is there."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from bench import report
from st_fast.recipe import load
from st_fast.train.__main__ import main as train
from tests import tiny
from tests.data.conftest import encoded, picture

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
SHELL = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
MODULES = sorted({m for line in SHELL for m in re.findall(r"-m (st_fast\.\w+)", line)})
TRAINING = [line for line in SHELL if "st_fast.train recipes/" in line]


@pytest.mark.parametrize("module", MODULES)
def test_every_command_the_readme_names_has_help_with_an_example(module, capsys):
    try:
        import_module(f"{module}.__main__").main(["--help"])
    except SystemExit as end:  # argparse's own
        assert not end.code
    assert f"-m {module}" in capsys.readouterr().out


@pytest.mark.parametrize("line", TRAINING)
def test_every_training_command_passes_a_dry_run(line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(line[line.index("st_fast.train") + len("st_fast.train") :])
    train([*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])])
    said = capsys.readouterr().out
    assert "multiply-adds forward" in said and "[[stage]]" in said


SMALL = {
    "prepare": "--vae-steps 20 --device cpu",
    "train": "--model.depth=3 --model.width=64 --model.heads=1 --model.patch=4 --optim.batch_size=8 --run.device=cpu "
    "--stage.align.steps=2 --stage.transcend.steps=2 --stage.transcend.stop_step=2 --stage.transcend.student_depth=1 "
    "--stage.transcend.teacher_depth=2 --sample.num=4 --sample.steps=2",
    "sample": "--num 4 --steps 2",
}
"""What makes the commands for own images small."""


@pytest.mark.slow
def test_own_images_train_and_draw_by_the_three_commands(tmp_path):
    for number in range(12):
        folder = tmp_path / "pictures" / f"class {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(picture(number, (40, 48))))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (block,) = [block for block in BLOCKS if "--vae small" in block]
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [words[2] for words in commands] == [f"st_fast.{name}" for name in SMALL]
    said = tiny.in_turn(
        [[*words[2:], *small.split()] for words, small in zip(commands, SMALL.values(), strict=True)], tmp_path
    )
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / said.split()[-1]).suffix == ".png" and (tmp_path / said.split()[-1]).is_file()


def test_the_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for line in SHELL if line.startswith("make ") for word in line.split()[1:2]}
    assert {"demo", "test"} <= named <= targets


def test_the_recipe_shown_is_the_shipped_ones_method(tmp_path):
    path = tmp_path / "shown.toml"
    path.write_text(re.findall(r"```toml\n(.*?)```", README, re.S)[0] + '\n[data]\npath = "x"\n')
    shown = load(path)
    shipped = load(ROOT / "recipes" / "sit_xl.toml")
    for ours, theirs in zip(shown.stages, shipped.stages, strict=True):
        assert ours.name == theirs.name and ours.steps == theirs.steps
        for key in ("depth", "student_depth", "teacher_depth", "cfg_scale", "teacher"):
            assert getattr(ours.method, key, None) == getattr(theirs.method, key, None)


def test_the_layout_names_every_folder_with_its_packages():
    block = re.search(r"## Layout\n\n```\n(.*?)```", README, re.S)[1]
    rooms = re.findall(r"^  (\w+)/ ", block, re.M)
    assert sorted(rooms) == sorted(
        path.parent.name for path in (ROOT / "st_fast").glob("*/__init__.py") if not path.parent.is_symlink()
    )
    for name in re.findall(r"^(\w+)/ ", block, re.M):
        assert (ROOT / name).is_dir(), name


def test_it_is_short_and_its_figures_are_those_stored():
    typed = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", README, flags=re.S)
    assert len(typed.splitlines()) <= 140
    figures = json.loads((ROOT / "bench" / "results" / report.DEMO).read_text(encoding="utf-8"))
    assert report.demo_sentence(figures) in README
    assert report.demo_table(figures) in (ROOT / "bench" / "README.md").read_text(encoding="utf-8")


def test_pictures_and_links_are_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith(("http", "#")):
            assert (ROOT / target.partition("#")[0]).exists(), target
