"""What came out of a study, from its runs' logs: curves, scores and the verdict, as JSON and in a Markdown page.

On the page a study stands between its own two markers, so that one page can hold several. Imports no torch.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_fast.core.errors import UserError
from st_fast.core.files import inside, make_folder, read_bytes, write_atomic, write_json_atomic
from st_fast.core.writing import cannot_write
from st_fast.report import plot, words
from st_fast.report.arms import Arm, make_arms
from st_fast.report.collect import number, read_run
from st_fast.report.fairness import data_digest, unfair
from st_fast.report.figures import Chart, Curve
from st_fast.report.metrics import METRICS
from st_fast.report.repeats import Repeats, Row, compared, rows, spread
from st_fast.study.plan import Study, jobs

METRIC = "frechet"
PROTOCOL = (
    "num", "cfg_scale", "sampler", "steps", "classifier_accuracy", "classifier_digest", "floor_frechet", "floor_num"
)  # fmt: skip
HEADER = """# Does it pay?

Self-Transcendence ([arXiv 2601.07773](https://arxiv.org/abs/2601.07773), [the method](method.md)) trains a diffusion
transformer in two stages:

- **Plain training**, the baseline, has the denoising task alone.
- **Stage 1** trains a small head on an early block as well. Its model can be used as it is, or as the teacher.
- **Stage 2** trains a new model. An early block has to predict the frozen teacher's features, guided towards the class
  with the scale ω.

Published curves count the steps of the new model alone. Training the teacher and its forward passes cost FLOPs too, so
the arms here are compared **at equal total FLOPs**, and over several seeds. Scores are Fréchet distances between
generated and real images: lower is better.

Written by `python -m st_fast.study FILE --write docs/study.md` from the logs of the runs; no figure is typed.
"""


@dataclass(frozen=True)
class Results:
    """A finished study: each arm's runs by seed, and the verdict's rows, the baseline first."""

    study: Study
    groups: list[Repeats]
    rows: list[Row]

    @property
    def protocol(self) -> dict[str, Any]:
        """How every score was taken, from the first evaluation."""
        metrics = next(iter(self.groups[0].by_seed.values())).last_metrics
        return {key: metrics[key] for key in PROTOCOL if key in metrics}

    def group(self, name: str) -> Repeats:
        """An arm's runs."""
        return next(group for group, arm in zip(self.groups, self.study.arms, strict=True) if arm.name == name)


def collect(study: Study, out: Path) -> Results:
    """Reads every arm's run of every seed; UserError for one that is missing, unscored, or that can't be compared."""
    groups = [Repeats(arm.title, {}) for arm in study.arms]
    logs = []
    for job in jobs(study, out):
        if job.arm is None:
            continue
        log = read_run(job.folder)
        logs.append(log)
        arm = make_arms([log])[-1]
        if not math.isfinite(arm.final(METRIC)) or arm.stage.step < job.recipe.stages[0].steps:
            raise UserError(f"{job.folder}: not finished and scored yet; run the study first")
        if not arm.total.known:
            raise UserError(f"{job.folder}: no log says what its teacher cost; start the study where it was started")
        groups[study.arms.index(job.arm)].by_seed[job.seed] = arm
    reasons = unfair(logs, seeds_declared=True)
    if reasons:
        raise UserError(f"{out}: these runs can't be compared: {'; '.join(reasons)}")
    baseline = next(g for g, arm in zip(groups, study.arms, strict=True) if arm.name == study.baseline)
    return Results(study, groups, rows(groups, baseline, METRIC))


def as_json(results: Results) -> dict[str, Any]:
    """Everything the page is written from. Only `wall_clock` differs between two machines or two days."""
    study = results.study
    first = next(iter(results.groups[0].by_seed.values()))
    return {
        "study": study.name, "seeds": list(study.seeds), "baseline": study.baseline, "metric": METRIC,
        "dataset": data_digest(first.run), "protocol": results.protocol,
        "verdict": [{k: v for k, v in asdict(row).items() if k != "reached_seconds"} for row in results.rows],
        "arms": [
            {"name": arm.name, "title": arm.title, "runs": [_run(*run) for run in group.by_seed.items()]}
            for arm, group in zip(study.arms, results.groups, strict=True)
        ],
        "wall_clock": {
            "reached": {row.label: row.reached_seconds for row in results.rows},
            "seconds": {g.label: [a.own.seconds for a in g.by_seed.values()] for g in results.groups},
            "device": str(first.stage.start.get("device", "")),
            "versions": first.stage.start.get("versions", {}),
        },
    }  # fmt: skip


def _run(seed: int, arm: Arm) -> dict[str, Any]:
    flops, frechet = arm.quality(METRIC, "flops")
    steps, accuracy = arm.quality("accuracy", "step")
    return {
        "seed": seed, "step": [int(step) for step in steps], "total_flops": flops, "frechet": frechet,
        "accuracy": accuracy, "own_flops": arm.own.flops, "teacher_flops": arm.teacher.flops,
        "teacher_forward_flops": arm.teacher_forward_flops,
    }  # fmt: skip


def write_page(results: Results, page: Path) -> None:
    """Puts the study's text in its place on the page, and its pictures and all figures into a folder beside it."""
    name = results.study.name
    folder = page.parent / page.stem
    try:
        make_folder(folder)
        plot.save(plot.sheet(charts(results), 4.2, 3.3), folder / f"{name}-quality.png", dpi=110)
        drawn = samples(results)
        if drawn:
            plot.save(plot.pictures([("", [one]) for one in drawn], 6.0), folder / f"{name}-samples.png", dpi=110)
        write_json_atomic(folder / f"{name}.json", as_json(results))
        text = page.read_text(encoding="utf-8") if page.is_file() else HEADER
        section = f"{body(results, page.stem, bool(drawn))}\nEvery figure: [{name}.json]({page.stem}/{name}.json).\n"
        write_atomic(page.resolve(), placed(text, name, section).encode())
    except OSError as error:
        raise cannot_write(page, error) from None


def placed(text: str, name: str, section: str) -> str:
    """The page with the study's section between its markers, at the end where there was none."""
    begin, end = f"<!-- study {name}: begin -->\n", f"<!-- study {name}: end -->\n"
    block = f"{begin}{section}{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}"


def body(results: Results, folder: str, with_samples: bool) -> str:
    """The section: what came out, how it was done, the verdict, every comparison, the pictures, and what it took."""
    study, protocol, base = results.study, results.protocol, results.rows[0]
    verdict = compared(results.rows, METRIC)
    seeds, floor = len(study.seeds), METRICS[METRIC].floor
    lines = "".join(f"| {' | '.join(line)} |\n" for line in comparisons(results))
    controls = [f"“{arm.title}”" for arm in study.arms
                if arm.teacher and not (arm.teacher.trained and arm.teacher.labels == "true")]  # fmt: skip
    parts = [
        f"## {study.title}\n",
        f"- {verdict.sentence}\n- **Cost:** {price(results)}\n- **Certainty:** {certainty(results)}\n",
        "### How it was done\n",
        f"{len(results.groups)} arms, {seeds} seed{'s' * (seeds != 1)} each ({', '.join(map(str, study.seeds))}), from "
        f"`{study.path.as_posix()}`. Runs of one seed saw the same records, times and noise in the same order, and "
        f"their samples start from the same noise. Each score is of {protocol.get('num')} samples "
        f"({protocol.get('sampler')}, {protocol.get('steps')} steps, guidance {protocol.get('cfg_scale')}) in the "
        "features of a classifier trained on the real images, so it is not FID; its accuracy on held-out real ones is "
        f"{words.percent(number(protocol, METRICS['accuracy'].floor))}, and these score a Fréchet distance of "
        f"{words.plain(number(protocol, floor))}. All costs count the teacher's training and its forward passes.\n",
        *([f"{study.notes}\n"] if study.notes else []),
        "### The verdict\n",
        verdict.markdown(),
        f"{verdict.note}\n",
        "### Every comparison\n",
        f"| Compared at | Arm | With | {METRICS[METRIC].title} | Seeds |\n| --- | --- | --- | --- | --- |\n{lines}",
        "Mean ± standard deviation of the differences between runs of one seed; “seeds”: how many of them agree with "
        "the sign of the mean."
        + f" Controls, whose teachers know less or nothing: {', '.join(controls)}." * bool(controls)
        + "\n",
        f"![Quality over all training FLOPs; the range over seeds is shaded]({folder}/{study.name}-quality.png)\n",
    ]
    if with_samples:
        parts.append(
            f"The last samples of seed {study.seeds[0]} within the total cost of “{base.label}”, from the same "
            f"noise:\n\n![Samples of every arm]({folder}/{study.name}-samples.png)\n"
        )
    runs = [arm for group in results.groups for arm in group.by_seed.values()]
    parts.append(
        f"{len(runs)} runs on {runs[0].stage.start.get('device', 'an unknown device')}: "
        f"{words.duration(math.fsum(arm.own.seconds for arm in runs))} of training beside the shared teachers', pauses "
        "for sampling and scoring left out.\n"
    )
    return "\n".join(parts)


def comparisons(results: Results) -> Iterator[tuple[str, str, str, str, str]]:
    """(compared at, arm, with, difference, seeds that agree) of every comparison, best first at equal cost."""
    study, rows = results.study, {row.label: row for row in results.rows}
    titles = {arm.name: arm.title for arm in study.arms}
    base, taught = rows[titles[study.baseline]], rows[titles[study.reference]]
    by_score = sorted((row for row in rows.values() if row is not base), key=lambda row: spread(row.at_cost)[0])
    for row in by_score:
        yield "equal FLOPs", row.label, base.label, *difference(row.at_cost, base.final)
    for arm in study.arms:
        if arm.teacher is None and arm.stage.get("supervision") == "velocity_head":
            alone = rows[arm.title]
            yield "equal FLOPs", taught.label, alone.label, *difference(taught.at_cost, alone.at_cost)
    students, plain = (results.group(name).by_seed for name in (study.reference, study.baseline))
    then = [plain[seed].at(METRIC, "step", students[seed].stage.step) for seed in taught.seeds]
    yield "equal steps of the new model", taught.label, base.label, *difference(taught.final, then)
    for arm in study.arms:
        if arm.teacher and arm.name != study.reference:
            row = rows[arm.title]
            yield "equal steps of the new model", row.label, taught.label, *difference(row.final, taught.final)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[str, str]:
    """(“0.11 ± 0.02 lower (better)”, “3 of 3”) of two lists with an entry a seed, lower being better."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, deviation = spread(differences)
    about = f" ± {words.plain(deviation)}" if math.isfinite(deviation) else ""
    side = "lower (better)" if mean < 0 else "higher (worse)"
    agreeing = sum(d < 0 if mean < 0 else d > 0 for d in differences)
    return f"{words.plain(abs(mean))}{about} {side}", f"{agreeing} of {len(differences)}"


def price(results: Results) -> str:
    """What of the reference arm's FLOPs its teacher took."""
    group = results.group(results.study.reference)
    runs = group.by_seed.values()
    total, training = math.fsum(arm.total.flops for arm in runs), math.fsum(arm.teacher.flops for arm in runs)
    asking = math.fsum(arm.teacher_forward_flops for arm in runs)
    return (
        f"{words.percent(training / total)} of the FLOPs of “{group.label}” trained its teacher, and "
        f"{words.percent(asking / total)} were the teacher's forward passes."
    )


def certainty(results: Results) -> str:
    """How often chance alone would give such agreement, and how much the scores vary by themselves."""
    base: Row = results.rows[0]
    n, arms = len(base.seeds), len(results.rows) - 1
    if n == 1:
        return "none: with one seed, chance can't be told from effect."
    return (
        f"the seed alone moves the score of “{base.label}” by ± {words.plain(spread(base.final)[1])}. By chance all "
        f"{n} seeds agree on a sign in {words.percent(2.0 ** (1 - n))} of comparisons, and {arms} arms are compared: "
        "trust a difference that is several times its ±, not one that is only the best of many. Held-out real images "
        f"score {words.plain(number(results.protocol, METRICS[METRIC].floor))}; no arm can be much better than that."
    )


def charts(results: Results) -> list[list[Chart]]:
    """Mean over the seeds against total FLOPs, the range shaded: a row a metric, a column a panel.

    An arm without a panel of its own, such as the baseline, is in every one, and so is the reference.
    """
    study = results.study
    panels = [p for p in dict.fromkeys(arm.panel for arm in study.arms) if p] or [""]
    rows: list[list[Chart]] = []
    for metric in (METRICS[METRIC], METRICS["accuracy"]):
        values = np.concatenate([_points(group, metric.key)[1].ravel() for group in results.groups])
        wide = metric.unit == "number" and 0 < 10 * values.min() < values.max()
        line = []
        for panel in panels:
            pairs = zip(results.groups, study.arms, strict=True)
            shown = [g for g, arm in pairs if arm.panel in ("", panel) or arm.name == study.reference]
            curves = [_curve(group, metric.key, place) for place, group in enumerate(shown)]
            title, x_label = (panel, "") if not rows else ("", "all training FLOPs, teacher included")
            line.append(Chart("", title, "", x_label, "flops", metric.title, metric.unit, wide, curves))
        rows.append(line)
    return rows


def _curve(group: Repeats, metric: str, place: int) -> Curve:
    x, y = _points(group, metric)
    colours = len(plot.COLOURS)
    low, high = y.min(axis=0).tolist(), y.max(axis=0).tolist()
    return Curve(group.label, x, y.mean(axis=0).tolist(), place, place // colours, low=low, high=high)


def _points(group: Repeats, metric: str) -> tuple[list[float], np.ndarray]:
    """Total FLOPs (n,) of an arm's evaluations and the metric (seeds, n); costs are the same for every seed."""
    points = [arm.quality(metric, "flops") for arm in group.by_seed.values()]
    count = min(len(x) for x, _ in points)
    return points[0][0][:count], np.array([y[:count] for _, y in points])


def samples(results: Results) -> list[tuple[str, Any]]:
    """(label, image) of the first seed's last samples of every arm within the baseline's cost, from the same noise."""
    seed = results.study.seeds[0]
    budget = results.group(results.study.baseline).by_seed[seed].total.flops
    found = []
    for group in results.groups:
        arm = group.by_seed[seed]
        for record in arm.last_sample(budget):
            spent = words.flops(number(record, "flops") + arm.teacher.flops)
            with Image.open(io.BytesIO(read_bytes(inside(arm.run.path, record["file"])))) as image:
                found.append((f"{group.label}: step {words.count(record['step'])}, {spent} in all", np.array(image)))
    return found
