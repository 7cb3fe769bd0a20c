"""Every numeric option of every command, built from the parsers themselves, and argparse's mistakes in one line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from st_fast.__main__ import COMMANDS, module_of
from st_fast.core.command import run_command
from st_fast.core.errors import UserError
from st_fast.core.options import given, integer, number, path
from st_fast.train import plan

PARSERS = {name: module_of(name).parser for name in COMMANDS if name != "train"} | {"plan": plan.parser}


def numeric() -> Iterator[tuple[str, str, int]]:
    """Command, option and how many values it takes."""
    for command, parser in PARSERS.items():
        for action in parser()._actions:
            if action.type in (int, float) or getattr(action.type, "__qualname__", "").endswith("<locals>.read"):
                yield command, action.option_strings[-1], action.nargs if isinstance(action.nargs, int) else 1


OPTIONS = list(numeric())


def test_no_number_is_read_without_its_range():
    bare = [(c, a.option_strings) for c, make in PARSERS.items() for a in make()._actions if a.type in (int, float)]
    assert bare == [] and len(OPTIONS) >= 20


@pytest.mark.parametrize(("command", "option", "count"), OPTIONS, ids=lambda value: str(value))
def test_a_number_out_of_range_is_one_line_that_names_option_value_and_limit(command, option, count):
    parser = PARSERS[command]()
    needed = ["x"] * sum(not a.option_strings and a.nargs not in ("?", "*") for a in parser._actions)
    for value in ("-1", str(10**30), "9" * 5000, "nan", "inf", "some", "1e400", "", "٣x", "٣", "1_0"):
        with pytest.raises(UserError) as error:
            parser.parse_args([*needed, *([option] + [value] * count)])
        text = str(error.value)
        assert text.isprintable() and len(text) < 600 and option in text
        assert any(words in text for words in ("at least", "at most", "above", "is needed")), text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/a", "--nmu", "3"], "--nmu is unknown (did you mean --num?)"),
        (["runs/a", "--sampler", "hune"], "--sampler 'hune': one of euler, heun, dopri5, sde (did you mean heun?)"),
        (["runs/a", "--num"], "--num: expected one argument"),
        ([], "MODEL"),
        (["runs/a", "--gif", "--interpolate", "1", "2"], "not allowed with"),
        (["runs/a", "--s", "2"], "ambiguous option"),
        (["runs/a", "\x1b[31m"], "is unknown"),
    ],
)
def test_a_mistake_on_a_command_line_is_one_line_with_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda given: PARSERS["sample"]().parse_args(given), arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("st_fast: ") and said.err.count("\n") == 1 and said.err[:-1].isprintable()
    assert words.replace("'", "") in said.err.replace("'", "")


def test_minus_nothing_is_nothing():
    assert str(PARSERS["sample"]().parse_args(["x", "--cfg-scale", "-0"]).cfg_scale) == "0.0"


PATHS = {
    (command, (action.option_strings or [action.dest])[-1])
    for command, make in PARSERS.items()
    for action in make()._actions
    if action.type in (path, given)
}


def test_every_path_of_a_command_is_of_the_type_that_refuses_blanks():
    bare = [(c, a.dest) for c, make in PARSERS.items() for a in make()._actions if a.type is Path]
    assert bare == [] and len(PATHS) >= 15


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("prepare", ["images", ""]),
        ("prepare", ["", "out"]),
        ("prepare", ["--to-repa", "data", " "]),
        ("prepare", ["images", "out", "--vae", ""]),
        ("report", ["run", "--export", ""]),
        ("report", ["run", "--out", "\t"]),
        ("sample", ["run", "--out", ""]),
        ("study", ["file", "--out", ""]),
    ],
)
def test_an_empty_or_blank_path_is_one_line_with_exit_code_2(command, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda given: PARSERS[command]().parse_args(given), arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "': a path or a name is needed" in said


@pytest.mark.parametrize(("kind", "good"), [(integer(1, 8), ("1", "8")), (number(0, 2, above=True), ("0.1", "2"))])
def test_the_ends_of_a_range_belong_to_it(kind, good):
    assert [str(kind(text)) for text in good] in (["1", "8"], ["0.1", "2.0"])
    for text in ("0", "9"):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)
