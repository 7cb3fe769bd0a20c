"""Is everything right on this device, and does it train?

Every op, backend and compiled form against the truth; then CIFAR-10's study as far as the time allows, with samples of
what is trained. What is brought home of it lies beside the rows: `runs.tar.gz` (recipes, logs, pictures; no weights)
and a set of samples an arm, `samples-ARM.npz`, which `python -m st_fast.evaluate RUN --samples FILE` scores where the
real images are.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench import measure, ops, optimiser
from bench.machine import ROOT, Suite, Task, end_with_the_parent, left_out, notices
from bench.measure import Row, Stopwatch, interleave, tidy
from bench.ops import Case
from bench.step import setups
from bench.workload import Setup, ours
from st_fast.core.errors import EXIT_INTERRUPTED
from st_fast.kernels import native
from st_fast.kernels.common.trial import Draw
from st_fast.model.attention import BACKENDS, Attend, verify
from st_fast.report.collect import read_run
from st_fast.study.plan import Job, jobs, read_study
from st_fast.study.seeds import done

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 72)


def build(suite: Suite) -> Iterator[Task]:
    """Whether the compiled ops are loaded; on CUDA their build is part of importing st_fast."""
    for kind in ("cpu", "cuda") if suite.device.type == "cuda" else ("cpu",):
        yield kind, partial(_loaded, kind)


def _loaded(kind: str) -> Row:
    if not native.available(kind):
        raise RuntimeError(f"csrc ({kind}) is not loaded: see the notice at the start")
    return {"ok": True, "file": str(native.path(kind))}


def truth(suite: Suite) -> Iterator[Task]:
    """Every op against float64, outputs and gradients, at three dtypes; the optimiser against the reference."""
    for size in ops.sizes(suite):
        for dtype in DTYPES:
            for case in ops.cases(size, dtype, suite.device):
                yield case.key, partial(_true, case)
    for setting in optimiser.cases(suite.device, full=False):
        yield setting.key, partial(_true_optimiser, setting)


def _true(case: Case) -> Row:
    inputs = case.inputs(0)
    measure.check(case, {"fused": case.fused}, inputs)
    exact = measure.results(case.eager, measure.in_float64(inputs))

    def worst(call: Callable[..., object]) -> float:
        return max(measure.errors(a, b)[1] for a, b in zip(measure.results(call, inputs), exact, strict=True))

    return {"ok": True, "worst_error": worst(case.fused), "eager_error": worst(case.eager)}


def _true_optimiser(setting: optimiser.OptimiserCase) -> Row:
    optimiser.check(setting)
    return {"ok": True}


def attention(suite: Suite) -> Iterator[Task]:
    """Every attention backend: is it right, forward and gradients, and how long does it take at XL/2's shape?"""
    for name, backend in BACKENDS.items():
        for head in HEAD_SIZES:
            refusal = backend.refusal(suite.device, head)
            label = f"{name}, head_dim {head}"
            yield label, partial(_attention, suite, backend.attend, head) if refusal is None else left_out(refusal)


def _attention(suite: Suite, attend: Attend, head: int) -> Row:
    problem = verify(attend, suite.device, suite.dtype, head)
    if problem:
        return {"ok": False, "wrong": problem}
    batch, heads, tokens = (2, 2, 16) if suite.small else (256, 16, 256)
    draw = Draw(suite.device, suite.dtype, 0)
    q, k, v = (draw.leaf(batch, heads, tokens, head) for _ in range(3))
    dout = draw(batch, tokens, heads, head).transpose(1, 2)

    def run(number: int, watch: Stopwatch) -> None:
        with watch("forward"):
            out = attend(q, k, v)
        with watch("backward"):
            torch.autograd.grad(out, (q, k, v), dout)

    samples = interleave({"it": run}, suite.device, suite.effort)["it"]
    return {"ok": True} | {f"{phase}_ms": 1e3 * statistics.median(values) for phase, values in samples.items()}


def compiled(suite: Suite) -> Iterator[Task]:
    """Compiled equals eager: every op, and three steps of every stage."""
    for case in ops.cases(ops.sizes(suite)[-1], suite.dtype, suite.device):
        yield case.key, partial(_same_op, case)
    for setup in setups(suite):
        yield f"step, {setup.label}", partial(_same_step, setup)


def _same_op(case: Case) -> Row:
    torch._dynamo.reset()
    inputs = case.inputs(0)
    eager = measure.results(case.fused, inputs)
    found = measure.results(torch.compile(case.fused, fullgraph=True, dynamic=False), inputs)
    worst = max(measure.errors(a, b.double())[1] for a, b in zip(found, eager, strict=True))
    return {"ok": worst <= measure.SLACK_ULPS * torch.finfo(case.dtype).eps, "worst_difference": worst}


def _same_step(setup: Setup) -> Row:
    values, said = {}, list[str]()
    for choice in ("off", "on"):
        with ours(replace(setup.untried, compile=choice)) as loop, tidy(setup.device):
            values[choice] = [[float(v) for v in loop()] for _ in range(3)]
            said += loop.log.said
    worst = measure.worst_difference(values["off"], values["on"])
    ok = worst <= measure.SAME_LOSS[setup.device.type]
    return {"ok": ok, "worst_difference": worst, "eager_loss": values["off"][-1][0]} | notices(said)


STUDY, REHEARSAL = ROOT / "recipes" / "study" / "cifar10_gpu.toml", ROOT / "bench" / "day_rehearsal.toml"
DATA = ROOT / "data" / "cifar10-8x8"
"""CIFAR-10's latents, as `bench/pack.sh` has brought them along."""
REACHED = ("step", "loss", "denoise", "images_per_s", "mfu", "seconds", "flops")
SAVING = 90.0
"""Seconds kept for the study to save, for samples and for the records to be read."""
READING = 15.0
"""Of these, the last ones, for the records: a study that has not saved by then is killed and goes on from before."""
SAMPLES, FEW = 3_000, 100
"""Samples of an arm: 9 MB; of a rehearsal."""


def convergence(suite: Suite) -> Iterator[Task]:
    """As much of the study as fits; a row a run that has begun, one of how many are done, and one an arm's samples."""
    study = REHEARSAL if suite.small else STUDY
    out = suite.runs / study.stem
    yield study.stem, partial(_study, suite, study, out)
    for job in jobs(read_study(study), out):
        if job.arm is not None:
            yield f"samples of {job.arm.name}", partial(_samples, suite, job)


def _study(suite: Suite, study: Path, out: Path) -> Row:
    """Trains until the time is nearly over; a study that is not done is asked for again by the next call."""
    if not suite.small and not (DATA / "manifest.json").is_file():
        raise FileNotFoundError(f"{DATA}: no latents; bench/pack.sh makes them, bench/day.sh puts them there")
    seconds = suite.left - SAVING
    if seconds <= 0:
        raise TimeoutError(f"{suite.left:.0f} s are left, and {SAVING:.0f} of them are for saving")
    command = ("st_fast.study", str(study), "--out", str(out), "--minutes", f"{seconds / 60:.3f}")
    code = _command(*command, allowed=(0, EXIT_INTERRUPTED), most=suite.left - READING)
    planned = list(jobs(read_study(study), out))
    for job in planned:
        if (job.folder / "log.jsonl").is_file():
            suite.store.put("convergence", str(job.folder.relative_to(out)), _reached(job.folder))
    if out.is_dir():
        _bring_home(out, suite.store.path.with_name("runs.tar.gz"))
    return {"ok": True, "done": sum(map(done, planned)), "runs": len(planned), "unfinished": code != 0}


def _reached(folder: Path) -> Row:
    """How far a run is: its last record."""
    stage = read_run(folder).stages[-1]
    trained = stage.records["train"]
    return {"stage": stage.name} | ({key: trained[-1].get(key) for key in REACHED} if trained else {})


def _bring_home(out: Path, archive: Path) -> None:
    """The runs without their weights and caches, as one file."""

    def light(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if Path(member.name).name in ("checkpoints", "compiled", "data") else member

    with tarfile.open(archive, "w:gz") as tar:
        tar.add(out, arcname=out.name, filter=light)


def _samples(suite: Suite, job: Job) -> Row:
    """A set of an arm's samples, for classes by turns."""
    assert job.arm is not None
    if not done(job):
        return {"ok": True, "left_out": "its run is not done", "unfinished": True}
    count = FEW if suite.small else SAMPLES
    _command("st_fast.sample", str(job.folder), "-n", str(count), "--npz")
    (drawn,) = job.folder.glob("*/samples/*/samples.npz")
    target = suite.store.path.with_name(f"samples-{job.arm.name}.npz")
    shutil.copyfile(drawn, target)
    return {"ok": True, "file": target.name, "num": count}


def _command(module: str, *arguments: str, allowed: tuple[int, ...] = (0,), most: float | None = None) -> int:
    """Runs a command of st_fast; RuntimeError with its last line if it ends with another code than is allowed.

    most: seconds after which it is killed, which counts as interrupted.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        ended = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=end_with_the_parent, timeout=most,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return EXIT_INTERRUPTED
    if ended.returncode not in allowed:
        raise RuntimeError(f"{module}: {(ended.stdout.strip().splitlines() or ['no output'])[-1]}")
    return ended.returncode
