"""Every command: `st-fast NAME ...`, which is `python -m st_fast NAME ...`. Without a name, the list of them.

st-fast demo
st-fast train recipes/digits.toml
torchrun --nproc-per-node 8 -m st_fast train recipes/sit_xl.toml
source <(st-fast completion bash)
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from st_fast.core.command import compile_nothing_for_help, run_command
from st_fast.core.errors import UserError, how_to_install
from st_fast.core.options import Parser, did_you_mean
from st_fast.core.signals import catch_signals
from st_fast.core.streams import show

COMMANDS = {
    "demo": ("train.demo", "train digits in minutes on a CPU, with a report that explains it"),
    "train": ("train.__main__", "train a recipe: every stage, then the report"),
    "sample": ("sample.__main__", "draw samples of a run: a picture, or a set of many"),
    "evaluate": ("evaluate.__main__", "FID and other metrics of a run's samples"),
    "probe": ("evaluate.probe.__main__", "what each block has learnt: linear probe, CKA, guided features"),
    "prepare": ("prepare.__main__", "images to a data folder of latents; features for REPA"),
    "real-images": ("prepare.real_images", "real images beside a data folder, for the classifier's metrics"),
    "convert": ("convert.__main__", "other projects' models to ours and back; publish on the Hugging Face hub"),
    "report": ("report.__main__", "the HTML report of one run, or of several side by side"),
    "study": ("study.__main__", "many arms over several seeds"),
    "speedrun": ("study.speedrun.__main__", "tasks with a target, and records that anyone can verify"),
    "doctor": ("train.doctor", "what this machine has; with --plan RECIPE, how fast more GPUs would be"),
}
"""Name → (module within st_fast, with `parser` and `main`; what it does)."""
CONTINUED = ("demo", "train", "sample", "evaluate", "probe", "prepare", "study", "speedrun")
"""Commands that take long and that the same command continues: a signal ends them with exit code 75."""
SHELLS = ("bash", "zsh", "tcsh")


def module_of(name: str) -> Any:
    """The module of a command. UserError for a name that is none."""
    if name not in COMMANDS:
        raise UserError(f"{name!r} is no command{did_you_mean(name, (*COMMANDS, 'completion'))}; `st-fast` lists them")
    return import_module(f"st_fast.{COMMANDS[name][0]}")


def completion(shell: str) -> str:
    """The shell's completion script for `st-fast`. UserError where shtab is missing or does not know the shell."""
    if shell not in SHELLS:
        raise UserError(f"completion {shell}: one of {', '.join(SHELLS)}")
    try:
        import shtab
    except ImportError:
        raise UserError(f"completion needs shtab: {how_to_install('complete')}") from None
    parser = Parser("st-fast")
    commands = parser.add_subparsers()
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, parents=[module_of(name).parser()], add_help=False)
    commands.add_parser("completion", help="a completion script").add_argument("shell", choices=SHELLS)
    return str(shtab.complete(parser, shell))


def main(arguments: Sequence[str]) -> None:
    """Runs the command that is named first."""
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<13}{text}" for name, (_, text) in COMMANDS.items())
        show(f"{__doc__}\n{rows}\n  completion   a completion script for {', '.join(SHELLS)}\n\nst-fast NAME --help")
        return
    name, *rest = arguments
    if name == "completion":
        shell = rest[0] if rest else "--help"
        show(f"usage: st-fast completion {'|'.join(SHELLS)}" if shell in ("-h", "--help") else completion(shell))
        return
    module_of(name).main(rest)


def run() -> None:
    """The console script."""
    if sys.argv[1:2] and sys.argv[1] in CONTINUED:
        catch_signals()
    compile_nothing_for_help()
    run_command(main, sys.argv[1:])


if __name__ == "__main__":
    run()
