"""Prints the tables of what was measured, and writes them into README.md and bench/README.md.

    python -m bench.report             all of it
    python -m bench.report --readme    the goals into README.md, every other table into bench/README.md, each between
                                       <!-- bench:begin --> and <!-- bench:end -->

Everything comes from bench/results/*.json. What was not measured is said, not left out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine as results
from bench.goals import GOALS, Content, Goal, Row
from bench.tables import (
    anything,
    choices,
    convergence,
    first_steps,
    kernels,
    loaders,
    longest_kernels,
    sampling,
    steps,
    table,
    where_time_goes,
)

HERE = Path(__file__).resolve().parent
README, BENCH_README = HERE.parent / "README.md", HERE / "README.md"
BLOCK = re.compile(r"(<!-- bench:begin -->\n).*?(<!-- bench:end -->)", re.DOTALL)
PARTS = {
    "kernels": "The ops",
    "step": "The step",
    "loader": "The loaders, batch 256, fp16 moments",
    "first step": "From starting Python to the end of the first step",
    "sampling": "Drawing samples",
    "choices": "Every choice of the step",
    "schedules": "Every schedule of the step",
    "sweep": "How the step grows",
    "convergence": "Training",
}
GPU_ONLY = ("choices", "schedules", "convergence")
"""Parts that only `python -m bench.gpu_day` measures."""
DETAILS = ("demo", "sweep", "longest kernels", "correctness", "csrc")
"""Parts that only the command line shows."""
COMMANDS = {"cpu": "pytest bench/", "cuda": "bash bench/day.sh"}
NAMES = {"cpu": "CPU", "cuda": "GPU"}
PREDICTION = "prediction.json"
PREDICTED = (
    " What is predicted was computed without a GPU by `python -m bench.predict`, from counted FLOPs, bytes and launches"
    " and from assumed rates."
)


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
    return line + (f" **The machine was busy (load {machine['load']} a core): not results.**" if _busy(machine) else "")


def _busy(machine: Mapping[str, Any]) -> bool:
    return bool(machine["load"] > results.BUSY)


def failures(rows: Mapping[str, Row]) -> str:
    """Rows that have an error in place of figures, and those measured with something given up, one line each."""
    failed = [f"- {key}: failed: {row['error']}" for key, row in rows.items() if "error" in row]
    given_up = [f"- {key}: no result: {'; '.join(row['notices'])}" for key, row in rows.items() if row.get("notices")]
    return "\n".join(failed + given_up)


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
    if name in ("choices", "schedules"):
        return choices(rows)
    if name == "convergence":
        return convergence(rows)
    return first_steps(rows) if name == "first step" else anything(rows)


def predictions(folder: Path) -> dict[str, Content]:
    """What `python -m bench.predict --write` left in the folder, by a part of the device's name."""
    devices: dict[str, Content] = results.load(folder / PREDICTION).get("devices", {})
    return devices


def goals(kind: str, content: Content, device: str = "", predicted: Mapping[str, Content] | None = None) -> str:
    """Every goal for such a device with what was measured, on GPUs beside what was predicted.

    device: its name, "" where none was measured: then the goals for all devices of the kind, with all predictions.
    """
    lines = []
    for goal in GOALS:
        if goal.kind != kind or not goal.applies(device):
            continue
        value, foreseen = goal.value_in(content), _foreseen(goal, device, predicted or {})
        bound = goal.least if goal.least is not None else goal.most
        wanted = ("≥ " if goal.least is not None else "≤ ") + goal.shown(bound or 0.0)
        cells = [goal.text, wanted, goal.shown(value) if value is not None else "–", _verdict(goal, value, foreseen)]
        if value is not None and _busy(content[goal.part]["machine"]):
            cells[-1] += " on a busy machine: no result"
        if kind == "cuda":
            shown = {name: goal.shown(figure) for name, figure in foreseen.items()}
            several = len(shown) > 1
            texts = (f"{name} {text}" if several else text for name, text in shown.items())
            cells.insert(2, ", ".join(texts) or "–")
        lines.append(cells)
    return table(["goal", "wanted", *(["predicted"] if kind == "cuda" else []), "measured", ""], lines)


def _foreseen(goal: Goal, device: str, predicted: Mapping[str, Content]) -> dict[str, float]:
    """What is predicted of a goal, by device: of this one, or of all that it is a goal for."""
    chosen = {name: content for name, content in predicted.items() if goal.applies(name) and name in (device or name)}
    return {name: value for name, content in chosen.items() if (value := goal.value_in(content)) is not None}


def _verdict(goal: Goal, measured: float | None, foreseen: Mapping[str, float]) -> str:
    if measured is not None:
        return "reached" if goal.met(measured) else "**missed**"
    if not foreseen:
        return "not measured"
    return "predicted" if all(map(goal.met, foreseen.values())) else "predicted: missed"


def device_tables(content: Content, brief: bool) -> str:
    """All parts of one device, and what was not measured on it."""
    machine = next(iter(content.values()))["machine"]
    texts = [f"### {machine['device']}"]
    for name in (*PARTS, *(n for n in content if n not in PARTS)):
        if content.get(name, {}).get("rows") and not (brief and name in DETAILS):
            section = content[name]
            body = part(name, section["rows"], brief)
            texts.append(f"**{PARTS.get(name, name)}.** {machine_line(section['machine'])}\n\n{body}")
    asked = [name for name in PARTS if not (machine["kind"] == "cpu" and name in GPU_ONLY)]
    missing = [PARTS[name] for name in asked if name not in content]
    if missing:
        texts.append(f"Not measured here: {', '.join(missing).lower()}.")
    return "\n\n".join(texts)


def pictures_of(path: Path) -> str:
    """The pictures that lie beside a results file, as Markdown from bench/."""
    titles = {"growth": "How the step grows", "roofline": "Kernels and steps under the device's ceilings"}
    files = {title: path.with_name(f"{path.stem}-{name}.png") for name, title in titles.items()}
    shown = [f"![{title}]({os.path.relpath(file, HERE)})" for title, file in files.items() if file.exists()]
    return "".join(f"\n\n{line}" for line in shown)


def all_goals(folder: Path) -> str:
    """The goals of every device. Kinds of devices without any figures are named, with the command for them."""
    foreseen, texts, kinds = predictions(folder), [], set()
    for content in map(results.load, results.files(folder)):
        machine = next(iter(content.values()))["machine"]
        kinds.add(machine["kind"])
        texts.append(f"### {machine['device']}\n\n{goals(machine['kind'], content, machine['device'], foreseen)}")
    for kind in NAMES:
        if kind not in kinds:
            text = f"No {NAMES[kind]} has been measured yet: none of these goals is confirmed or refuted."
            text += f" `{COMMANDS[kind]}` measures them." + (PREDICTED if kind == "cuda" and foreseen else "")
            texts.append(f"### {NAMES[kind]}\n\n{text}\n\n{goals(kind, {}, '', foreseen)}")
    return "\n\n".join(texts) + "\n"


def all_tables(folder: Path, brief: bool) -> str:
    """Every table of every device, with its pictures."""
    contents = {path: results.load(path) for path in results.files(folder)}
    texts = [device_tables(content, brief) + pictures_of(path) for path, content in contents.items()]
    return "\n\n".join(texts or ["Nothing has been measured yet."]) + "\n"


def write_block(path: Path, text: str) -> None:
    """Replaces the block between the markers. ValueError if they are not there."""
    old = path.read_text(encoding="utf-8")
    new, count = BLOCK.subn(lambda found: found[1] + text + found[2], old)
    if count != 1:
        raise ValueError(f"{path}: {count} blocks <!-- bench:begin --> … <!-- bench:end -->; exactly one is needed")
    aside = path.with_suffix(".md.partial")
    aside.write_text(new, encoding="utf-8")
    os.replace(aside, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints, or writes both pages; 1 with one line if that fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.report")
    parser.add_argument("--readme", action="store_true", help="rewrite the blocks in README.md and bench/README.md")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the JSON files")
    settings = parser.parse_args(arguments)
    if not settings.readme:
        print(all_goals(settings.results), all_tables(settings.results, brief=False), sep="\n")
        return 0
    try:
        write_block(README, all_goals(settings.results))
        write_block(BENCH_README, all_tables(settings.results, brief=True))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
