"""The faults that the soak makes happen at random in small runs, and what must follow each (see tests/soak.py)."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from st_fast.core.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from tests import pixels, tiny
from tests.faults.moments import STAGES, Moments, states
from tests.faults.ranks import Nursery, Rank, finish
from tests.faults.restarts import killed_again_and_again
from tests.train.test_continuity import changed_teacher

OPTIONS = ("--run.save_every=2", "--run.keep=2", "--run.hang_timeout=60", "--run.log_every=1")
KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "sharded": ("--run.sharding=fsdp2",),
    "drawing": ("--sample.every=2", "--evaluate.classifier=true", "--evaluate.every=3", "--evaluate.num=70"),
}
"""Small runs of two stages and their options; those that draw do so of digits, and train a classifier to score them."""
KILLS_A_RUN = 10
RESTARTS_A_RUN = 20
LONG = 600.0
"""Seconds that a run nobody disturbs may take on a machine that has much else to do."""


@dataclass(frozen=True)
class Run:
    """A recipe with a run folder of its own."""

    kind: str
    recipe: Path
    count: int = 2
    """Ranks."""

    @property
    def out(self) -> Path:
        return self.recipe.parent / "out"

    @property
    def log(self) -> Path:
        return self.out / "log.jsonl"

    @property
    def options(self) -> tuple[str, ...]:
        return (f"--run.out={self.out}", *OPTIONS, *KINDS[self.kind])


class Soak:
    """The data sets, the undisturbed runs, and where broken ones live."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.nursery = Nursery(folder)
        self.latents, self.digits = tiny.write_data(folder / "latents"), pixels.write_data(folder / "digits")
        (folder / "moments").mkdir()
        self.moments = Moments(folder / "moments", self.rng, self.nursery)
        self.runs = 0
        self.expected: dict[tuple[str, int], dict[str, Tensor]] = {}

    def new_run(self, kind: str = "plain", count: int = 2) -> Run:
        """A run that has not begun. The classifier of those that draw is not trained."""
        self.runs += 1
        home = self.folder / f"run{self.runs}"
        home.mkdir()
        recipe = home / "recipe.toml"
        if kind == "drawing":
            shutil.rmtree(self.digits / "classifier", ignore_errors=True)
            recipe.write_text(pixels.RECIPE.format(data=self.digits))
        else:
            tiny.write_recipe(recipe, self.latents, home / "out")
        return Run(kind, recipe, count)

    def undisturbed(self, kind: str, count: int) -> dict[str, Tensor]:
        """What a run that nobody disturbs ends with."""
        if (kind, count) not in self.expected:
            run = self.new_run(kind, count)
            ranks = self.start(run)
            assert finish(ranks, LONG) == [0] * count, (
                f"undisturbed, it failed: {[rank.text[-2000:] for rank in ranks]}"
            )
            self.expected[kind, count] = states(run.out)
        return self.expected[kind, count]

    def start(self, run: Run, *more: str, breaks: dict[str, object] | None = None) -> list[Rank]:
        """The run's ranks, with further options and with something broken in them."""
        return self.nursery.start(run.count, run.recipe, *run.options, *more, breaks=breaks)

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

    def as_undisturbed(self, run: Run) -> bool:
        """Whether the run has ended with the expected bits."""
        found, expected = states(run.out), self.undisturbed(run.kind, run.count)
        return found.keys() == expected.keys() and all(torch.equal(found[k], t) for k, t in expected.items())

    def ends_well(self, run: Run) -> bool:
        """Whether the same command, undisturbed now, brings the run to the expected bits."""
        return finish(self.start(run), LONG) == [0] * run.count and self.as_undisturbed(run)


def size(log: Path) -> int:
    """How many lines it has."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


Outcome = tuple[int, bool]
"""How many faults were made to happen in a run, and whether it survived them all."""


def kills(soak: Soak, kind: str = "plain") -> Outcome:
    """`kill -9` to both ranks at random moments, in random order, several times a run."""
    run, tried = soak.new_run(kind), 0
    while tried < KILLS_A_RUN:
        ranks = soak.start(run)
        if soak.wait(ranks, run.log):
            break  # it was done before the blow
        for rank in soak.rng.sample(ranks, 2):
            rank.send(signal.SIGKILL)
            time.sleep(soak.rng.choice((0.0, 0.05)))
        finish(ranks)
        tried += 1
    return tried, soak.ends_well(run)


def kills_of_shards(soak: Soak) -> Outcome:
    """The same to a run whose ranks each write their part of a checkpoint."""
    return kills(soak, "sharded")


def restarts(soak: Soak) -> Outcome:
    """`kill -9` to one of two ranks under one torchrun, which starts both again, several times a run that draws."""
    run = soak.new_run("drawing")
    moments = [soak.rng.uniform(0.5, 8.0) for _ in range(RESTARTS_A_RUN)]
    output = run.recipe.with_name("torchrun.txt")
    slow = ("--sample.sampler=heun", "--sample.steps=50")  # scores of the same weights
    code, tried = killed_again_and_again(run.recipe, output, moments, soak.rng, *run.options, *slow, limit=3 * LONG)
    return tried, code == 0 and soak.as_undisturbed(run)


def signals(soak: Soak) -> Outcome:
    """SIGTERM or SIGINT to one rank or both, once or again, while the run goes."""
    run = soak.new_run()
    ranks = soak.start(run, breaks={"at": "step", "do": "pause", "seconds": 0.1})
    end = time.monotonic() + LONG
    while time.monotonic() < end and not (run.log.exists() and '"start"' in run.log.read_text()):
        time.sleep(0.02)  # before the first step a signal just ends the process, with nothing to save
    time.sleep(soak.rng.uniform(0.0, 1.5))
    for _ in range(soak.rng.choice((1, 1, 3))):
        for rank in soak.rng.choice((ranks, ranks[:1], ranks[1:])):
            rank.send(soak.rng.choice((signal.SIGTERM, signal.SIGINT)))
        time.sleep(0.05)
    return 1, finish(ranks, LONG) == [EXIT_INTERRUPTED] * 2 and soak.ends_well(run)


def signals_while_drawing(soak: Soak) -> Outcome:
    """A signal to one rank, or to the torchrun of two, while it draws, scores or trains the classifier."""
    one = soak.moments.interrupt(soak.rng.choice((1, 2)), soak.rng.choice(("drawing", "scoring", "classifier")))
    if not one.well:
        print(one, flush=True)
    return 1, one.well


def failures(soak: Soak) -> Outcome:
    """One rank hangs, dies or fails in the middle: all end with a code, and the next start goes on."""
    run, action = soak.new_run(), soak.rng.choice(("kill", "fail", "hang"))
    plan = {"at": soak.rng.choice(("step", "data")), "do": action, "rank": soak.rng.randrange(2)}
    place = {"stage": soak.rng.choice(STAGES), "steps": [soak.rng.randint(1, 10)]}
    codes = finish(soak.start(run, breaks=plan | place), LONG)
    return 1, set(codes) <= {EXIT_FAILED, -9} and EXIT_FAILED in codes and soak.ends_well(run)


def full_disk(soak: Soak) -> Outcome:
    """For a while nothing can be written: log, pictures, checkpoints. No line of the log is missing without a word."""
    run = soak.new_run("drawing")
    plan = {"at": "step", "do": "fill the disk", "writes": soak.rng.choice((1, 10, 100, 2**30))}
    plan |= {"seconds": soak.rng.choice((1.0, 3.0, 8.0))}
    place = {"stage": soak.rng.choice(STAGES), "steps": [soak.rng.randint(1, 8)]}
    ranks = soak.start(run, breaks=plan | place)
    codes = finish(ranks, LONG)  # 1 where the last checkpoint of a stage could not be written
    texts = [rank.text for rank in ranks]
    told = "could not be written" in texts[0]
    well = codes in ([0, 0], [EXIT_FAILED] * 2) and not any("Traceback" in text for text in texts)
    well = well and soak.ends_well(run) and (told or log_is_whole(run))
    if not well:
        print(codes, *texts, sep="\n", flush=True)
    happened = any("cannot be written" in text or "not saved" in text for text in texts)
    return int(happened or not well), well


def log_is_whole(run: Run) -> bool:
    """Whether its log has every step of both stages."""
    steps = {(record["stage"], record["step"]) for record in tiny.records(run.out, "train")}
    return steps == {(stage, step) for stage in STAGES for step in range(1, 9)}


def damage(soak: Soak) -> Outcome:
    """A bit of the newest checkpoint flips, or its end is cut off, while the run is down."""
    run = soak.new_run()
    stage = soak.rng.choice(STAGES)
    plan = {"at": "step", "do": "fail", "stage": stage, "steps": [soak.rng.randint(5, 10)]}
    codes = finish(soak.start(run, breaks=plan))
    newest = max((run.out / stage / "checkpoints").iterdir())
    file = soak.rng.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    if soak.rng.random() < 0.5:
        content[soak.rng.randrange(len(content))] ^= 1 << soak.rng.randrange(8)
    else:
        del content[soak.rng.randrange(len(content)) :]
    file.write_bytes(content)
    return 1, codes == [EXIT_FAILED] * 2 and soak.ends_well(run)


def missing(soak: Soak) -> Outcome:
    """A file of the newest checkpoint is gone."""
    run = soak.new_run()
    plan = {"at": "step", "do": "fail", "stage": "align", "steps": [soak.rng.randint(5, 10)]}
    codes = finish(soak.start(run, breaks=plan))
    newest = max((run.out / "align" / "checkpoints").iterdir())
    soak.rng.choice(sorted(newest.iterdir())).unlink()
    return 1, codes == [EXIT_FAILED] * 2 and soak.ends_well(run)


def two_writers(soak: Soak) -> Outcome:
    """Two runs start in one folder, at once or nearly so, where files can't be locked: one trains, one is refused."""
    run = soak.new_run(count=1)
    plan = {"at": "step", "do": "pause", "seconds": 0.1, "flock": False}
    first = soak.start(run, breaks=plan)
    time.sleep(soak.rng.choice((0.0, soak.rng.uniform(0.0, 1.0))))
    both = first + soak.start(run, breaks=plan)
    codes, texts = finish(both, LONG), [rank.text for rank in both]
    refused = texts[codes.index(EXIT_USAGE)] if EXIT_USAGE in codes else ""
    well = sorted(codes) == [0, EXIT_USAGE] and "another run is writing here" in refused
    well = well and not any("Traceback" in text for text in texts)
    if not well:
        print(codes, *texts, sep="\n", flush=True)
    return 1, well and soak.as_undisturbed(run)


def other_teacher(soak: Soak) -> Outcome:
    """The teacher changes while its student is interrupted: refused, on a copy accepted, and restored it goes on."""
    run = soak.new_run()
    plan = {"at": "step", "do": "fail", "stage": "transcend", "steps": [soak.rng.randint(4, 10)]}
    codes = finish(soak.start(run, breaks=plan))
    shutil.copytree(run.out, kept := run.recipe.parent / "kept")
    longer = soak.rng.random() < 0.5
    if not longer:
        changed_teacher(run.out, "blocks.1.attn.qkv.weight", soak.rng.uniform(-0.1, 0.1))
    options = (f"--stage.align.steps={soak.rng.randint(11, 14)}",) if longer else ()
    ranks = soak.start(run, *options)
    refused = finish(ranks) == [EXIT_USAGE] * 2 and "its teacher align was" in ranks[0].text
    accepted = finish(soak.start(run, *options, "--accept-changes"), LONG) == [0, 0]
    accepted = accepted and bool(tiny.records(run.out, "accepted"))
    shutil.rmtree(run.out)
    kept.rename(run.out)
    return 1, codes == [EXIT_FAILED] * 2 and refused and accepted and soak.ends_well(run)


FAULTS: dict[str, Callable[[Soak], Outcome]] = {
    "kill -9 of both ranks at a random moment": kills,
    "kill -9 of both ranks of a sharded run": kills_of_shards,
    "kill -9 of one rank, restarted by torchrun": restarts,
    "SIGTERM or SIGINT to one rank or both, once or more": signals,
    "a signal while drawing, scoring or training the classifier": signals_while_drawing,
    "a rank hangs, dies or fails": failures,
    "the disk is full for a while, as it logs, draws and saves": full_disk,
    "the newest checkpoint is truncated or a bit of it flips": damage,
    "a file of the newest checkpoint is missing": missing,
    "two runs start in one folder, without file locks": two_writers,
    "the teacher changes between interruption and resume": other_teacher,
}
