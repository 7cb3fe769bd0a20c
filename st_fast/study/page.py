"""Writes a study into a Markdown page between its own two markers, so that one page can hold several studies."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from st_fast.core.errors import UserError
from st_fast.core.files import make_folder, write_json_atomic
from st_fast.report import words
from st_fast.report.repeats import Row, spread
from st_fast.report.verdict_table import in_words
from st_fast.study.pictures import curves, samples
from st_fast.study.results import METRIC, Results, as_json
from st_fast.study.summary import in_short

HEADER = """# Does it pay?

A diffusion transformer learns to draw from one task: an image is mixed with noise, and it says which way the image
lies. Self-Transcendence ([arXiv 2601.07773](https://arxiv.org/abs/2601.07773)) helps it to learn that sooner, with
nothing but its own kind ([the method](method.md)):

- **Plain training** is the yardstick: the task alone.
- **Stage 1** asks an early block, too, for the answer. Its model can be used as it is, or teach stage 2.
- **Stage 2** starts a new model. The frozen stage-1 model looks at the same noisy image once told the class and once
  not; the difference, added ω-fold, is what an early block of the new model has to predict beside the task.

The published curves count steps of the new model alone. But somebody trains the teacher, and asks it at every step: the
questions here are what each stage buys **for the same arithmetic in all**, and whether the seed alone would explain it.
Scores are Fréchet distances between drawn and real images: lower is better.

Written by `python -m st_fast.study FILE --write docs/study.md` from the runs' own logs; no figure is typed.
"""


def write_page(results: Results, page: Path) -> None:
    """Puts the study's text in its place on the page, and its pictures and all figures into a folder beside it."""
    name = results.study.name
    folder = page.parent / page.stem
    try:
        make_folder(folder)
        links = []
        for kind, figure in (("quality", curves(results)), ("samples", samples(results))):
            if figure is not None:
                figure.savefig(folder / f"{name}-{kind}.png", dpi=110, metadata={"Software": None})
                links.append(f"{page.stem}/{name}-{kind}.png")
        write_json_atomic(folder / f"{name}.json", as_json(results))
        text = page.read_text(encoding="utf-8") if page.is_file() else HEADER
        section = f"{body(results, links)}\nEvery figure: [{name}.json]({page.stem}/{name}.json).\n"
        page.write_text(placed(text, name, section), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page}: can't be written: {error.strerror}") from None


def placed(text: str, name: str, section: str) -> str:
    """The page with the study's section between its markers, at the end where there was none."""
    begin, end = f"<!-- study {name}: begin -->\n", f"<!-- study {name}: end -->\n"
    block = f"{begin}{section}{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}"


def body(results: Results, links: Sequence[str]) -> str:
    """The section: what came out in short, how, the table, each arm, the pictures, what it took."""
    study, protocol = results.study, results.protocol
    arms, seeds = len(results.groups), len(study.seeds)
    pictures = {link.rsplit("-", 1)[1].removesuffix(".png"): link for link in links}
    parts = [
        f"## {study.title}\n",
        "\n".join(f"- {sentence}" for sentence in in_short(results)) + "\n",
        "### How it was done\n",
        f"{arms} arms, {seeds} seed{'s' * (seeds != 1)} each ({', '.join(map(str, study.seeds))}), from "
        f"`{study.path.as_posix()}`. Runs of one seed saw the same records, times and noise in the same order, and "
        f"their samples start from the same noise. Each score is of {protocol.get('num')} samples "
        f"({sampling(protocol)}) in the features of a classifier trained on the real images, so it is not FID; its "
        f"accuracy on held-out real ones is {words.percent(_number(protocol, 'classifier_accuracy'))}, and these score "
        f"a Fréchet distance of {words.plain(_number(protocol, 'floor_frechet'))}. All costs count the teacher's "
        "training and its forward passes.\n",
        *([f"{study.notes}\n"] if study.notes else []),
        "### The verdict\n",
        table(results.rows),
        f"{in_words(results.rows, METRIC).note}\n",
        "### Every arm\n",
        "\n".join(f"- {sentence}" for sentence in findings(results.rows)) + "\n",
    ]
    others = against_reference(results)
    if others:
        title = next(arm.title for arm in study.arms if arm.name == study.reference)
        parts.append(f"Fréchet distance beside “{title}”, after as many steps of the student:\n")
        parts.append("\n".join(f"- {sentence}" for sentence in others) + "\n")
    if "quality" in pictures:
        parts.append(f"![Quality against all training FLOPs; the range over seeds is shaded]({pictures['quality']})\n")
    if "samples" in pictures:
        parts.append(
            f"The last samples of seed {study.seeds[0]} that each arm had drawn by the time that it had spent what "
            f"“{results.rows[0].label}” took in all, from the same noise:\n\n"
            f"![Samples of every arm]({pictures['samples']})\n"
        )
    parts.append(f"{took(results)}\n")
    return "\n".join(parts)


def findings(rows: Sequence[Row]) -> list[str]:
    """A sentence for each arm on how it stands to the baseline at the same cost, best first."""
    base, others = rows[0], rows[1:]
    sentences = []
    for row in sorted(others, key=lambda row: spread(row.at_cost)[0]):
        mean, deviation = spread([a - b for a, b in zip(row.at_cost, base.final, strict=False)])
        n = len(row.seeds)
        sure = "the sign of the difference is the same in every seed" if row.better in (0, n) and n > 1 else (
            "one seed: chance can't be told from effect" if n == 1 else "seeds disagree"
        )  # fmt: skip
        side = "below" if mean < 0 else "above"
        about = f" ± {words.plain(deviation)}" if math.isfinite(deviation) else ""
        sentences.append(
            f"{row.label}: Fréchet distance {words.plain(abs(mean))}{about} {side} “{base.label}” at the same cost, "
            f"better in {row.better} of {n} ({sure})."
        )
    return sentences


def against_reference(results: Results) -> list[str]:
    """A sentence for each other arm with a teacher on how it ends beside the reference, after the same steps."""
    titles = {arm.name: arm.title for arm in results.study.arms}
    taught = [arm.title for arm in results.study.arms if arm.teacher and arm.name != results.study.reference]
    rows = {row.label: row for row in results.rows}
    reference = rows[titles[results.study.reference]]
    sentences = []
    for row in (rows[title] for title in taught):
        differences = [a - b for a, b in zip(row.final, reference.final, strict=True)]
        mean, deviation = spread(differences)
        about = f" ± {words.plain(deviation)}" if math.isfinite(deviation) else ""
        worse = sum(difference > 0 for difference in differences)
        side = "above" if mean > 0 else "below"
        seeds = f"worse in {worse} of {len(differences)} seeds"
        sentences.append(f"{row.label}: ends {words.plain(abs(mean))}{about} {side} it, {seeds}.")
    return sentences


def table(rows: Sequence[Row]) -> str:
    """The verdict as Markdown."""
    verdict = in_words(rows, METRIC)
    lines = [verdict.head, ["---"] * len(verdict.head), *verdict.lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def sampling(protocol: dict[str, object]) -> str:
    """How samples were drawn, in a few words."""
    return f"{protocol.get('sampler')}, {protocol.get('steps')} steps, guidance {protocol.get('cfg_scale')}"


def took(results: Results) -> str:
    """What the runs took, teachers included; the only sentence that another machine writes otherwise."""
    runs = [arm for group in results.groups for arm in group.by_seed.values()]
    own = math.fsum(arm.own.seconds for arm in runs)
    device = runs[0].stage.start.get("device", "an unknown device")
    return (
        f"{len(runs)} runs on {device}: {words.duration(own)} of training beside the shared teachers', pauses for "
        "sampling and scoring left out."
    )


def _number(protocol: dict[str, object], key: str) -> float:
    value = protocol.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan
