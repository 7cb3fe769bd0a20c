"""Reads run folders: the resolved recipe and the log, checked record by record. Imports no torch."""

import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from st_fast.core.command import need_each_once
from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, printable, read_bytes, shown
from st_fast.report.metrics import NUMBERS as METRIC_NUMBERS

Record = dict[str, Any]
ModelKey = Literal["teacher", "init"]

LEFT_OUT_MOST = 5
"""Lines of a log that are told one by one as left out."""
KINDS = ("start", "train", "eval", "sample", "gradients", "validate", "end")
"""What the report uses; other kinds of record are skipped, so that logs may grow."""
NUMBERS = (
    "seconds", "flops", "loss", "denoise", "aux", "grad_norm", "lr", "images_per_s", "mfu", "data_wait", "peak_gib",
    "direction", "skipped", "params", "trunk_params", "flops_per_image", "teacher_flops_per_image", "batch_size",
    "matmul_flops_per_s", "cosine", "train_loss", "raw_loss", "raw_train_loss", "lowest", "lowest_at",
)  # fmt: skip
"""Keys of any record that must hold numbers or null."""
BY_TIME = ("by_time", "train_by_time", "raw_by_time", "raw_train_by_time")
"""Keys of validations that must hold lists of them."""
OLD_KEYS = {"judge_accuracy": "classifier_accuracy", "judge_digest": "classifier_digest"}
"""Keys of `metrics` in logs of earlier versions, and what they are called now."""
OLD_CLASSIFIER = {"none": False, "classifier": True}
"""What `evaluate.judge` in recipes of earlier versions means for `evaluate.classifier`."""


@dataclass(frozen=True)
class Taken:
    """The model that taught a stage, or whose weights it began with, as the stage's start record says.

    What an older log doesn't say is "". `sha256` is of the weights' names, shapes and values.
    """

    path: str
    step: int
    weights: str
    sha256: str

    def __str__(self) -> str:
        """“step 800, raw weights, SHA-256 3fa9c2d1b04e”; no step where another project's file doesn't tell one."""
        weights = {"raw": "raw weights", "ema": "ema weights", "state": "weights and optimiser state"}
        parts = [f"step {self.step:,}"] * (self.step > 0)
        parts += [weights.get(self.weights, self.weights)] * bool(self.weights)
        return ", ".join(parts + [f"SHA-256 {self.sha256[:12]}"] * bool(self.sha256))


@dataclass(frozen=True)
class StageLog:
    """What one stage of one run logged, each kind in the order of its steps, and its entry in the recipe."""

    name: str
    entry: Record
    records: dict[str, list[Record]]

    @property
    def method(self) -> str:
        """The name of its supervision method; "none" for plain training."""
        return str(self.entry.get("supervision", "none"))

    @property
    def plain(self) -> bool:
        """Whether it trained by the denoising loss alone, on all tokens."""
        return self.method == "none" and not self.entry.get("contrast") and self.entry.get("route", "none") == "none"

    def model(self, key: ModelKey) -> str | None:
        """The stage or path whose model teaches this one, or whose weights it began with, where there is any."""
        value = self.entry.get(key)
        return value if isinstance(value, str) and value else None

    def taken(self, key: ModelKey) -> Taken | None:
        """Which weights of that model were taken, as the start record says; None where it doesn't."""
        said = self.start.get(key)
        if not isinstance(said, dict) or type(step := said.get("step")) is not int or step < 0:
            return None
        path, weights, digest = (printable(str(said.get(name, "")))[:500] for name in ("path", "weights", "sha256"))
        return Taken(path, step, weights, digest)

    def model_step(self, key: ModelKey) -> int | None:
        """The step at which that model was taken, as the start record says; None where it doesn't."""
        found = self.taken(key)
        return None if found is None else found.step

    @property
    def teacher(self) -> Taken | None:
        """The frozen teacher's step, weights and digest; None without one, and in logs that do not say."""
        return self.taken("teacher")

    @property
    def evals(self) -> list[Record]:
        """The evaluation records."""
        return self.records["eval"]

    @property
    def start(self) -> Record:
        """The last start record; empty where the log has none."""
        return self.records["start"][-1] if self.records["start"] else {}

    @property
    def stopped(self) -> Record | None:
        """The comparison of gradients that ended its supervision; None where none did."""
        return next((record for record in self.records["gradients"] if record.get("stopped") is True), None)

    @property
    def step(self) -> int:
        """The last step that any record tells of."""
        return max((int(records[-1]["step"]) for records in self.records.values() if records), default=0)

    @property
    def steps(self) -> int:
        """Steps planned, as the recipe or the start record says; the last step where neither does."""
        planned = self.entry.get("steps", self.start.get("steps"))
        return planned if isinstance(planned, int) else self.step

    @property
    def ended(self) -> bool:
        """Whether it has logged its end, after all steps that are planned now or as its validations had it."""
        return self.ended_early is not None or any(record["step"] >= self.steps for record in self.records["end"])

    @property
    def ended_early(self) -> Record | None:
        """The end that its validations made before all planned steps; None where it made them, or has gone on since."""
        last = next(reversed(self.records["end"]), {"step": 0})
        early = last.get("ended_by") == "validation" and self.step <= last["step"] < self.steps
        return last if early else None

    @property
    def logged_at(self) -> float:
        """Seconds since 1970 of its newest record; NaN where no record has a time."""
        times = [record.get("time") for records in self.records.values() for record in records]
        known = [float(t) for t in times if isinstance(t, int | float) and not isinstance(t, bool) and abs(t) < 1e300]
        return max(known, default=math.nan)

    def series(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of `key` in the records of a kind."""
        return finite((float(record["step"]), number(record, key)) for record in self.records[kind])

    def last(self, key: str, until: float = math.inf) -> float:
        """The largest value of a cumulative `key` ("seconds" or "flops") in records up to a step; 0 without."""
        records = [record for kind in self.records.values() for record in kind if record["step"] <= until]
        values = [number(record, key) for record in records]
        return max((value for value in values if math.isfinite(value)), default=0.0)


@dataclass(frozen=True)
class RunLog:
    """One run folder: its name, its recipe as a dictionary and as text, its stages, and what was odd about its log."""

    name: str
    path: Path
    recipe: Record
    recipe_text: str
    stages: tuple[StageLog, ...]
    notes: tuple[str, ...]

    @property
    def planned(self) -> list[str]:
        """The names of the stages in its recipe, begun or not."""
        return [str(entry.get("name")) for entry in self.recipe.get("stage", [])]


def number(record: Record, key: str) -> float:
    """A number of a record, NaN where the key is absent or null; the reader has refused everything else."""
    value = record.get(key)
    return math.nan if value is None else float(value)


def finite(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """x and y of the points of which both are finite."""
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def read_runs(paths: Sequence[Path]) -> list[RunLog]:
    """All run folders, under names that differ; UserError where one can't be read or is named twice."""
    resolved = need_each_once(paths)
    names = [path.name for path in resolved]
    return [
        read_run(path, path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}")
        for path in resolved
    ]


def read_run(path: Path, name: str = "") -> RunLog:
    """One run folder; UserError names the file, line and key where something is missing or wrong."""
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder")
    recipe, text = _read_recipe(path / "recipe.toml")
    notes: list[str] = []
    records = _read_log(path / "log.jsonl", notes)
    entries = {str(entry.get("name")): entry for entry in recipe.get("stage", [])}
    logged = dict.fromkeys(str(record["stage"]) for record in records)
    names = [n for n in entries if n in logged] + [n for n in logged if n not in entries]
    stages = []
    for its_name in names:
        mine = [record for record in records if record["stage"] == its_name]
        kept: dict[str, list[Record]] = {}
        for kind in KINDS:  # the last record of each step: the steps that a resumed run did again count once
            latest = {record["step"]: record for record in mine if record["kind"] == kind}
            kept[kind] = [latest[step] for step in sorted(latest)]
        stage = StageLog(its_name, entries.get(its_name, {}), kept)
        stages.append(stage)
        for record in mine:
            if record["kind"] == "accepted":
                told = printable("; ".join(map(str, record.get("changes") or ())))[:2_000]
                notes.append(f"Stage “{its_name}” went on after step {record['step']:,} with accepted changes: {told}.")
        starts = sum(record["kind"] == "start" for record in mine)
        if starts > 1:
            times = "once" if starts == 2 else f"{starts - 1} times"
            notes.append(f"Stage “{its_name}” was interrupted and resumed {times}.")
    return RunLog(name or path.name, path, recipe, text, tuple(stages), tuple(notes))


def _read_recipe(path: Path) -> tuple[Record, str]:
    try:
        text = read_bytes(path).decode("utf-8")
        recipe = tomllib.loads(text)
    except BadFile as error:
        raise UserError(f"{error}; a run folder holds recipe.toml and log.jsonl") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    entries = recipe.get("stage", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: stage = {shown(entries)}; [[stage]] tables are needed")
    evaluate = recipe.get("evaluate", {})
    if isinstance(evaluate, dict) and evaluate.get("judge") in OLD_CLASSIFIER:
        evaluate["classifier"] = OLD_CLASSIFIER[evaluate.pop("judge")]
    return recipe, text


def _read_log(path: Path, notes: list[str]) -> list[Record]:
    """The log's known records; lines that are none, as kills, full disks or editors leave them, are left out and noted.

    A resumed run's first record may follow a half line on the same line.
    """
    try:
        lines = read_bytes(path).decode("utf-8", errors="replace").split("\n")
    except BadFile as error:
        raise UserError(f"{error}; has this run begun?" if not path.exists() else str(error)) from None
    records: list[Record] = []
    left_out: list[str] = []
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            record = _parse(line[max(0, line.rfind('{"kind"')) :])
            cut = line.startswith("{")
            why = "was cut off, as by a kill or a full disk" if cut else f"is no record: {shown(line, 60)}"
            left_out.append(f"Line {n} of the log {why}; it is left out.")
        if record is not None:
            if problem := _problem(record):
                left_out.append(f"Line {n} of the log is no record: {problem}; it is left out.")
            else:
                records.append(record)
    more = len(left_out) - LEFT_OUT_MOST
    notes += [*left_out[:LEFT_OUT_MOST], *[f"{more} more lines of the log are left out."] * (more > 0)]
    records = [record for record in records if record["kind"] in (*KINDS, "accepted")]
    if not records:
        why = f" ({left_out[0]})" if left_out else ""
        raise UserError(f"{path}: holds no record yet; has this run begun?{why}")
    return records


def _parse(line: str) -> Record | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _problem(record: Record) -> str:
    """What keeps a record from being used: a missing key, or a number that is none; "" if nothing does."""
    for key, kind, words in (("kind", str, "text"), ("stage", str, "text"), ("step", int, "a whole number")):
        if key not in record:
            return f"no {key!r}; every record needs kind, stage and step"
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            return f"{key} = {shown(record[key])}; {words} is needed"
    if not 0 <= record["step"] < 2**53:
        return f"step = {shown(record['step'])}; 0..2^53 are possible"
    if record["kind"] not in KINDS:
        return ""
    metrics = record.get("metrics", {})
    if not isinstance(metrics, dict):
        return f"metrics = {shown(metrics)}; an object is needed"
    if record["kind"] == "eval":
        record["metrics"] = metrics = {OLD_KEYS.get(key, key): value for key, value in metrics.items()}
    numbers = [(key, record[key]) for key in NUMBERS if key in record]
    numbers += [(f"metrics.{key}", value) for key, value in metrics.items() if key in METRIC_NUMBERS]
    for key, value in numbers:
        if value is not None and (type(value) not in (int, float) or (type(value) is int and abs(value) > 1e300)):
            return f"{key} = {shown(value)}; a number is needed"
    for key in BY_TIME if record["kind"] == "validate" else ():
        values = record.get(key, [])
        if not isinstance(values, list) or not all(
            type(v) is float or (type(v) is int and abs(v) < 1e300) for v in values
        ):
            return f"{key} = {shown(values)}; a list of numbers is needed"
    if record["kind"] == "sample" and not isinstance(record.get("file"), str):
        return f"file = {shown(record.get('file'))}; a path is needed"
    return ""
