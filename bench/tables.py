"""Rows of results as Markdown tables: a part's columns, each with what its cells say of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.goals import Row, inputs_named, of
from st_fast.report.metrics import RANKING, summary

Columns = Mapping[str, Callable[[Row], str]]
NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left, the others to the right, padded to be read as it is."""
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def filled(columns: Columns, rows: Iterable[Row]) -> str:
    """A line a row."""
    return table(list(columns), [[shown(row) for shown in columns.values()] for row in rows])


def ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def times(value: float | None) -> str:
    """A cost that may be a hair above one."""
    return NONE if value is None else f"{value:.3f}×"


def share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f} %"


def milliseconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def number(value: Any) -> str:
    """As it is; fractions to four digits."""
    return NONE if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def cell(form: Callable[[Any], str], *path: str) -> Callable[[Row], str]:
    """What `form` makes of what a row has under a path of keys; NONE where it has nothing there."""
    return lambda row: NONE if (value := of(row, *path)) is None else form(value)


def _noise(row: Row) -> str:
    return f"± {share(of(row, 'noise'))}"


def _key(row: Row) -> str:
    return str(row["key"])


def _op(row: Row) -> str:
    form = (f" {row['form']}" if "form" in row else "") + (inputs_named(row["kind"]) if "kind" in row else "")
    return f"{row['op']}{form}, {row['size']}, {row['dtype']}"


OP: Columns = {
    "op, size": _op,
    "pass": cell(str, "pass"),
    "× eager": cell(ratio, "speedup", "eager"),
    "× compile": cell(ratio, "speedup", "compile"),
    "× torch": cell(ratio, "speedup", "torch"),
    "time, × usual": cell(ratio, "times_usual"),
    "ms": cell(milliseconds, "ms", "fused"),
    "GB/s": cell("{:.1f}".format, "gb_per_s"),
    "of copy rate": cell(share, "of_copy_rate"),
    "of byte floor": cell(share, "of_floor"),
    "noise": _noise,
}
PASSES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def kernels(rows: Sequence[Row], brief: bool) -> str:
    """The ops at their sizes: ratios first; `brief`: only both passes together."""
    return filled(OP, (
        {**row, "pass": "step" if row["op"] == "adamw_ema" else name, **row[key]}
        for row in rows for key, name in PASSES.items() if key in row and (key == "both" or not brief)
    ))  # fmt: skip


def step_name(row: Row) -> str:
    tokens = f", {row['tokens']} tokens" if row["tokens"] != 256 else ""
    return f"{row['size']}, {row['stage']}, batch {row['batch']}{tokens}, depth {row['depth']}"


STEP: Columns = {
    "step": step_name,
    "images/s": cell("{:.3g}".format, "images_per_s", "ours"),
    "MFU": cell(share, "mfu", "ours"),
    "× published": cell(ratio, "speedup", "plain"),
    "× published, compiled": cell(ratio, "speedup", "compile"),
    "× published, our memory": cell(ratio, "speedup", "plain, our memory"),
    "ms": cell(milliseconds, "ms", "ours"),
    "× its floor": cell(ratio, "parts", "times_the_floor"),
    "GiB": lambda row: f"{row['peak_gib']:.1f}" if row.get("peak_gib") else NONE,
    "noise": _noise,
}


def steps(rows: Sequence[Row], brief: bool) -> str:
    """Whole steps, then the floor and the families of each that was taken apart."""
    apart = [row for row in rows if "parts" in row]
    families = dict.fromkeys(name for row in apart for name in row["parts"]["families"])
    lines = {
        "the step": [milliseconds(row["ms"]["ours"]) for row in apart],
        **{f"its {title} alone": [milliseconds(1e3 * row["parts"]["floor"][key]) for row in apart]
           for key, title in (("products", "matrix products"), ("attention", "attention"))},
        **{f"profiled: {name}": [_in_ms(of(row, "parts", "families", name)) for row in apart] for name in families},
    }  # fmt: skip
    head = ["ms a step", *(f"{row['size']}, {row['stage']}" for row in apart)]
    where = table(head, ([name, *cells] for name, cells in lines.items()))
    return filled(STEP, rows) + (f"\n\n{where}" if apart else "")


def _in_ms(seconds: float | None) -> str:
    return NONE if seconds is None else milliseconds(1e3 * seconds)


LOADER: Columns = {
    "moments, page cache": lambda row: f"{row['shape']}, {row['cache']}",
    "loader": cell(str, "loader"),
    "samples/s": cell("{:,}".format, "samples/s"),
    "× per file": cell("{:.1f}×".format, "times per file"),
    "waited": lambda row: f"{100 * row['waited']:.1f} %" if "waited" in row else NONE,
    "noise": _noise,
}
SAMPLER: Columns = {
    "sampler": lambda row: f"{row['size']}, {row['sampler']}, {row['steps']} steps, batch {row['batch']}",
    "images/s": cell("{:.3g}".format, "images_per_s", "ours"),
    "in bf16": cell("{:.3g}".format, "images_per_s", "bf16"),
    "× plain": cell(ratio, "speedup", "plain"),
    "× plain, skipping": cell(ratio, "speedup", "skipping"),
    "bf16, × plain": cell(ratio, "bf16_speedup"),
    "Internal Guidance, time × unguided": cell(times, "of_unguided", "internal"),
    "CFG, time × unguided": cell(times, "of_unguided", "cfg"),
    "noise": _noise,
}
FIRST: Columns = {
    "start": _key,
    "total, s": cell("{:.1f}".format, "total"),
    "import": cell("{:.1f}".format, "import"),
    "build": cell("{:.1f}".format, "build"),
    "first step": cell("{:.1f}".format, "first_step"),
    "second step": cell("{:.1f}".format, "second_step"),
}
CONVERGENCE: Columns = {
    "run": _key,
    "step": cell(number, "step"),
    "loss": cell(number, "loss"),
    "images/s": cell(number, "images_per_s"),
    "MFU": cell(share, "mfu"),
    "hours": lambda row: f"{row['seconds'] / 3600:.2f}" if row.get("seconds") else NONE,
    "scores": lambda row: summary(row.get("metrics", {})) or NONE,
}
CHOICE: Columns = {
    "step": _key,
    "× default": cell(ratio, "speedup"),
    "default, ms": cell(milliseconds, "ms", "default"),
    "ms": lambda row: milliseconds(row["ms"][_other(row)]),
    "default, GiB": lambda row: _gib(row, "default"),
    "GiB": lambda row: _gib(row, _other(row)),
    "noise": _noise,
}


def _other(row: Row) -> str:
    return next(name for name in row["ms"] if name != "default")


def _gib(row: Row, name: str) -> str:
    peak = of(row, "peak_gib", name)
    return f"{peak:.1f}" if peak else NONE


def first_steps(rows: Sequence[Row], brief: bool) -> str:
    """Cold and warm starts."""
    parts = ({"key": f"{row['key']}, {kind}", **found} for row in rows for kind, found in row["seconds"].items())
    return filled(FIRST, parts)


def choices(rows: Sequence[Row], brief: bool) -> str:
    """Each choice or schedule of the step, beside the default in the same rounds; why others were left out."""
    others = [f"- {row['key']}: {row.get('left_out') or row.get('wrong')}" for row in rows if "speedup" not in row]
    return "\n".join([filled(CHOICE, (row for row in rows if "speedup" in row)), "", *others]).rstrip()


def overheads(rows: Sequence[Row], brief: bool) -> str:
    """What a call costs where there is nothing to compute, beside layer_norm's; "graph": each op is a call there."""
    usual = next((found for row in rows if row["op"] == "layer_norm" and (found := of(row, "us", "opaque", "both"))), 0)
    columns: Columns = {
        "op, forward + backward": cell(str, "op"),
        "from Python, µs": cell("{:.1f}".format, "us", "eager", "both"),
        "in a graph, µs": cell("{:.1f}".format, "us", "opaque", "both"),
        "in Inductor's code, µs": cell("{:.1f}".format, "us", "compiled", "both"),
        "in a graph, × layer_norm": lambda row: f"{row['us']['opaque']['both'] / usual:.1f}×" if usual else NONE,
        "noise": _noise,
    }
    return filled(columns, rows)


CONTENTION: Columns = {
    "beside the step": cell(str, "condition"),
    "fair part": cell(share, "fair"),
    "images/s": cell("{:.0f}".format, "rates", "st_fast"),
    "of its fair part": cell(share, "shares", "st_fast"),
    "images/s with OpenMP's own settings": cell("{:.0f}".format, "rates", "as it comes"),
    "of that one's": cell(share, "shares", "as it comes"),
}


def contention(rows: Sequence[Row], brief: bool) -> str:
    """The step beside other work, a line a condition; on a quiet machine what the settings cost."""
    texts = []
    for row in rows:
        lines = ({"condition": name, "fair": row["fair"][name], "rates": rates, "shares": row["share"].get(name)}
                 for name, rates in row["images_per_s"].items())  # fmt: skip
        kept = f"Quiet, in pairs: {row['quiet']['st_fast']:.3f} of the rate with OpenMP's own settings"
        skipped = "".join(f" {name} was skipped: {why}." for name, why in row.get("skipped", {}).items())
        noise = share(of(row, "noise_of", "quiet") or row["noise"])
        texts += [filled(CONTENTION, lines), f"{kept} (± {noise}).{skipped}"]
    return "\n\n".join(texts)


METHODS: Columns = {
    "step": cell(str, "stage"),
    "size": lambda row: f"{row['size']}, batch {row['batch']}",
    "× a plain step": cell(ratio, "times_plain"),
    "floor, by FLOPs": cell(ratio, "floor"),
    "ms": cell(milliseconds, "ms", "default"),
    "plain ms": cell(milliseconds, "ms", "plain"),
    "noise": _noise,
}
GROUPS: Columns = {
    "size": lambda row: f"{row['size']}, batch {row['batch']}",
    "tokens of the groups": cell(str, "groups"),
    "× with a mask": cell(ratio, "speedup", "masked"),
    "× over all tokens": cell(ratio, "speedup", "all tokens"),
    "fewer scores": cell(ratio, "scores"),
    "ms": cell(milliseconds, "ms", "within groups"),
    "noise": _noise,
}


def longest_kernels(rows: Sequence[Row], brief: bool) -> str:
    """The ten longest kernels of each step."""
    longest = ((row, name, spent) for row in rows for name, spent in list(row["kernels_ms"].items())[:10])
    lines = ([f"{row['key']}: {name[:80]}", milliseconds(spent)] for row, name, spent in longest)
    return table(["kernel", "ms a step"], lines)


def anything(rows: Sequence[Row], brief: bool = False) -> str:
    """A part without a table of its own: every scalar of its rows."""
    scalars = (name for row in rows for name, value in row.items() if not isinstance(value, dict | list))
    names = [name for name in dict.fromkeys(scalars) if name not in ("key", "code", "load")]
    return filled({"": _key, **{name: cell(number, name) for name in names}}, rows)


def lines_of(columns: Columns) -> Callable[[Sequence[Row], bool], str]:
    """A table with a line a row."""
    return lambda rows, brief: filled(columns, rows)


@dataclass(frozen=True)
class Part:
    """A part of the measurements: `shown` makes its tables of its rows, each with its "key"; brief on the page."""

    title: str
    shown: Callable[[Sequence[Row], bool], str]
    kinds: tuple[str, ...] = ("cpu", "cuda")
    """Of devices that it is measured on."""
    on_page: bool = True


GPU = ("cuda",)
PARTS = {
    "kernels": Part("The ops", kernels),
    "step": Part("The step", steps),
    "methods": Part("Steps of methods beside a plain one", lines_of(METHODS), ("cpu",)),
    "separated attention": Part("Attention within groups of tokens", lines_of(GROUPS), ("cpu",)),
    "loader": Part("The loaders, batch 256, fp16 moments", lines_of(LOADER)),
    "first step": Part("From starting Python to the end of the first step", first_steps),
    "sampling": Part("Drawing samples", lines_of(SAMPLER)),
    "launch overhead": Part("The cost of a call", overheads),
    "contention": Part("The demo's step beside other work", contention, ("cpu",)),
    "choices": Part("Every choice of the step", choices, GPU),
    "schedules": Part("Every schedule of the step", choices, GPU),
    "sweep": Part("How the step grows", lambda rows, brief: filled(STEP, rows), on_page=False),
    "longest kernels": Part("The longest kernels", longest_kernels, GPU, on_page=False),
    "convergence": Part("Training", lambda rows, brief: filled(CONVERGENCE, (r for r in rows if "stage" in r)), GPU),
}
"""By name; others have `anything` for a table, and only the command line shows them."""
SCORES = [metric for metric in RANKING if metric.features == "classifier"]
