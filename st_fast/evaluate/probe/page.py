"""The page on what the paper claims: a Markdown file with three figures and the numbers, all of one probe's result."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from st_fast.core.errors import UserError
from st_fast.core.files import make_folder, printable, read_bytes, write_atomic, write_json_atomic
from st_fast.core.writing import cannot_write
from st_fast.evaluate.probe.drawing import accuracy_charts
from st_fast.evaluate.probe.guided import MEASURES
from st_fast.report import plot
from st_fast.report.figures import Chart, Curve

HEADER = """# Does the method do what it claims?

Self-Transcendence ([arXiv 2601.07773](https://arxiv.org/abs/2601.07773), [the method](method.md)) argues that a
target for shallow blocks must be *clean* and *discriminative*, and that guiding a teacher's features makes them so.
Here that argument is tested on our own models. Whether it pays is another question: [Does it pay?](study.md)

Written by `python -m st_fast probe RUN… --write PAGE`; verdicts follow from rules in the program, no figure is typed.
"""
DISCRIMINATIVE = {
    "told_true": "own class told", "told_random": "random class told", "names_told": "names the told class",
    "between_pooled": "variance between classes",
}  # fmt: skip
CLEAN = {
    "steady": "image's share of variance", "steady_within": "the same within a class", "clean": "R² to clean latent",
}  # fmt: skip
"""Panels of the figures by ω, with their titles."""


def check_page(page: Path) -> None:
    """UserError where a page can't be written without losing what is there: it is another's, or a folder."""
    folder = page.parent / page.stem
    if page.is_dir() or not page.suffix or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--write {page}: a Markdown file is needed, such as docs/probes.md, with {folder} its folder")
    if page.exists() and not read_bytes(page).startswith(HEADER.splitlines()[0].encode()):
        raise UserError(f"--write {page}: holds another text, which would be lost; name a new page")


def write_page(result: Mapping[str, Any], page: Path) -> None:
    """Writes the page, and figures and numbers into the folder beside it that has its name."""
    folder = page.parent / page.stem
    try:
        make_folder(folder)
        drawn = {"accuracy": [accuracy_charts(result["models"], result["times"])]}
        if result["guided"]:
            drawn |= {name: guided_charts(result, panels) for name, panels in
                      (("discriminative", DISCRIMINATIVE), ("clean", CLEAN))}  # fmt: skip
        for name, charts in drawn.items():
            plot.save(plot.sheet(charts, 2.6, 3.2), folder / f"{name}.png", dpi=110)
        write_json_atomic(folder / "probe.json", {key: value for key, value in result.items() if key != "figures"})
        write_atomic(page.resolve(), body(result, page).encode())
    except OSError as error:
        raise cannot_write(page, error) from None


def guided_charts(result: Mapping[str, Any], panels: Mapping[str, str]) -> list[list[Chart]]:
    """Measures over ω, a curve a time: a row a teacher, a column a measure."""
    rows = []
    for guide in result["guided"]:
        charts = []
        for name, title in panels.items():
            measure = guide["measures"][name]
            curves = [
                _curve(f"t = {t:g}", guide["scales"], measure["value"][place], measure["error"][place], place)
                for place, t in enumerate(result["times"])
            ]
            charts.append(Chart(name, title, "", "ω", "number", guide["teacher"], "percent", False, curves))
        rows.append(charts)
    return rows


def _curve(label: str, x: Sequence[float], y: Sequence[float | None], error: Sequence[float | None], n: int) -> Curve:
    """The defined points, with one standard error to either side."""
    points = [(a, b, e or 0.0) for a, b, e in zip(x, y, error, strict=True) if b is not None]
    return Curve(
        label, [float(a) for a, _, _ in points], [b for _, b, _ in points], n,
        low=[b - e for _, b, e in points], high=[b + e for _, b, e in points],
    )  # fmt: skip


def body(result: Mapping[str, Any], page: Path) -> str:
    """The page's text."""
    claims, folder = result["claims"], page.stem
    count = Counter(claim["verdict"] for claim in claims)
    summary = ", ".join(f"{number} {verdict}" for verdict, number in count.items())
    unseen = "that no training had" if result["held_out_unseen"] else "of the training set"
    parts = [
        HEADER,
        f"**Of {len(claims)} claims: {summary}.** A difference counts where it is more than two standard errors of "
        f"itself, at t = {result['rules_at']:g} (0 is the clean latent, 1 noise), on "
        f"{result['held_out_images']} held-out images {unseen} "
        f"({result['classes']} classes; probes learn from {result['train_images']} others). These errors are of the "
        "images: one model stands for each arm, and another seed's training may move a difference by more. “Seen here” "
        "is said of these models, not of the method.\n",
        table(["What the paper claims", "Tested here by", "Found", "Verdict"],
              [[f"{c['claim']} ({c['place']})", c["test"], c["found"], f"**{c['verdict']}**"] for c in claims]),
        "Claims are in our words, as far as the paper's abstract, its figures and its code's page state them.\n",
        "## What was probed\n",
        table(["Model", "What it is", "Step", "Weights", "SHA-256"], [*map(_model, result["models"]),
                                                                       *map(_teacher, result["guided"])]),
        "## What the blocks know\n",
        f"![Accuracy of a linear probe by block and time]({folder}/accuracy.png)\n",
        "Accuracy of a linear classifier on each block's mean-pooled features, made without the label, from little "
        "noise (t near 0) to almost only noise. Shaded: one standard error. Rings: the block that supervision reads.\n",
    ]  # fmt: skip
    if result["guided"]:
        parts += _guided(folder)
    parts.append(f"Every number with its standard error: [probe.json]({folder}/probe.json). {made_by(result, page)}")
    return "\n".join(parts)


def made_by(result: Mapping[str, Any], page: Path) -> str:
    """The command that makes the page, and of which data; "" where an older probe doesn't say."""
    if "given" not in result:
        return ""
    command = ["python -m st_fast probe", *map(shlex.quote, result["given"]), f"--images {result['images']}"]
    return (
        f"Of the latents in `{result['data']}` (digest `{result['dataset'][:12]}`), by:\n\n```sh\n"
        f"{' '.join(command)} --write {shlex.quote(page.as_posix())}\n```\n"
    )


def _guided(folder: str) -> list[str]:
    """The sections on the target of stage 2."""
    return [
        "## How discriminative the target is\n",
        f"![How discriminative guided features are, by ω and time]({folder}/discriminative.png)\n",
        "f = f_∅ + ω·(f_y − f_∅) at the teacher's block: f_∅ are its features without a label, ω = 0, and f_y those "
        "with one, ω = 1. **f_y is told the class, so high "
        "accuracy is no proof of semantics:** a probe may read the label off the features. The first panel is "
        f"therefore an upper bound ({MEASURES['told_true']}). The second is the control: "
        f"{MEASURES['told_random']}, so what it still finds comes from the image: if guidance brought out more "
        "of that, this would rise with ω; where it falls, the label drowns the image for such a probe. "
        f"The third is the {MEASURES['names_told']}: the first panel's. "
        f"The fourth is the {MEASURES['between_pooled']}; labels that have nothing to do with them would give 0.\n",
        "## How clean the target is\n",
        f"![How clean guided features are, by ω and time]({folder}/clean.png)\n",
        f"The first panel is the {MEASURES['steady']}: the same images under two noises, each position's mean removed. "
        "A label told twice is steady by itself, so the second panel removes each class's mean as well. The third is "
        f"the {MEASURES['clean']}, on held-out images.\n",
    ]


def _model(entry: Mapping[str, Any]) -> list[str]:
    return [entry["label"], entry["role"] or "–", f"{entry['step']:,}", entry["weights"], f"`{entry['sha256'][:12]}`"]


def _teacher(entry: Mapping[str, Any]) -> list[str]:
    students = ", ".join(f"{label} (ω = {scale:g})" for label, scale in entry["students"].items())
    what = f"block {entry['block']} teaches {students}" if students else f"guided features of block {entry['block']}"
    return [entry["teacher"], what, f"{entry['step']:,}", entry["weights"], f"`{entry['sha256'][:12]}`"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; labels can't break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(printable(cell).replace('|', '&#124;') for cell in line)} |\n" for line in lines)
