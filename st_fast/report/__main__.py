"""`python -m st_fast.report RUN [RUN…]`: one self-contained HTML page on one run, or several side by side.

examples:
  python -m st_fast.report runs/digits
      one run → runs/digits/report.html
  python -m st_fast.report runs/plain runs/digits --out compare.html
      two runs side by side
  python -m st_fast.report runs/study/digits/seed*/plain runs/study/digits/seed*/omega5 --seeds --out seeds.html
      two arms over several seeds, with the spread
  python -m st_fast.report runs/digits --export figures
      and every figure as figures/*.png and figures/*.json
  python -m st_fast.report runs/digits --dry-run
      read and check the logs, print the verdict, write nothing
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from st_fast.core.command import command_parser, run_command
from st_fast.core.errors import UserError
from st_fast.core.options import path
from st_fast.core.streams import show
from st_fast.report import default_path, write_report
from st_fast.report.arms import make_arms
from st_fast.report.collect import read_runs
from st_fast.report.fairness import unfair
from st_fast.report.progress import unfinished
from st_fast.report.repeats import verdict

PAGES = (".html", ".htm")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="run folder: recipe.toml and log.jsonl")
    parser.add_argument("--out", type=path, help="the page to write (default: RUN/report.html; several: ./report.html)")
    parser.add_argument("--export", type=path, metavar="DIR", help="also write each figure as PNG and JSON into DIR")
    parser.add_argument("--seeds", action="store_true", help="runs that differ in run.seed are one arm's repetitions")
    parser.add_argument("--dry-run", action="store_true", help="read and check, print the verdict, write nothing")
    return parser


def _need_places(out: Path | None, export: Path | None) -> None:
    """UserError unless the page's name is one of a page, and the figures' that of a folder."""
    if out is not None and (out.suffix.lower() not in PAGES or out.is_dir()):
        raise UserError(f"--out {out}: a file name that ends in {' or '.join(PAGES)} is needed, and not a folder's")
    if export is not None and export.exists() and not export.is_dir():
        raise UserError(f"--export {export}: is a file; a folder is needed")


def main(arguments: Sequence[str]) -> None:
    """Reads run folders and writes their report; UserError names what is missing or broken."""
    options = parser().parse_intermixed_args(arguments)
    _need_places(options.out, options.export)
    if options.dry_run:
        runs = read_runs(options.runs)
        found = verdict(make_arms(runs), unfair(runs, options.seeds))
        lines = "".join(f"{line}\n" for line in (*unfinished(runs), found.sentence))
        show(f"{lines}{found.markdown()}would write {options.out or default_path(options.runs)}")
        return
    print(write_report(options.runs, options.out, options.export, options.seeds))


if __name__ == "__main__":
    run_command(main)
