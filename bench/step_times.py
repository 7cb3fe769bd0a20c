"""Times one step: st_fast's, the plain loop's, and the plain loop's under torch.compile, with the step's floor."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch

from bench import apart, floor, profiles
from bench.results import Machine, Row
from bench.timing import Effort, Samples, Stopwatch, Variant, interleave, noise
from bench.workload import STAGES, Ours, Setup, our_variant, ours, plain_variant
from st_fast import families
from st_fast.model.attention import choose

log = logging.getLogger("bench")
OUR_MEMORY = "plain, our memory"


@dataclass(frozen=True)
class Wanted:
    """What to measure beside st_fast's own step."""

    effort: Effort
    block: int = 1
    """Steps a round: several on CUDA, where work of one step overlaps with the next."""
    rivals: tuple[str, ...] = ("plain", "compile")
    """"plain" is the loop in eager mode; "compile" has its blocks compiled, "compile whole" its networks.

    On a CPU these have a process of their own (`bench.apart`); "plain, our memory" shares ours, with what is set there.
    """
    breakdown: bool = True


def default_setups(device: torch.device) -> list[Setup]:
    """S/2 at batch 8 on a CPU; B/2 and XL/2 at 256 on CUDA; all three stages."""
    sizes = [("B/2", 256), ("XL/2", 256)] if device.type == "cuda" else [("S/2", 8)]
    return [Setup(size, stage, batch, device) for size, batch in sizes for stage in STAGES]


def default_wanted(device: torch.device, full: bool) -> Wanted:
    """Enough rounds for a figure, within the ten minutes that the whole of `pytest bench/` may take on two cores."""
    rivals = ("plain", "compile", "compile whole") if full else ("plain", "compile")
    if device.type == "cuda":
        return Wanted(Effort(rounds=12, seconds=60, least=5, warmup=2), 5, rivals)
    return Wanted(Effort(rounds=6, seconds=60, least=3, warmup=1), 1, (*rivals, OUR_MEMORY))


@contextmanager
def tidy(device: torch.device) -> Iterator[None]:
    """Gives memory back on leaving."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def largest_batch(run: Callable[[int], None], batch: int, device: torch.device) -> int:
    """`batch`, halved until `run(batch)` fits into memory; the error itself if not even 1 does."""
    while True:
        try:
            with tidy(device):
                run(batch)
            return batch
        except (torch.OutOfMemoryError, MemoryError):
            if batch == 1:
                raise
            batch //= 2


def measure(setup: Setup, wanted: Wanted, machine: Machine) -> Row:
    """The row of one step. OutOfMemoryError if st_fast's own step does not fit; rivals get the batch that fits them."""
    with ours(setup) as loop, tidy(setup.device), ExitStack() as processes:
        peak = _peak_memory(loop, setup.device)
        variants: dict[str, Variant] = {"ours": our_variant(loop, wanted.block)}
        batches, first = {"ours": setup.batch}, {}
        for name in wanted.rivals:
            start = time.perf_counter()
            try:
                variants[name], batches[name] = _rival(loop, setup, wanted.block, name, processes)
            except Exception as error:  # the compiler's failures have no common class
                if name == "plain" or isinstance(error, torch.OutOfMemoryError | MemoryError):
                    raise
                log.warning("%s: torch.compile failed: %s", setup.label, str(error).splitlines()[0])
            first[name] = time.perf_counter() - start
        done, supervised, waited = loop.done, loop.supervised, loop.waited
        samples = interleave(variants, setup.device, wanted.effort)
        count = loop.done - done
        rows, wait = (loop.supervised - supervised) / count, (loop.waited - waited) / count
        row = _row(setup, loop, samples, batches, wanted.block, machine)
        row |= {"supervised": rows, "first_step_s": first, "peak_gib": peak, "waited": 1e3 * wait / row["ms"]["ours"]}
        if wanted.breakdown:
            row["parts"] = _parts(loop, setup, round(rows), row["ms"]["ours"] / 1e3)
    return row


def _peak_memory(loop: Ours, device: torch.device) -> float | None:
    """GiB at the peak of one step; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    loop()
    return torch.cuda.max_memory_allocated(device) / 2**30


def _rival(loop: Ours, setup: Setup, block: int, name: str, processes: ExitStack) -> tuple[Variant, int]:
    """The plain loop, with the first step behind it, and its batch."""
    if setup.device.type == "cpu" and name != OUR_MEMORY:
        return processes.enter_context(apart.plain(setup, name)).variant(block), setup.batch
    plain = loop.plain()
    if "compile" in name:
        plain.compile(whole="whole" in name)

    def first_step(batch: int) -> None:
        plain_variant(plain, batch, 1)(0, Stopwatch(setup.device))

    batch = largest_batch(first_step, setup.batch, setup.device)
    return plain_variant(plain, batch, block), batch


def _row(
    setup: Setup, loop: Ours, samples: dict[str, Samples], batches: dict[str, int], block: int, machine: Machine
) -> Row:
    step = {name: [s / block for s in series["step"]] for name, series in samples.items()}
    speed = {name: batches[name] / statistics.median(values) for name, values in step.items()}
    per_image = loop.flops / setup.batch
    return {
        "size": setup.size, "stage": setup.stage, "batch": setup.batch, "tokens": setup.tokens,
        "depth": loop.recipe.model.depth, "batches": batches, "rounds": len(step["ours"]), "steps_a_round": block,
        "ms": {name: 1e3 * statistics.median(values) for name, values in step.items()},
        "images_per_s": speed,
        "speedup": {name: speed["ours"] / value for name, value in speed.items() if name != "ours"},
        "gflop_per_image": per_image / 1e9,
        "mfu": {name: value * per_image / machine.matmul_rate for name, value in speed.items()},
        "noise": noise(step["ours"]),
    }  # fmt: skip


def _parts(loop: Ours, setup: Setup, supervised: int, seconds: float) -> Row:
    """The floor, the distance to it, and the families of st_fast's step."""
    dtype = loop.trainer.setting.dtype
    effort = Effort(rounds=5, seconds=2, least=2, warmup=1)
    model = loop.recipe.model
    attend = choose(model.attention, setup.device, dtype, model.width // model.heads, log.info)
    linear = loop.trainer.model.kernels.linear
    least = floor.measure(loop.recipe, loop.stage, supervised, attend, linear, setup.device, dtype, effort)
    return {
        "floor": asdict(least),
        "times_the_floor": seconds / least.seconds,
        "at_product_speed_s": least.products * (1 + least.attention_flops / least.product_flops),
        "families": families.by_family(profiles.kernels(loop, setup.device, 3 if setup.device.type == "cuda" else 1)),
    }
