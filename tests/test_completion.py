"""What the shells offer for a line that is being typed, asked of the shells themselves."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from st_fast import completion, prepare
from st_fast.recipe.schema import SECTIONS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, found = tmp_path_factory.mktemp("scripts"), completion.commands()
    for shell, script in completion.SHELLS.items():
        (folder / shell).write_text(script(found) + "\n")
    return folder


def shell(program: str, *command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} isn't installed")
    done = subprocess.run([*command, program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def in_bash(script: Path, line: str) -> list[str]:
    program = (
        f'source {script}; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _st_fast; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    return [word for word in shell(program, "bash", "--norc", "-c") if word]


def in_fish(script: Path, line: str) -> list[str]:
    return [
        word.split("\t")[0] for word in shell(f"source {script}; complete -C '{line}'", "fish", "--no-config", "-c")
    ]


CASES = [
    ("python -m st_fast.pre", {"st_fast.prepare"}, set()),
    ("python -m ", {"st_fast.train", "st_fast.sample", "st_fast.report", "st_fast.doctor"}, set()),
    ("torchrun --nproc-per-node 8 -m st_fast.tr", {"st_fast.train"}, {"st_fast.prepare"}),
    ("python -m st_fast.prepare in out --d", {"--dtype", "--device", "--dry-run"}, {"--size"}),
    ("python -m st_fast.prepare in out --dtype ", {"float16", "float32"}, {"--size", "README.md"}),
    ("python3 -m st_fast.sample runs/a --sampler h", {"heun"}, {"euler"}),
    ("python -m st_fast.train recipes/digits.toml --run.dev", {"--run.device="}, {"--run.out="}),
    ("python -m st_fast.train recipes/digits.toml --dry", {"--dry-run"}, set()),
    ("python -m st_fast.report runs/a --ex", {"--export"}, {"--out"}),
    ("python -m st_fast.completion z", {"zsh"}, {"bash"}),
]


@pytest.mark.parametrize(("line", "offered", "not_offered"), CASES)
def test_bash_offers(line: str, offered: set[str], not_offered: set[str], scripts: Path) -> None:
    words = set(in_bash(scripts / "bash", line))
    assert offered <= words and not not_offered & words


@pytest.mark.parametrize(("line", "offered"), [case[:2] for case in CASES])
def test_fish_offers(line: str, offered: set[str], scripts: Path) -> None:
    words = in_fish(scripts / "fish", line)
    for word in offered:
        assert any(other.startswith(word) for other in words), words  # it offers --key=value where bash offers --key=


def test_bash_completes_a_recipes_values_behind_the_equals_sign(scripts: Path) -> None:
    line = "python -m st_fast.train recipes/digits.toml --run.device="
    assert in_bash(scripts / "bash", line) == ["auto", "cpu", "cuda"]  # bash itself keeps what is before the =
    assert in_bash(scripts / "bash", f"{line}c") == ["cpu", "cuda"]


def test_bash_serves_the_three_programs_and_gives_other_lines_back(scripts: Path) -> None:
    said = shell(f"source {scripts / 'bash'}; complete -p", "bash", "--norc", "-c")
    for program in ("python", "python3", "torchrun"):
        assert any(line.endswith(f"-F _st_fast {program}") and "-o default" in line for line in said)
    for line in (
        "python scri",
        "python -m pytest --",
        "torchrun --nproc",
        "python -m st_fast.prepare ",
        "python -m st_fast.train rec",
    ):
        assert in_bash(scripts / "bash", line) == [], line  # nothing of ours: the shell completes files


@pytest.mark.parametrize(("line", "offered"), [case[:2] for case in CASES])
def test_zsh_offers(line: str, offered: set[str], scripts: Path) -> None:
    """As its bashcompinit calls the function; what does not begin like the word typed is left out by zsh itself."""
    ask = f'COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _st_fast; for w in "${{COMPREPLY[@]}}"; do echo "$w"; done'
    words = shell(f"source {scripts / 'zsh'} 2> /dev/null; emulate sh -c '{ask}'", "zsh", "-f", "-c")
    assert offered <= set(words)


def test_every_option_of_a_parser_and_every_key_of_a_recipe_is_known() -> None:
    found = {command.name: command for command in completion.commands()}
    options = {o for a in prepare.parser()._actions for o in a.option_strings if o.startswith("--")}
    assert options <= set(found["prepare"].words)
    keys = {f"--{section}.{f.name}=" for section, cls in SECTIONS.items() for f in fields(cls)}
    assert keys <= set(found["train"].words)
    assert {"completion", "doctor", "prepare", "report", "sample", "train"} <= set(found)


def test_subcommands_and_their_options_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def main(arguments: list[str]) -> None:
            parser = argparse.ArgumentParser()
            inner = parser.add_subparsers().add_parser("import")
            inner.add_argument("--layout", choices=("sit", "repa"))
            parser.parse_args(arguments)

    monkeypatch.setattr(completion.importlib, "import_module", lambda name: Module)
    command = completion._described("sample")
    assert {"import", "--layout"} <= set(command.words) and command.values == {"--layout": ("sit", "repa")}
