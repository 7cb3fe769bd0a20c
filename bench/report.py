"""Prints the tables of what was measured, and writes them into the README.

    python -m bench.report             all of it
    python -m bench.report --readme    rewrites README.md between <!-- bench:begin --> and <!-- bench:end -->

Everything comes from bench/results/*.json. What was not measured is said, not left out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.goals import GOALS, Content, Row

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- bench:begin -->\n).*?(<!-- bench:end -->)", re.DOTALL)
PARTS = {
    "kernels": "The ops",
    "step": "The step",
    "loader": "The loaders, batch 256, fp16 moments",
    "first step": "From starting Python to the end of the first step",
    "sampling": "Drawing samples",
    "sweep": "How the step grows",
}
DETAILS = ("sweep", "longest kernels", "correctness", "csrc")
"""Parts that the README leaves to the command line."""
COMMANDS = {"cpu": "pytest bench/", "cuda": "python -m bench.gpu_day"}
NAMES = {"cpu": "CPU", "cuda": "GPU"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left, the others to the right, padded to be read as it is."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        padded = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(padded) + " |"

    return "\n".join(line(row) for row in (cells[0], rule, *cells[1:]))


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def machine_line(machine: Mapping[str, Any]) -> str:
    """What a part was measured on."""
    rate = machine["matmul_rate"]
    multiplies = f"{rate / 1e12:.0f} TFLOP/s" if rate > 1e13 else f"{rate / 1e9:.0f} GFLOP/s"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    isa = f", {machine['isa']}" if machine.get("isa") and machine["kind"] == "cpu" else ""
    line = (
        f"{machine['device']}{isa}: copies {machine['copy_rate'] / 1e9:.1f} GB/s (read + written), multiplies "
        f"{machine['matmul_dtype']} at {multiplies}. {versions}. Revision {machine['commit']}, {machine['date']}."
    )
    busy = machine["load"] > results.BUSY
    return line + (f" **The machine was busy (load {machine['load']} a core): not results.**" if busy else "")


def kernels(rows: Sequence[Row], phases: Sequence[str]) -> str:
    """Ops at their sizes: ratios first."""
    head = [
        "op, size",
        "pass",
        "× eager",
        "× compile",
        "× torch",
        "ms",
        "GB/s",
        "of copy rate",
        "of byte floor",
        "noise",
    ]
    lines = []
    for row in rows:
        for phase in phases:
            if phase not in row:
                continue
            figures = row[phase]
            speedup = figures["speedup"]
            lines.append([
                f"{row['op']}, {row['size']}, {row['dtype']}",
                "forward + backward" if phase == "both" and row["op"] != "adamw_ema" else phase.replace("both", "step"),
                ratio(speedup.get("eager")), ratio(speedup.get("compile")), ratio(speedup.get("torch")),
                milliseconds(figures["ms"]["fused"]), f"{figures['gb_per_s']:.1f}", share(figures["of_copy_rate"]),
                share(figures["of_floor"]), f"± {share(figures['noise'])}",
            ])  # fmt: skip
    return table(head, lines)


def steps(rows: Sequence[Row]) -> str:
    """Whole steps: images a second, MFU, and how many times faster than the published loop."""
    head = ["step", "images/s", "MFU", "× published", "× published, compiled", "× published, our memory", "ms"]
    head += ["× its floor", "GiB", "noise"]
    lines = []
    for row in rows:
        speedup, peak = row["speedup"], row.get("peak_gib")
        size = f"{row['size']}, {row['stage']}, batch {row['batch']}"
        size += f", {row['tokens']} tokens" if row["tokens"] != 256 else ""
        lines.append([
            f"{size}, depth {row['depth']}", f"{row['images_per_s']['ours']:.3g}", share(row["mfu"]["ours"]),
            ratio(speedup.get("plain")), ratio(speedup.get("compile")), ratio(speedup.get("plain, our memory")),
            milliseconds(row["ms"]["ours"]),
            ratio(row.get("parts", {}).get("times_the_floor")), f"{peak:.1f}" if peak else "–",
            f"± {share(row['noise'])}",
        ])  # fmt: skip
    return table(head, lines)


def where_time_goes(rows: Sequence[Row]) -> str:
    """The floor and the families of each step that was taken apart."""
    rows = [row for row in rows if "parts" in row]
    families = list(dict.fromkeys(name for row in rows for name in row["parts"]["families"]))
    head = ["ms a step", *(f"{row['size']}, {row['stage']}" for row in rows)]
    lines = [
        ["the step", *(milliseconds(row["ms"]["ours"]) for row in rows)],
        ["its matrix products alone", *(milliseconds(1e3 * row["parts"]["floor"]["products"]) for row in rows)],
        ["its attention alone", *(milliseconds(1e3 * row["parts"]["floor"]["attention"]) for row in rows)],
    ]
    for name in families:
        lines.append([f"profiled: {name}", *(_profiled(row, name) for row in rows)])
    return table(head, lines)


def _profiled(row: Row, name: str) -> str:
    found = row["parts"]["families"].get(name)
    return milliseconds(1e3 * found) if found is not None else "–"


def first_steps(rows: Mapping[str, Row]) -> str:
    """Cold and warm starts."""
    head = ["start", "total, s", "import", "build", "first step", "second step"]
    keys = ("total", "import", "build", "first_step", "second_step")
    lines = [
        [f"{label}, {kind}", *(f"{seconds[key]:.1f}" for key in keys)]
        for label, row in rows.items()
        for kind, seconds in row["seconds"].items()
    ]
    return table(head, lines)


def loaders(rows: Sequence[Row]) -> str:
    """Samples a second of each loader, and the share of a 50 ms step that its consumer stands waiting."""
    head = ["moments, page cache", "loader", "samples/s", "× per file", "waited", "noise"]
    lines = [
        [
            f"{row['shape']}, {row['cache']}", row["loader"], f"{row['samples/s']:,}", f"{row['times per file']:.1f}×",
            f"{100 * row['waited']:.1f} %" if "waited" in row else "–", f"± {share(row['noise'])}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(head, lines)


def sampling(rows: Sequence[Row]) -> str:
    """Samplers: images a second, and how many times faster than the same written plainly."""
    head = ["sampler", "images/s", "in bf16", "× plain", "× plain, skipping", "bf16, × plain", "noise"]
    lines = [
        [
            f"{row['size']}, {row['sampler']}, {row['steps']} steps, batch {row['batch']}",
            f"{row['images_per_s']['ours']:.3g}", f"{row['images_per_s']['bf16']:.3g}", ratio(row["speedup"]["plain"]),
            ratio(row["speedup"]["skipping"]), ratio(row["bf16_speedup"]), f"± {share(row['noise'])}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(head, lines)


def anything(rows: Mapping[str, Row]) -> str:
    """A part without a table of its own: every scalar of its rows."""
    scalars = (k for row in rows.values() for k, v in row.items() if k != "code" and not isinstance(v, dict | list))
    names = list(dict.fromkeys(scalars))
    lines = [[key, *(_scalar(row.get(name)) for name in names)] for key, row in rows.items()]
    return table(["", *names], lines)


def _scalar(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def longest_kernels(rows: Mapping[str, Row]) -> str:
    """The ten longest kernels of each step."""
    lines = [
        [f"{label}: {kernel[:80]}", milliseconds(spent)]
        for label, row in rows.items()
        for kernel, spent in list(row["kernels_ms"].items())[:10]
    ]
    return table(["kernel", "ms a step"], lines)


def failures(rows: Mapping[str, Row]) -> str:
    """Rows that have an error in place of figures, one line each."""
    return "\n".join(f"- {key}: failed: {row['error']}" for key, row in rows.items() if "error" in row)


def part(name: str, rows: Mapping[str, Row], brief: bool) -> str:
    """One part's tables, and what failed."""
    failed, rows = failures(rows), {key: row for key, row in rows.items() if "error" not in row}
    return "\n\n".join(filter(None, [_tables(name, rows, brief) if rows else "", failed]))


def _tables(name: str, rows: Mapping[str, Row], brief: bool) -> str:
    values = list(rows.values())
    if name == "kernels":
        return kernels(values, ("both",) if brief else ("forward", "backward", "both"))
    if name == "step":
        return steps(values) + "\n\n" + where_time_goes(values)
    if name == "sampling":
        return sampling(values)
    if name == "sweep":
        return steps(values)
    if name == "longest kernels":
        return longest_kernels(rows)
    if name == "loader":
        return loaders(values)
    return first_steps(rows) if name == "first step" else anything(rows)


def goals(kind: str, content: Content) -> str:
    """Every goal for a kind of device with what was measured."""
    lines = []
    for goal in GOALS:
        if goal.kind != kind:
            continue
        value = goal.measured(content)
        bound = goal.least if goal.least is not None else goal.most
        wanted = ("≥ " if goal.least is not None else "≤ ") + goal.shown(bound or 0.0)
        verdict = "not measured" if value is None else "reached" if goal.met(value) else "**missed**"
        lines.append([goal.text, wanted, goal.shown(value) if value is not None else "–", verdict])
    return table(["goal", "wanted", "measured", ""], lines)


def device_report(content: Content, brief: bool) -> str:
    """All parts of one device, its goals first, and what was not measured on it."""
    kind = next(iter(content.values()))["machine"]["kind"]
    texts = [f"### {next(iter(content.values()))['machine']['device']}", goals(kind, content)]
    for name in (*PARTS, *(n for n in content if n not in PARTS)):
        if content.get(name, {}).get("rows") and not (brief and name in DETAILS):
            section = content[name]
            body = part(name, section["rows"], brief)
            texts.append(f"**{PARTS.get(name, name)}.** {machine_line(section['machine'])}\n\n{body}")
    missing = [title for name, title in PARTS.items() if name not in content]
    if missing:
        texts.append(f"Not measured here: {', '.join(missing).lower()}.")
    return "\n\n".join(texts)


def pictures_of(path: Path) -> str:
    """The pictures that lie beside a results file, as Markdown from the repository's root."""
    titles = {"growth": "How the step grows", "roofline": "Kernels and steps under the device's ceilings"}
    files = {title: path.with_name(f"{path.stem}-{name}.png") for name, title in titles.items()}
    shown = [f"![{title}]({os.path.relpath(file, README.parent)})" for title, file in files.items() if file.exists()]
    return "".join(f"\n\n{line}" for line in shown)


def report(folder: Path, brief: bool) -> str:
    """The whole text. Kinds of devices without any figures are named, with their goals and the command for them."""
    contents = {path: results.load(path) for path in results.files(folder)}
    texts = [device_report(content, brief) + pictures_of(path) for path, content in contents.items()]
    kinds = {next(iter(content.values()))["machine"]["kind"] for content in contents.values()}
    for kind in NAMES:
        if kind not in kinds:
            text = f"No {NAMES[kind]} has been measured yet: none of these goals is confirmed or refuted."
            texts.append(f"### {NAMES[kind]}\n\n{text} `{COMMANDS[kind]}` measures them.\n\n{goals(kind, {})}")
    return "\n\n".join(texts) + "\n"


def write_readme(path: Path, text: str) -> None:
    """Replaces the block between the markers. ValueError if they are not there."""
    old = path.read_text(encoding="utf-8")
    new, count = BLOCK.subn(lambda found: found[1] + text + found[2], old)
    if count != 1:
        raise ValueError(f"{path}: {count} blocks <!-- bench:begin --> … <!-- bench:end -->; exactly one is needed")
    aside = path.with_suffix(".md.partial")
    aside.write_text(new, encoding="utf-8")
    os.replace(aside, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints, or writes the README; 1 with one line if that fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.report")
    parser.add_argument("--readme", action="store_true", help="rewrite the block in README.md")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the JSON files")
    settings = parser.parse_args(arguments)
    if not settings.readme:
        print(report(settings.results, brief=False))
        return 0
    try:
        write_readme(README, report(settings.results, brief=True))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
