"""Trains a model in minutes on a CPU, and explains it: handwritten digits, or emoji from their names.

    st-fast demo
    st-fast demo emoji
    st-fast demo --stage.transcend.steps=500

It is `st-fast train` with a recipe that comes with st_fast; options are those of `train`. The same command again
continues where it stopped.
"""

import argparse
from collections.abc import Sequence

from st_fast.core.errors import UserError
from st_fast.core.options import did_you_mean
from st_fast.core.streams import show
from st_fast.recipe.load import shipped
from st_fast.train import __main__ as train

NAMES = ("digits", "emoji")


def parser() -> argparse.ArgumentParser:
    """The command line, for --help and completion."""
    made = train.parser()
    made.prog, made.description = "st-fast demo", __doc__
    made.usage = "st-fast demo [digits|emoji] [--section.key=value ...]"
    recipe = next(action for action in made._actions if action.dest == "recipe")
    recipe.nargs, recipe.choices, recipe.help = "?", NAMES, "what to train (default: digits)"
    return made


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's text."""
    if {"-h", "--help"} & set(arguments):
        show(parser().format_help())
        return
    names = [argument for argument in arguments if not argument.startswith("-")]
    if len(names) > 1 or (names and names[0] not in NAMES):
        wrong = " ".join(names)
        raise UserError(f"demo {wrong}: one of {', '.join(NAMES)}{did_you_mean(wrong, NAMES)}")
    options = [argument for argument in arguments if argument.startswith("-")]
    train.main([str(shipped(names[0] if names else "digits")), *options])
