"""The step: st_fast's, the published loop's eager and compiled, and the floor that the step can't be faster than.

The floor is the step's matrix products alone and its attention alone: every linear layer is run at its own shape as the
step runs it, forward and gradients (the teacher's forward alone), and attention at its own shape through the backend
that the model uses. Times are multiplied by how often each occurs.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from bench import measure
from bench.machine import Machine, Suite, Task, notices
from bench.measure import Effort, Row, Samples, Stopwatch, Variant, give_memory_back, interleave, noise, spread, tidy
from bench.published import PlainLoop, in_subprocess, plain_loop, plain_variant
from bench.workload import IN_RANGE, STAGES, Ours, Setup, decisions, our_variant, ours
from st_fast.model.attention import Attend, attend_packed, choose
from st_fast.recipe import Recipe
from st_fast.recipe.architecture import Layer
from st_fast.recipe.schema import Model, Stage
from st_fast.train import profiling

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

    On a CPU these have a process of their own (`bench.published`); "plain, our memory" shares ours with its settings.
    On CUDA, where two loops of XL/2 do not fit one device, each is alone there; "compile whole" is left to the CPU.
    """
    breakdown: bool = True


def default_setups(device: torch.device) -> list[Setup]:
    """S/2 at batch 8 on a CPU; B/2 and XL/2 at 256 on CUDA; all three stages, and of an MMDiT the last.

    Of B/2 also the modern block, beside the published one.
    """
    if device.type == "cuda":
        steps = [(size, stage, 256) for size in ("B/2", "XL/2") for stage in STAGES] + [("MMDiT-24/2", "stage 2", 256)]
        steps += [("modern B/2", "plain", 256)]
    else:
        steps = [("S/2", stage, 8) for stage in STAGES] + [("MMDiT-6/2", stage, 8) for stage in ("stage 2", IN_RANGE)]
        steps += [("B/2", "plain", 8), ("modern B/2", "plain", 8)]
    return [Setup(*step, device, options=MICRO_BATCH if device.type == "cuda" else ()) for step in steps]


MICRO_BATCH = ("--optim.micro_batch=auto",)
"""On CUDA: as the shipped recipes have it."""


def default_wanted(setup: Setup, full: bool) -> Wanted:
    """Enough rounds for a figure; on two cores all steps take less than five minutes, or fifteen with `full`."""
    if setup.size.startswith("modern "):  # whose block no published loop has
        return replace(default_wanted(replace(setup, size=setup.size.removeprefix("modern ")), full), rivals=())
    if setup.device.type == "cuda":
        return Wanted(Effort(rounds=8, seconds=15, least=3, warmup=1), 5)
    if full:
        rivals = ("plain", "compile", "compile whole", OUR_MEMORY)
        return Wanted(Effort(rounds=6, seconds=90, least=3, warmup=1), 1, rivals)
    few = ("plain",) if setup.stage == "stage 1" or setup.size != "S/2" else ("plain", "compile")
    return Wanted(Effort(rounds=4, seconds=60, least=3, warmup=1), 1, few)


def setups(suite: Suite) -> list[Setup]:
    """The steps that a suite measures."""
    found = default_setups(suite.device)
    if not suite.small:
        return found
    return [replace(s, batch=4, tokens=16, depth=2, options=()) for s in found if s.size == found[0].size]


def steps(suite: Suite) -> Iterator[Task]:
    """The whole step's figures."""
    for setup in setups(suite):
        wanted = default_wanted(setup, suite.full)
        wanted = replace(wanted, effort=suite.effort) if suite.small else wanted
        yield setup.label, partial(measure_in, suite, setup, wanted)


def measure_in(suite: Suite, setup: Setup, wanted: Wanted) -> Row:
    """The row of one step, its MFU by the suite's own matmul rate."""
    return measure_step(setup, wanted, suite.store.machine)


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


def measure_step(setup: Setup, wanted: Wanted, machine: Machine) -> Row:
    """The row of one step. OutOfMemoryError if st_fast's own step does not fit; rivals get the batch that fits them."""
    loops = _one_by_one if setup.device.type == "cuda" else _interleaved
    with tidy(setup.device), ExitStack() as stack:
        return loops(setup, wanted, machine, stack)


def _interleaved(setup: Setup, wanted: Wanted, machine: Machine, stack: ExitStack) -> Row:
    """All loops by turns, round after round."""
    loop = stack.enter_context(ours(setup))
    variants: dict[str, Variant] = {"ours": our_variant(loop, wanted.block)}
    first, failed = {}, []
    for name in wanted.rivals:
        start = time.perf_counter()
        try:
            variants[name] = _rival(loop, setup, wanted.block, name, stack)
        except Exception as error:  # the compiler's failures have no common class
            if name == "plain" or isinstance(error, MemoryError):
                raise
            failed.append(_failed_to_compile(name, error))
        first[name] = time.perf_counter() - start
    watch = _Watch(loop)
    samples = interleave(variants, setup.device, wanted.effort)
    measured = _ours(loop, setup, wanted, watch, samples["ours"])
    row = _row(setup, loop.recipe, loop.flops, samples, dict.fromkeys(variants, setup.batch), wanted.block, machine)
    return row | measured | {"first_step_s": first} | notices([*loop.log.said, *failed])


def _one_by_one(setup: Setup, wanted: Wanted, machine: Machine, stack: ExitStack) -> Row:
    """Ours, then the plain loop, which is compiled afterwards: whichever is timed has the device to itself."""
    samples, measured, recipe, cost, plain = _ours_alone(setup, wanted)
    give_memory_back(setup.device)
    said = measured.pop("notices", [])
    batches, first = {"ours": setup.batch}, {}
    for name in wanted.rivals:
        assert plain is not None
        start = time.perf_counter()
        try:
            if name == "compile":
                plain.compile(whole=False)
            batches[name] = _largest_batch_of(plain, batches.get("plain", setup.batch))
        except Exception as error:
            if name == "plain" or isinstance(error, torch.OutOfMemoryError):
                raise
            said = [*said, _failed_to_compile(name, error)]
            continue
        first[name] = time.perf_counter() - start
        variant = plain_variant(plain, batches[name], wanted.block)
        samples |= interleave({name: variant}, setup.device, wanted.effort)
    row = _row(setup, recipe, cost, samples, batches, wanted.block, machine)
    return row | measured | {"first_step_s": first} | notices(said)


def _ours_alone(setup: Setup, wanted: Wanted) -> tuple[dict[str, Samples], Row, Recipe, float, PlainLoop | None]:
    """Our loop's samples and figures, its recipe and FLOPs a step, and the plain loop from its weights."""
    with ours(setup) as loop:
        peak, watch = _peak_memory(loop, setup.device), _Watch(loop)
        samples = interleave({"ours": our_variant(loop, wanted.block)}, setup.device, wanted.effort)
        measured = _ours(loop, setup, wanted, watch, samples["ours"]) | {"peak_gib": peak} | notices(loop.log.said)
        return samples, measured, loop.recipe, loop.flops, plain_loop(loop) if wanted.rivals else None


class _Watch:
    """What a loop did since this was made."""

    def __init__(self, loop: Ours) -> None:
        self._loop, self._start = loop, (loop.done, loop.supervised, loop.waited)

    def read(self) -> tuple[float, float]:
        """Supervised samples and milliseconds waited for data, each a step."""
        done, supervised, waited = self._start
        steps = self._loop.done - done
        return (self._loop.supervised - supervised) / steps, 1e3 * (self._loop.waited - waited) / steps


def _ours(loop: Ours, setup: Setup, wanted: Wanted, watch: _Watch, samples: Samples) -> Row:
    """Figures that only our loop has."""
    seconds, (rows, waited) = statistics.median(samples["step"]) / wanted.block, watch.read()
    found: Row = {"supervised": rows, "waited": waited / (1e3 * seconds), "micro_batch": loop.micro_batch}
    found |= decisions(loop)
    return found | ({"parts": _parts(loop, setup, wanted)} if wanted.breakdown else {})


def _failed_to_compile(name: str, error: Exception) -> str:
    return f"{name}: torch.compile failed: {(str(error).splitlines() or [type(error).__name__])[0]}"


def _peak_memory(loop: Ours, device: torch.device) -> float:
    """GiB at the peak of one step on CUDA."""
    torch.cuda.reset_peak_memory_stats(device)
    loop()
    return torch.cuda.max_memory_allocated(device) / 2**30


def _rival(loop: Ours, setup: Setup, block: int, name: str, processes: ExitStack) -> Variant:
    """The plain loop on a CPU, with the first step behind it."""
    if name != OUR_MEMORY:
        return processes.enter_context(in_subprocess(setup, name)).variant(block)
    plain = plain_loop(loop)
    plain_variant(plain, setup.batch, 1)(0, Stopwatch(setup.device))
    return plain_variant(plain, setup.batch, block)


def _largest_batch_of(plain: PlainLoop, most: int) -> int:
    """That the plain loop makes steps of, `most` or a half, a quarter, … of it."""

    def steps(batch: int) -> None:
        # Two: AdamW's moments are there from the first one's end on.
        plain_variant(plain, batch, block=2)(0, Stopwatch(plain.device))

    return largest_batch(steps, most, plain.device)


def _row(
    setup: Setup, recipe: Recipe, cost: float, samples: dict[str, Samples], batches: dict[str, int], block: int,
    machine: Machine,
) -> Row:  # fmt: skip
    step = {name: [s / block for s in series["step"]] for name, series in samples.items()}
    speed = {name: batches[name] / statistics.median(values) for name, values in step.items()}
    per_image = cost / setup.batch
    return {
        "size": setup.size, "stage": setup.stage, "batch": setup.batch, "tokens": setup.tokens,
        "depth": recipe.model.depth, "batches": batches, "rounds": len(step["ours"]), "steps_a_round": block,
        "ms": {name: 1e3 * statistics.median(values) for name, values in step.items()},
        "images_per_s": speed,
        "speedup": {name: speed["ours"] / value for name, value in speed.items() if name != "ours"},
        "gflop_per_image": per_image / 1e9,
        "mfu": {name: value * per_image / machine.matmul_rate for name, value in speed.items()},
        "noise": noise(step["ours"]), "spread_ms": spread(step["ours"]),
    }  # fmt: skip


def _parts(loop: Ours, setup: Setup, wanted: Wanted) -> Row:
    """The floor, the distance to it, and the families of st_fast's step.

    A machine's speed wanders by more than the distance, so every round measures the floor of the very step before it,
    which depends on how many samples were supervised.
    """
    trainer, model = loop.trainer, loop.recipe.model
    head, dtype = model.width // model.heads, trainer.context.dtype
    attend = choose(model.attention, setup.device, dtype, head, log.info, model.length)
    meter = FloorMeter(loop.recipe, loop.stage, attend, trainer.model.kernels.linear, setup.device, dtype)
    step, watch = our_variant(loop, wanted.block), _Watch(loop)

    def round_(number: int, time: Stopwatch) -> None:
        before = loop.supervised
        step(number, time)
        for key, seconds in meter(round((loop.supervised - before) / wanted.block)).items():
            time.add(key, seconds)

    effort = replace(wanted.effort, rounds=FLOOR_ROUNDS * wanted.effort.rounds)
    found = interleave({"ours": round_}, setup.device, effort)["ours"]
    apart = [s / wanted.block / sum(parts) for s, *parts in zip(*(found[k] for k in ("step", *PARTS)), strict=True)]
    floor = meter.flops(round(watch.read()[0])) | {key: statistics.median(found[key]) for key in PARTS}
    return {
        "floor": floor,
        "times_the_floor": statistics.median(apart),
        "noise": noise(apart),
        "rounds": len(apart),
        "at_product_speed_s": floor["products"] * (1 + floor["attention_flops"] / floor["product_flops"]),
        "families": profiling.by_family(measure.by_kernel(loop, setup.device, 3 if setup.device.type == "cuda" else 1)),
    }


PARTS = ("products", "attention")
FLOOR_ROUNDS = 2
"""Rounds with the floor for one with the rivals: the ratio is to be known to a few hundredths."""
Linear = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Product:
    """y (rows, wide) = x (rows, deep)·wᵀ, and its two gradients if trained."""

    rows: int
    deep: int
    wide: int
    trained: bool

    @property
    def elements(self) -> int:
        """Read and written, operands and results."""
        return (self.rows * self.deep + self.deep * self.wide + self.rows * self.wide) * (3 if self.trained else 1)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.deep * self.wide * (3 if self.trained else 1)


@dataclass(frozen=True)
class Attended:
    """Attention of `batch` samples, over the tokens of all streams."""

    batch: int
    trained: bool


def products(recipe: Recipe, stage: Stage, supervised: int) -> Counter[Product]:
    """All linear layers of one step, with `supervised` samples in the t-range."""
    model, method, batch = recipe.model, stage.method, recipe.optim.batch_size
    found = _trunk(model, batch, model.depth, trained=True) + _layers(model.final_layers, batch, trained=True)
    if supervised:
        found += _layers(method.head_layers(model), supervised, trained=True)
    if supervised and method.frozen_depth:
        found += _trunk(model, method.teacher_passes * supervised, method.frozen_depth, trained=False)
    return found


def _trunk(model: Model, batch: int, depth: int, trained: bool) -> Counter[Product]:
    blocks = [model.block_layers(ends=number == depth) for number in range(1, depth + 1)]
    return _layers(chain(model.embedders, *blocks), batch, trained)


def _layers(layers: Iterable[Layer], batch: int, trained: bool) -> Counter[Product]:
    return Counter(Product(batch * layer.rows, layer.inputs, layer.outputs, trained) for layer in layers)


def attended(recipe: Recipe, stage: Stage, supervised: int) -> Counter[Attended]:
    """All attentions of one step."""
    found = Counter({Attended(recipe.optim.batch_size, True): recipe.model.depth})
    if stage.method.frozen_depth and supervised:
        found[Attended(stage.method.teacher_passes * supervised, False)] += stage.method.frozen_depth
    return found


def _product_variant(product: Product, linear: Linear, device: torch.device, dtype: torch.dtype) -> Variant:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=product.trained)

    x, w, bias = leaf(product.rows, product.deep), leaf(product.wide, product.deep), leaf(product.wide)
    dy = torch.randn(product.rows, product.wide, device=device, dtype=dtype)

    def run(number: int, watch: Stopwatch) -> None:
        with watch("product"):
            y = linear(x, w, bias)
            if product.trained:
                torch.autograd.grad(y, (x, w, bias), dy)

    return run


def _attention_variant(
    case: Attended, model: Model, attend: Attend, device: torch.device, dtype: torch.dtype
) -> Variant:
    n, head = model.length, model.width // model.heads
    shape = (case.batch, n, 3, model.heads, head)
    qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=case.trained)
    # As the output projection's gradient comes: (B, N, H, d) in memory.
    dout = torch.randn(case.batch, n, model.heads, head, device=device, dtype=dtype)

    def run(number: int, watch: Stopwatch) -> None:
        with watch("attention"):
            out = attend_packed(attend, qkv)
            if case.trained:
                torch.autograd.grad(out, qkv, dout)

    return run


class FloorMeter:
    """Measures a step's matrix products and its attention, each alone: every distinct shape times how often it occurs.

    `attend` and `linear` are those that the step runs; `dtype` is the step's.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, attend: Attend, linear: Linear, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._recipe, self._stage, self._device = recipe, stage, device
        self._make: dict[type, Callable[..., Variant]] = {
            Product: lambda product: _product_variant(product, linear, device, dtype),
            Attended: lambda case: _attention_variant(case, recipe.model, attend, device, dtype),
        }
        self._kept: dict[Product | Attended, Variant] = {}

    def __call__(self, supervised: int) -> dict[str, float]:
        """Seconds of "products" and "attention" of a step with so many samples in the t-range, at this moment."""
        found = self._found(supervised)
        return {key: sum(n * self._seconds(case) for case, n in cases.items()) for key, cases in found.items()}

    def flops(self, supervised: int) -> dict[str, float]:
        """Those of both: "product_flops" and "attention_flops"."""
        model = self._recipe.model
        each = 2 * model.attention_macs
        found = self._found(supervised)
        return {
            "product_flops": sum(n * product.flops for product, n in found["products"].items()),
            "attention_flops": sum(
                n * case.batch * each * (3 if case.trained else 1) for case, n in found["attention"].items()
            ),
        }

    def _found(self, supervised: int) -> dict[str, Counter[Any]]:
        return {
            "products": products(self._recipe, self._stage, supervised),
            "attention": attended(self._recipe, self._stage, supervised),
        }

    def _seconds(self, case: Product | Attended) -> float:
        # Drawing the operands takes longest on a CPU, so they are kept; a GPU's memory is left to the step.
        variant = self._kept.get(case) or self._make[type(case)](case)
        if self._device.type == "cpu":
            self._kept[case] = variant
        (samples,) = interleave({"alone": variant}, self._device, ALONE)["alone"].values()
        return statistics.fmean(samples)


ALONE = Effort(rounds=6, seconds=60, warmup=1)
"""Of one shape: the step does not run it cold either."""
