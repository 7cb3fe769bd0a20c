"""Which head guides better on the digits: Internal Guidance's, or stage 1's, which training has anyway.

    python -m bench.internal_heads                        trains both (900 steps) and scores 1,000 samples a setting
    python -m bench.internal_heads --write docs/frontier.md

The recipe is recipes/digits.toml with other stages, on one thread. Runs, sets and scores stay in --out, and what is
there is not made again. The table is the classifier's Fréchet distance, lower is better.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.report import write_blocks
from st_fast.core.command import command_parser, run_command
from st_fast.core.options import integer, path
from st_fast.evaluate.__main__ import main as evaluate
from st_fast.recipe import load
from st_fast.train.run import run

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAMPLES, SOLVER_STEPS = 900, 1_000, 10
SCALES, GUIDANCE = (1.0, 1.25, 1.5, 2.0, 3.0), (1.0, 2.0)
STAGES = {
    "internal": ("internal head, all t", 'supervision = "internal_guidance"\ndepth = 2\n'),
    "early": (
        "stage 1's head, all t",
        'supervision = "velocity_head"\ndepth = 2\nhidden = 256\nt_range = [0.0, 1.0]\n',
    ),
}
"""By the stage's name: what the table calls its head, and the stage's keys."""
MARKER = "internal-heads"


def train(out: Path, steps: int) -> None:
    """One run with a stage for each head; pictures and scores of training are left out."""
    text = (ROOT / "recipes" / "digits.toml").read_text().partition("[[stage]]")[0]
    for name, (_, keys) in STAGES.items():
        text += f'[[stage]]\nname = "{name}"\nsteps = {steps}\n{keys}\n'
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / "internal_heads.toml"
    recipe.write_text(text)
    run(load(recipe, [f"--run.out={out / 'run'}", "--sample.num=0", "--evaluate.classifier=false"]))


def score(folder: Path, stage: str, cfg: float, scale: float, samples: int) -> float:
    """The classifier's Fréchet distance of a stage's samples, from the record that `st_fast.evaluate` writes."""
    words, told = [str(folder), "--stage", stage, "-n", str(samples)], io.StringIO()
    words += ["--cfg-scale", f"{cfg:g}", "--internal-guidance", f"{scale:g}", "--steps", str(SOLVER_STEPS)]
    with contextlib.redirect_stdout(told):
        evaluate(words)
    record = json.loads(Path(told.getvalue().splitlines()[-1]).read_text())
    return float(record["metrics"]["classifier_frechet"])


def table(found: dict[str, dict[str, list[float]]], steps: int, samples: int) -> str:
    """Markdown: a row for each head and guidance, a column for each w."""
    lines = [f"| head | CFG | {' | '.join(f'w = {scale:g}' for scale in SCALES)} |", "|---|---|" + "---|" * len(SCALES)]
    for stage, rows in found.items():
        for cfg, values in rows.items():
            best = min(values)
            cells = [f"**{value:.2f}**" if value == best else f"{value:.2f}" for value in values]
            lines.append(f"| {STAGES[stage][0]} | {cfg} | {' | '.join(cells)} |")
    lines += [f"\n{steps} steps each, {samples:,} samples (Heun, {SOLVER_STEPS} steps), seed 0, CPU, one thread."]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("internal_heads", __doc__)
    parser.add_argument("--out", type=path, default=Path("runs/internal_heads"), help="folder of runs and samples")
    parser.add_argument("--steps", type=integer(1, 10**6), default=STEPS, help=f"of each stage ({STEPS})")
    parser.add_argument("-n", "--num", type=integer(65, 10**6), default=SAMPLES, help=f"samples a setting ({SAMPLES})")
    parser.add_argument("--write", type=path, metavar="PAGE", help=f"put the table between the page's {MARKER} markers")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Trains, scores, and prints the table."""
    given = parser().parse_args(arguments)
    torch.set_num_threads(1)
    train(given.out, given.steps)
    found: dict[str, dict[str, list[float]]] = {}
    for cfg in GUIDANCE:
        for stage in STAGES:
            row = [score(given.out / "run", stage, cfg, scale, given.num) for scale in SCALES]
            found.setdefault(stage, {})[f"{cfg:g}"] = row
            print(stage, cfg, *(f"{value:.3f}" for value in row), flush=True)
    text = table(found, given.steps, given.num)
    print(text)
    if given.write:
        write_blocks(given.write, {MARKER: text})


if __name__ == "__main__":
    run_command(main)
