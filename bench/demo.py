"""Takes the demo's figures from its log into bench/results/demo.json, README.md, bench/README.md and docs/digits.png.

make demo && python -m bench.demo runs/digits
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from st_fast.core.command import run_command
from st_fast.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "demo.json"
SCORES = ("accuracy", "frechet", "floor_frechet", "classifier_accuracy", "num", "cfg_scale")
BLOCK = re.compile(r"(<!-- demo:begin -->\n).*?(<!-- demo:end -->)", re.DOTALL)


def figures(run: Path) -> dict[str, Any]:
    """What the run's log says of each stage; UserError if the run is not finished."""
    try:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{run}/log.jsonl: {error.strerror}; run `make demo` first") from None
    records = [json.loads(line) for line in lines]
    stages = []
    for name in dict.fromkeys(r["stage"] for r in records if r["kind"] == "end"):
        of_stage = [r for r in records if r["stage"] == name]
        mine = {kind: [r for r in of_stage if r["kind"] == kind] for kind in ("end", "eval", "train")}
        scores = mine["eval"][-1]["metrics"]
        stages.append({
            "stage": name,
            "steps": mine["end"][-1]["step"],
            "seconds": mine["end"][-1]["seconds"],
            "tflop": mine["end"][-1]["flops"] / 1e12,
            "waited": max(r["data_wait"] for r in mine["train"]),
            **{key: scores[key] for key in SCORES},
        })  # fmt: skip
    if not stages:
        raise UserError(f"{run}: no stage has ended yet")
    start = next(r for r in records if r["kind"] == "start")
    return {"device": start["device"], "versions": start["versions"], "stages": stages}


def sentence(found: dict[str, Any]) -> str:
    """The README's words."""
    stages = found["stages"]
    last, minutes = stages[-1], sum(s["seconds"] for s in stages) / 60
    held_out = last.get("classifier_accuracy", last.get("judge_accuracy"))  # the second in older results
    return (
        f"`make demo` on {found['device']}: {minutes:.1f} minutes of training. A classifier with "
        f"{100 * held_out:.1f} % accuracy on held-out real digits\n"
        f"finds the digit asked for in {100 * last['accuracy']:.1f} % of {last['num']} guided samples "
        f"(ω = {last['cfg_scale']:g}). One seed.\n"
    )


def table(found: dict[str, Any]) -> str:
    """The table of bench/README.md, by stage."""
    stages = found["stages"]
    rows = "\n".join(
        f"| {s['stage']} | {s['steps']} | {s['seconds']:.0f} s | {s['tflop']:.1f} | {100 * s['accuracy']:.1f} % "
        f"| {s['frechet']:.2f} |"
        for s in stages
    )
    return f"""| stage | steps | training | TFLOP | accuracy | Fréchet distance* |
|---|---|---|---|---|---|
{rows}

*In the classifier's features, so not FID; real held-out digits score {stages[-1]["floor_frechet"]:.2f}. One seed.
"""


def write(page: Path, text: str) -> None:
    """Replaces what stands between the page's two markers."""
    old = page.read_text(encoding="utf-8")
    page.write_text(BLOCK.sub(lambda found: found[1] + text + found[2], old), encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """The command."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    run = Path(arguments[0])
    found = figures(run)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write(ROOT / "README.md", sentence(found))
    write(ROOT / "bench" / "README.md", table(found))
    pictures = sorted((run / found["stages"][-1]["stage"] / "samples").glob("0*.png"))
    (ROOT / "docs").mkdir(exist_ok=True)
    shutil.copyfile(pictures[-1], ROOT / "docs" / "digits.png")
    print(table(found))


if __name__ == "__main__":
    run_command(main)
