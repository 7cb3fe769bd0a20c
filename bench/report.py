"""Prints the tables of what was measured, and writes them into README.md and bench/README.md.

    python -m bench.report                       all of it
    python -m bench.report --readme              the goals and the demo's sentence into README.md, every other table
                                                 into bench/README.md, between markers such as <!-- bench:begin -->
                                                 and <!-- bench:end -->; the pictures beside the results
    python -m bench.report --demo runs/digits    the same, with the demo's figures and picture taken from its run first;
                                                 of runs/emoji into docs/text.md

Everything comes from bench/results/*.json. What was not measured is said, not left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine as store
from bench import pictures
from bench.goals import GOALS, Content, Figure, Goal, Row, busy, of
from bench.tables import PARTS, SCORES, Part, anything, ratio, table
from st_fast.core.errors import UserError
from st_fast.report.collect import read_run
from st_fast.report.metrics import METRICS, Metric

HERE = Path(__file__).resolve().parent
README, BENCH_README, DOCS = HERE.parent / "README.md", HERE / "README.md", HERE.parent / "docs"
COMMANDS = {"cpu": "pytest bench/", "cuda": "bash bench/day.sh"}
NAMES = {"cpu": "CPU", "cuda": "GPU"}
PREDICTION, DEMO, EMOJI = "prediction.json", "demo.json", "emoji.json"
PREDICTED = (
    " What is predicted was computed without a GPU by `python -m bench.predict`, from counted FLOPs, bytes and launches"
    " and from assumed rates."
)
NOT_JUDGED = (
    "Not judged: measured on a busy machine, or nearer to the goal than the noise of the measurement. The worst row of"
    " each goal counts. An update in place moves its bytes faster than a copy does, so its share may exceed 100 %."
)
FLOOR = (
    "A step's floor is the time of its matrix products and its attention alone, measured in the same run. It bounds"
    " what can be gained over the published loop:"
)
Found = dict[str, Any]


def machine_line(machine: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """What a part was measured on; its rows may be of several revisions."""
    commits = dict.fromkeys(of(row, "taken", "commit") or machine["commit"] for row in rows.values())
    rate = machine["matmul_rate"]
    multiplies = f"{rate / 1e12:.0f} TFLOP/s" if rate > 1e13 else f"{rate / 1e9:.0f} GFLOP/s"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    isa = f", {machine['isa']}" if machine.get("isa") and machine["kind"] == "cpu" else ""
    return (
        f"{machine['device']}{isa}: copies {machine['copy_rate'] / 1e9:.1f} GB/s (read + written), multiplies "
        f"{machine['matmul_dtype']} at {multiplies}. {versions}. "
        f"Revision {', '.join(commits)}, {machine['date']}{', rates and date of the last' * (len(commits) > 1)}."
    )


def remarks(rows: Mapping[str, Row], machine: Mapping[str, Any]) -> str:
    """A line for each row with an error, figures that are no result or can't be judged, or a trial's decision."""
    failed = [f"- {key}: failed: {row['error']}" for key, row in rows.items() if "error" in row]
    given_up = [f"- {key}: no result: {'; '.join(row['notices'])}" for key, row in rows.items() if row.get("notices")]
    decided = [f"- {key}: {'; '.join(row['decided'])}" for key, row in rows.items() if row.get("decided")]
    loads = {key: row.get("load", machine["load"]) for key, row in rows.items() if busy(row, machine)}
    if loads and len(loads) == len(rows):
        loads = {"all rows": max(loads.values())}
    taken = [f"- {key}: not judged: other work took {100 * load:.0f} % of the machine" for key, load in loads.items()]
    return "\n".join([*failed, *given_up, *decided, *taken])


def section(name: str, content: Content, brief: bool) -> str:
    """One part of a device: its machine, its tables, and what failed."""
    part, rows, machine = _part(name), content[name]["rows"], content[name]["machine"]
    shown = [{"key": key, **row} for key, row in rows.items() if "error" not in row]
    wanted = goals(machine["kind"], content, machine["device"], of_ops=True) if name == OPS else ""
    body = [wanted, part.shown(shown, brief) if shown else "", remarks(rows, machine)]
    return "\n\n".join([f"**{part.title}.** {machine_line(machine, rows)}", *filter(None, body)])


def _part(name: str) -> Part:
    return PARTS.get(name) or Part(name, anything, on_page=False)


def device_tables(content: Content, brief: bool) -> str:
    """All parts of one device, and what was not measured on it."""
    machine = next(iter(content.values()))["machine"]
    names = [name for name in (*PARTS, *(n for n in content if n not in PARTS)) if of(content, name, "rows")]
    texts = [section(name, content, brief) for name in names if _part(name).on_page or not brief]
    missing = [f"“{p.title}”" for name, p in PARTS.items() if machine["kind"] in p.kinds and name not in content]
    if missing:
        texts.append(f"Not measured here: {', '.join(missing)}.")
    return "\n\n".join([f"### {machine['device']}", *texts])


OPS = "kernels"
"""The part whose goals stand beside its tables, and in the README as a sentence."""


def ops_in_short(kind: str, content: Content, device: str) -> str:
    """How many goals of ops there are, and what became of them."""
    chosen = [goal for goal in GOALS if goal.part == OPS and goal.kind == kind and goal.applies(device)]
    verdicts = Counter(goal.verdict(goal.figures(content)) for goal in chosen)
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    return f"Of {len(chosen)} goals of single ops: {told} ([each](bench/README.md#speed))."


def goals(
    kind: str, content: Content, device: str = "", predicted: Mapping[str, Content] | None = None,
    of_ops: bool | None = None,
) -> str:  # fmt: skip
    """Every goal for such a device with what was measured, on GPUs beside what was predicted.

    device: its name, "" where none was measured: then the goals for all devices of the kind, with all predictions.
    of_ops: only those of single ops, or only the others.
    """
    lines = []
    for goal in GOALS:
        if of_ops is not None and (goal.part == OPS) != of_ops:
            continue
        if goal.kind == kind and goal.applies(device):
            figures, foreseen = goal.figures(content), _foreseen(goal, device, predicted or {})
            value = goal.worst(figures)
            wanted = ("≥ " if goal.least is not None else "≤ ") + goal.shown(goal.bound)
            several = len(foreseen) > 1
            shown = (f"{name} {goal.shown(v)}" if several else goal.shown(v) for name, v in foreseen.items())
            predictions = [", ".join(shown) or "–"] if kind == "cuda" else []
            measured = goal.shown(value) if value is not None else "–"
            lines.append([goal.text, wanted, *predictions, measured, _verdict(goal, figures, foreseen)])
    return table(["goal", "wanted", *(["predicted"] if kind == "cuda" else []), "measured", ""], lines)


def _foreseen(goal: Goal, device: str, predicted: Mapping[str, Content]) -> dict[str, float]:
    """What is predicted of a goal, by device: of this one, or of all that it is a goal for."""
    chosen = {name: content for name, content in predicted.items() if goal.applies(name) and name in (device or name)}
    values = {name: goal.worst(goal.figures(content)) for name, content in chosen.items()}
    return {name: value for name, value in values.items() if value is not None}


def _verdict(goal: Goal, measured: Sequence[Figure], foreseen: Mapping[str, float]) -> str:
    if measured or not foreseen:
        return goal.verdict(measured)
    return f"not measured, predicted to {'reach' if all(map(goal.met, foreseen.values())) else 'miss'}"


def floors(content: Content) -> str:
    """Why a step's goal is its own floor: what its matrix products and attention leave to win. "" without such rows."""
    found = [
        f"{row['size']}, {row['stage']}: {ratio(speedup)} of at most {ratio(speedup * row['parts']['times_the_floor'])}"
        for row in (of(content, "step", "rows") or {}).values()
        if "parts" in row and (speedup := of(row, "speedup", "plain"))
    ]
    return f"{FLOOR} {'; '.join(found)}." if found else ""


def all_goals(folder: Path) -> str:
    """The goals of every device, those of single ops in short.

    Kinds of devices without any figures are named, with the command for them.
    """
    foreseen, texts, kinds = store.load(folder / PREDICTION).get("devices", {}), [], set()
    for content in map(store.load, store.files(folder)):
        machine = next(iter(content.values()))["machine"]
        kinds.add(machine["kind"])
        shown = goals(machine["kind"], content, machine["device"], foreseen, of_ops=False)
        ops = ops_in_short(machine["kind"], content, machine["device"])
        notes = " ".join(filter(None, [ops, NOT_JUDGED if "not judged" in shown + ops else "", floors(content)]))
        texts.append("\n\n".join(filter(None, [f"### {machine['device']}", shown, notes])))
    for kind in NAMES:
        if kind not in kinds:
            text = f"No {NAMES[kind]} has been measured yet: none of these goals is confirmed or refuted."
            text += f" `{COMMANDS[kind]}` measures them." + (PREDICTED if kind == "cuda" and foreseen else "")
            texts.append(f"### {NAMES[kind]}\n\n{text}\n\n{goals(kind, {}, '', foreseen)}")
    return "\n\n".join(texts) + "\n"


def all_tables(folder: Path, brief: bool) -> str:
    """Every table of every device, with the pictures that lie beside its file, as Markdown from bench/."""
    texts = []
    for path in store.files(folder):
        drawn = {title: pictures.file(path, name) for name, (title, _) in pictures.ALL.items()}
        shown = [f"![{title}]({os.path.relpath(file, HERE)})" for title, file in drawn.items() if file.exists()]
        texts.append("\n\n".join([device_tables(store.load(path), brief), *shown]))
    return "\n\n".join(texts or ["Nothing has been measured yet."]) + "\n"


def demo_figures(run: Path) -> Found:
    """What a finished run's log says of each stage; UserError if there is none."""
    log, stages = read_run(run), []
    for stage in log.stages:
        if stage.records["end"] and stage.evals:
            end, scores = stage.records["end"][-1], stage.evals[-1]["metrics"]
            keys = [key for metric in METRICS.values() for key in (metric.key, metric.floor) if key in scores]
            stages.append({
                "stage": stage.name, "steps": end["step"], "seconds": end["seconds"], "tflop": end["flops"] / 1e12,
                "waited": max(record["data_wait"] for record in stage.records["train"]),
                **{key: scores[key] for key in (*keys, "num", "cfg_scale")},
            })  # fmt: skip
    if not stages:
        raise UserError(f"{run}: no stage has ended yet; run `make demo` or `make emoji` first")
    start = log.stages[0].start
    return {"device": start["device"], "versions": start["versions"], "stages": stages}


def demo_sentence(found: Found) -> str:
    """The README's words."""
    last, minutes = found["stages"][-1], sum(stage["seconds"] for stage in found["stages"]) / 60
    return (
        f"`make demo` on {found['device']}: {minutes:.1f} minutes of training. A classifier with "
        f"{100 * last['classifier_accuracy']:.1f} % accuracy on held-out real digits\n"
        f"finds the digit asked for in {100 * last['accuracy']:.1f} % of {last['num']} guided samples "
        f"(ω = {last['cfg_scale']:g}). One seed.\n"
    )


def stage_table(stages: Sequence[Found], metrics: Sequence[Metric]) -> str:
    """A demo by stage."""
    head = ["stage", "steps", "training", "TFLOP", *(metric.title for metric in metrics)]
    lines = (
        [s["stage"], str(s["steps"]), f"{s['seconds']:.0f} s", f"{s['tflop']:.1f}",
         *(metric.write(s[metric.key]) for metric in metrics)]
        for s in stages
    )  # fmt: skip
    return table(head, lines)


def demo_table(found: Found) -> str:
    """The demo on digits by stage."""
    stages = found["stages"]
    return (
        f"{stage_table(stages, SCORES)}\n\nThe Fréchet distance is taken in the classifier's features, so it is not "
        f"FID; real held-out digits score {stages[-1]['floor_frechet']:.2f}. One seed.\n"
    )


def emoji_table(found: Found) -> str:
    """The demo on emoji by stage, and what it took."""
    stages = found["stages"]
    last, minutes = stages[-1], sum(stage["seconds"] for stage in stages) / 60
    return (
        f"{stage_table(stages, [METRICS[key] for key in ('held_out', 'seen', 'retrieved')])}\n\n"
        f"On {found['device']}: {minutes:.1f} minutes of training, after the data were made. Scores are of "
        f"{last['num']} samples (ω = {last['cfg_scale']:g}), half of\nthem of combinations never seen; the "
        f"classifier reads {100 * last['real_held_out']:.1f} % of the real pictures of these right. One seed.\n"
    )


def take_demo(run: Path, folder: Path) -> None:
    """Keeps a demo run's figures and its last picture. UserError where it has none."""
    found = demo_figures(run)
    last = found["stages"][-1]
    emoji = "held_out" in last
    (folder / (EMOJI if emoji else DEMO)).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    drawn = sorted((run / last["stage"] / "samples").glob("0*-nearest.png" if emoji else "0*[0-9].png"))
    shutil.copyfile(drawn[-1], DOCS / ("emoji.png" if emoji else "digits.png"))


def write_blocks(path: Path, blocks: Mapping[str, str]) -> None:
    """Replaces the blocks between a page's markers. ValueError if one is not there."""
    text = path.read_text(encoding="utf-8")
    for name, new in blocks.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        parts = re.split(f"{begin}.*?{end}", text, flags=re.DOTALL)
        if len(parts) != 2:
            raise ValueError(f"{path}: {len(parts) - 1} blocks {begin.strip()} … {end}; exactly one is needed")
        text = f"{begin}{new}{end}".join(parts)
    aside = path.with_suffix(".md.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_pages(folder: Path) -> None:
    """Draws the pictures and rewrites what both pages say of a folder of results."""
    for path in store.files(folder):
        pictures.draw(path)
    demo, emoji = store.load(folder / DEMO), store.load(folder / EMOJI)
    write_blocks(DOCS / "text.md", {"emoji": emoji_table(emoji)} if emoji else {})
    write_blocks(README, ({"demo": demo_sentence(demo)} if demo else {}) | {"bench": all_goals(folder)})
    tables = {"bench": all_tables(folder, brief=True)}
    write_blocks(BENCH_README, ({"demo": demo_table(demo)} if demo else {}) | tables)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints, or writes both pages; 1 with one line if that fails."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", action="store_true", help="rewrite the blocks in README.md and bench/README.md")
    parser.add_argument("--demo", type=Path, metavar="RUN", help="take a demo's figures from its run, then --readme")
    parser.add_argument("--results", type=Path, default=store.FOLDER, help="folder of the JSON files")
    given = parser.parse_args(arguments)
    try:
        if given.demo:
            take_demo(given.demo, given.results)
        if given.readme or given.demo:
            write_pages(given.results)
        else:
            print(all_goals(given.results), all_tables(given.results, brief=False), sep="\n")
    except (OSError, ValueError, UserError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
