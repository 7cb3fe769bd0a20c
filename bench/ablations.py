"""The step varied: choices of the recipe, schedules, sizes, the demo's ops, cold and warm starts.

A choice or schedule is measured beside the default, both training the same steps in the same rounds; their numbers must
agree before any time is taken. Neither makes a trial: the default is the step without CUDA graphs and `gelu_mlp`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench import measure, step
from bench.machine import ROOT, Suite, Task, end_with_the_parent, left_out, notices
from bench.measure import Effort, Row, interleave, noise, paired, paired_ratio, spread, tidy
from bench.step import Wanted
from bench.workload import STAGES, Ours, Setup, decisions, make_recipe, our_variant, ours
from st_fast.core.errors import UserError
from st_fast.core.machine import free_memory
from st_fast.kernels import SWITCHES
from st_fast.kernels.table import auto
from st_fast.model.attention import AUTO_ORDER, BACKENDS
from st_fast.model.fp8 import check_fp8
from st_fast.recipe import cost
from st_fast.recipe.architecture import resolve_model
from st_fast.recipe.schema import Model

PLAIN_OPS = (
    "norm_modulate", "gate_residual_norm_modulate", "qk_norm", "gelu_tanh", "gelu_mlp", "bias_gradients",
    "noisy_latents",
)  # fmt: skip
"""Switches of the plain step."""
AHEAD, PADDED = "--run.teacher_placement=ahead", "--run.supervised_rows=padded"
GRAPHS = (PADDED, "--run.cuda_graphs=true")
CHOICES = {
    **{f"{op} {how}": (f"--kernels.{op}={how}",) for op in PLAIN_OPS for how in ("reference", "fused")},
    "qk_norm heads": ("--kernels.qk_norm=heads",),
    "compile off": ("--run.compile=off",),
    "compile on": ("--run.compile=on",),
    **{f"attention {name}": (f"--model.attention={name}",) for name in BACKENDS},
    "modulation one": ("--model.modulation=one",),
    "checkpointing block": ("--run.checkpointing=block",),
    "checkpointing attention": ("--run.checkpointing=attention",),
    "fp8 tensorwise": ("--run.fp8=tensorwise",),
    "CUDA graphs": GRAPHS,
    "optimiser torch": ("--optim.implementation=torch",),
    "optimiser apex": ("--optim.implementation=apex",),
}
"""What may decide a default first."""
SOME = ("modulation one", "checkpointing block", "optimiser torch", "fp8 tensorwise", "compile off", "attention math")
"""One of each kind, for a rehearsal."""
FIRST_LOSS = {"cuda": 5e-3, "cpu": 1e-5}
"""Relative difference of the first step's loss that a choice may make: bf16's rounding, float32's."""
FP8_LOSS = 5e-2


def others(device: torch.device) -> list[str]:
    """The choices that can be had on such a device and are not the default there."""
    kind = device.type
    default = {f"{op} {auto(op, device)}" for op in PLAIN_OPS}
    default |= {"CUDA graphs"} if kind == "cpu" else set()
    default |= {f"attention {AUTO_ORDER[kind][0]}", "compile on" if kind == "cuda" else "compile off"}
    return [name for name in CHOICES if name not in default]


def measure_choice(setup: Setup, name: str, effort: Effort, block: int) -> Row:
    """The row of one choice beside the step without trials; "left_out" where it can't be had here.

    `block` steps a round.
    """
    setup = setup.untried
    chosen = replace(setup, options=(*setup.options, *CHOICES[name]))
    try:
        with tempfile.TemporaryDirectory(prefix="st_fast-bench-") as folder:
            check_fp8(make_recipe(chosen, Path(folder)), setup.device)
        with ours(setup) as default, tidy(setup.device):
            peaks = {"default": _peak(default, setup.device, beside=0)}
            beside = torch.cuda.memory_allocated(setup.device) if setup.device.type == "cuda" else 0
            with ours(chosen) as other:
                peaks[name] = _peak(other, setup.device, beside)
                row = _beside({"default": default, name: other}, setup, effort, block) | {"peak_gib": peaks}
                return row | notices(default.log.said + other.log.said)
    except UserError as error:
        return {"ok": True, "left_out": str(error).replace(f"{ROOT}/", "")}


def _beside(loops: dict[str, Ours], setup: Setup, effort: Effort, block: int) -> Row:
    default, name = loops
    allowed = FP8_LOSS if name.startswith("fp8") else FIRST_LOSS[setup.device.type]
    off = measure.worst_difference(*([[float(loop()[0])]] for loop in loops.values()))
    if not off <= allowed:
        return {"ok": False, "wrong": f"the loss is off by {off:.1e} (allowed: {allowed:.0e})"}
    return {"ok": True, "loss_off": off} | paired(loops[default], loops[name], name, setup.device, effort, block)


def _peak(loop: Ours, device: torch.device, beside: int) -> float | None:
    """GiB at the peak of one step, without the bytes that lay `beside`; None on a CPU. It warms the step up, too."""
    if device.type != "cuda":
        loop()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    loop()
    return (torch.cuda.max_memory_allocated(device) - beside) / 2**30


def choices(suite: Suite) -> Iterator[Task]:
    """What each choice that leaves the mathematics alone, or fp8, does to the plain step's time and memory.

    At XL/2 with a batch that two loops fit into one device's memory with.
    """
    large = Setup("XL/2", "plain", 64, suite.device) if suite.device.type == "cuda" else step.setups(suite)[0]
    setup = step.setups(suite)[0] if suite.small else large
    for name in SOME if suite.small else others(suite.device):
        block = 3 if suite.device.type == "cuda" and not suite.small else 1
        yield f"{setup.label} | {name}", partial(measure_choice, setup, name, suite.effort, block)


TEACHER: dict[str, tuple[str, ...]] = {
    "branches on two streams": ("--run.teacher_branches=streams",),
    "teacher a step ahead": (AHEAD,),
    "teacher a step ahead on two streams": (AHEAD, "--run.teacher_branches=streams"),
    "teacher beside the student": ("--run.teacher_placement=beside",),
    "sequential branches": ("--run.teacher_branches=sequential",),
    "padded rows": (PADDED,),
    "padded rows, teacher a step ahead": (PADDED, AHEAD),
}
UNIFORM = ("--flow.time=uniform",)
STREAMED = ("--data.loader=torch",)
BLOCK = {"cuda": 5, "cpu": 1}
"""Steps a round."""


@dataclass(frozen=True)
class Point:
    """A schedule to measure: its options over `setup`, whose own options the default gets, too."""

    name: str
    setup: Setup
    options: tuple[str, ...]

    @property
    def label(self) -> str:
        more = "".join(f", {option.removeprefix('--')}" for option in self.setup.options)
        return f"{self.setup.label}{more}: {self.name}"

    @property
    def refusal(self) -> str | None:
        """Why it can't be measured here, if it can't."""
        cpu = self.setup.device.type == "cpu"
        return "needs CUDA" if cpu and "--run.cuda_graphs=true" in self.options else None


def points(device: torch.device, small: Setup | None) -> Iterator[Point]:
    """Graphs where launches cost most, then every schedule of the teacher at XL/2 and B/2; or all of them at `small`.

    XL/2 has a batch that two loops fit into one device's memory with.
    """
    large = [small] if small else [Setup("XL/2", "stage 2", 64, device), Setup("B/2", "stage 2", 256, device)]
    little = [small] if small else [Setup("B/2", stage, 16, device) for stage in ("plain", "stage 1", "stage 2")]
    for setup in little:
        yield Point("CUDA graphs", setup, GRAPHS)
    for setup in large:
        for name, options in TEACHER.items():
            yield Point(name, setup, options)
        yield Point("padded rows", replace(setup, options=UNIFORM), (PADDED,))
        yield Point("prefetch", setup, ("--run.prefetch=true",))
        yield Point("prefetch", replace(setup, options=STREAMED), ("--run.prefetch=true",))


def measure_schedule(point: Point, effort: Effort) -> Row:
    """Milliseconds a step of both, how many times faster the schedule is, and by how much their numbers differ."""
    setup = point.setup.untried
    # Without CUDA the order of things is rehearsed on the one queue there is.
    other = replace(setup, options=(*setup.options, *point.options, "--run.streams=auto"))
    with ours(setup) as default, ours(other) as scheduled, tidy(setup.device):
        numbers = [[[float(v) for v in loop()] for _ in range(5)] for loop in (default, scheduled)]
        worst = measure.worst_difference(*numbers)
        if worst > measure.SAME_LOSS[setup.device.type]:
            return {"ok": False, "wrong": f"numbers differ by {worst:.1e}", "worst_difference": worst}
        timed = paired(default, scheduled, "schedule", setup.device, effort, BLOCK[setup.device.type])
        said = default.log.said + scheduled.log.said
    return {"ok": True, "worst_difference": worst} | timed | notices(said)


def schedules(suite: Suite) -> Iterator[Task]:
    """What streams, fixed shapes, prefetching and graphs make of the step, each beside the default."""
    small = replace(step.setups(suite)[-1], batch=4) if suite.small else None
    for point in points(suite.device, small):
        yield point.label, left_out(point.refusal) if point.refusal else partial(measure_schedule, point, suite.effort)


BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (64, 256, 1024)
DEPTHS = (3, 6, 12, 24)
SHARE_OF_MEMORY = 0.7


def sweep_points(device: torch.device, few: bool) -> list[Setup]:
    """All steps of the sweeps that fit into memory by estimate, each once; a few take minutes, the quickest first."""
    size, batch = ("XL/2", 64) if device.type == "cuda" else ("S/2", 4 if few else 8)
    batches, sizes = BATCHES[: 5 if few else None], 2 if few else 4 if device.type == "cuda" else 3
    recipes = ("S/2", "B/2", "L/2", "XL/2")[:sizes]
    wanted = [Setup(name, stage, batch, device) for name in recipes for stage in STAGES]
    wanted += [Setup(size, "plain", b, device) for b in batches]
    wanted += [Setup(size, "plain", batch, device, tokens=tokens) for tokens in TOKENS if tokens != 256]
    own = resolve_model(Model(f"SiT-{size}")).depth
    wanted += [Setup(size, "plain", batch, device, depth=depth) for depth in DEPTHS if depth != own]
    found = [setup for setup in dict.fromkeys(wanted) if fits(setup)]
    return sorted(found, key=_work) if few else found


def _work(setup: Setup) -> float:
    """Multiply-adds of a step's forward, roughly."""
    model = _model(setup)
    return setup.batch * cost.trunk_macs(model) * (setup.depth or model.depth) / model.depth


def _model(setup: Setup) -> Model:
    return resolve_model(Model(f"SiT-{setup.size}", latent_size=2 * int(setup.tokens**0.5)))


def memory(device: torch.device) -> int:
    """Bytes of the device, or free ones of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_memory(device)


def fits(setup: Setup) -> bool:
    """Whether weights, their state (the plain loop's too) and activations stay within a share of the memory."""
    bf16 = setup.device.type == "cuda"
    model = _model(setup)
    depth_share = (setup.depth or model.depth) / model.depth
    state = 2 * cost.STATE_BYTES * model.parameters * depth_share
    # Eager PyTorch keeps about twice what the formula counts for st_fast's own step.
    activations = 2 * setup.batch * cost.activation_bytes(model, bf16) * depth_share
    return state + activations < SHARE_OF_MEMORY * memory(setup.device)


def sweep(suite: Suite) -> Iterator[Task]:
    """How the step's cost grows: the published loop beside it on CUDA and with --full, st_fast's alone in minutes."""
    whole = suite.device.type == "cuda" or suite.full
    alone = Wanted(Effort(rounds=5, seconds=4, least=2, warmup=1), rivals=(), breakdown=False)
    both = Wanted(Effort(rounds=5, seconds=30, least=2, warmup=1), rivals=("plain",), breakdown=False)
    for setup in step.setups(suite)[:1] if suite.small else sweep_points(suite.device, few=not whole):
        yield setup.label, partial(step.measure_in, suite, setup, both if whole else alone)


def profiles(suite: Suite) -> Iterator[Task]:
    """The longest kernels of a step, by name."""
    for setup in step.setups(suite):
        yield setup.label, partial(_longest, setup)


def _longest(setup: Setup) -> Row:
    with ours(setup) as loop, tidy(setup.device):
        loop()
        found = measure.by_kernel(loop, setup.device, times=3)
        longest = {name[:120]: 1e3 * spent for name, spent in list(found.items())[:30]}
        return {"ok": True, "kernels_ms": longest} | decisions(loop) | notices(loop.log.said)


REFERENCE = (*(f"--kernels.{op}=reference" for op in SWITCHES), "--model.attention=sdpa")
DEMO: dict[str, tuple[str, ...]] = {"auto": (), "reference": REFERENCE}


def demo(suite: Suite) -> Iterator[Task]:
    """`make demo`'s own step: stage 2 of recipes/digits.toml, but for random latents and stratified t."""
    effort = suite.effort if suite.small else Effort(rounds=100, seconds=10, least=20, warmup=3)
    yield "digits, stage 2", partial(measure_demo, suite.device, effort)


def measure_demo(device: torch.device, effort: Effort) -> Row:
    """Milliseconds a step with the ops that "auto" chooses and with the reference's, in turns."""
    with ExitStack() as loops:
        made = {name: Setup("digits", "stage 2", 64, device, options=options) for name, options in DEMO.items()}
        variants = {name: our_variant(loops.enter_context(ours(setup.untried)), 1) for name, setup in made.items()}
        samples = {name: found["step"] for name, found in interleave(variants, device, effort).items()}
    return {
        "recipe": "digits", "stage": "stage 2", "batch": 64, "rounds": len(samples["auto"]),
        "ms": {name: 1e3 * statistics.median(values) for name, values in samples.items()},
        "speedup": {"reference": paired_ratio(samples["reference"], samples["auto"])},
        "noise": noise(samples["auto"]), "spread_ms": spread(samples["auto"]),
    }  # fmt: skip


def first_step(suite: Suite) -> Iterator[Task]:
    """Cold and warm start: of the largest plain step on CUDA, of the only one on a CPU."""
    setup = [s for s in step.default_setups(suite.device) if s.stage == "plain"][-1]
    setup = replace(setup, batch=1, options=()) if suite.small else setup
    yield setup.label, lambda: {"seconds": cold_and_warm(setup)}


def cold_and_warm(setup: Setup) -> dict[str, dict[str, float]]:
    """Seconds of a start without and with the compiler's cache. RuntimeError with the last line if it fails."""
    with tempfile.TemporaryDirectory(prefix="st_fast-cache-") as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        return {name: _start(setup, environment) for name in ("cold", "warm")}


def _start(setup: Setup, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.workload", setup.size, setup.stage, str(setup.batch), str(setup.device)]
    start = time.monotonic()  # one clock for all processes
    done = subprocess.run(
        [*command, repr(start), *setup.options], cwd=ROOT, env=environment, capture_output=True, text=True,
        preexec_fn=end_with_the_parent,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"bench.workload: {done.stderr.strip().splitlines()[-1]}")
    parts: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"total": time.monotonic() - start, **parts}


def contention(suite: Suite) -> Iterator[Task]:
    """The demo's step beside other work, in processes of their own."""
    yield "digits, stage 2", partial(_beside_other_work, 10.0 if suite.small else 50.0)


def _beside_other_work(seconds: float) -> Row:
    from bench import contention

    return contention.measure(seconds)
