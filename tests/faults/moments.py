"""A signal at a random moment of a run: in imports, steps, saving, drawing, scoring, or as the classifier trains.

    python -m tests.faults.moments --times 10
    python -m tests.faults.moments --times 26 --out bench/results/moments.json

prints a line a try, and at the end how many were lost and the longest time from the signal to the end. A try is lost
where the run took longer to end than PROMPT seconds (more, where other work has the cores), did not end as documented,
or had not saved a step of its log, or where the same command then did not bring it to the weights of a run that nobody
disturbed. "busy" are the seconds of processor time from the signal to the end, of all processes together, which other
work does not lengthen. Where that is allowed (to root), the run goes before other work from the signal on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from st_fast.core import checkpoint
from st_fast.core.errors import EXIT_INTERRUPTED
from st_fast.core.files import write_json_atomic
from st_fast.core.signals import STOPPING
from tests import pixels, tiny
from tests.faults.ranks import ONE_THREAD, TORCHRUN, Nursery, finish
from tests.faults.restarts import ranks_of

STAGES = ("align", "transcend")
QUIET = ("--sample.num=0", "--evaluate.classifier=false", "--run.log_every=1", "--run.save_every=1000")
LONG = ("--sample.sampler=heun", "--sample.steps=100", "--sample.every=3", "--evaluate.every=5")
WORK = {
    "steps": ("--run.log_every=1", "--run.save_every=3", "--stage.align.steps=2000"),
    "drawing": ("--sample.num=4000",),
    "scoring": ("--sample.num=0", "--evaluate.classifier=true", "--evaluate.num=4000"),
    "classifier": ("--sample.num=0", "--evaluate.classifier=true", "--evaluate.num=70", "--sample.steps=1"),
}
"""What most of a run's time goes to, and the options for it."""
LATEST = 6.0
"""Seconds after which a signal is sent at most: from the start, or from the first step."""
EARLY = 0.3
"""The share of those from the start."""
PROMPT = 10.0
"""Seconds within which a run has to have saved and ended; torchrun kills its ranks after 30."""
IMAGES = 1600
"""Real images, on which the classifier trains for seconds."""


@dataclass
class Try:
    """How a run ended that was interrupted."""

    ranks: int
    work: str
    signal: str
    moment: float
    since: str
    place: str
    seconds: float
    busy: float
    load: float
    """Of the machine, which other work may slow down."""
    well: bool
    said: str

    def __str__(self) -> str:
        what = (
            f"{self.ranks} rank(s), {self.work}, {self.signal} {self.moment:.1f} s after the {self.since}, {self.place}"
        )
        how = f"after {self.seconds:.1f} s, {self.busy:.1f} busy, load {self.load:.0f}"
        return f"{what}: ended {how}, {'well' if self.well else 'LOST'}: {self.said}"


def states(out: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoints."""
    found = {stage: checkpoint.latest(out / stage / "checkpoints", print) for stage in STAGES}
    return {f"{s}/{g}/{k}": t for s, c in found.items() if c for g, ts in c.groups.items() for k, t in ts.items()}


def saved(out: Path) -> dict[str, int]:
    """The step of each stage's newest checkpoint."""
    found = {stage: checkpoint.latest(out / stage / "checkpoints", print, groups=()) for stage in STAGES}
    return {stage: one.step for stage, one in found.items() if one}


def busy(pid: int) -> float:
    """Seconds of processor time that a process has taken, with its children."""
    total = 0.0
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its own, and of children that it waited for
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += busy(int(child))
    return total


class Moments:
    """The data, and what undisturbed runs end with."""

    def __init__(self, folder: Path, rng: random.Random, nursery: Nursery) -> None:
        self.folder, self.rng, self.nursery, self.tries = folder, rng, nursery, 0
        for number in STOPPING:  # which a shell's background job or nohup may have left ignored, for runs as well
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        self.data = pixels.write_data(folder / "data", IMAGES)
        self.expected: dict[tuple[int, str], dict[str, Tensor]] = {}

    def recipe(self, home: Path) -> Path:
        """A recipe in a folder of its own."""
        home.mkdir(exist_ok=True)
        (home / "pixels.toml").write_text(pixels.RECIPE.format(data=self.data))
        return home / "pixels.toml"

    def command(self, ranks: int, home: Path, *options: str) -> list[str]:
        recipe = self.recipe(home)
        start = (
            [sys.executable, "-m"] if ranks == 1 else [str(TORCHRUN), "--standalone", f"--nproc-per-node={ranks}", "-m"]
        )
        return [*start, "st_fast.train", str(recipe), f"--run.out={home / 'out'}", *options]

    def finish(self, ranks: int, work: str, home: Path) -> dict[str, Tensor]:
        """What the same run ends with, without pictures and scores, which change no weight."""
        begun = saved(home / "out").get("align", 0)
        steps = (f"--stage.align.steps={max(40, begun + 1)}",) if work == "steps" else ()
        return self.train(ranks, home, *steps)

    def train(self, ranks: int, home: Path, *options: str) -> dict[str, Tensor]:
        """Trains to the end, and quickly: neither torchrun nor torch is imported again."""
        recipe = self.recipe(home)
        started = self.nursery.start(ranks, recipe, f"--run.out={home / 'out'}", *QUIET, *options)
        assert finish(started, 900) == [0] * ranks, [rank.text[-2000:] for rank in started]
        return states(home / "out")

    def interrupt(self, ranks: int, work: str) -> Try:
        """Interrupts a new run once, and finishes it."""
        shutil.rmtree(self.data / "classifier", ignore_errors=True)
        self.tries += 1
        home, output = self.folder / f"run{self.tries}", self.folder / f"run{self.tries}.txt"
        number = signal.SIGTERM if ranks > 1 else self.rng.choice(STOPPING)  # torchrun passes on no others
        early = self.rng.random() < EARLY
        moment = self.rng.uniform(0.3, LATEST)
        command = self.command(ranks, home, *QUIET, *LONG, *WORK[work])
        with output.open("wb") as file:
            environment = os.environ | ONE_THREAD
            run = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=tiny.ROOT, env=environment, start_new_session=True
            )
        log = home / "out" / "log.jsonl"
        begun = time.monotonic()
        while run.poll() is None and time.monotonic() - begun < 300:
            # torchrun has no ranks while it imports torch itself, and then ends as any process does.
            if (ranks == 1 or len(ranks_of(run.pid)) == ranks) and (
                early or (log.exists() and "train" in log.read_text())
            ):
                break
            time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            run.wait(moment)
        sent, place, before = run.poll() is None, self.place(work, log), busy(run.pid)
        for pid in (run.pid, *ranks_of(run.pid).values()):
            with suppress(OSError):
                os.setpriority(os.PRIO_PGRP, os.getpgid(pid), -19)
        run.send_signal(number)
        start = time.monotonic()
        _, status, used = os.wait4(run.pid, 0)
        code = run.returncode = os.waitstatus_to_exitcode(status)
        seconds, text = time.monotonic() - start, output.read_text(errors="replace")
        spent, load = used.ru_utime + used.ru_stime - before, os.getloadavg()[0]
        if not sent:
            return Try(ranks, work, "no signal", moment, "start", "at the end", 0.0, 0.0, 0.0, code == 0, "it was done")
        told = re.findall(rf"st_fast: .*?{number.name}.*", text)
        steps = {
            stage: max((r["step"] for r in tiny.records(home / "out", "train") if r["stage"] == stage), default=0)
            for stage in (STAGES if log.exists() else ())
        }
        there = saved(home / "out")
        nothing_lost = all(steps[stage] <= there.get(stage, 0) for stage in steps)
        stopped = code == EXIT_INTERRUPTED or (ranks > 1 and code == 1 and "SIGKILL" not in text)
        sound = stopped and nothing_lost and "Traceback" not in text.split("torch/distributed")[0]
        sound = sound and seconds <= PROMPT * max(1.0, load / (os.cpu_count() or 1))
        found = self.finish(ranks, work, home)
        wanted = self.undisturbed(ranks, work, home)
        same = found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        said = told[-1] if told else f"(no line) after {next(iter(text.splitlines()[-1:]), '')!r}"
        if sound and same:
            shutil.rmtree(home)
        return Try(
            ranks,
            work,
            number.name,
            moment,
            "start" if early else "first step",
            place,
            seconds,
            spent,
            load,
            sound and same,
            f"{said} [code {code}, same {same}]",
        )

    def place(self, work: str, log: Path) -> str:
        """What the run is doing, by the last record of its log."""
        kinds = re.findall(r'"kind": "(\w+)"', log.read_text()) if log.exists() else []
        if "train" not in kinds:
            return "starting"
        if work == "steps" or kinds[-1] != "save":
            return "steps"
        return (
            "training the classifier" if work == "classifier" and not (self.data / "classifier").exists() else "drawing"
        )

    def undisturbed(self, ranks: int, work: str, home: Path) -> dict[str, Tensor]:
        length = str(saved(home / "out")["align"])
        if (ranks, length) not in self.expected:
            twin = self.folder / f"twin{ranks}-{length}"
            self.expected[ranks, length] = self.train(ranks, twin, f"--stage.align.steps={length}")
        return self.expected[ranks, length]


def summary(tries: list[Try]) -> dict[str, object]:
    """How many, by ranks and by what the run was doing; how many were lost, and the longest time to the end."""
    return {
        "tries": len(tries),
        "lost": sum(not one.well for one in tries),
        "longest": round(max(one.seconds for one in tries), 1),
        "busiest": round(max(one.busy for one in tries), 1),
        "loads": sorted(round(one.load) for one in tries)[:: len(tries) - 1 or 1],
        "ranks": {str(count): sum(one.ranks == count for one in tries) for count in (1, 2)},
        "places": dict(sorted(Counter(one.place for one in tries).items())),
    }


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="tries on one rank, and as many on two")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="what the runs do")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file, written after every try")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tries: list[Try] = []
    with tempfile.TemporaryDirectory(prefix="st_fast-moments-") as folder:
        nursery = Nursery(Path(folder))
        moments = Moments(Path(folder), random.Random(given.seed), nursery)
        for number in range(given.times):
            for ranks in (1, 2):
                tries.append(moments.interrupt(ranks, given.work[number % len(given.work)]))
                print(tries[-1], flush=True)
                if given.out:
                    date, load = time.strftime("%Y-%m-%d", time.gmtime()), os.getloadavg()[2]
                    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}"
                    about = {"date": date, "machine": machine, "seed": given.seed}
                    write_json_atomic(given.out, about | summary(tries) | {"each": list(map(asdict, tries))})
        nursery.close()
    found = summary(tries)
    print(json.dumps(found))
    return 1 if found["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
