"""`python -m st_fast.study FILE --out FOLDER`: runs a study's list and tells what came out.

examples:
  python -m st_fast.study recipes/study/digits.toml --out runs/study/digits --write docs/study.md
      every run that isn't done, then the page and a file a seed beside it; the same command again continues, and
      started in several terminals it shares the runs
  python -m st_fast.study recipes/study/cifar10_cpu.toml --minutes 480
      stop after eight hours, saved; exit code 75 until all is done
  python -m st_fast.study recipes/study/cifar10_cpu.toml --seed 1 --write docs/study.md
      a further seed; the page's figures are then of all seeds whose files lie beside it
  python -m st_fast.study recipes/study/digits.toml --dry-run
      the list of runs with their steps and FLOPs

docs/own-study.md has what a file may say.
"""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from st_fast.core.command import command_parser, run_command
from st_fast.core.errors import Interrupted, UserError
from st_fast.core.files import write_json_atomic
from st_fast.core.machine import rank_count
from st_fast.core.options import integer, number, path
from st_fast.core.signals import catch_signals
from st_fast.study.plan import Study, jobs, read_study


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("study", __doc__)
    parser.add_argument("study", type=path, metavar="FILE", help="such as recipes/study/digits.toml")
    parser.add_argument(
        "--seed", type=integer(0, 2**31 - 1), nargs="+", metavar="N", help="these seeds instead of the file's"
    )
    parser.add_argument("--out", type=path, help="where the runs go (runs/study/NAME)")
    parser.add_argument(
        "--minutes", type=number(0, 1e8, above=True), default=float("inf"), help="stop after this time, saved"
    )
    parser.add_argument("--write", type=path, metavar="PAGE", help="also put the outcome into this Markdown page")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs, and stop")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Reads, runs, collects, writes; Interrupted (75) when the time or a signal ended it first."""
    given = parser().parse_args(arguments)
    if rank_count() > 1:
        raise UserError(f"{rank_count()} processes: a study runs in one; start it with python, not with torchrun")
    study = read_study(given.study)
    if given.seed is not None:
        study = replace(study, seeds=tuple(dict.fromkeys(given.seed)))
    out = given.out or Path("runs") / "study" / study.name
    if given.dry_run:
        print(listing(study, out))
        return
    if given.write is not None:
        from st_fast.study.page import read_page
        from st_fast.study.seeds import gather

        read_page(given.write)  # what would refuse the page at the end is told before anything is trained
        for seed in gather(study, given.write.parent / given.write.stem, []):
            if seed.seed in study.seeds and not (out / f"seed{seed.seed}").exists():
                raise UserError(
                    f"--write {given.write}: seed {seed.seed} is there already, of runs that are not in {out}: without "
                    "--write the study makes them again and prints its table; another --seed adds to the page"
                )
    from st_fast.study.carry_out import carry_out  # torch is imported only once the study is known to be right

    try:
        carry_out(study, out, given.minutes)
    except Interrupted:
        with suppress(UserError):  # the page can be written at any later time
            tell(study, out, given.write)
        raise
    tell(study, out, given.write)


def tell(study: Study, out: Path, page: Path | None) -> None:
    """Writes what has come out so far: a file a seed, the page if one is wanted, and the verdict to the terminal."""
    from st_fast.report.repeats import compared
    from st_fast.study.page import write_page
    from st_fast.study.results import half_done, together
    from st_fast.study.seeds import METRIC, as_json, collect

    wanted = study.base.sections.get("evaluate", {})
    if not wanted.get("classifier"):
        print(f"study {study.name}: no arm is compared without evaluate.classifier = true")
        return
    seeds = [found for seed in study.seeds if (found := collect(study, out, seed)).arms]
    for seed in seeds:
        file = out / f"{study.name}-seed{seed.seed}.json"  # not among the runs, so that a report takes seed0/*
        write_json_atomic(file, as_json(study, seed))
        print(file)
    results = together(study, seeds) if page is None else write_page(study, seeds, page)
    for sentence in half_done(results):
        print(sentence.replace("**", ""))
    if results.rows:
        print(compared(results.rows, METRIC, results.study.apart).markdown(), end="")
    if page is not None:
        print(page)


def listing(study: Study, out: Path) -> str:
    """Every run with its steps and its own FLOPs, and the sum."""
    from st_fast.recipe import cost
    from st_fast.report import words

    lines, total, looking = [], 0.0, 0.0
    for job in jobs(study, out):
        spent = cost.stage_flops(job.recipe, job.recipe.stages[0], 0, job.steps)
        total += spent
        looking += cost.looking_flops(job.recipe, job.recipe.stages[0])
        lines.append(f"{job.folder}  {job.steps} steps, {words.flops(spent)}")
    drawing = f"{words.flops(looking)} to draw samples for pictures and scores"
    return "\n".join([*lines, f"{len(lines)} runs: {words.flops(total)} of training, {drawing}"])


if __name__ == "__main__":
    catch_signals()
    run_command(main)
