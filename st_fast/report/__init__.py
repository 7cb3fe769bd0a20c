"""The report: run folders in, one self-contained HTML page out. Imports no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from st_fast.core.files import make_folder, write_atomic
from st_fast.core.writing import cannot_write
from st_fast.report.arms import make_arms
from st_fast.report.collect import read_runs


def default_path(runs: Sequence[Path]) -> Path:
    """Where the page goes unless told otherwise: into a single run's folder, else into the working directory."""
    return runs[0] / "report.html" if len(runs) == 1 else Path("report.html")


def write_report(
    runs: Sequence[Path], out: Path | None = None, export: Path | None = None, seeds_declared: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> Path:  # fmt: skip
    """Writes the report of one or several run folders, aside first and then renamed, and returns its path.

    With `export`, each figure also goes there as PNG and JSON. With `seeds_declared`, runs that differ in their seed
    alone are one arm's repetitions; without it, runs of several seeds are shown but not ranked. `beat` is called as it
    makes progress. UserError names what can't be read or written.
    """
    beat()
    from st_fast.report import figures, html, plot  # a second of imports that training need not wait for

    logs = read_runs(runs)
    page = html.render(logs, seeds_declared, beat)
    path = out or default_path(runs)
    try:
        make_folder(path.parent)
        write_atomic(path, page.encode())
    except OSError as error:
        raise cannot_write(path, error) from None
    if export:
        plot.export([figure for drawn in figures.all_figures(make_arms(logs)).values() for figure in drawn], export)
    return path
