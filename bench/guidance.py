"""What guidance is worth to the digits' networks that a study has trained, each drawn with several kinds and strengths.

    python -m bench.guidance runs/study/digits_frontier              draws and scores 1,000 samples a setting
    python -m bench.guidance runs/study/digits_frontier --write docs/frontier.md

Nothing is trained. Of every seed whose runs of `NETWORKS` are done, their networks at the end are drawn by their weight
averages, on one thread; sets and scores stay beside the runs, and what is there is not made again. The table is the
classifier's Fréchet distance, lower is better.
"""

import argparse
import contextlib
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.report import write_blocks
from st_fast.core.command import command_parser, run_command
from st_fast.core.errors import UserError
from st_fast.core.options import integer, path
from st_fast.evaluate.__main__ import main as evaluate
from st_fast.report import words
from st_fast.report.collect import read_run

SAMPLES, SOLVER_STEPS = 1_000, 10
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
CFG, INTERNAL, PATH_DROP = "CFG", "Internal Guidance", "path drop"
FLAGS = {
    CFG: ("--internal-guidance", "1", "--guidance", "cfg", "--cfg-scale"),
    INTERNAL: ("--cfg-scale", "1", "--internal-guidance"),
    PATH_DROP: ("--internal-guidance", "1", "--guidance", "path_drop", "--cfg-scale"),
}
"""By the kind of guidance: flags of `st_fast.evaluate`, its strength last."""
NETWORKS = {
    "plain": ("plain SiT", (CFG,)),
    "ig": ("internal head", (CFG, INTERNAL)),
    "stage1": ("stage 1, its own head where it was trained", (CFG, INTERNAL)),
    "tread": ("TREAD", (CFG,)),
    "sprint": ("SPRINT", (CFG, PATH_DROP)),
}
"""By the arm of `recipes/study/digits_frontier.toml`: what the table calls its network, and what guides it."""
SAME = 0.95
"""Of one budget, which whole steps do not meet exactly, is what is above this share of it."""
MARKER = "guidance"


def score(run: Path, kind: str, scale: float, samples: int) -> float:
    """The classifier's Fréchet distance of a run's samples, from the record that `st_fast.evaluate` writes.

    A strength of 1 is none, and the same set whatever the kind.
    """
    chosen, told = CFG if scale == 1.0 else kind, io.StringIO()
    options = [str(run), "-n", str(samples), "--sampler", "heun", "--steps", str(SOLVER_STEPS), "--cfg-range", "0", "1"]
    with contextlib.redirect_stdout(told):
        evaluate([*options, *FLAGS[chosen], f"{scale:g}"])
    record = json.loads(Path(told.getvalue().splitlines()[-1]).read_text())
    return float(record["metrics"]["classifier_frechet"])


def seeds_of(study: Path) -> tuple[list[Path], float]:
    """Folders of the seeds whose runs are all done for the largest budget that a seed's are, and its FLOPs.

    UserError where there is none.
    """
    spent = {seed: [ended(seed / name) for name in NETWORKS] for seed in sorted(study.glob("seed*"))}
    done = {seed: max(each) for seed, each in spent.items() if min(each) > SAME * max(each)}
    if not done:
        raise UserError(f"{study}: no seed there has finished runs of {', '.join(NETWORKS)}; st_fast.study makes them")
    most = max(done.values())
    return [seed for seed, flops in done.items() if flops > SAME * most], most


def ended(run: Path) -> float:
    """FLOPs of a finished run; 0 for one that is not there, has not ended or goes on."""
    if not (run / "log.jsonl").is_file():
        return 0.0
    (stage,) = read_run(run).stages
    return next((end["flops"] for end in reversed(stage.records["end"]) if end["step"] == stage.step), 0.0)


def cell(values: Sequence[float], best: bool) -> str:
    """The mean over seeds, and from lowest to highest where there are several."""
    mean = f"**{statistics.fmean(values):.3f}**" if best else f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def table(found: dict[tuple[str, str], list[list[float]]], samples: int, flops: float) -> str:
    """Markdown: a row for each network and kind, a column for each strength; `found` has a list a strength of seeds."""
    lines = [f"| network | guided by | {' | '.join(f'{scale:g}' for scale in SCALES)} |"]
    lines.append("|---|---|" + "---|" * len(SCALES))
    for (name, kind), row in found.items():
        best = min(map(statistics.fmean, row))
        cells = " | ".join(cell(values, statistics.fmean(values) == best) for values in row)
        lines.append(f"| {NETWORKS[name][0]} | {kind} | {cells} |")
    seeds = len(next(iter(found.values()))[0])
    lines.append(
        f"\nThe study's networks after {words.flops(flops)} of training each, {seeds} seed{'s' * (seeds > 1)}, "
        f"{samples:,} samples (Heun, {SOLVER_STEPS} steps, guided at all times that the network allows)."
    )
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("guidance", __doc__)
    parser.add_argument("study", type=path, metavar="FOLDER", help="where the study's runs are: its folders seed0, …")
    parser.add_argument("-n", "--num", type=integer(65, 10**6), default=SAMPLES, help=f"samples a setting ({SAMPLES})")
    parser.add_argument("--write", type=path, metavar="PAGE", help=f"put the table between the page's {MARKER} markers")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Draws, scores, and prints the table."""
    given = parser().parse_args(arguments)
    torch.set_num_threads(1)
    seeds, flops = seeds_of(given.study)
    found: dict[tuple[str, str], list[list[float]]] = {}
    for name, (_, kinds) in NETWORKS.items():
        for kind in kinds:
            row = [[score(seed / name, kind, scale, given.num) for seed in seeds] for scale in SCALES]
            found[name, kind] = row
            print(name, kind, *(cell(values, best=False) for values in row), flush=True)
    text = table(found, given.num, flops)
    print(text)
    if given.write:
        write_blocks(given.write, {MARKER: text})


if __name__ == "__main__":
    run_command(main)
