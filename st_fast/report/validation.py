"""What a stage's validations found: the held-out loss and that of training records, over the steps and by time."""

from collections.abc import Sequence
from dataclasses import dataclass

from st_fast.report import words
from st_fast.report.arms import Arm
from st_fast.report.collect import finite, number

KINDS = (
    ("", "held out", 0),
    ("train_", "training records", 2),
    ("raw_", "held out, raw weights", 1),
    ("raw_train_", "training records, raw weights", 2),
)
"""(how a record's keys begin, words, dash)."""


@dataclass(frozen=True)
class Losses:
    """Losses of one stage's validations on records of one kind."""

    arm: Arm
    prefix: str
    label: str
    dash: int

    @property
    def over_steps(self) -> tuple[list[float], list[float]]:
        """Steps and losses."""
        return self.arm.stage.series("validate", f"{self.prefix}loss")

    @property
    def bins(self) -> list[float]:
        """The loss in each of equal bins of the time, at the last validation."""
        return [float(value) for value in self.arm.stage.records["validate"][-1].get(f"{self.prefix}by_time", [])]

    @property
    def over_time(self) -> tuple[list[float], list[float]]:
        """Middles of the bins, and their losses."""
        return finite(((place + 0.5) / len(self.bins), loss) for place, loss in enumerate(self.bins))

    @property
    def line(self) -> list[str]:
        """Of the table: the last validation."""
        last = self.arm.stage.records["validate"][-1]
        mean = words.plain(number(last, f"{self.prefix}loss"))
        return [self.label, words.count(last["step"]), mean, *map(words.plain, self.bins)]


def validated(arms: Sequence[Arm]) -> list[Losses]:
    """All that was taken at the last validation of each stage; empty where none was made."""
    return [
        Losses(arm, prefix, f"{arm.label}, {label}", dash)
        for arm in arms
        for record in arm.stage.records["validate"][-1:]
        for prefix, label, dash in KINDS
        if f"{prefix}loss" in record
    ]


def tables(arms: Sequence[Arm]) -> list[tuple[list[str], list[list[str]]]]:
    """Head and lines of the last validations: the mean and each bin of times; a table for each number of bins."""
    found: dict[int, list[list[str]]] = {}
    for one in validated(arms):
        found.setdefault(len(one.bins), []).append(one.line)
    return [
        (["Records", "Step", "Mean", *(f"t {n / bins:.2g} – {(n + 1) / bins:.2g}" for n in range(bins))], lines)
        for bins, lines in found.items()
    ]


def incomparable(arms: Sequence[Arm]) -> list[str]:
    """A sentence where stages' held-out losses are not of the same records, times, noise and weights; else none."""
    taken = [arm.stage.records["validate"][-1] for arm in arms if arm.stage.records["validate"]]
    if len({str(record.get("protocol")) for record in taken}) < 2:
        return []
    return ["Losses on held-out records are not of the same records, noise or weights everywhere: don't compare them."]
