"""One seed of a study as a JSON file: what every arm cost and scored, by step, with the hash of its run.

A page is written from these files, so that seeds may come from several machines and days, and runs may be deleted.
Imports no torch.
"""

import hashlib
import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from st_fast.core.comparison import short_digest
from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, read_bytes, read_json, shown, write_json_atomic
from st_fast.recipe import Recipe, Stage, load_run, to_toml
from st_fast.recipe.methods import supervision_name
from st_fast.recipe.schema import Model
from st_fast.report.arms import Arm, Cost, make_arms
from st_fast.report.collect import Record, RunLog, StageLog, read_run
from st_fast.report.fairness import unfair
from st_fast.report.metrics import METRICS
from st_fast.study.plan import Arm as ArmPlan
from st_fast.study.plan import Job, Study, jobs

METRIC = "frechet"
FLOOR = METRICS[METRIC].floor
PROTOCOL = (
    "num", "cfg_scale", "guidance", "internal_guidance", "sampler", "steps", "classifier_accuracy", "classifier_digest",
    "shift", FLOOR, "floor_num",
)  # fmt: skip
"""How a score was taken, as an evaluation's record says."""
RECIPE = ("flow", "optim", "run", "sample", "evaluate")
"""Sections of a run's recipe that decide whether it can be compared."""
KEEPING = ("log_every = ", "save_every = ", "keep = ", "keep_every = ")
"""What a run logs and keeps of itself: a run that differs in these alone is the study's."""
IN_ONE_LINE = re.compile(r"[^|\n\r]*")
"""What a title must be: it stands in tables and headings."""
START = ("batch_size", "teacher_flops_per_image", "device", "dataset", "versions", "teacher")
"""What is kept of a run's start record."""


@dataclass(frozen=True)
class Seed:
    """One seed: its finished arms by name, what each was defined as, the hash of its run; and those not finished."""

    seed: int
    arms: dict[str, Arm]
    definitions: dict[str, str]
    hashes: dict[str, str]
    missing: tuple[str, ...]


def done(job: Job) -> bool:
    """Whether the job's folder holds its finished run; UserError, with hashes, if it holds a run of another recipe.

    A run of fewer steps is the beginning of this one: a study whose budget was raised goes on with it.
    """
    if not (job.folder / "recipe.toml").is_file():
        return False
    (wanted,), there = job.recipe.stages, load_run(job.folder)
    if len(there.stages) == 1 and there.stages[0].steps < wanted.steps:
        there = replace(there, stages=(replace(there.stages[0], steps=wanted.steps),))
    theirs, ours = to_toml(there), to_toml(job.recipe)
    lines = [[line for line in text.splitlines() if not line.startswith(KEEPING)] for text in (theirs, ours)]
    for old, new in itertools.zip_longest(*lines, fillvalue="nothing"):
        if old != new:
            raise UserError(
                f"{job.folder} holds a run of another recipe, {_short(theirs.encode())}, than the study's, "
                f"{_short(ours.encode())} ({old}, the study has {new}); remove it or choose another --out"
            )
    try:
        stages = read_run(job.folder).stages
    except UserError:  # no log, or one that has only begun
        return False
    return [end["step"] for stage in stages for end in stage.records["end"]][-1:] == [job.steps]


def collect(study: Study, out: Path, seed: int) -> Seed:
    """Reads one seed's runs. UserError where two can't be compared, or where a teacher's cost is recorded nowhere."""
    found, logs, missing = Seed(seed, {}, {}, {}, ()), list[RunLog](), []
    for job in jobs(study, out):
        if job.arm is None or job.seed != seed:
            continue
        name = job.arm.name
        if not done(job):
            missing.append(name)
            continue
        log = read_run(job.folder)
        arm = make_arms([log])[-1]
        if not math.isfinite(arm.final(METRIC)):
            raise UserError(f"{job.folder}: not scored: no {METRIC} in its log; remove it, and the study runs it again")
        if not arm.total.known:
            raise UserError(f"{job.folder}: no log says what its teacher cost; start the study where it was started")
        logs.append(as_declared(study, name, log))
        found.arms[name], found.definitions[name], found.hashes[name] = arm, definition(job), hash_of(job.folder)
    comparable(logs, out, one_seed=True)
    return Seed(seed, found.arms, found.definitions, found.hashes, tuple(missing))


def comparable(logs: Sequence[RunLog], where: Path, one_seed: bool = False) -> None:
    """UserError where runs differ in data, noise, test images or in how their scores were taken.

    Runs of several seeds see other noise, unless they are to be of `one_seed`.
    """
    if reasons := unfair(logs, seeds_declared=not one_seed):
        raise UserError(f"{where}: these runs can't be compared: {'; '.join(reasons)}")


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def hash_of(run: Path) -> str:
    """Twelve hex digits of a run's recipe and log: others if either was changed by hand."""
    return _short(read_bytes(run / "recipe.toml") + read_bytes(run / "log.jsonl"))


def definition(job: Job) -> str:
    """A short hash of what an arm is: its recipe and its teacher's stage, whatever the seed, folders and machine.

    Keys at their defaults are left out, so that a key which is new to the program changes no hash.
    """
    stage = job.recipe.stages[0]
    usual = Recipe(Model(), (Stage(stage.name, type(stage.method)(), stage.steps),))
    recipe, defaults = (tomllib.loads(to_toml(one)) for one in (job.recipe, usual))
    paths = (("sample", "vae"), ("evaluate", "inception"), ("evaluate", "reference"))

    def chosen(table: dict[str, Any], default: dict[str, Any], section: str) -> dict[str, Any]:
        left_out = {key for name, key in paths if name == section}
        return {key: value for key, value in table.items() if key not in left_out and value != default.get(key)}

    kept = {
        name: chosen(recipe[name], defaults[name], name) for name in ("model", "flow", "optim", "sample", "evaluate")
    }
    own = chosen(recipe["stage"][0], defaults["stage"][0], "stage")
    own.pop("teacher", None)
    teacher = job.arm.teacher if job.arm is not None else None
    taught = {} if teacher is None else teacher.stage | {"labels": teacher.labels}
    method = supervision_name(stage.method)
    return short_digest({**kept, "stage": own | {"supervision": method, "steps": stage.steps}, "teacher": taught})


def as_json(study: Study, found: Seed) -> dict[str, Any]:
    """The seed's file. Only seconds, device, versions and hashes differ between two machines or two days."""
    arms = [
        {"name": name, **_told(study.arm(name)), "definition": found.definitions[name], "run": found.hashes[name]}
        | _arm_json(arm)
        for name, arm in found.arms.items()
    ]
    about = _headings(study)
    return {
        "study": study.name, "title": about.pop("title"), "seed": found.seed, "metric": METRIC, **about,
        "missing": list(found.missing), "arms": arms,
    }  # fmt: skip


def _told(arm: ArmPlan) -> dict[str, Any]:
    """What a seed's file says of an arm for the page alone."""
    return {"title": arm.title} | ({"panel": arm.panel} if arm.panel else {})


def _headings(study: Study) -> dict[str, Any]:
    """What a seed's file says of the study, and no run depends on."""
    return {
        "title": study.title, "baseline": study.baseline, "reference": study.reference,
        "horizons": list(study.horizons),
    }  # fmt: skip


def _arm_json(arm: Arm) -> dict[str, Any]:
    def scores(record: Record) -> dict[str, Any]:
        return {key: record["metrics"][key] for key in METRICS if key in record["metrics"]}

    return {
        "stage": arm.stage.entry,
        "recipe": {name: table for name, table in arm.run.recipe.items() if name in RECIPE},
        "start": {key: arm.stage.start[key] for key in START if key in arm.stage.start},
        "protocol": {key: arm.last_metrics[key] for key in PROTOCOL if key in arm.last_metrics},
        "evals": [{key: r[key] for key in ("step", "flops", "seconds")} | scores(r) for r in arm.stage.evals],
        "own": {"step": arm.stage.step, "flops": arm.own.flops, "seconds": arm.own.seconds},
        "teacher": {"flops": arm.teacher.flops, "seconds": arm.teacher.seconds},
        **({"stopped": stopped} if (stopped := arm.stage.stopped) is not None else {}),
    }


def from_json(path: Path) -> tuple[dict[str, Any], Seed]:
    """A seed's file and what it says; BadFile names the file and what is wrong in it."""
    told = read_json(path)
    try:
        found = Seed(int(told["seed"]), {}, {}, {}, tuple(map(str, told["missing"])))
        if not isinstance(told["missing"], list):
            raise TypeError("missing: a list is needed")
        if path.name != (name := f"{told['study']}-seed{told['seed']}.json"):
            raise ValueError(f"by what it says its name is {name}")
        titles = (told.get("title", ""), *(entry.get("title", "") for entry in told["arms"]))
        if bad := [title for title in titles if not IN_ONE_LINE.fullmatch(title)]:
            raise ValueError(f"title {bad[0]}")
        for entry in told["arms"]:
            name = str(entry["name"])
            if name in found.arms:
                raise ValueError(f"{name}: twice")
            found.arms[name] = _arm(name, entry, path)
            found.definitions[name], found.hashes[name] = str(entry["definition"]), str(entry["run"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFile(f"{path}: not a seed's results as st_fast.study writes them ({shown(repr(error))})") from None
    return told, found


def _arm(name: str, entry: dict[str, Any], path: Path) -> Arm:
    own, teacher, protocol = entry["own"], entry["teacher"], entry["protocol"]
    end = {"step": int(own["step"]), "flops": float(own["flops"]), "seconds": float(own["seconds"])}
    evals = [
        {key: float(one[key]) for key in ("step", "flops", "seconds")}
        | {"metrics": protocol | {key: float(one[key]) for key in METRICS if key in one}}
        for one in entry["evals"]
    ]
    steps = [one["step"] for one in evals]
    if not any(METRIC in one["metrics"] for one in evals) or steps != sorted({*steps}):
        raise ValueError(f"{name}: no score, or not in the order of steps")
    costs = (teacher["flops"], teacher["seconds"], end["step"], end["seconds"], *steps)
    if end["flops"] <= 0 or min(map(float, costs)) < 0 or any(one["metrics"].get(METRIC, 1) <= 0 for one in evals):
        raise ValueError(f"{name}: a cost, a step or a score below 0")
    if not isinstance(entry["recipe"], dict):
        raise TypeError(f"{name}: recipe")
    records = {"start": [{"step": 0} | entry["start"]], "train": [], "eval": evals, "sample": [], "end": [end]}
    records["gradients"] = [entry["stopped"]] if "stopped" in entry else []
    stage = StageLog(str(entry["stage"]["name"]), entry["stage"], records)
    run = RunLog(f"{path.stem}, {name}", path, entry["recipe"], "", (stage,), ())
    cost = Cost(float(teacher["flops"]), float(teacher["seconds"]))
    return Arm(run, stage, name, 0, 0, Cost(end["flops"], end["seconds"]), cost)


def gather(study: Study, folder: Path, ours: Sequence[Seed]) -> list[Seed]:
    """These seeds and those whose files lie in a folder, in order.

    UserError where a file is of another study, or of the same run with other figures, or where seeds can't be compared.
    """
    expected = {job.arm.name: definition(job) for job in jobs(study, Path()) if job.arm is not None}
    found = {one.seed: one for one in ours}
    for path, told, theirs in _files(folder):
        if told["study"] != study.name:
            continue
        mine = found.get(theirs.seed)
        for name, hashed in theirs.hashes.items():
            if theirs.definitions[name] != expected.get(name, theirs.definitions[name]):
                raise UserError(
                    f"{path}: arm {shown(name)} is {theirs.definitions[name]} there, {expected[name]} in {study.path}: "
                    "the study was changed; move the file away, or take the change back"
                )
            now = hashed if mine is None else mine.hashes.get(name, hashed)
            if now != hashed:
                raise UserError(
                    f"{path}: arm {shown(name)} was written from run {hashed}, which is {now} now: changed by hand, or "
                    "made again; move the file away to write it anew"
                )
            if mine is not None and name in mine.arms and mine.arms[name].teacher != theirs.arms[name].teacher:
                raise UserError(
                    f"{path}: the teacher of arm {shown(name)} cost {theirs.arms[name].teacher} there, "
                    f"{mine.arms[name].teacher} by its log now: changed by hand, or made again; "
                    "move the file away to write it anew"
                )
        if mine is None or len(mine.arms) < len(theirs.arms):
            found[theirs.seed] = theirs
    seeds = [found[seed] for seed in sorted(found)]
    runs = [[as_declared(study, name, arm.run) for name, arm in seed.arms.items()] for seed in seeds]
    for of_seed in runs:
        comparable(of_seed, folder, one_seed=True)
    comparable([run for of_seed in runs for run in of_seed], folder)
    return seeds


def as_declared(study: Study, name: str, run: RunLog) -> RunLog:
    """The run without what the study says to be this arm's own: keys of sections that others need not share."""
    own = next((arm.sections for arm in study.arms if arm.name == name), {})
    shared = {
        section: {key: value for key, value in run.recipe.get(section, {}).items() if key not in table}
        for section, table in own.items()
    }
    return replace(run, recipe=run.recipe | shared)


def write_seeds(study: Study, folder: Path, ours: Sequence[Seed], chosen: Sequence[Seed]) -> None:
    """A file for each of our seeds that was `chosen`; in the study's others its titles and which arms it compares.

    A seed whose file holds more arms than are here now keeps its file.
    """
    for seed in ours:
        if any(seed is one for one in chosen):
            write_json_atomic(folder / f"{study.name}-seed{seed.seed}.json", as_json(study, seed))
    titles = {arm.name: _told(arm) for arm in study.arms}
    for path, told, _ in _files(folder):
        if told["study"] == study.name:
            arms = [arm | titles.get(arm["name"], {"title": arm.get("title", arm["name"])}) for arm in told["arms"]]
            now = told | _headings(study) | {"arms": arms}
            if now != told:
                write_json_atomic(path, now)


def _files(folder: Path) -> Iterator[tuple[Path, dict[str, Any], Seed]]:
    """Every seed's file in a folder, what it says, and its seed."""
    for path in sorted(folder.glob("*-seed*.json")):
        yield (path, *from_json(path))


def complete(folder: Path) -> dict[str, list[tuple[dict[str, Any], Seed]]]:
    """Every study whose seeds' files lie in a folder, with what they say; seeds that lack an arm are left out."""
    found: dict[str, list[tuple[dict[str, Any], Seed]]] = {}
    for _, told, seed in _files(folder):
        if not seed.missing:
            found.setdefault(str(told.get("study")), []).append((told, seed))
    return found
