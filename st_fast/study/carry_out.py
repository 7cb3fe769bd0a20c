"""Runs a study's list in one process: what is done is passed over, what was cut off goes on where it stood.

Makes the two control teachers as well: an untrained network, and one that is trained on shuffled labels.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from st_fast import __version__, kernels
from st_fast.core import checkpoint, random
from st_fast.core.errors import Interrupted, RunFailed
from st_fast.core.files import write_atomic, write_folder
from st_fast.core.lock import Locked, turn
from st_fast.core.signals import StopRequest, stop_on_signals
from st_fast.data.buckets import one_shape
from st_fast.data.manifest import Manifest, VaeInfo, read_manifest
from st_fast.data.shards import open_data
from st_fast.model import DiffusionTransformer, build
from st_fast.prepare.writing import write_shards
from st_fast.recipe import Recipe, to_toml
from st_fast.recipe.schema import Model
from st_fast.study.plan import Job, Study, jobs
from st_fast.study.seeds import done
from st_fast.train.run import make_on_first_use, run

SHUFFLE = 1 << 40
"""Added to a run's seed for the permutation of its labels, so that it is no epoch's order."""
LABEL_STD = 0.1
"""Of a random teacher's label embeddings: the label then moves its features by some hundredths of their size, as
it does a trained teacher's, so that ω means about as much."""
RECORDS = 4_096
"""Copied at a time."""
POLL = 2.0
"""Seconds between two looks whether another process's runs are done."""


def carry_out(study: Study, out: Path, minutes: float) -> None:
    """Runs every job that isn't done. Interrupted when `minutes` are over, or after a signal, with all work saved.

    Several processes with the same study and folder share its runs: each takes one that no other has begun and whose
    teacher is there, and at the end waits for the others'. UserError if a folder holds a run of another recipe than the
    study's.
    """
    todo = list(jobs(study, out))
    print(f"study {study.name}: {len(todo)} runs, {sum(map(done, todo))} done", flush=True)
    end = time.monotonic() + 60 * minutes
    # When the time is over, this process asks itself to stop, as a person would: the trainer saves.
    timer = threading.Timer(min(60 * minutes, threading.TIMEOUT_MAX), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    try:
        with stop_on_signals() as stop, ExitStack() as at_end:
            timer.start()
            at_end.callback(timer.cancel)
            _make_data(todo, out, stop)
            waiting, left = "", todo
            while left := [job for job in left if not done(job)]:
                if stop or time.monotonic() >= end:
                    why = f"{minutes:g} minutes are over" if time.monotonic() >= end else stop.name
                    raise Interrupted(f"{why}; the same command continues")
                number = f"{len(todo) - len(left) + 1} of {len(todo)}"
                try:
                    _take_one(study, out, left, number)
                except Locked as error:
                    if str(error) != waiting:
                        held = str(error).partition("; stop it")[0]  # what else it advises is for a run of one's own
                        print(f"study {study.name}: waiting for other processes: {held}", flush=True)
                    waiting = str(error)
                    time.sleep(POLL)
    except Interrupted as error:
        raise Interrupted(f"{error} ({sum(map(done, todo))} of {len(todo)} runs are done)") from None


def _make_data(todo: Sequence[Job], out: Path, stop: StopRequest) -> None:
    """Makes the data of a recipe that brings its own, in one process while the others wait for it, or for a signal."""
    while not stop:
        try:
            with turn(out / "data", print, "--out"):
                for job in todo:
                    make_on_first_use(job.recipe, print)
                return
        except Locked:
            time.sleep(POLL)


def _startable(left: Sequence[Job]) -> Iterator[Job]:
    """Those whose teacher, where they have one, isn't itself left to do."""
    missing = {(job.seed, job.teacher.name) for job in left if job.teacher is not None}
    for job in left:
        if job.arm is None or job.arm.teacher is None or (job.seed, job.arm.teacher.name) not in missing:
            yield job


def _take_one(study: Study, out: Path, left: Sequence[Job], number: str) -> None:
    """Runs the first job that no other process has; Locked, with the last one's holder, where all are taken."""
    locked = None
    for job in _startable(left):
        try:
            with turn(job.folder, print, "--out"):
                if not done(job):
                    print(f"study {study.name}: run {number}: {job.folder}", flush=True)
                    _run(study, job)
                    if not done(job):
                        raise RunFailed(f"{job.folder}: its log doesn't say that it ended; remove the folder")
                return
        except Locked as error:
            locked = error
    if locked is not None:
        raise locked


def _run(study: Study, job: Job) -> None:
    if not job.steps:
        write_random_teacher(job.folder, job.recipe)
        return
    if job.teacher is not None and job.teacher.labels == "shuffled":
        shuffled = Path(job.recipe.data.path)
        with turn(shuffled, print):
            write_shuffled(Path(study.base.sections["data"].get("path", "")), shuffled, job.seed)
    run(job.recipe)


def random_model(config: Model, seed: int) -> DiffusionTransformer:
    """A network no layer of which is zero, drawn from `seed`.

    As published a SiT starts with every block the identity and blind to label and time, so guidance on it would be
    zero whatever ω. Here every linear layer is drawn as the others are (Xavier), and label embeddings normal.
    """
    model = build(config, kernels.select({}, torch.device("cpu")), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=LABEL_STD)
    return model


def write_random_teacher(folder: Path, recipe: Recipe) -> None:
    """A run folder whose one stage is a random network at step 0 and cost nothing: recipe, log and checkpoint."""
    stage, config = recipe.stages[0].name, recipe.for_stage(recipe.stages[0]).model
    state = random_model(config, recipe.run.seed).state_dict()
    meta = {
        "stage": stage,
        "recipe": to_toml(recipe),
        "architecture": config.architecture(),
        "dataset": "none",
        "seconds": 0.0,
        "rollbacks": 0,
        "versions": {"st_fast": __version__, "torch": torch.__version__},
    }
    end = {"kind": "end", "stage": stage, "step": 0, "seconds": 0.0, "flops": 0.0}
    with write_folder(folder, replace=True) as writing:
        checkpoint.save(writing / stage / "checkpoints", 0, {"model": state, "ema": state}, meta)
        write_atomic(writing / "recipe.toml", to_toml(recipe).encode())
        write_atomic(writing / "log.jsonl", f"{json.dumps(end)}\n".encode())


def write_shuffled(source: Path, folder: Path, seed: int) -> None:
    """A copy of a data folder's latents with permuted labels, unless the one for this source is there already.

    The permutation follows from the seed: as many labels of each class, but no sense.
    """
    records = one_shape(open_data(source, verify=False), "a study's shuffled copy")
    theirs = records.manifest
    said = f"labels shuffled by seed {seed}; {records.digest}"
    if (folder / "manifest.json").is_file() and read_manifest(folder).source == said:
        records.close()
        return
    labels = torch.from_numpy(records.labels[random.epoch_order(SHUFFLE + seed, 0, len(records))])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(records), RECORDS):
            rows = np.arange(start, min(start + RECORDS, len(records)))
            yield records.gather(rows)[0], labels[start : start + len(rows)]

    ours = Manifest(0, theirs.shape, theirs.dtype, theirs.scale, VaeInfo("none"), said, theirs.num_classes, theirs.flip)
    with write_folder(folder, replace=True) as writing:
        write_shards(writing, batches(), ours)
    records.close()
