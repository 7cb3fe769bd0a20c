"""Shell completion for the commands: modules after -m, options, their values, and the keys of recipes.

    source <(python -m st_fast.completion bash)
    source <(python -m st_fast.completion zsh)
    python -m st_fast.completion fish | source

The script that is printed holds everything, so that a press of TAB starts no Python. It completes lines with
`-m st_fast.…` after python, python3 and torchrun, and leaves all other lines to the shell.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import st_fast
from st_fast.errors import run_command
from st_fast.recipe.schema import SECTIONS
from st_fast.recipe.typed import choices as words_of
from st_fast.recipe.typed import field_types

PROGRAMS = ("python", "python3", "torchrun")
COMMON = ("--help", "--debug")
PLAIN = {"train": ("--dry-run", "--accept-changes")}
"""Options of the commands that read their arguments without argparse."""


@dataclass(frozen=True)
class Command:
    """What can follow `-m st_fast.NAME`."""

    name: str
    words: tuple[str, ...]
    """Options and subcommands; one that ends in = wants a value right behind it."""
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Option → the values it may have; none, and so the shell's files, for an option that is not in here."""


def commands() -> list[Command]:
    """Every module of st_fast that can be run."""
    names = sorted(m.name for m in pkgutil.iter_modules(st_fast.__path__) if _source(m.name, m.ispkg))
    return [train() if name == "train" else _described(name) for name in names]


def _source(name: str, package: bool) -> str:
    """The text of the file that `-m` runs, or "" where there is none."""
    file = Path(st_fast.__path__[0], f"{name}/__main__.py" if package else f"{name}.py")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text if 'if __name__ == "__main__"' in text else ""


def train() -> Command:
    """The trainer's options, with every key of a recipe as `--section.key=` and the values that are words."""
    keys = {f"--{s}.{key}=": kind for s, cls in SECTIONS.items() for key, kind in field_types(cls).items()}
    values = {key: words for key, kind in keys.items() if (words := _choices(kind))}
    return Command("train", (*COMMON, *PLAIN["train"], *keys), values)


def _choices(kind: Any) -> tuple[str, ...]:
    if kind is bool:
        return ("true", "false")
    return words_of(kind)


def _described(name: str) -> Command:
    """A command as its argparse parser has it."""
    words, values = dict.fromkeys((*COMMON, *PLAIN.get(name, ()))), dict[str, tuple[str, ...]]()
    for parser in () if name in PLAIN else _parsers(name):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                words |= dict.fromkeys(action.choices)
            options = [option for option in action.option_strings if option.startswith("--")]
            words |= dict.fromkeys(options)
            if action.choices:
                values |= {option: tuple(map(str, action.choices)) for option in options}
                words |= {} if options else dict.fromkeys(map(str, action.choices))
    return Command(name, tuple(words), values)


class _Caught(Exception):
    """The parser that a command was about to use."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _caught(parser: argparse.ArgumentParser, *arguments: object) -> NoReturn:
    raise _Caught(parser)


@contextmanager
def _parsing_stopped() -> Iterator[None]:
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", _caught):
        yield


def _parsers(name: str) -> list[argparse.ArgumentParser]:
    """The parser that a command makes when it is called, and those of its subcommands."""
    package = Path(st_fast.__path__[0], name).is_dir()
    module = importlib.import_module(f"st_fast.{name}" + ".__main__" * package)
    try:
        with _parsing_stopped():
            module.main([])
    except _Caught as caught:
        inner = [a for a in caught.parser._actions if isinstance(a, argparse._SubParsersAction)]
        return [caught.parser, *(parser for action in inner for parser in action.choices.values())]
    raise TypeError(f"st_fast.{name} made no argparse parser; name its options in PLAIN")


BASH = r"""
_st_fast() {
    local line="${COMP_LINE:0:$COMP_POINT}" words="" flag="" prefix="" options="" module
    local cur="${line##*[[:space:]]}"
    local before="${line%"$cur"}"
    before="${before%"${before##*[![:space:]]}"}"
    local prev="${before##*[[:space:]]}"
    COMPREPLY=()
    case "$line" in
        *" -m $cur") words="@MODULES@" ;;
        *" -m st_fast."*" "*) ;;
        *) return 0 ;;
    esac
    if [ -z "$words" ]; then
        module="${line#* -m st_fast.}"
        module="${module%%[[:space:]]*}"
        flag="$prev"
        case "$cur" in *=*) flag="${cur%%=*}=" ;; esac
        case "$module $flag" in
@VALUES@
        esac
        if [ -n "$words" ]; then
            case "$cur" in
                *=*)  # bash takes = as the end of a word
                    case "${COMP_WORDBREAKS-}" in *=*) ;; *) prefix="${cur%%=*}=" ;; esac
                    cur="${cur#*=}"
                    ;;
            esac
        else
            case "$cur" in *=*) return 0 ;; esac
            case "$module" in
@WORDS@
            esac
        fi
    fi
    case "$cur" in -*) ;; *) options="-*" ;; esac  # where a file may stand, options are not offered
    COMPREPLY=($(compgen -P "$prefix" -X "$options" -W "$words" -- "$cur"))
    case "${COMPREPLY[*]}" in *=) type compopt > /dev/null 2>&1 && compopt -o nospace 2> /dev/null ;; esac
    return 0
}
complete -o default -o bashdefault -F _st_fast @PROGRAMS@
"""

ZSH = "autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n"

FISH = r"""
function __st_fast_in --argument-names module
    string match -qr -- '\s-m\s+st_fast\.'$module'\s' (commandline -cp)
end
function __st_fast_behind --argument-names word
    string match -q -- $word (commandline -cpo)[-1]
end
for program in @PROGRAMS@
    complete -c $program -n '__st_fast_behind -m' -x -a '@MODULES@'
@LINES@
end
"""


def bash(found: Sequence[Command]) -> str:
    """The script for bash."""
    values = [
        f'"{c.name} {flag}"' + f") words={shlex.quote(' '.join(v))} ;;" for c in found for flag, v in c.values.items()
    ]
    words = [f"{c.name}) words={shlex.quote(' '.join(c.words))} ;;" for c in found]
    return _filled(BASH, found, VALUES=_lines(values, 12), WORDS=_lines(words, 16))


def zsh(found: Sequence[Command]) -> str:
    """The script for zsh, which runs bash's."""
    return ZSH + bash(found).replace("-o default", "-o default -o nospace")  # there it can't be said word by word


def fish(found: Sequence[Command]) -> str:
    """The script for fish."""
    lines = []
    for command in found:
        spelt = [word for word in command.words if word not in command.values]
        spelt += [flag + value for flag, vs in command.values.items() if flag.endswith("=") for value in vs]
        spelt += [flag for flag in command.values if not flag.endswith("=")]
        here = f"__st_fast_in {command.name}"
        lines.append(f"complete -c $program -n '{here}' -a {shlex.quote(' '.join(spelt))}")
        for flag, choices in command.values.items():
            if not flag.endswith("="):
                behind = f"{here}; and __st_fast_behind {flag}"
                lines.append(f"complete -c $program -n '{behind}' -x -a {shlex.quote(' '.join(choices))}")
    return _filled(FISH, found, LINES=_lines(lines, 4))


def _filled(template: str, found: Sequence[Command], **parts: str) -> str:
    parts |= {"MODULES": " ".join(f"st_fast.{c.name}" for c in found), "PROGRAMS": " ".join(PROGRAMS)}
    for name, text in parts.items():
        template = template.replace(f"@{name}@", text)
    return template.strip("\n")


def _lines(lines: Sequence[str], indent: int) -> str:
    return "\n".join(" " * indent + line for line in lines)


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def main(arguments: Sequence[str]) -> None:
    """Prints a shell's script."""
    parser = argparse.ArgumentParser(
        prog="python -m st_fast.completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=SHELLS)
    print(SHELLS[parser.parse_args(arguments).shell](commands()))


if __name__ == "__main__":
    run_command(main)
