"""The study file: arms as changes of a base recipe → one checked recipe for each run. Imports no torch.

recipe = "../digits.toml"     relative to this file
like = "digits.toml"          another study, whose teachers and arms these are too
seeds = [0, 1, 2]
title, notes                  of its section on the page
baseline = "plain"            the arm whose final score the others have to reach
reference = "omega5"          the arm with a teacher that the others with one are compared with, step for step
teacher_steps                 of every teacher that doesn't say its own `steps`
student_steps                 of an arm with a teacher; one without gets both together
flops                         instead of student_steps: each arm trains until it has spent this, its teacher's training
                              and forward passes included
horizons                      budgets, at most `flops`, at which arms are compared as well
[common.sample]               sections, and [common.stage.NAME] settings, that every run has over the base recipe's
[[teacher]]                   name, stage; labels = "shuffled"; steps = 0: an untrained network
[[arm]]                       name, title, panel; `stage` of the base recipe or `supervision`; teacher; settings;
                              tables `model`, `optim` and `flow` for a network and a training of its own, and `sample`
                              for what the arm's own samples are drawn with
"""

import copy
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from st_fast.core.errors import UserError
from st_fast.core.files import shown
from st_fast.recipe import Recipe, RecipeError, cost
from st_fast.recipe.batch import agreed
from st_fast.recipe.check import check
from st_fast.recipe.document import Document, as_document, parse_toml, read_document, read_text
from st_fast.recipe.error import wrong_value
from st_fast.recipe.keys import FOLDER_NAME
from st_fast.recipe.load import parse, resolve

ARM_SECTIONS = ("model", "optim", "flow", "sample")
"""Sections of the recipe of which an arm may have keys of its own."""
ARM_KEYS = ("name", "title", "panel", "stage", "teacher", *ARM_SECTIONS)
"""What an arm says beside its stage's own settings."""
TEACHER_KEYS = ("name", "labels", "stage")
EXTERNAL = ("repa",)
"""Methods that learn from a network which was trained for something else."""
MOST_STEPS = 10**13
"""More than a stage may have, which is refused where a budget gives it."""
OWN_SECTIONS = ("summary", "shares", "frontier")
"""Sections of the page that are no study's."""
STUDY_KEYS = (
    "recipe", "like", "seeds", "baseline", "reference", "title", "notes", "teacher_steps", "student_steps", "flops",
    "horizons", "common", "teacher", "arm",
)  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """A shared teacher: its stage's table, whether its labels are shuffled, and whether it is trained at all."""

    name: str
    stage: dict[str, Any]
    labels: Literal["true", "shuffled"]

    @property
    def trained(self) -> bool:
        """False for a network as it was drawn, with `steps = 0`."""
        return self.stage["steps"] != 0


@dataclass(frozen=True)
class Arm:
    """One thing that is compared: its stage's table, its teacher if it has one, and where it is drawn."""

    name: str
    title: str
    panel: str
    stage: dict[str, Any]
    teacher: Teacher | None
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Keys that are the arm's own, by section: of its network, its training, or how it is drawn."""


@dataclass(frozen=True)
class Study:
    """A whole study as its file says."""

    name: str
    title: str
    notes: str
    path: Path
    base: Document
    recipe_path: Path
    seeds: tuple[int, ...]
    baseline: str
    reference: str
    horizons: tuple[float, ...]
    teachers: tuple[Teacher, ...]
    arms: tuple[Arm, ...]

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def apart(self) -> set[str]:
        """Titles of arms that are no rivals of the others: drawn with settings of their own, or taught from outside.

        The scores of the former tell of these settings; the latter's network was trained at no counted cost.
        """
        return {arm.title for arm in self.arms if "sample" in arm.sections or arm.stage.get("supervision") in EXTERNAL}


@dataclass(frozen=True)
class Job:
    """One run. `teacher` is set where it makes a shared teacher, `arm` where it is what is compared."""

    seed: int
    folder: Path
    recipe: Recipe
    arm: Arm | None = None
    teacher: Teacher | None = None

    @property
    def steps(self) -> int:
        """The steps that it trains for: 0 for a teacher that isn't trained."""
        return self.recipe.stages[0].steps if self.teacher is None or self.teacher.trained else 0


def read_study(path: Path) -> Study:
    """The study at `path`, every run's recipe checked; UserError names the file, the arm or teacher, and the key."""
    raw = parse_toml(read_text(path), str(path))
    for key in raw:
        if key not in STUDY_KEYS:
            raise UserError(f"{path}: unknown key {shown(key)}; {', '.join(STUDY_KEYS)} are known")
    if "like" in raw:
        other = path.parent / _text(raw, "like", path)
        theirs = parse_toml(read_text(other), str(other))
        raw = {key: theirs[key] for key in ("teacher", "arm", "baseline", "reference", "notes") if key in theirs} | raw
    base_path = path.parent / _text(raw, "recipe", path)
    seeds: Any = raw.get("seeds")
    right = isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 and seeds.count(s) == 1 for s in seeds)
    _need(bool(right), path, "seeds", seeds, "a list of whole numbers from 0 is needed; each can be used once")
    base = _with_common(read_document(base_path), raw.get("common", {}), path)
    steps, flops, horizons = _budgets(raw, path)
    own = raw["teacher_steps"]
    teachers = tuple(_teacher({"steps": own} | table, base, path) for table in _tables(raw, "teacher", path))
    arms = tuple(
        _arm({"steps": steps + ("teacher" not in table) * own * (not flops)} | table, base, path, teachers)
        for table in _tables(raw, "arm", path)
    )
    title, notes = str(raw.get("title", path.stem)), str(raw.get("notes", "")).strip()
    baseline, reference = (_text(raw, key, path) for key in ("baseline", "reference"))
    settled = (path.stem, title, notes, path, base, base_path, tuple(seeds), baseline, reference, horizons, teachers)
    study = Study(*settled, arms)
    if flops:
        own_steps = [str(table.get("name")) for table in _tables(raw, "arm", path) if "steps" in table]
        _need(not own_steps, path, "flops", flops, f"steps of {', '.join(own_steps)} follow from it")
        study = replace(study, arms=tuple(_within(study, arm, flops) for arm in arms))
    names = _check_names(study)
    for key, name in (("baseline", baseline), ("reference", reference)):
        _need(name in names, path, key, name, "an arm's name is needed")
    for _ in jobs(study, Path("runs") / study.name):  # a mistake in the last arm is told before the first is trained
        pass
    return study


def _check_names(study: Study) -> list[str]:
    """The arms' names; UserError where the study's, two of them, or their titles can't be told apart."""
    path, names = study.path, [arm.name for arm in study.arms]
    right = FOLDER_NAME.allows(study.name) and study.name not in OWN_SECTIONS
    _need(right, path, "the file's name", study.name, f"text {FOLDER_NAME}, and not {' or '.join(OWN_SECTIONS)}")
    used = {"arm": names, "teacher": [teacher.name for teacher in study.teachers]}
    folders = [*names, *(f"teacher-{name}" for name in used["teacher"])]
    for kind, some in used.items():
        for name in some:
            if [other.casefold() for other in some].count(name.casefold()) > 1:
                raise UserError(f"{path}: two [[{kind}]] are called {name!r}; names must differ")
    for name in names:
        if [folder.casefold() for folder in folders].count(name.casefold()) > 1:
            raise UserError(f"{path}: arm {name!r} is called as a teacher's folder is; names must differ")
    titles = [arm.title for arm in study.arms]
    for title in (study.title, *titles):
        _need(title.isprintable() and "|" not in title, path, "title", title, "one line without | is needed")
        _need(titles.count(title) <= 1, path, "title", title, "two arms have it; titles must differ")
    _need(len(names) > 1, path, "arm", names, "a study compares two arms or more")
    return names


def _budgets(raw: dict[str, Any], path: Path) -> tuple[int, float, tuple[float, ...]]:
    """(steps of an arm with a teacher, FLOPs of every arm, horizons): steps are 1 where they follow from FLOPs."""
    budgeted = "flops" in raw
    _need(not (budgeted and "student_steps" in raw), path, "flops", raw.get("flops"), "student_steps follow from it")
    for key in ("teacher_steps", *(["student_steps"] * (not budgeted))):
        value = raw.get(key)
        _need(type(value) is int and value >= 1, path, key, value, "a whole number from 1 is needed")
    flops, horizons = raw.get("flops", 0.0), raw.get("horizons", [])
    right = type(flops) in (int, float) and 0 <= flops <= sys.float_info.max and (flops > 0 or not budgeted)
    _need(right, path, "flops", flops, "a number above 0 is needed")
    right = isinstance(horizons, list) and all(type(h) in (int, float) and 0 < h <= flops for h in horizons)
    _need(right, path, "horizons", horizons, "a list of FLOPs up to `flops` is needed")
    return raw.get("student_steps", 1), float(flops), tuple(sorted({*map(float, horizons)}))


def jobs(study: Study, out: Path) -> Iterator[Job]:
    """Every run, seed by seed, each seed's teachers before its arms."""
    needed = [arm.teacher for arm in study.arms]
    for seed in study.seeds:
        for teacher in (teacher for teacher in study.teachers if teacher in needed):
            folder = out / f"seed{seed}" / f"teacher-{teacher.name}"
            table = teacher.stage | {"steps": teacher.stage["steps"] or 1}
            recipe = _recipe(study, folder, seed, table, f"teacher {teacher.name}")
            data = recipe.data
            if teacher.labels == "shuffled":
                data = replace(data, path=(out / "data" / f"shuffled-labels-{seed}").as_posix(), source="shards")
            # No samples are drawn of it: the arm that trains the same stage longer shows them.
            quiet = (
                replace(recipe.sample, num=0),
                replace(recipe.evaluate, classifier=False, inception="", reference=""),
            )
            yield Job(seed, folder, replace(recipe, data=data, sample=quiet[0], evaluate=quiet[1]), teacher=teacher)
        for arm in study.arms:
            folder, table = out / f"seed{seed}" / arm.name, dict(arm.stage)
            if arm.teacher is not None:
                stage = folder.with_name(f"teacher-{arm.teacher.name}") / arm.teacher.stage["name"]
                table["teacher"] = stage.as_posix()
            yield Job(seed, folder, _recipe(study, folder, seed, table, f"arm {arm.name}", arm.sections), arm=arm)


def _within(study: Study, arm: Arm, flops: float) -> Arm:
    """The arm with as many steps as fit `flops` in all, its teacher's training and forward passes among them."""
    seed, folder, where = study.seeds[0], Path(arm.name), f"{study.path}, arm {arm.name}"
    spent = 0.0
    if arm.teacher is not None and arm.teacher.trained:
        steps = arm.teacher.stage["steps"]
        spent = _flops(_recipe(study, folder, seed, arm.teacher.stage, f"teacher {arm.teacher.name}"), steps)
    table = arm.stage | ({"teacher": "./teacher"} if arm.teacher else {})
    recipe = _recipe(study, folder, seed, table, f"arm {arm.name}", arm.sections)
    a_step = recipe.optim.batch_size * cost.stage_cost(recipe, recipe.stages[0]).student
    most = int(min((flops - spent) // a_step, MOST_STEPS))
    steps = bisect_right(range(max(1, most) + 1), flops - spent, key=lambda n: _flops(recipe, n)) - 1
    what = f"not one step fits: a step takes {_flops(recipe, 1):.3g}, its teacher before it {spent:.3g}"
    _need(steps >= 1, where, "flops", flops, what)
    return replace(arm, stage=arm.stage | {"steps": steps})


def _flops(recipe: Recipe, steps: int) -> float:
    """What that many steps of a recipe's one stage take."""
    return cost.stage_flops(recipe, recipe.stages[0], 0, steps)


def _with_common(base: Document, common: dict[str, Any], path: Path) -> Document:
    """The base recipe with the study's own sections and stage settings over it."""
    _need(isinstance(common, dict), path, "common", common, "tables under [common.SECTION] are needed")
    stages = common.get("stage", {})
    names = [stage.get("name") for stage in base.stages]
    right = isinstance(stages, dict) and all(n in names and isinstance(table, dict) for n, table in stages.items())
    _need(right, path, "common.stage", stages, f"tables named {', '.join(map(str, names))} are possible")
    try:
        sections = as_document({key: table for key, table in common.items() if key != "stage"}).sections
    except RecipeError as error:
        raise error.at(f"{path}, common") from None
    merged = {name: base.sections.get(name, {}) | sections.get(name, {}) for name in base.sections | sections}
    return Document(merged, [stage | stages.get(stage.get("name"), {}) for stage in base.stages])


def _need(right: bool, where: object, key: str, value: object, what: str) -> None:
    """UserError that names the place, the key, its value and what is needed, unless it is right."""
    if not right:
        raise UserError(f"{where}: {f'{key} is missing' if value is None else f'{key} = {shown(value)}'}; {what}")


def _recipe(
    study: Study, folder: Path, seed: int, stage: dict[str, Any], what: str,
    own: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Recipe:  # fmt: skip
    """The base recipe with this one stage and its own keys of other sections, checked."""
    sections = copy.deepcopy(study.base.sections)
    sections["run"] = sections.get("run", {}) | {"out": folder.as_posix(), "seed": seed}
    for section, table in own.items():
        sections[section] = sections.get(section, {}) | table
    try:
        recipe = agreed(resolve(parse(Document(sections, [stage])), study.recipe_path), ranks=1)
        check(recipe)
        if patience := recipe.validate.patience:
            why = "every run of a study makes the steps that its budget buys"
            raise wrong_value("validate.patience", patience, "0", why)
    except RecipeError as error:
        raise error.at(f"{study.path}, {what}") from None
    return recipe


def _teacher(table: dict[str, Any], base: Document, path: Path) -> Teacher:
    where = f"{path}, teacher {shown(table.get('name'))}"
    labels = table.get("labels", "true")
    _need(labels in ("true", "shuffled"), where, "labels", labels, '"true" or "shuffled"')
    stage = _stage_of(table, base, where) | {k: v for k, v in table.items() if k not in TEACHER_KEYS}
    right = type(stage.get("steps")) is int and stage["steps"] >= 0
    _need(right, where, "steps", stage.get("steps"), "a whole number, 0 for an untrained network")
    return Teacher(_name(table, where), stage, labels)


def _arm(table: dict[str, Any], base: Document, path: Path, teachers: Sequence[Teacher]) -> Arm:
    where = f"{path}, arm {shown(table.get('name'))}"
    name = _name(table, where)
    settings = {k: v for k, v in table.items() if k not in ARM_KEYS}
    stage = (_stage_of(table, base, where) if "stage" in table else {}) | settings | {"name": name}
    stage.pop("teacher", None)
    teacher = next((teacher for teacher in teachers if teacher.name == table.get("teacher")), None)
    what = f"the study has {', '.join(teacher.name for teacher in teachers) or 'none'}"
    _need(teacher is not None or "teacher" not in table, where, "teacher", table.get("teacher"), what)
    sections = {section: table[section] for section in ARM_SECTIONS if section in table}
    for section, own in sections.items():
        _need(isinstance(own, dict), where, section, own, f"a table of keys of [{section}] is needed")
    what = f"none beside teacher = {shown(table.get('teacher'))}, whose network is the base recipe's"
    _need(teacher is None or "model" not in sections, where, "model", sections.get("model"), what)
    theirs = base.sections.get("flow", {}).get("path", "linear")
    flow_path = sections.get("flow", {}).get("path", theirs)
    what = f"teacher = {shown(table.get('teacher'))} has {theirs}"
    _need(teacher is None or flow_path == theirs, where, "flow.path", flow_path, what)
    return Arm(name, str(table.get("title", name)), str(table.get("panel", "")), stage, teacher, sections)


def _stage_of(table: dict[str, Any], base: Document, where: str) -> dict[str, Any]:
    stages = {str(stage.get("name")): dict(stage) for stage in base.stages}
    name = table.get("stage")
    _need(name in stages, where, "stage", name, f"the base recipe has {', '.join(stages)}")
    return stages[str(name)]


def _tables(raw: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    tables = raw.get(key, [])
    right = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    _need(right, path, key, tables, f"tables under [[{key}]] are needed")
    return list(tables)


def _name(table: dict[str, Any], where: str) -> str:
    name = table.get("name")
    right = isinstance(name, str) and FOLDER_NAME.allows(name)
    _need(right, where, "name", name, "a word that can name a folder is needed")
    return str(name)


def _text(table: dict[str, Any], key: str, where: object) -> str:
    _need(isinstance(table.get(key), str), where, key, table.get(key), "text is needed")
    return str(table[key])
