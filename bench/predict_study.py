"""Predicts how long a study trains on one GPU that is not here, run by run.

    python -m bench.predict_study recipes/study/cifar10_gpu.toml

A step is counted from the study's own recipes and timed by the assumptions of `bench.predict`: nothing is measured.
What these leave out is added to the sum: `MARGIN`, `START` and `ONCE`, assumed as well.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import counting
from bench.counting import Kernel
from bench.predict import DEVICES, Rates, total
from bench.tables import milliseconds, table
from st_fast.core.command import run_command
from st_fast.recipe.methods import SelfTranscendence
from st_fast.recipe.schema import Kernels
from st_fast.study.plan import Job, Study, jobs, read_study

MARGIN = 1.4
"""Of a step's time. The shares that `bench.predict` assumes are those of products 1,152 wide and more; a small model's
are narrower and fill fewer of the device's units."""
START = 8.0
"""Seconds of a run beside its steps: it draws its weights, reads its teacher, tries its kernels, records its graphs,
and saves."""
ONCE = 45.0
"""Seconds of the whole: starting Python, measuring the machine, compiling the first block of each kind."""


@dataclass(frozen=True)
class Trained:
    """A run of a study and what one of its steps launches."""

    name: str
    steps: int
    kernels: list[Kernel]

    def step(self, rates: Rates) -> float:
        """Predicted seconds of a step."""
        return total(self.kernels, rates)

    def training(self, rates: Rates) -> float:
        """Predicted seconds of all its steps."""
        return self.steps * self.step(rates)


def trained(study: Study) -> list[Trained]:
    """Every run that trains, in order; the runs that do the same work in a step are counted once."""
    counted: dict[str, list[Kernel]] = {}
    found = []
    for job in jobs(study, Path("runs")):
        if not job.steps:
            continue
        work = _work(job)
        if work not in counted:
            # As the trial at a run's start is taken to decide (`counting.TIMED`).
            kernels = Kernels(**vars(job.recipe.kernels) | {"gelu_mlp": "fused"})
            counted[work] = counting.step_kernels(replace(job.recipe, kernels=kernels), job.recipe.stages[0])
        found.append(Trained(job.folder.relative_to("runs").as_posix(), job.steps, counted[work]))
    return found


def _work(job: Job) -> str:
    """The method of a run's stage, without which teacher it has."""
    method = job.recipe.stages[0].method
    return repr(replace(method, teacher="any") if isinstance(method, SelfTranscendence) else method)


def training_seconds(runs: Sequence[Trained], rates: Rates) -> float:
    """Predicted seconds of all steps of all runs, without what `whole_seconds` adds."""
    return sum(run.training(rates) for run in runs)


def whole_seconds(runs: Sequence[Trained], rates: Rates) -> float:
    """Seconds to plan for: training with its margin, and what each run and the whole take beside."""
    return MARGIN * training_seconds(runs, rates) + START * len(runs) + ONCE


def report(runs: Sequence[Trained]) -> str:
    """A row a run, and the sums."""
    head = ["run", "steps", *(f"{rates.name}, {unit}" for rates in DEVICES for unit in ("ms a step", "s"))]
    lines = [
        [run.name, f"{run.steps:,}"]
        + [cell for r in DEVICES for cell in (milliseconds(1e3 * run.step(r)), f"{run.training(r):.0f}")]
        for run in runs
    ]
    sums = {"all": training_seconds, f"× {MARGIN:g}, + {START:g} s a run, + {ONCE:g} s": whole_seconds}
    for name, seconds in sums.items():
        lines.append([name, f"{sum(run.steps for run in runs):,}"])
        lines[-1] += [cell for rates in DEVICES for cell in ("", f"**{seconds(runs, rates):.0f}**")]
    return f"Predicted, not measured:\n\n{table(head, lines)}"


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict_study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("study", type=Path, metavar="FILE", help="such as recipes/study/cifar10_gpu.toml")
    gc.disable()  # as bench.predict: a trace makes millions of objects and no garbage
    print(report(trained(read_study(parser.parse_args(arguments).study))))


if __name__ == "__main__":
    run_command(main)
