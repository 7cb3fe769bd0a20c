"""A study's page: text, tables and pictures, between two markers of a Markdown file. Imports no torch."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_fast.core.errors import UserError
from st_fast.core.files import inside, make_folder, read_bytes, write_atomic
from st_fast.core.writing import cannot_write
from st_fast.report import plot, words
from st_fast.report.collect import number
from st_fast.report.figures import Chart, Curve
from st_fast.report.metrics import METRICS
from st_fast.report.repeats import Repeats, compared
from st_fast.study import frontier, shares, summary
from st_fast.study.plan import EXTERNAL, Study
from st_fast.study.results import Results, certainty, comparisons, equal_steps, half_done, price, together
from st_fast.study.seeds import METRIC, Seed, gather, write_seeds

HEADER = """# Does it pay?

Self-Transcendence ([arXiv 2601.07773](https://arxiv.org/abs/2601.07773), [the method](method.md)) trains a diffusion
transformer in two stages:

- **Plain training**, the baseline, has the denoising task alone.
- **Stage 1** trains a small head on an early block as well. Its model can be used as it is, or as the teacher.
- **Stage 2** trains a new model. An early block has to predict the frozen teacher's features, guided towards the class
  with the scale ω.

Published curves count the steps of the new model alone. Training the teacher and its forward passes cost FLOPs too, so
the arms here are also compared **at equal total FLOPs**, with controls whose teachers know nothing. Scores are Fréchet
distances between generated and real images: lower is better. Whether the features are what the paper says they are is
another page: [Does the method do what it claims?](probes.md). The [other methods without an external
encoder](frontier.md) are compared by the same rule, under “Which arm leads at equal FLOPs?”.

Written by `python -m st_fast.study FILE --write docs/study.md` from the logs of the runs; no figure is typed.

<!-- study summary: begin -->
<!-- study summary: end -->

<!-- study frontier: begin -->
<!-- study frontier: end -->
"""


def write_page(study: Study, ours: Sequence[Seed], page: Path) -> Results:
    """Puts the study's text in its place on the page, and its pictures and a file a seed into a folder beside it.

    `ours` are the seeds whose runs are here; the others' figures come from that folder. UserError where seeds can't be
    put together, or where a run isn't the one that a seed's file was written from.
    """
    name, folder = study.name, page.parent / page.stem
    chosen, text = gather(study, folder, ours), read_page(page)
    results = together(study, chosen)
    try:
        make_folder(folder)
        write_seeds(study, folder, ours, chosen)
        if results.rows:
            plot.save(plot.sheet(charts(results), 4.2, 3.3), folder / f"{name}-quality.png", dpi=110)
            drawn = samples(results, ours)
            if drawn:
                plot.save(
                    plot.pictures([("", drawn[n : n + 2]) for n in range(0, len(drawn), 2)], 5.0),
                    folder / f"{name}-samples.png",
                    dpi=110,
                )
        text = placed(text, name, body(results, folder))
        if found := [one for one in shares.read_shares(folder) if shares.chart(one).curves]:
            shares.draw(found, folder / "shares.png")
            text = placed(text, "shares", shares.section(found, f"{folder.name}/shares.png"))
        if leads := frontier.read_frontiers(folder):
            frontier.draw(leads, folder / "frontier.png")
            text = placed(text, "frontier", frontier.section(leads, f"{folder.name}/frontier.png"))
        write_atomic(page.resolve(), placed(text, "summary", summary.section(folder)).encode())
    except OSError as error:
        raise cannot_write(page, error) from None
    return results


def read_page(page: Path) -> str:
    """The page's text, HEADER where there is none yet; UserError for a place or a file that can't be such a page."""
    if page.is_dir() or not page.suffix:
        raise UserError(
            f"{page}: a Markdown file is needed, such as docs/study.md; its folder is called as the page is"
        )
    try:
        return read_bytes(page).decode() if page.exists() else HEADER
    except UnicodeDecodeError as error:
        raise UserError(f"{page}: not text in UTF-8 ({error.reason} at byte {error.start})") from None


def placed(text: str, name: str, section: str) -> str:
    """The page with the study's section between its markers, at the end where there was none.

    A marker without its counterpart is left alone, and one within the section is no marker.
    """
    begin, end = f"<!-- study {name}: begin -->", f"<!-- study {name}: end -->"
    block = f"{begin}\n{section.replace('<!-- study', '&lt;!-- study')}{end}\n"
    pattern = re.compile(f"{re.escape(begin)}(?:(?!<!-- study ).)*{re.escape(end)}\n?", re.DOTALL)
    text = text.replace("\r\n", "\n")
    return pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}"


def body(results: Results, folder: Path) -> str:
    """The section: what came out, how it was done, the verdict, every comparison, the pictures, and what it took."""
    study = results.study
    unfinished = "".join(f"- {sentence}\n" for sentence in half_done(results))
    if not results.rows:
        return f"## {study.title}\n\nNo seed is complete yet.\n\n{unfinished}"
    verdict = compared(results.rows, METRIC, results.study.apart)
    lines = "".join(f"| {' | '.join(line)} |\n" for line in comparisons(results))
    base, taught = (study.arm(name).title for name in (study.baseline, study.reference))
    titles = [f"Beside “{base}” at equal FLOPs", f"Beside “{base}” at equal steps", f"Beside “{taught}” at equal steps"]
    head = f"| Arm | {' | '.join(titles)} |\n| --- | --- | --- | --- |\n"
    parts = [
        f"## {study.title}\n",
        f"{unfinished}- **At equal FLOPs:** {verdict.sentence}\n- **At equal steps of the new model:** "
        f"{equal_steps(results)}\n- **Cost:** {price(results)}\n- **Certainty:** {certainty(results)}\n",
        "### How it was done\n",
        protocol(results),
        *([f"{study.notes}\n"] if study.notes else []),
        "### The verdict\n",
        verdict.markdown(),
        f"{verdict.note}\n",
        "### Every comparison\n",
        f"{head}{lines}",
        f"Differences in {METRICS[METRIC].title} between runs of one seed: mean ± standard deviation, and how many "
        "seeds agree with the sign of the mean. Steps are those of the new model alone, as in published curves. Two "
        "runs are read where the first of them ends, which is another place in each row: rows of one column can't be "
        "compared with each other.\n",
        f"![Quality over all training FLOPs; the range over seeds is shaded]({folder.name}/{study.name}-quality.png)\n",
    ]
    if (folder / f"{study.name}-samples.png").is_file():
        parts.append(
            f"The last samples of one seed within the total cost of “{results.rows[0].label}”, to a step, from the "
            f"same noise:\n\n![Samples of every arm]({folder.name}/{study.name}-samples.png)\n"
        )
    parts.append(reproduced(results, folder))
    return "\n".join(parts)


def protocol(results: Results) -> str:
    """How many arms and seeds, what runs have in common, and how scores were taken."""
    study, told, seeds = results.study, results.protocol, results.seeds
    drawn = f"{told.get('sampler')}, {told.get('steps')} steps, guidance {told.get('cfg_scale')}"
    if "shift" in told:
        drawn += f", shift {told['shift']}"
    if "internal_guidance" in told:
        drawn += f", Internal Guidance {told['internal_guidance']}"
    outside = any(arm.stage.get("supervision") in EXTERNAL for arm in study.arms)
    return (
        f"{len(results.groups)} arms, {len(seeds)} seed{'s' * (len(seeds) != 1)} each "
        f"({', '.join(map(str, seeds))}), from `{study.path.as_posix()}`. Runs of one seed saw the same records, times "
        "and noise in the same order, and their samples start from the same noise. Each score is of "
        f"{words.count(number(told, 'num'))} samples ({drawn}) in the features of a classifier trained on the real "
        "images, so it is not FID; its accuracy on held-out real ones is "
        f"{words.percent(number(told, METRICS['accuracy'].floor))}, and {words.count(number(told, 'floor_num'))} of "
        f"these score a Fréchet distance of {words.plain(number(told, METRICS[METRIC].floor))}. All costs count the "
        f"teacher's training and its forward passes{', but not the training of an external network' * outside}. "
        "Between evaluations a distance is read off a straight line between logarithms, an accuracy off one between "
        "values.\n"
    )


def reproduced(results: Results, folder: Path) -> str:
    """What the runs took, the command that makes them, how a seed is added, and where every figure is."""
    study, name = results.study, results.study.name
    runs = [arm for group in results.groups for arm in group.by_seed.values()]
    teachers = {arm.stage.model("teacher"): arm.teacher for arm in runs}  # each is shared by several
    spent = [*(arm.own for arm in runs), *teachers.values()]
    flops, seconds = math.fsum(cost.flops for cost in spent), math.fsum(cost.seconds for cost in spent)
    devices = ", ".join(dict.fromkeys(str(arm.stage.start.get("device", "an unknown device")) for arm in runs))
    files = ", ".join(f"[seed {s}]({folder.name}/{name}-seed{s}.json)" for s in results.seeds)
    more = max((*results.seeds, *study.seeds)) + 1
    return (
        f"{len(runs)} runs on {devices}, and their teachers: {words.flops(flops)} and {words.duration(seconds)}, added "
        "up, pauses for sampling and scoring left out. Other work may have run beside them, which moves times and not "
        "FLOPs. Every number again: "
        f"`python -m st_fast.study {study.path.as_posix()}`; a further seed on this page: the same with `--seed {more} "
        f"--write {folder.as_posix()}.md`. Every figure, and the hash of every run: {files}.\n"
    )


def charts(results: Results) -> list[list[Chart]]:
    """Mean over the seeds against total FLOPs, the range shaded: a row a metric, a column a panel.

    An arm without a panel of its own, such as the baseline, is in every one, and so is the reference: these come first,
    so that they look the same everywhere.
    """
    study = results.study
    panels = [p for p in dict.fromkeys(arm.panel for arm in study.arms) if p] or [""]
    pairs = zip(results.groups, study.arms, strict=True)
    arms = [(arm.panel == "" or arm.name == study.reference, arm.panel, group) for group, arm in pairs]
    rows: list[list[Chart]] = []
    for metric in (METRICS[METRIC], METRICS["accuracy"]):
        values = np.concatenate([_points(group, metric.key)[1].ravel() for group in results.groups])
        if not values.size:  # files of seeds need not have both
            continue
        wide = metric.unit == "number" and 0 < 10 * values.min() < values.max()
        line = []
        for panel in panels:
            shown = [group for always, _, group in arms if always]
            shown += [group for always, own, group in arms if own == panel and not always]
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


def samples(results: Results, ours: Sequence[Seed]) -> list[tuple[str, Any]]:
    """(label, image) of one seed's last samples of every arm within the baseline's cost, from the same noise.

    The first complete seed whose runs are here.
    """
    seed = next((one.seed for one in ours if one.seed in results.seeds), None)
    if seed is None:
        return []
    budget = results.group(results.study.baseline).by_seed[seed].total.flops
    found = []
    for group in results.groups:
        arm = group.by_seed[seed]
        one_step = arm.own.flops / max(1, arm.stage.step)  # budgets are met to a step
        for record in arm.last_sample(budget + one_step):
            if not inside(arm.run.path, record["file"]).is_file():
                continue
            spent = words.flops(number(record, "flops") + arm.teacher.flops)
            with Image.open(io.BytesIO(read_bytes(inside(arm.run.path, record["file"])))) as image:
                found.append((f"{group.label}: step {words.count(record['step'])}, {spent} in all", np.array(image)))
    return found
