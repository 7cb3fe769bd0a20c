"""Rows of results as Markdown tables, one function a part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.goals import Row

SCORES = ("accuracy", "frechet")


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


def predicted_step(counted: Row, rows: Mapping[str, Row]) -> str:
    """The parts of a step that was predicted, by device, its total, and the published loop's."""
    names = list(next(iter(rows.values()))["parts"]["ms"])
    lines = []
    for name in names:
        part = counted["parts"].get(name, {"tflop": 0.0, "gb": 0.0, "launches": counted["launches"]})
        work = [f"{part['tflop']:.4g}" if part["tflop"] else "–", f"{part['gb']:.3g}" if part["gb"] else "–"]
        times = [milliseconds(row["parts"]["ms"][name]) for row in rows.values()]
        lines.append([name, *work, f"{part['launches']:.0f}", *times])
    lines.append(["the step", "", "", "", *(f"**{milliseconds(row['ms']['ours'])}**" for row in rows.values())])
    lines.append(["images/s", "", "", "", *(f"{row['images_per_s']['ours']:.0f}" for row in rows.values())])
    lines.append(["MFU", "", "", "", *(share(row["mfu"]["ours"]) for row in rows.values())])
    for title, key in (("the published loop", "plain"), ("the same, compiled", "compile")):
        cells = [f"{milliseconds(row['ms'][key])} ({ratio(row['speedup'][key])})" for row in rows.values()]
        lines.append([title, "", "", "", *cells])
    return table(["part", "TFLOP", "GB", "launches", *(f"{name}, ms" for name in rows)], lines)


def beside_prediction(predicted: Row, measured: Row, short: float, judged: float) -> str:
    """Families of a step as predicted and as measured; `short` is the ratio from which on a family is named.

    Families below the share `judged` of both steps are shown without a verdict.
    """
    ours, theirs = predicted["parts"]["families"], measured.get("parts", {}).get("families", {})
    pairs = {name: (1e3 * ours.get(name, 0.0), 1e3 * theirs.get(name, 0.0)) for name in [*ours, *theirs] if theirs}
    least = judged * min(predicted["ms"]["ours"], measured["ms"]["ours"])
    pairs["the step"] = predicted["ms"]["ours"], measured["ms"]["ours"]
    lines, named = [], []
    for name, (foreseen, found) in pairs.items():
        missed = max(foreseen, found) >= least and found > short * foreseen
        times = ratio(found / foreseen) if foreseen else "–"
        lines.append([name, milliseconds(foreseen), milliseconds(found), f"**{times}**" if missed else times])
        if missed:
            named.append(f"{name} ({f'+{100 * (found / foreseen - 1):.0f} %' if foreseen else 'not predicted'})")
    verdict = f"Short by over {100 * (short - 1):.0f} %: {', '.join(named) or 'nothing'}."
    return table(["family", "predicted, ms", "measured, ms", "measured / predicted"], lines) + f"\n\n{verdict}"


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


def choices(rows: Mapping[str, Row]) -> str:
    """Each choice or schedule of the step, beside the default in the same rounds."""
    lines = []
    for label, row in rows.items():
        if "speedup" in row:
            ms, peaks = row["ms"], row.get("peak_gib") or {}
            other = next(name for name in ms if name != "default")
            memory = [f"{peaks[name]:.1f}" if peaks.get(name) else "–" for name in ("default", other)]
            times = [milliseconds(ms["default"]), milliseconds(ms[other])]
            lines.append([label, ratio(row["speedup"]), *times, *memory, f"± {share(row['noise'])}"])
    text = table(["step", "× default", "default, ms", "ms", "default, GiB", "GiB", "noise"], lines)
    others = {label: row.get("left_out") or row.get("wrong") for label, row in rows.items() if "speedup" not in row}
    return "\n".join([text, "", *(f"- {label}: {why}" for label, why in others.items())]).rstrip()


def convergence(rows: Mapping[str, Row]) -> str:
    """How far each run of the study is, and its last scores."""
    head = ["run", "step", "loss", "images/s", "MFU", "hours", "scores"]
    lines = [
        [
            label, *(_scalar(row.get(key)) for key in ("step", "loss", "images_per_s")), share(row.get("mfu")),
            f"{row['seconds'] / 3600:.2f}" if row.get("seconds") else "–",
            ", ".join(f"{k} {_scalar(v)}" for k, v in row.get("metrics", {}).items() if k in SCORES) or "–",
        ]
        for label, row in rows.items() if "stage" in row
    ]  # fmt: skip
    return table(head, lines)
