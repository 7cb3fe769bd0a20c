"""One self-contained page from run folders: no script, no external resource, everything from logs escaped."""

import base64
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import median_high
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from st_fast.core.errors import UserError
from st_fast.core.files import inside, read_bytes, read_json, shown
from st_fast.report import fairness, plot, scores, teachers, validation, words
from st_fast.report.arms import Arm, make_arms
from st_fast.report.collect import Record, RunLog, number
from st_fast.report.figures import Figure, all_figures
from st_fast.report.progress import unfinished
from st_fast.report.repeats import heads, ranked, verdict

MAX_BYTES, MAX_PIXELS = 160_000, 64_000_000
NARROW, WIDE, PROBE = 520, 960, 1_400
"""Widths of embedded pictures, at most: one of several, a large one, and a probe's figure."""


@dataclass(frozen=True)
class Picture:
    """An embedded picture with the text under it, and with a title where it is a figure."""

    uri: str
    width: int
    height: int
    caption: str
    title: str = ""


def render(runs: Sequence[RunLog], seeds_declared: bool = False, beat: Callable[[], None] = lambda: None) -> str:
    """The page as HTML text; `seeds_declared`: runs that differ in their seed are repetitions.

    beat: called before each figure.
    """

    def drawn(figure: Figure) -> Markup:
        beat()
        return plot.svg(figure)

    reasons = fairness.unfair(runs, seeds_declared)
    every_arm = make_arms(runs)
    found = verdict(every_arm, reasons)
    open_ended, doubts = unfinished(runs), teachers.warnings(every_arm, beat)
    every, seed = len(runs), fairness.seed_of(runs[0])
    runs = [run for run in runs if not seeds_declared or fairness.seed_of(run) == seed]
    arms = make_arms(runs)
    notes = [note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes]
    unknown = [arm.label for arm in arms if not arm.total.known]
    notes += [f"The cost of a model before “{label}” isn't recorded; its totals lack it." for label in unknown]
    notes += [
        f"The supervision of “{arm.label}” ended by itself after {words.count(ended['step'])} steps, as the cosine of "
        f"its gradient and the denoising loss's was {words.plain(number(ended, 'cosine'))}."
        for arm in arms
        if (ended := arm.stage.stopped) is not None
    ]
    notes += [
        f"“{arm.label}” ended after {words.count(ended['step'])} of {words.count(arm.stage.steps)} steps, as its loss "
        f"on held-out records had not fallen since step {words.count(number(ended, 'lowest_at'))}."
        for arm in arms
        if (ended := arm.stage.ended_early) is not None
    ]
    notes += validation.incomparable(arms)
    if len(runs) < every:
        notes.append(f"Curves and pictures are of seed {seed}; the verdict is over all {every} runs.")
    best = [*ranked(arms)[1], *heads(arms)[::-1]][0]
    strips = [(arm.label, f"c{arm.colour % len(plot.COLOURS)}", _strip(arm, notes), _named(arm)) for arm in arms]
    spent = [_spent(arm) for arm in arms]
    context: dict[str, Any] = {
        "title": ", ".join(run.name for run in runs),
        "verdict": found,
        "origins": teachers.origins(arms),
        "unfinished": open_ended,
        "warnings": [*fairness.warnings(runs, arms, reasons), *doubts],
        "captioned": any(map(_captioned, arms)),
        "hero": next(iter(_grids(best, best.stage.records["sample"][-1:], WIDE, notes)), None),
        "methods": _methods(arms),
        "scores": scores.table(arms),
        "costs": (list(spent[0]), [list(line.values()) for line in spent]),
        "figures": {key: [(one, drawn(one)) for one in section] for key, section in all_figures(arms).items()},
        "validations": validation.tables(arms),
        "strips": [strip for strip in strips if strip[2]],
        "nearest": [(arm.label, picture) for arm in arms for picture in _nearest(arm, notes)],
        "at_cost": _at_equal_cost(arms, notes),
        "probes": [probe for run in runs if (probe := _probe(run, notes))],
        "differences": [[key, *values] for key, values in fairness.differences(runs)],
        "runs": runs,
        "notes": notes,
        "machines": [_machine(run) for run in runs],
        "style": Markup(_resource("style.css")),
    }
    return _template().render(context)


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_resource("page.html"))


ALWAYS = ("depth", "target", "student_depth", "teacher_depth", "cfg_scale")
"""Settings of a stage that stand in the table of methods wherever it has them."""
WHERE_CHOSEN = {"projector": "mlp", "target_norm": 0.0, "stop_step": 0, "stop_below": "off"}
"""Those that stand there only where they are not these."""


def _methods(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: each method and its settings in the order of their first use; a column of teachers if any."""
    groups: dict[tuple[str, str, str, str], list[Arm]] = {}
    for arm in arms:
        entry, method = arm.stage.entry, arm.stage.method
        title, sentence = words.METHODS.get(method, (method, "See the recipe below."))
        shown = [key for key in ALWAYS if key in entry]
        shown += [key for key, usual in WHERE_CHOSEN.items() if entry.get(key, usual) != usual]
        settings = ", ".join(f"{key} = {entry[key]}" for key in shown)
        if method == "repa" and entry.get("projector") == "conv" and entry.get("target_norm"):
            title = words.IREPA
        if method == "none" and not arm.stage.plain:
            sentence = "The denoising task alone."
        if pushed := entry.get("contrast"):
            title, sentence = f"{title} with a contrast", f"{sentence} {words.CONTRAST}"
            settings = f"{settings}, contrast = {pushed}".removeprefix(", ")
        if (route := entry.get("route", "none")) != "none":
            name, told = words.ROUTES.get(route, (route, ""))
            title, sentence = f"{title} with {name}", f"{sentence} {told}".strip()
            rest = "" if entry.get("dense_after", 0) == 0 else f", until step {entry['dense_after']}"
            rate = entry.get("route_rate")
            rate = words.ROUTE_RATES.get(str(route), rate) if rate == "auto" else rate
            settings = f"{settings}, route_rate = {rate}{rest}".removeprefix(", ")
        groups.setdefault((title, settings, arm.stage.model("teacher") or "", sentence), []).append(arm)
    taught = any(name for _, _, name, _ in groups)
    lines = [
        [title, ", ".join(dict.fromkeys(arm.stage.name for arm in mine)), settings]
        + [teachers.of_all(mine)] * taught
        + [sentence]
        for (title, settings, _, sentence), mine in groups.items()
    ]
    return ["Method", "Stages", "Settings", *["Teacher"] * taught, "Extra supervision"], lines


def _spent(arm: Arm) -> dict[str, str]:
    """One line of the table of costs: column → text; "–" where nothing was measured."""
    speeds, used = (arm.stage.series("train", key)[1] for key in ("images_per_s", "mfu"))
    bound, stage = "" if arm.total.known else "≥ ", arm.stage
    mfu = median_high(used or [math.nan])
    return {
        "Stage": arm.label,
        "Steps": words.count(stage.step) + f" of {words.count(stage.steps)}" * (stage.step < stage.steps),
        "FLOPs, own": words.flops(arm.own.flops),
        "FLOPs, with teacher": bound + words.flops(arm.total.flops),
        "Time, own": words.duration(arm.own.seconds),
        "Time, with teacher": bound + words.duration(arm.total.seconds),
        "Images/s": words.plain(median_high(speeds or [math.nan])),
        "MFU": words.percent(mfu if mfu <= 1 else math.nan),
    }


def _machine(run: RunLog) -> str:
    """One line on the device, the size of the network and the versions of a run."""
    start = next((stage.start for stage in run.stages if stage.start), {})
    parts = [run.name]
    if isinstance(start.get("device"), str):
        parts.append(start["device"])
    speed, parameters = number(start, "matmul_flops_per_s"), number(start, "trunk_params")
    if math.isfinite(speed):
        parts.append(f"{words.flops(speed)}/s in plain matrix products")
    if math.isfinite(parameters):
        parts.append(f"{words.count(parameters)} parameters used for sampling")
    versions = start.get("versions")
    if isinstance(versions, dict):
        parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return " · ".join(parts)


def _strip(arm: Arm, notes: list[str]) -> list[Picture]:
    """At most five grids of a stage, the first and last among them."""
    records = arm.stage.records["sample"]
    places = {round(i * (len(records) - 1) / 4) for i in range(5)} if records else set()
    return _grids(arm, [records[place] for place in sorted(places)], WIDE if _captioned(arm) else NARROW, notes)


def _nearest(arm: Arm, notes: list[str]) -> list[Picture]:
    """The last sheet of a stage's scored samples beside the nearest real pictures, if one was made."""
    records = [record for record in arm.stage.records["eval"] if isinstance(record.get("file"), str)]
    return _grids(arm, records[-1:], WIDE, notes)


def _captioned(arm: Arm) -> bool:
    """Whether a stage's grids have a text under each image."""
    records = arm.stage.records["sample"]
    return bool(records) and "prompts" in records[-1]


def _named(arm: Arm) -> str:
    """What the images of a stage's grids are: of classes their names in turn, of texts the source of the data."""
    records = arm.stage.records["sample"]
    last = records[-1] if records else {}
    if _captioned(arm):
        return f"Trained on {last['source']}." if last.get("source") else ""
    names = last.get("classes")
    return f"Classes in turn, row by row: {', '.join(map(str, names))}." if isinstance(names, list) else ""


def _at_equal_cost(arms: Sequence[Arm], notes: list[str]) -> tuple[str, list[Picture]]:
    """(total FLOPs, each run's last grid within them): the most that all runs of the first one's seed spent."""
    ranked_by = heads(arms)
    alike = [a for a in ranked_by if fairness.seed_of(a.run) == fairness.seed_of(ranked_by[0].run) and a.total.known]
    drawn = [arm for arm in alike if arm.stage.records["sample"]]
    budget = min((arm.total.flops for arm in drawn), default=0.0)
    grids = [grid for arm in drawn for grid in _grids(arm, arm.last_sample(budget), NARROW, notes, named=True)]
    return words.flops(budget), grids if len(grids) > 1 else []


def _grids(arm: Arm, records: Sequence[Record], width: int, notes: list[str], named: bool = False) -> list[Picture]:
    """The pictures of sample records; a note for each that can't be read as an image inside the run folder."""
    found = []
    for record in records:
        name = record["file"]
        try:
            uri, size = _embedded(arm.run.path, name, width, gaps=True)
        except (UserError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else "not a picture inside the run folder"
            note = f"The sample {shown(name)} of stage “{arm.stage.name}” is {reason}; it is left out."
            if note not in notes:
                notes.append(note)
            continue
        spent = words.flops(number(record, "flops") + arm.teacher.flops)
        step = f"step {words.count(record['step'])}"
        found.append(Picture(uri, *size, f"{arm.label}, {step}, {spent}" if named or width == WIDE else step))
    return found


def _embedded(folder: Path, name: str, width: int, gaps: bool = False) -> tuple[str, tuple[int, int]]:
    """A PNG of a folder as a data URI, at most `width` wide, and its size; with `gaps` the page shows through these.

    Never follows a path out of the folder, never opens an absurdly large picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a smaller one than its limit is refused here
        with Image.open(io.BytesIO(read_bytes(inside(folder, name))), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError("too large")
            clear = image.has_transparency_data
            grey = image.mode in ("L", "1", "LA")
            picture = image.convert(("LA" if grey else "RGBA") if clear else "L" if grey else "RGB")
    if gaps and not clear:
        picture = _with_clear_gaps(picture)
    picture.thumbnail((width, picture.height), Image.Resampling.LANCZOS, reducing_gap=None)
    # PNG where that is small, else WebP: photographs need no exact pixels at this size.
    for format_, options in (("png", {"optimize": True}), ("webp", {"quality": 85})):
        buffer = io.BytesIO()
        picture.save(buffer, format_, **options)
        if buffer.tell() <= MAX_BYTES:
            break
    return f"data:image/{format_};base64,{base64.b64encode(buffer.getvalue()).decode()}", picture.size


def _with_clear_gaps(picture: Image.Image) -> Image.Image:
    """A grid on white, with what lies between its images made transparent: rows and columns that are white all over."""
    values = np.asarray(picture)
    white = (values == 255).reshape(*values.shape[:2], -1).all(-1)
    clear = white.all(1)[:, None] | white.all(0)[None]
    if clear.all() or not clear.any():
        return picture
    picture.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return picture


def _probe(run: RunLog, notes: list[str]) -> tuple[str, str, list[Picture]] | None:
    """(the run, what was probed, the figures) of a run's probe folder; a note on each part that can't be shown."""
    path = run.path / "probe" / "probe.json"
    if not path.is_file():
        return None
    try:
        about = read_json(path)
        entries = [dict(entry) for entry in about["figures"]]
    except (UserError, OSError, KeyError, ValueError, TypeError):
        notes.append(f"The probe of {run.name} can't be read: probe/probe.json is damaged; it is left out.")
        return None
    drawn = []
    for entry in entries:
        try:
            uri, size = _embedded(path.parent, str(entry["file"]), PROBE)
        except (UserError, OSError, KeyError, ValueError, SyntaxError, Image.DecompressionBombError):
            notes.append(f"A figure of the probe of {run.name} is missing or not a picture; it is left out.")
            continue
        drawn.append(Picture(uri, *size, str(entry.get("caption", "")), str(entry.get("title", ""))))
    unseen = "unseen in training" if about.get("held_out_unseen") is True else "unseen by the probe alone"
    told = (
        f"On {about.get('held_out_images', '?')} images {unseen}; linear classifiers were trained on "
        f"{about.get('train_images', '?')} others. Weights: {about.get('weights', '?')}{_probed(about)}."
        f"{_outdated(about, run)}"
    )
    return (run.name, told, drawn) if drawn else None


def _probed(about: Record) -> str:
    """“, of align at step 2,000 and …”: what a probe read; nothing where it is older and does not say."""
    models = about.get("models")
    found = [
        f"{model.get('label')} at step {model['step']:,}"
        for model in (models if isinstance(models, list) else [])
        if isinstance(model, dict) and isinstance(model.get("step"), int)
    ]
    return f", of {', '.join(found)}" if found else ""


def _outdated(about: Record, run: RunLog) -> str:
    """A sentence for stages of the run that were trained on since they were probed."""
    models, now = about.get("models"), {stage.name: stage.step for stage in run.stages}
    older = {
        model["stage"]: now[model["stage"]]
        for model in (models if isinstance(models, list) else [])
        if isinstance(model, dict) and model.get("run") == run.path.name and isinstance(model.get("stage"), str)
        and isinstance(model.get("step"), int) and model["step"] < now.get(model["stage"], 0)
    }  # fmt: skip
    where = ", ".join(f"{name} is at step {step:,}" for name, step in older.items())
    return f" The run has gone on since: {where}." if older else ""


def _resource(name: str) -> str:
    return files("st_fast.report").joinpath(name).read_text(encoding="utf-8")
