"""The speedrun: tasks, records that anyone can verify, and their leaderboard. docs/speedrun.md has the rules.

    python -m st_fast speedrun run digits my.toml --what "a higher rate" --out my-record
    python -m st_fast speedrun verify docs/speedrun/digits/1-plain
    python -m st_fast speedrun table docs/speedrun.md
    python -m st_fast speedrun try digits docs/speedrun/digits/4-narrow/recipe.toml --seed 7 --optim.lr=2e-3
    python -m st_fast speedrun data fashion --images /usr/share/datasets/fashion-mnist
    python -m st_fast speedrun make my-task --vae data/mine/vae --images pictures

run     trains every seed of a task, and writes the record as a folder with its verdict; the same command continues
verify  checks a record: every hash, figure and log, then one seed run again, to the bit where the machine is the same
table   writes the leaderboards of the records beside a page into it, and with --html a page for a browser
try     one seed, with overrides as `train` takes them; with --note its result goes into the task's list of attempts
data    makes a task's training data; the other commands do so where they can
make    makes the files of a task of your own: its task.toml says what
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from st_fast.core.command import command_parser, run_command
from st_fast.core.comparison import short_digest
from st_fast.core.errors import UserError
from st_fast.core.machine import rank_count
from st_fast.core.options import Parser, given, integer, path
from st_fast.core.signals import catch_signals
from st_fast.study.speedrun.task import Task, read_task

say = partial(print, flush=True)
"""At once, so that lines of the processes that are started come between."""
RECORDS = Path("docs/speedrun")
"""Where this repository keeps its records, a folder a task."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("speedrun", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str, recipe: bool = False) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text)
        if name != "table":
            one.add_argument("--data", type=path, help="the folder of the task's data (data/speedrun-TASK)")
            one.add_argument("--images", type=path, help="the task's images, for one that brings none")
        if recipe:
            one.add_argument("task", type=given, help="a task's name, or the folder of one")
            one.add_argument("recipe", type=path, help="a TOML file as `train` takes it")
        return one

    run = command("run", "train every seed and write a record", recipe=True)
    run.add_argument("--what", type=given, required=True, help="what did it, in one line")
    run.add_argument("--by", type=given, default="st_fast", help="whose record it is")
    run.add_argument("--out", type=path, required=True, help="the record's folder, which is not there yet")
    one = command("try", "train one seed", recipe=True)
    one.add_argument("--seed", type=integer(0, 2**31 - 1), required=True)
    one.add_argument("--out", type=path, help="the run's folder (runs/speedrun/TASK/RECIPE-seedN)")
    one.add_argument("--note", type=given, help="what was tried, in one line, for the task's list")
    verify = command("verify", "whether a record is true")
    verify.add_argument("record", type=path)
    verify.add_argument("--task", type=given, help="the folder of its task, where st_fast has none of that name")
    which = verify.add_mutually_exclusive_group()
    which.add_argument("--seed", type=integer(0, 2**31 - 1), help="which seed is run again (one by chance)")
    which.add_argument("--all", action="store_true", help="run every seed again")
    verify.add_argument("--no-rerun", action="store_true", help="check only what needs no training")
    verify.add_argument("--run-changes", action="store_true", help="run its changes of the code, which you have read")
    table = command("table", "write the leaderboards")
    table.add_argument("page", type=path, nargs="?", default=RECORDS.with_suffix(".md"), help=f"({RECORDS}.md)")
    table.add_argument("--html", type=path, metavar="FILE", help="also as a page of its own")
    command("data", "make a task's data").add_argument("task", type=given)
    make = command("make", "make a task's files")
    make.add_argument("task", type=path, help="a folder with task.toml")
    make.add_argument("--vae", type=path, metavar="FOLDER", help="makes the latents; without it pixels are the latents")
    return parser


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's text."""
    options, overrides = parser().parse_known_args(arguments)
    if strange := [one for one in overrides if options.command != "try" or not one.startswith("--") or "=" not in one]:
        written = f"; overrides are written {strange[0]}=VALUE" if options.command == "try" else ""
        raise UserError(f"speedrun {options.command}: {strange[0]} is no option; --help lists them{written}")
    if rank_count() > 1:
        raise UserError(f"{rank_count()} processes: a speedrun runs in one; start it with python, not with torchrun")
    if options.command == "table":
        from st_fast.study.speedrun.table import write_table

        write_table(options.page, options.html, say)
    elif options.command == "verify":
        _verify(options)
    elif options.command == "make":
        from st_fast.study.speedrun.prepare import make_task

        task = make_task(options.task, options.vae, options.images, say)
        say(f"{task.name}: classifier {task.accuracy:.2%} right on held-out images; real images score {task.floor:.4g}")
    else:
        task = read_task(options.task)
        {"run": _run, "try": _try, "data": _data}[options.command](task, options, overrides)


def _data_folder(task_name: str, options: argparse.Namespace) -> Path:
    return options.data or Path("data") / f"speedrun-{task_name}"


def _data(task: Task, options: argparse.Namespace, _: list[str]) -> str:
    """Makes the data, where they are not there; their digest."""
    from st_fast.study.speedrun.prepare import task_data

    return task_data(task, _data_folder(task.name, options), options.images, say)


def _try(task: Task, options: argparse.Namespace, overrides: list[str]) -> None:
    from st_fast.study.speedrun import rules
    from st_fast.study.speedrun.attempt import attempt
    from st_fast.study.speedrun.tried import check_note, note

    revision = "" if options.note is None else check_note(task, options.note, options.seed)
    recipe = rules.read(options.recipe, task, overrides)
    digest = _data(task, options, overrides)
    name = _name(options.recipe)
    run = f"{name}{f'-{short_digest(dict.fromkeys(overrides))}' if overrides else ''}-seed{options.seed}"
    out = options.out or Path("runs") / "speedrun" / task.name / run
    result = attempt(task, recipe, options.seed, _data_folder(task.name, options), digest, out, say)
    if options.note is not None:
        say(note(RECORDS / task.name, options.note, name, overrides, result, revision))


def _name(recipe: Path) -> str:
    """What a recipe is called: a record's by its record."""
    from st_fast.study.speedrun.record import RECIPE

    return recipe.absolute().parent.name if recipe.name == RECIPE else recipe.stem


def _run(task: Task, options: argparse.Namespace, _: list[str]) -> None:
    from st_fast.study.speedrun.carry_out import make_record

    make_record(
        task, options.recipe, options.out, options.what, options.by, _data_folder(task.name, options), options.images,
        say,
    )  # fmt: skip


def _verify(options: argparse.Namespace) -> None:
    from st_fast.study.speedrun.record import read_record
    from st_fast.study.speedrun.verify import verify

    name = read_record(options.record).task
    verify(
        options.record, options.task, "all" if options.all else options.seed, _data_folder(name, options),
        options.images, options.run_changes, not options.no_rerun, say,
    )  # fmt: skip


if __name__ == "__main__":
    catch_signals()
    run_command(main)
