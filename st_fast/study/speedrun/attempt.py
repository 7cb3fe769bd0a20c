"""One seed of a recipe on a task: trained, drawn from, scored, and told in result.json."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from st_fast.core.comparison import check_same
from st_fast.core.errors import BadFile, Say, UserError
from st_fast.core.files import make_folder, read_json, sha256_file, write_json_atomic
from st_fast.core.records import log_records, record_from
from st_fast.recipe import Recipe, to_toml
from st_fast.report import words
from st_fast.sample.model import sampling
from st_fast.sample.previews import grid, png
from st_fast.sample.request import sample_request, sampling_parser
from st_fast.sample.set import SAMPLES, draw_set, open_npz, settings_of
from st_fast.study.speedrun.origin import Machine, code_here, machine, versions
from st_fast.study.speedrun.rules import SAMPLE_SEED, settled
from st_fast.study.speedrun.score import Score, Scorer
from st_fast.study.speedrun.task import Task
from st_fast.train.run import run

FILE, ASKED = "result.json", "asked.json"
SAMPLES_FOLDER = "samples"
PICTURES = 100
"""Samples of the picture: ten of each of ten classes."""


@dataclass(frozen=True)
class Result:
    """What one seed reached, what it took, and the hashes by which it is known."""

    seed: int
    distance: float
    accuracy: float
    flops: float
    """Of all training, teachers included, by formula."""
    seconds: float
    """Of all training, as the log has it: pauses to save are left out."""
    data_sha256: str
    weights_sha256: str
    samples_sha256: str


@dataclass(frozen=True)
class Attempt:
    """A result, and where it was had."""

    task_sha256: str
    machine: Machine
    versions: Mapping[str, str]
    result: Result


def attempt(task: Task, recipe: Recipe, seed: int, data: Path, digest: str, out: Path, say: Say) -> Result:
    """Trains, draws and scores one seed in the folder `out`, or goes on with what is there; see `Attempt` for its file.

    recipe: as its author wrote it, and `rules.check` let it pass; digest: of the data. UserError where `out` holds
    another attempt.
    """
    if recipe.model.num_classes != (classes := Scorer(task).classes):
        raise UserError(f"model.num_classes = {recipe.model.num_classes}: the task {task.name} has {classes}")
    if task.device == "cpu":
        torch.set_num_threads(task.threads)
    wanted = settled(recipe, task, seed, data.resolve(), out.resolve())
    asked = {"task": task.digest, "data": digest, "recipe": to_toml(wanted), "code": code_here()}
    if (out / ASKED).exists():
        check_same(read_json(out / ASKED), asked, f"{out}: holds an attempt with", "choose another --out")
    else:
        make_folder(out)
        write_json_atomic(out / ASKED, asked)
    if not (out / FILE).exists():
        run(wanted)
        result = _scored(task, out, seed, digest, say)
        told = Attempt(task.digest, machine(task.device), versions(), result)
        write_json_atomic(out / FILE, asdict(told))
    result = read_attempt(out).result
    say(
        f"seed {seed}: Fréchet distance {result.distance:.4f} (target {task.target:g}), {words.flops(result.flops)}, "
        f"{result.seconds:.1f} s of training"
    )
    return result


def read_attempt(out: Path) -> Attempt:
    """What `attempt` has written; `BadFile` where it is damaged."""
    return record_from(Attempt, read_json(out / FILE), str(out / FILE))


def _scored(task: Task, out: Path, seed: int, digest: str, say: Say) -> Result:
    count, noise = str(task.samples), str(SAMPLE_SEED + seed)
    flags = [str(out), "-n", count, "--seed", noise, "--compile", "off"]
    request = sample_request(sampling_parser("sample", None).parse_args(flags), "evaluate")
    with sampling(request) as (ranks, sampler, _):
        weights = settings_of(sampler)["model_sha256"]
        file = draw_set(sampler, out / SAMPLES_FOLDER, False, ranks, say)
    score = score_of(task, out)
    flops, seconds = spent(out / "log.jsonl")
    return Result(seed, score.distance, score.accuracy, flops, seconds, digest, weights, sha256_file(file))


def score_of(task: Task, out: Path) -> Score:
    """Of the samples that an attempt in `out` has drawn; `BadFile` where there are not as many of each class."""
    samples, scorer = open_npz(out / SAMPLES_FOLDER / SAMPLES), Scorer(task)
    wanted = np.arange(task.samples) % scorer.classes
    if samples.labels is None or not np.array_equal(samples.labels, wanted):
        raise BadFile(f"{samples.path}: not {task.samples} samples of the task's classes in turn")
    return scorer(np.concatenate(list(samples.blocks())).transpose(0, 3, 1, 2), samples.labels)


def picture(out: Path) -> bytes:
    """The first samples that an attempt in `out` has drawn, as a PNG."""
    drawn = next(open_npz(out / SAMPLES_FOLDER / SAMPLES).blocks(PICTURES))
    return png(grid(torch.from_numpy(drawn.transpose(0, 3, 1, 2).copy())))


def spent(log: Path) -> tuple[float, float]:
    """FLOPs and seconds of a run's stages, by their last words in its log."""
    ends = {record["stage"]: record for record in log_records(log) if record["kind"] == "end"}
    return math.fsum(end["flops"] for end in ends.values()), math.fsum(end["seconds"] for end in ends.values())
