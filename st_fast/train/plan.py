"""Estimates a stage's step time and images/s on 1 to 64 GPUs from measured speed, gradient bytes and link bandwidth.

    python -m st_fast doctor --plan recipes/sit_xl.toml --images-per-s 700
    python -m st_fast doctor --plan recipes/sit_xl.toml --run runs/sit_xl --network 22

The global batch is the recipe's, whatever the number of GPUs: compute shrinks with them and traffic does not.
DDP: the weights on every GPU; gradients summed over a ring, overlapped with the backward pass but for the last bucket.
FSDP2 (run.sharding = "fsdp2"): weights, optimiser and EMA in shards; weights gathered for forward and backward,
gradients scattered. It sends more, and saves memory and the update's time.
Optimistic: latencies are left out, and a GPU is as efficient with a few images as with the batch it was measured at.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high

from st_fast.core.command import command_parser
from st_fast.core.errors import UserError
from st_fast.core.files import is_count
from st_fast.core.options import BATCH_MOST, integer, number, path
from st_fast.core.records import log_records
from st_fast.recipe import cost, load
from st_fast.train.parallel import BUCKET_BYTES

COUNTS = (1, 2, 4, 8, 16, 32, 64)
UPDATE_BYTES = 42
"""Bytes that clipping, AdamW, EMA and the bf16 copy move a parameter, in one pass over memory."""
ASSUMED_FLOPS = 0.6 * 790e12
"""Where nothing was measured: this project's goal, as a share of what an H200's bf16 matrix product reaches."""
BACKWARD_SHARE = 2 / 3
"""Of a step's compute; the forward is the rest."""


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and its links, in bytes a second and one direction."""

    per_node: int
    within: float
    """Between GPUs of one node."""
    between: float
    """Between nodes, for each GPU of a node."""
    memory: float
    """Copying, read and write counted."""

    def link(self, count: int) -> float:
        """The slowest link on a ring through `count` GPUs; a node's rings leave it through all its network cards."""
        return self.within if count <= self.per_node else min(self.within, self.between * self.per_node)

    def update(self, parameters: int) -> float:
        """Seconds of the optimiser's pass over all state."""
        return parameters * UPDATE_BYTES / self.memory


@dataclass(frozen=True)
class Work:
    """One step of a stage on one GPU."""

    compute: float
    """Seconds of forward and backward for the whole global batch."""
    images: int
    parameters: int
    weight_bytes: int
    """Of one parameter in use, and so of its gradient."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, the part of them that is communication not hidden by compute, and GiB of state a GPU."""

    step: float
    exposed: float
    memory_gib: float


def ddp(work: Work, machine: Machine, count: int) -> Estimate:
    """Ring all-reduce sends 2·(n − 1)/n of the gradients (Patarasuk & Yuan 2009); the last bucket can't be hidden."""
    share = 2 * (count - 1) / count / machine.link(count)
    total, compute = work.parameters * work.weight_bytes, work.compute / count
    exposed = total * share - min((total - min(BUCKET_BYTES, total)) * share, BACKWARD_SHARE * compute)
    state = work.parameters * cost.STATE_BYTES / 2**30
    return Estimate(compute + exposed + machine.update(work.parameters), exposed, state)


def fsdp(work: Work, machine: Machine, count: int) -> Estimate:
    """ZeRO-3's traffic, 3·(n − 1)/n of the weights (arXiv 1910.02054): two gathers and a scatter, hidden by compute."""
    traffic = (count - 1) / count / machine.link(count) * work.parameters * work.weight_bytes
    compute = work.compute / count
    exposed = max(0.0, traffic - (1 - BACKWARD_SHARE) * compute) + max(0.0, 2 * traffic - BACKWARD_SHARE * compute)
    state = work.parameters * cost.STATE_BYTES / count / 2**30
    return Estimate(compute + exposed + machine.update(work.parameters) / count, exposed, state)


def table(work: Work, machine: Machine) -> str:
    """Markdown: one line a GPU count at which the global batch divides."""
    lines = [
        "| GPUs | images a GPU | DDP ms | exposed ms | images/s | efficiency | FSDP2 ms | exposed ms | images/s |"
        " state a GPU, DDP / FSDP2 GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    single = ddp(work, machine, 1).step
    for count in (n for n in COUNTS if work.images % n == 0):
        a, b = ddp(work, machine, count), fsdp(work, machine, count)
        lines.append(
            f"| {count} | {work.images // count} | {1e3 * a.step:.1f} | {1e3 * a.exposed:.1f} | "
            f"{work.images / a.step:,.0f} | {100 * single / (count * a.step):.0f} % | {1e3 * b.step:.1f} | "
            f"{1e3 * b.exposed:.1f} | {work.images / b.step:,.0f} | {a.memory_gib:.1f} / {b.memory_gib:.1f} |"
        )
    return "\n".join(lines)


def measured_rate(run: Path, stage: str) -> float:
    """Images/s of one GPU: the median of a run's log for a stage. UserError where the log has none."""
    rates, ranks, log = list[float](), 1, run / "log.jsonl"
    for record in log_records(log) if log.is_file() else ():
        if (record["kind"], record["stage"]) == ("start", stage) and is_count(record.get("ranks")):
            ranks = max(1, record["ranks"])
        if (record["kind"], record["stage"]) == ("train", stage) and type(record.get("images_per_s")) in (int, float):
            rates.append(record["images_per_s"] / ranks)
    if not rates:
        raise UserError(f"--run {run}: its log has no training step of stage {stage}")
    return median_high(rates)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("doctor --plan", __doc__)
    positive = number(0, 1e12, above=True)
    parser.add_argument("recipe", type=path)
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument("--images-per-s", type=positive, help="of one GPU, measured (python -m pytest bench/)")
    measured.add_argument("--run", type=path, help="a run folder whose log says how fast it was")
    parser.add_argument("--per-node", type=integer(1, BATCH_MOST), default=8, help="GPUs in a node (8)")
    parser.add_argument(
        "--nvlink", type=positive, default=360.0, help="GB/s a GPU within a node (360: NVLink 4, 80 %%)"
    )
    parser.add_argument(
        "--network", type=positive, default=45.0, help="GB/s a GPU between nodes (45: 400 Gbit/s, 90 %%)"
    )
    parser.add_argument("--memory", type=positive, default=4300.0, help="GB/s of device memory (4300: H200, measured)")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Prints the estimate of every stage of a recipe. UserError for what is not there, SystemExit(2) for bad flags."""
    given = parser().parse_args(list(arguments))
    recipe = load(given.recipe, ranks=None)
    machine = Machine(given.per_node, given.nvlink * 1e9, given.network * 1e9, given.memory * 1e9)
    images = recipe.optim.batch_size
    weight_bytes = 4 if recipe.run.precision == "fp32" else 2
    for stage in recipe.stages:
        parameters = recipe.for_stage(stage).model.parameters
        if given.run is not None:
            rate, source = measured_rate(given.run, stage.name), f"measured in {given.run}"
        elif given.images_per_s is not None:
            rate, source = given.images_per_s, "as given"
        else:
            rate = ASSUMED_FLOPS * images / cost.stage_flops(recipe, stage, 0, 1)
            source = "ASSUMED: 60 % of an H200's 790 TFLOP/s"
        step = images / rate  # the update is part of it, and does not shrink with the batch
        work = Work(max(step - machine.update(parameters), 0.1 * step), images, parameters, weight_bytes)
        links = f"{given.nvlink:g} GB/s within {given.per_node} GPUs, {given.network:g} GB/s a GPU beyond"
        print(
            f"{stage.name}: {recipe.model.name}, global batch {images}, {parameters * weight_bytes / 2**30:.2f} GiB of "
            f"gradients a step; one GPU {rate:,.0f} images/s ({source}); {links}\n{table(work, machine)}\n"
        )
