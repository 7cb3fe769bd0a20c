"""The leaderboards: the records beside a page, each checked, in tables between its markers, and as a page of HTML."""

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from st_fast.core.errors import Say, UserError
from st_fast.core.files import read_bytes, write_atomic
from st_fast.core.writing import cannot_write
from st_fast.report import plot, words
from st_fast.report.figures import Chart, Curve
from st_fast.study.page import placed, read_page
from st_fast.study.speedrun.record import PICTURE, Record, check, identity, read_record, same_kind
from st_fast.study.speedrun.task import SIGNIFICANCE, WEIGHTS, Task, mean_and_deviation, read_task, task_names
from st_fast.study.speedrun.tried import Tried, read_tried

STEP = 0.1
"""By how much less FLOPs, or time on the same kind of machine, a record takes than the one before."""
HEAD = (
    "#",
    "What did it",
    "FLOPs a seed",
    "of record 1",
    "Time a seed",
    "of record 1",
    "Distance",
    "p",
    "By",
    "Record",
)
TRIED = ("What", "Over", "Change", "Seeds", "FLOPs", "Distance", "Without it")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Speedrun</title>
<style>{{ style }} td, th { text-align: left; vertical-align: top; } code { white-space: nowrap; }
h3 { margin-top: 24px; } th:first-child { padding-left: 12px; }
.Records td:nth-child(2), .Tried td:nth-child(1), .Tried td:nth-child(3) { white-space: normal; }</style>
<main><h1>Speedrun</h1>{% for board in boards %}<section>
<h2>{{ board.task.title }}</h2><p><code>{{ board.task.name }}</code>: {{ board.target }}</p>
{% for title, head, lines in board.tables %}<h3>{{ title }}</h3><table class="{{ title }}">
<thead><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for line in lines %}<tr>{% for cell in line %}<td>{{ cell | code }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table>{% endfor %}<p>{{ board.remark }}</p>
{% if board.records %}<div class="grid"><figure class="card">{{ board.chart }}</figure>
<figure class="card"><img alt="" src="{{ board.picture }}"><figcaption>Samples of the last record, of its first seed.
</figcaption></figure></div>{% endif %}</section>
{% endfor %}</main></html>
"""


@dataclass(frozen=True)
class Board:
    """A task with its records, oldest first, and what was tried."""

    task: Task
    folders: list[Path]
    records: list[Record]
    tried: list[Tried]

    @property
    def target(self) -> str:
        """What has to be reached, in a sentence or two."""
        task, seeds = self.task, len(self.task.seeds)
        where = f"{task.threads} threads of a CPU" if task.device == "cpu" else "one GPU"
        limit = f", {task.minutes:g} minutes of training a seed at most" if task.minutes else ""
        through = " through the task's VAE" if WEIGHTS in task.files else ""
        return (
            f"Fréchet distance below {task.target:g}, mean of {seeds} seeds, p < {SIGNIFICANCE:g}; {where}{limit}. "
            f"{task.samples:,} samples a seed are scored, of at most {task.evaluations} passes of the network each. "
            f"Real training images{through} score {words.plain(task.floor)}; the classifier is right in "
            f"{words.percent(task.accuracy)} of the held-out images."
        )

    @property
    def tables(self) -> list[tuple[str, Sequence[str], list[list[str]]]]:
        """Titles, heads and lines: of records, and of what was tried, where there are any."""
        found: list[tuple[str, Sequence[str], list[list[str]]]] = []
        if self.records:
            found.append(("Records", HEAD, self._lines()))
        if self.tried:
            found.append(("Tried", TRIED, list(_tried(self.tried))))
        return found

    @property
    def remark(self) -> str:
        """On the records' times, if there are any."""
        return f"Times are of {self.records[0].machine}." if self.records else "No record yet."

    @property
    def chart(self) -> Markup:
        """What each record took, as a figure of a page."""
        return plot.svg(_chart(self))

    @property
    def picture(self) -> str:
        """The last record's samples as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(read_bytes(self.folders[-1] / PICTURE)).decode()}"

    def _lines(self) -> list[list[str]]:
        first = self.records[0]
        return [
            [
                str(number), record.what, words.flops(record.flops), words.percent(record.flops / first.flops),
                words.duration(record.seconds),
                words.percent(record.seconds / first.seconds) if same_kind(first, record) else "another machine",
                f"{words.plain(record.mean)} ± {words.plain(record.deviation)}", f"{record.p:.1e}", record.by,
                f"{folder.name}, {identity(folder)}",
            ]
            for number, (folder, record) in enumerate(zip(self.folders, self.records, strict=True), 1)
        ]  # fmt: skip


def _tried(tried: Sequence[Tried]) -> Iterator[list[str]]:
    """A line for each change, beside what its recipe reached without it on the same seeds; least distance first."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[Tried]] = {}
    for one in tried:
        groups.setdefault((one.what, one.recipe, one.overrides), []).append(one)
    plain: dict[tuple[str, int], Tried] = {}
    for one in tried:
        if not one.overrides:
            plain.setdefault((one.recipe, one.seed), one)
    for (what, recipe, overrides), some in sorted(groups.items(), key=_mean_distance):
        base = [plain[recipe, one.seed] for one in some if (recipe, one.seed) in plain]
        compared = len(base) == len(some) and some[0] not in base
        yield [
            what, recipe, " ".join(f"`{one}`" for one in overrides), ", ".join(str(one.seed) for one in some),
            words.flops(sum(one.flops for one in some) / len(some)), _spread([one.distance for one in some]),
            _spread([one.distance for one in base]) if compared else "",
        ]  # fmt: skip


def _mean_distance(group: tuple[object, list[Tried]]) -> float:
    return sum(one.distance for one in group[1]) / len(group[1])


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return words.plain(values[0])
    mean, deviation = mean_and_deviation(values)
    return f"{words.plain(mean)} ± {words.plain(deviation)}"


def read_board(task: Task, folder: Path) -> Board:
    """The task's records in `folder`, each checked, in the order of their names; UserError for one that isn't true.

    Each takes STEP less FLOPs, or time on the same kind of machine, than the least of those before it.
    """
    folders = sorted((path for path in folder.glob("*/") if not path.name.startswith(".")), key=_number)
    for one in folders:
        if not re.fullmatch(r"[\w.-]+", one.name):
            raise UserError(f"{one}: a record's folder is named by letters, digits, ., - and _")
    records = [read_record(one) for one in folders]
    for one, record in zip(folders, records, strict=True):
        check(one, record, task)
    for place, (one, record) in enumerate(zip(folders, records, strict=True)):
        times = [other.seconds for other in records[:place] if same_kind(other, record)]
        fewer = record.flops <= (1 - STEP) * min((other.flops for other in records[:place]), default=float("inf"))
        faster = bool(times) and record.seconds <= (1 - STEP) * min(times)
        if place and not fewer and not faster:
            raise UserError(
                f"{one}: neither {STEP:.0%} fewer FLOPs nor {STEP:.0%} less time than the records before it"
            )
    return Board(task, folders, records, read_tried(folder))


def _number(folder: Path) -> tuple[int, str]:
    """A record's folder is called by its place and a name: 3-muon."""
    number = folder.name.partition("-")[0]
    return (int(number) if number.isdecimal() else 10**9, folder.name)


def write_table(page: Path, html: Path | None, say: Say) -> None:
    """Writes the leaderboards of the records in the folder beside `page` into it, and where asked into a page of HTML.

    UserError for a record that isn't true, which has no place there.
    """
    if not page.is_file():
        raise UserError(f"{page}: no such page; the tables are written into one, whose records lie beside it")
    folder, text = page.parent / page.stem, read_page(page)
    if html is not None and html.resolve() == page.resolve():
        raise UserError(f"--html {html}: the page itself; name another file")
    if not folder.is_dir() and "<!-- study speedrun-" not in text:
        raise UserError(f"{page}: neither tables of the speedrun in it nor a folder {folder} with records beside it")
    tasks = sorted(map(read_task, task_names()), key=lambda task: (task.device != "cpu", task.name))
    boards = [read_board(task, folder / task.name) for task in tasks]
    writing = page
    try:
        for board in boards:
            text = placed(text, f"speedrun-{board.task.name}", _section(board, folder))
        write_atomic(page.resolve(), text.encode())
        say(str(page))
        if html is not None:
            writing = html
            environment = Environment(autoescape=True, undefined=StrictUndefined)
            environment.filters["code"] = lambda cell: Markup(re.sub("`([^`]*)`", r"<code>\1</code>", escape(cell)))
            template = environment.from_string(PAGE)
            style = Markup((files("st_fast.report") / "style.css").read_text(encoding="utf-8"))
            write_atomic(html, template.render(boards=boards, style=style).encode())
            say(str(html))
    except OSError as error:
        raise cannot_write(writing, error) from None


def _section(board: Board, folder: Path) -> str:
    """The task's part of the page."""
    parts = [f"### {board.task.title}\n", f"`{board.task.name}`: {board.target}\n"]
    for title, head, lines in board.tables:
        rows = [head, ["---"] * len(head), *([escape(cell, quote=False) for cell in line] for line in lines)]
        parts += [f"#### {title}\n", "".join(f"| {' | '.join(cells)} |\n" for cells in rows)]
    parts.append(f"{board.remark}\n")
    if not board.records:
        return "\n".join(parts)
    place = f"{folder.name}/{board.task.name}"
    plot.save(plot.sheet([[_chart(board)]], 4.6, 3.2), folder / board.task.name / "records.png", dpi=110)
    last = board.folders[-1].name
    parts += [
        f"![FLOPs and time of each record as shares of the first]({place}/records.png)\n",
        f"![Samples of the last record]({place}/{last}/{PICTURE})\n",
    ]
    return "\n".join(parts)


def _chart(board: Board) -> Chart:
    """Cost of each record as a share of the first one's."""
    first, numbers = board.records[0], list(map(float, range(1, len(board.records) + 1)))
    curves = [
        Curve("FLOPs", numbers, [record.flops / first.flops for record in board.records], 0),
        Curve("time", numbers, [record.seconds / first.seconds for record in board.records], 1),
    ]
    return Chart("", board.task.title, "", "record", "number", "share of the first record", "percent", False, curves)
