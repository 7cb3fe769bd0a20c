"""A task of the speedrun: its images, its target, and how samples are scored, all fixed by hashes. Imports no torch.

A task is a folder: `task.toml` with the numbers below, and the files that it names with their SHA-256, of which
`classifier.safetensors` scores and `reference.safetensors` holds the held-out images' statistics in its features: the
held-out images themselves are never read. `vae/` makes the latents and draws the samples.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from scipy import stats

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, inside, read_bytes, sha256_file, shown
from st_fast.core.options import did_you_mean
from st_fast.core.records import record_from
from st_fast.recipe.document import parse_toml

FOLDER = Path(__file__).parent / "tasks"
"""Where the tasks of this repository lie."""
FILE = "task.toml"
CLASSIFIER, REFERENCE = "classifier.safetensors", "reference.safetensors"
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
"""Of the VAE; a task without has pixels as latents."""
SIGNIFICANCE = 0.01
"""A record's mean is below the target with a p-value less than this."""
CONFIDENCE = 0.99
"""Of the interval that a seed's score on another kind of machine has to be in."""
LEAST_SEEDS = 3
LEAST = {"threads": 1, "samples": 65, "evaluations": 1, "side": 8}
"""Smaller numbers of a task mean nothing; 64 features need a covariance of more samples."""


@dataclass(frozen=True)
class Task:
    """What a record of the task has to reach, and with what."""

    name: str
    title: str
    device: Literal["cpu", "cuda"]
    threads: int
    """Of a CPU, that training runs on."""
    target: float
    """Fréchet distance that the mean over the seeds has to be below."""
    seeds: tuple[int, ...]
    samples: int
    """Scored for each seed, as many of each class."""
    evaluations: int
    """Passes of the network for a sample at most; with guidance a step has two."""
    minutes: float
    """Of training that a seed may take; 0: any."""
    images: str
    """Where they are from: "digits" for scikit-learn's, else what a person has to give."""
    side: int
    """Of an image, in pixels."""
    images_sha256: str
    """Of the training images and their labels, see `prepare.images_digest`."""
    accuracy: float
    """Of the classifier on the held-out images."""
    floor: float
    """The score of as many training images through the task's VAE: about the best that can be had."""
    files: Mapping[str, str]
    """The task's files and their SHA-256."""
    folder: str = ""
    digest: str = ""
    """SHA-256 of task.toml, which changes with anything of the above."""

    @property
    def classifier_sha256(self) -> str:
        """Of the classifier that scores."""
        return self.files[CLASSIFIER]

    def path(self, name: str) -> Path:
        """One of its files. `BadFile` where it is not the file that the task was made with."""
        path = inside(Path(self.folder), name)
        if (found := sha256_file(path)) != self.files[name]:
            raise BadFile(f"{path}: SHA-256 {found[:12]}…, the task has {self.files[name][:12]}…: not the task's file")
        return path


def task_names() -> list[str]:
    """Of the tasks that come with st_fast."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{FILE}"))


def read_task(name: str) -> Task:
    """The task of that name, or in the folder of that path; UserError where there is none or it is wrong."""
    own = FOLDER / name if name in task_names() else Path(name)
    if not (own / FILE).is_file():
        raise UserError(f"{name!r} is no task{did_you_mean(name, task_names())}; known are {', '.join(task_names())}")
    raw = read_bytes(own / FILE)
    table = parse_toml(raw.decode(errors="replace"), str(own / FILE))
    where = str(own / FILE)
    if found := table.keys() & {"folder", "digest"}:
        raise BadFile(f"{where}: the field {min(found)!r} is not the file's to say")
    if not table.keys() & {"files", "images_sha256"}:
        raise BadFile(f"{where}: not made yet: python -m st_fast speedrun make {name}")
    return task_from(table | {"folder": str(own), "digest": sha256(raw).hexdigest()}, where)


def task_from(table: Mapping[str, Any], where: str) -> Task:
    """The task of these values; `BadFile`, which begins with `where` they stand, for a missing or wrong one."""
    task = record_from(Task, dict(table), where)
    if not re.fullmatch("[a-z0-9][a-z0-9_-]*", task.name):
        raise BadFile(f"{where}: name = {shown(task.name)}: small letters, digits, - and _")
    if len(task.seeds) < LEAST_SEEDS or len(set(task.seeds)) < len(task.seeds) or not task.target > 0:
        raise BadFile(f"{where}: {LEAST_SEEDS} seeds or more, each once, and a target above 0 are needed")
    for name, least in LEAST.items():
        if (value := getattr(task, name)) < least:
            raise BadFile(f"{where}: {name} = {value}: at least {least} is needed")
    if missing := {CLASSIFIER, REFERENCE} - task.files.keys():
        raise BadFile(f"{where}: files lacks {min(missing)}")
    return task


def p_value(scores: Sequence[float], target: float) -> float:
    """Of a one-sided t-test that the mean of the scores (n ≥ 2) is not below the target (Student, 1908)."""
    mean, deviation = mean_and_deviation(scores)
    if deviation == 0.0:
        return 0.0 if mean < target else 1.0
    return float(stats.t.cdf((mean - target) * math.sqrt(len(scores)) / deviation, len(scores) - 1))


def mean_and_deviation(scores: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample's standard deviation of two scores or more."""
    mean = math.fsum(scores) / len(scores)
    return mean, math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1))


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """Where one more score of the same kind lies with CONFIDENCE: Student's prediction interval."""
    mean, deviation = mean_and_deviation(scores)
    wide = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(scores) - 1)) * deviation * math.sqrt(1 + 1 / len(scores))
    return mean - wide, mean + wide
