"""Breaks small two-rank runs at random, again and again, and counts what was lost: `make soak`.

    python -m tests.soak                      about half an hour on two idle cores
    python -m tests.soak --kills 10 --others 2 --out /tmp/soak.json

Every row is one kind of fault. A run counts as survived if it ended as documented and, once the same command had
continued it to its end, with every tensor of its last checkpoints bit-identical to those of a run nobody disturbed.
Writes bench/results/soak.json after every run; the same command goes on with what an interrupted or too short one left
open, and `--readme` writes the table of bench/README.md from it. Exit code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from st_fast import __version__
from st_fast.core import checkpoint
from st_fast.core.errors import EXIT_FAILED, EXIT_INTERRUPTED
from st_fast.core.files import write_json_atomic
from tests import tiny
from tests.faults.ranks import Nursery, Rank, finish

WHAT = "random faults in a two-rank run of 2 × 10 steps; survived: ended as documented, then bit-identical"
BLOCK = re.compile(r"(<!-- soak:begin -->\n).*?(<!-- soak:end -->)", re.DOTALL)
STAGES = ("align", "transcend")
OPTIONS = ("--run.save_every=2", "--run.keep=2", "--run.hang_timeout=60")
KILLS_A_RUN = 10
LONG = 600.0
"""Seconds that a run nobody disturbs may take on a machine that has much else to do."""


@dataclass
class Row:
    """One kind of fault: how many times it was made to happen, survived, and not."""

    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0


class Soak:
    """The data set, the undisturbed run, and where broken ones live."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.nursery = Nursery(folder)
        self.data = tiny.write_data(folder / "data")
        self.runs = 0
        self.expected: dict[bool, dict[str, Tensor]] = {}

    def new_run(self, sharded: bool = False) -> Path:
        """A recipe with a run folder of its own."""
        self.runs += 1
        home = self.folder / f"run{self.runs}"
        home.mkdir()
        recipe = tiny.write_recipe(home / "tiny.toml", self.data, home / "out")
        if sharded:
            recipe.write_text(recipe.read_text().replace("[run]", '[run]\nsharding = "fsdp2"'))
        return recipe

    def undisturbed(self, sharded: bool) -> dict[str, Tensor]:
        """What a run that nobody disturbs ends with."""
        if sharded not in self.expected:
            recipe = self.new_run(sharded)
            ranks = self.start(recipe)
            assert finish(ranks, LONG) == [0, 0], f"the undisturbed run failed: {[rank.text[-2000:] for rank in ranks]}"
            self.expected[sharded] = states(recipe.parent / "out")
        return self.expected[sharded]

    def start(self, recipe: Path, breaks: dict[str, object] | None = None, count: int = 2) -> list[Rank]:
        return self.nursery.start(count, recipe, *OPTIONS, breaks=breaks)

    def wait(self, ranks: list[Rank], log: Path) -> bool:
        """Lets the run write a random number of records, which may be none, and go on a little; whether it ended."""
        wanted, end = size(log) + self.rng.randint(0, 6), float("inf")
        while time.monotonic() < end:
            if all(rank.poll() is not None for rank in ranks):
                return True
            if end == float("inf") and size(log) >= wanted:
                end = time.monotonic() + self.rng.uniform(0.0, 0.5)
            time.sleep(0.01)
        return False

    def ends_well(self, recipe: Path, sharded: bool = False) -> bool:
        """Whether the same command, undisturbed now, brings the run to the expected bits."""
        if finish(self.start(recipe), LONG) != [0, 0]:
            return False
        found, expected = states(recipe.parent / "out"), self.undisturbed(sharded)
        return found.keys() == expected.keys() and all(torch.equal(found[k], t) for k, t in expected.items())


def size(log: Path) -> int:
    """How many lines it has."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


def states(out: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoints of both stages; empty where one has none."""
    found = {stage: checkpoint.latest(out / stage / "checkpoints", print) for stage in STAGES}
    return {f"{s}/{g}/{k}": t for s, c in found.items() if c for g, ts in c.groups.items() for k, t in ts.items()}


Outcome = tuple[int, bool]
"""How many faults were made to happen in a run, and whether it survived them all."""


def kills(soak: Soak, sharded: bool = False) -> Outcome:
    """`kill -9` to both ranks at random moments, in random order, several times a run."""
    recipe, tried = soak.new_run(sharded), 0
    while tried < KILLS_A_RUN:
        ranks = soak.start(recipe)
        if soak.wait(ranks, recipe.parent / "out" / "log.jsonl"):
            break  # it was done before the blow
        for rank in soak.rng.sample(ranks, 2):
            rank.send(signal.SIGKILL)
            time.sleep(soak.rng.choice((0.0, 0.05)))
        finish(ranks)
        tried += 1
    return tried, soak.ends_well(recipe, sharded)


def kills_of_shards(soak: Soak) -> Outcome:
    """The same to a run whose ranks each write their part of a checkpoint."""
    return kills(soak, sharded=True)


def signals(soak: Soak) -> Outcome:
    """SIGTERM or SIGINT to one rank or both, once or again, while the run goes."""
    recipe = soak.new_run()
    log = recipe.parent / "out" / "log.jsonl"
    ranks = soak.start(recipe, {"at": "step", "do": "pause", "seconds": 0.1})
    end = time.monotonic() + LONG
    while time.monotonic() < end and not (log.exists() and '"start"' in log.read_text()):
        time.sleep(0.02)  # before the first step a signal just ends the process, with nothing to save
    time.sleep(soak.rng.uniform(0.0, 1.5))
    for _ in range(soak.rng.choice((1, 1, 3))):
        for rank in soak.rng.choice((ranks, ranks[:1], ranks[1:])):
            rank.send(soak.rng.choice((signal.SIGTERM, signal.SIGINT)))
        time.sleep(0.05)
    return 1, finish(ranks, LONG) == [EXIT_INTERRUPTED] * 2 and soak.ends_well(recipe)


def failures(soak: Soak) -> Outcome:
    """One rank hangs, dies or fails in the middle: all end with a code, and the next start goes on."""
    recipe, action = soak.new_run(), soak.rng.choice(("kill", "fail", "hang"))
    plan = {"at": soak.rng.choice(("step", "data")), "do": action, "rank": soak.rng.randrange(2)}
    place = {"stage": soak.rng.choice(STAGES), "steps": [soak.rng.randint(1, 10)]}
    codes = finish(soak.start(recipe, plan | place), LONG)
    return 1, set(codes) <= {EXIT_FAILED, -9} and EXIT_FAILED in codes and soak.ends_well(recipe)


def damage(soak: Soak) -> Outcome:
    """A bit of the newest checkpoint flips, or its end is cut off, while the run is down."""
    recipe = soak.new_run()
    stage = soak.rng.choice(STAGES)
    plan = {"at": "step", "do": "fail", "stage": stage, "steps": [soak.rng.randint(5, 10)]}
    codes = finish(soak.start(recipe, plan))
    newest = max((recipe.parent / "out" / stage / "checkpoints").iterdir())
    file = soak.rng.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    if soak.rng.random() < 0.5:
        content[soak.rng.randrange(len(content))] ^= 1 << soak.rng.randrange(8)
    else:
        del content[soak.rng.randrange(len(content)) :]
    file.write_bytes(content)
    return 1, codes == [EXIT_FAILED] * 2 and soak.ends_well(recipe)


def missing(soak: Soak) -> Outcome:
    """A file of the newest checkpoint is gone."""
    recipe = soak.new_run()
    plan = {"at": "step", "do": "fail", "stage": "align", "steps": [soak.rng.randint(5, 10)]}
    codes = finish(soak.start(recipe, plan))
    newest = max((recipe.parent / "out" / "align" / "checkpoints").iterdir())
    soak.rng.choice(sorted(newest.iterdir())).unlink()
    return 1, codes == [EXIT_FAILED] * 2 and soak.ends_well(recipe)


FAULTS: dict[str, Callable[[Soak], Outcome]] = {
    "kill -9 of both ranks at a random moment": kills,
    "kill -9 of both ranks of a sharded run": kills_of_shards,
    "SIGTERM or SIGINT to one rank or both, once or more": signals,
    "a rank hangs, dies or fails": failures,
    "the newest checkpoint is truncated or a bit of it flips": damage,
    "a file of the newest checkpoint is missing": missing,
}


def run(soak: Soak, rows: list[Row], wanted: dict[str, int], seconds: float) -> Iterator[None]:
    """Breaks runs until every row has what is wanted of it or the time is over; kinds take turns. Yields after each."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and (open_rows := [row for row in rows if row.tried < wanted[row.fault]]):
        row = min(open_rows, key=lambda row: row.tried / wanted[row.fault])
        tried, survived = FAULTS[row.fault](soak)
        row.tried += tried
        row.survived += tried if survived else 0
        row.lost += 0 if survived else tried
        if not survived:
            print(f"LOST: {row.fault}, {soak.folder}/run{soak.runs}", flush=True)
        print(f"{row.fault}: {row.tried} of {wanted[row.fault]}, lost {row.lost}", flush=True)
        yield


def table(rows: list[Row]) -> str:
    """The rows as Markdown, with their sum."""
    total = Row("all", *(sum(getattr(row, key) for row in rows) for key in ("tried", "survived", "lost")))
    lines = ["| fault | tried | survived | lost |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {r.fault} | {r.tried} | {r.survived} | {r.lost} |" for r in [*rows, total]])


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
    """The rows of an earlier soak that ended before it had done the same, and how long it took; else new ones."""
    if out.exists():
        record = json.loads(out.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in record["rows"]]
        same = record.get("wanted") == wanted and record["seed"] == seed
        if same and any(row.tried < wanted[row.fault] for row in rows):
            return rows, record["seconds"]
    return [Row(fault) for fault in wanted], 0.0


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--others", type=int, default=20, help="of each other fault, a sharded run's kills included")
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
    wanted = {name: given.kills if fault is kills else given.others for name, fault in FAULTS.items()}
    rows, before = left_open(given.out, wanted, given.seed)
    start = time.time() - before
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="st_fast-soak-") as folder:
        soak = Soak(Path(folder), given.seed + sum(row.tried for row in rows))
        for _ in run(soak, rows, wanted, 60 * given.minutes):
            record = {
                "what": WHAT,
                "date": time.strftime("%Y-%m-%d", time.gmtime(start)),
                "seconds": round(time.time() - start),
                "seed": given.seed,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
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
