"""Breaks small two-rank runs at random, again and again, and counts what was lost: `make soak`.

    python -m tests.soak                      about half an hour on two idle cores
    python -m tests.soak --kills 10 --others 2 --out /tmp/soak.json
    python -m tests.soak --only disk teacher --others 5 --out /tmp/soak.json

Every row is one kind of fault; `tests/faults/random_faults.py` makes them happen. A run counts as survived if it ended
as documented and, once the same command had continued it to its end, with every tensor of its last checkpoints
bit-identical to those of a run nobody disturbed. Writes bench/results/soak.json after every run; the same command goes
on with what an interrupted or too short one left open, or with kinds that are new, and `--readme` writes the table of
bench/README.md from it. Exit code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from st_fast import __version__
from st_fast.core.files import write_json_atomic
from tests import tiny
from tests.faults.random_faults import FAULTS, Soak, kills

WHAT = "random faults in small runs of two stages; survived: ended as documented, then bit-identical"
BLOCK = re.compile(r"(<!-- soak:begin -->\n).*?(<!-- soak:end -->)", re.DOTALL)


@dataclass
class Row:
    """One kind of fault: how many times it was made to happen, survived, and not."""

    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    date: str = ""
    """Of the last one."""


def run(soak: Soak, rows: list[Row], wanted: dict[str, int], seconds: float) -> Iterator[None]:
    """Breaks runs until every row has what is wanted of it or the time is over; kinds take turns. Yields after each."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and (open_rows := [row for row in rows if row.tried < wanted[row.fault]]):
        row = min(open_rows, key=lambda row: row.tried / wanted[row.fault])
        tried, survived = FAULTS[row.fault](soak)
        row.tried += tried
        row.survived += tried if survived else 0
        row.lost += 0 if survived else tried
        row.date = time.strftime("%Y-%m-%d", time.gmtime())
        if not survived:
            print(f"LOST: {row.fault}, {soak.folder}/run{soak.runs}", flush=True)
        print(f"{row.fault}: {row.tried} of {wanted[row.fault]}, lost {row.lost}", flush=True)
        yield


def table(rows: list[Row]) -> str:
    """The rows as Markdown, with their sum."""
    total = Row("all", *(sum(getattr(row, key) for row in rows) for key in ("tried", "survived", "lost")))
    lines = ["| fault | tried | survived | lost | last tried |", "|---|---|---|---|---|"]
    return "\n".join(
        lines + [f"| {r.fault} | {r.tried} | {r.survived} | {r.lost} | {r.date} |" for r in [*rows, total]]
    )


def quoted(readme: str, out: Path) -> str:
    """The text with the soak's table between its two markers. ValueError if they are not there once."""
    record = json.loads(out.read_text(encoding="utf-8"))
    rows = table([Row(**row) for row in record["rows"]])
    text = f"{record['what']} ({record['date']}, {record['machine']}).\n\n{rows}\n"
    new, count = BLOCK.subn(lambda found: found[1] + text[0].upper() + text[1:] + found[2], readme)
    if count != 1:
        raise ValueError(
            f"bench/README.md: {count} blocks <!-- soak:begin --> … <!-- soak:end -->; exactly one is needed"
        )
    return new


def left_open(out: Path, wanted: dict[str, int], seed: int) -> tuple[list[Row], float]:
    """The rows of an earlier soak that had not yet done all of this, and how long it took; else new ones."""
    if out.exists():
        record = json.loads(out.read_text(encoding="utf-8"))
        known = {row["fault"]: Row(**row) for row in record["rows"]}
        same = record["seed"] == seed and record["wanted"].items() <= wanted.items()  # new kinds are still to be done
        rows = [known.get(fault, Row(fault)) for fault in wanted]
        if same and any(row.tried < wanted[row.fault] for row in rows):
            return rows, record["seconds"]
    return [Row(fault) for fault in wanted], 0.0


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--others", type=int, default=5, help="of each other fault, a sharded run's kills included")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="the faults whose name has one of these"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="the budget; what is not done by then is left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=tiny.ROOT / "bench" / "results" / "soak.json")
    parser.add_argument(
        "--readme", action="store_true", help="only rewrite bench/README.md's table from what was written"
    )
    given = parser.parse_args()
    if given.readme:
        readme = tiny.ROOT / "bench" / "README.md"
        readme.write_text(quoted(readme.read_text(encoding="utf-8"), given.out), encoding="utf-8")
        return 0
    torch.set_num_threads(1)
    chosen = {name: fault for name, fault in FAULTS.items() if any(word in name for word in given.only)}
    wanted = {name: given.kills if fault is kills else given.others for name, fault in chosen.items()}
    rows, before = left_open(given.out, wanted, given.seed)
    start = time.time() - before
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="st_fast-soak-") as folder:
        soak = Soak(Path(folder), given.seed + sum(row.tried for row in rows))
        for _ in run(soak, rows, wanted, 60 * given.minutes):
            record = {
                "what": WHAT,
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "seconds": round(time.time() - start),
                "seed": given.seed,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[2]:.1f}",
                "versions": {"st_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
                "wanted": wanted,
                "rows": [asdict(row) for row in rows],
            }
            write_json_atomic(given.out, record)
        soak.nursery.close()
    print(table(rows))
    return 1 if any(row.lost for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
