"""Options of a command line: numbers with their ranges, and mistakes in one line with the nearest name. No torch."""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from st_fast.core.errors import UserError

BATCH_MOST = 1_000_000
"""Images at a time; far more than fits a device, so that nothing is multiplied beyond 64 bits."""
COUNT_MOST = 100_000_000
"""Images of a set, records of a shard, training steps of a helper network."""
SIDE_MOST = 8_192
"""Pixels of an image's side."""
ARCHITECTURE_MOST = {
    "depth": 10_000, "width": 2**18, "heads": 2**16, "patch": SIDE_MOST, "channels": 2**16, "latent_size": SIDE_MOST,
    "num_classes": 10_000_000, "mlp_ratio": 1000, "text_length": 8_192,
    "registers": 1024,
}  # fmt: skip
"""The largest values of the keys of [model] that are numbers; a recipe's limits and a checkpoint's."""
SEED_MOST = 2**63 - 1
LAYOUTS = ("sit", "repa", "self-transcendence", "sra", "self-flow", "lightningdit", "speedrundit")
"""Of other projects' files: official SiT; REPA (also what shares its convention and has no head); Self-Transcendence,
both stages; SRA, also with dual time; Self-Flow; LightningDiT; SpeedrunDiT, whose class token is left out."""

OWN = re.compile(r"(invalid|expected|not allowed|ignored|ambiguous)\b")
"""How argparse's own texts about an option begin; other texts are those of `integer` and `number`."""


INTEGER = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
"""Python would also read 1_0 and the digits of other scripts, which no recipe takes."""


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError: the option, its value and what is allowed, or the option that may have been meant."""
        unknown = re.match(r"unrecognized arguments: (\S*)", message)
        names = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        if unknown is not None:
            name = unknown[1].partition("=")[0]
            message = f"{_shown(name)} is unknown" + (did_you_mean(name, names) if name.startswith("-") else "")
        elif (about := re.match(r"argument (?:-\w/)?([^:]+): (.*)", message, re.DOTALL)) is not None:
            message = f"{about[1]}{':' if OWN.match(about[2]) else ''} {about[2]}"
            choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
            if choice is not None:
                options = re.findall(r"[^', ]+", choice[2])
                message = f"{about[1]} {_shown(choice[1])}: one of {', '.join(options)}"
                message += did_you_mean(choice[1], options)
        raise UserError(f"{_shown(message, 400)}; {self.prog} --help lists the options")


def integer(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that takes an integer from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text if INTEGER.fullmatch(text) else "")
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_shown(text)}: an integer is needed") from None
        if not low <= value <= high:
            wanted = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"{_shown(text)}: {wanted}")
        return value

    return read


def pixels(text: str) -> int | tuple[int, int]:
    """The type of an option that takes an image's size: "256" of a square, or "192x320", height and width."""
    named = text.split("x")
    if len(named) > 2 or not all(named):
        raise argparse.ArgumentTypeError(f"{_shown(text)}: a side, or HEIGHTxWIDTH, is needed")
    parts = [integer(1, SIDE_MOST)(part) for part in named]
    return parts[0] if len(set(parts)) == 1 else (parts[0], parts[1])


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The type of an option that takes a finite number from `low` to `high`, or `above` the low end."""

    def read(text: str) -> float:
        value = float(text) + 0.0 if NUMBER.fullmatch(text) else math.nan  # -0 + 0 is 0
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{_shown(text)}: a finite number is needed")
        if value < low or value > high or (above and value == low):
            wanted = f"at most {high:g}" if value > high else f"above {low:g}" if above else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"{_shown(text)}: {wanted}")
        return value

    return read


def given(text: str) -> str:
    """The type of an option that takes a path or a name: not empty, and more than blanks."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{_shown(text)!r}: a path or a name is needed")
    return text


def path(text: str) -> Path:
    """The type of an option that takes a path: an empty one would be the folder that the command runs in."""
    return Path(given(text))


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """What another project's file may leave open: `layout`, `heads`, `num_classes` and `internal_head`."""
    most = ARCHITECTURE_MOST
    parser.add_argument("--from", dest="layout", choices=LAYOUTS, help="a file's layout, where its keys don't tell")
    parser.add_argument(
        "--heads", type=integer(1, most["heads"]), help="a file's attention heads, where no published size tells"
    )
    parser.add_argument(
        "--num-classes", type=integer(1, most["num_classes"]),
        help="a file's classes, where its keys and arguments don't tell",
    )  # fmt: skip
    parser.add_argument(
        "--internal-head", type=integer(1, most["depth"]), metavar="BLOCK",
        help="the block that the internal head in a file reads (default: as its arguments tell, else 8)",
    )  # fmt: skip


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A hint, " (did you mean x?)", at the option nearest to the name; empty where none is near."""
    by_folded = {option.casefold(): option for option in options}
    near = difflib.get_close_matches(name[:80].casefold(), by_folded, n=1, cutoff=0.65)
    return f" (did you mean {by_folded[near[0]]}?)" if near else ""


def _shown(text: str, most: int = 80) -> str:
    """The text in one printable line, its middle left out where it is long."""
    text = text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
