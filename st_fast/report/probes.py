"""The figures that `st_fast.evaluate.probe` left in run folders, as data URIs for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from st_fast.core.errors import UserError
from st_fast.core.files import read_json
from st_fast.report.collect import RunLog
from st_fast.report.samples import data_uri, narrowed, open_picture

WIDTH = 1_400
"""Of an embedded figure, at most."""


@dataclass(frozen=True)
class ProbeFigure:
    """One picture with its title and what to see in it."""

    title: str
    caption: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Probe:
    """What a run's probe drew, and on what it looked."""

    run: str
    about: str
    figures: list[ProbeFigure]


def read_probes(runs: Sequence[RunLog], notes: list[str]) -> list[Probe]:
    """The probes of those runs that have one; a note on each part that can't be shown."""
    found = []
    for run in runs:
        path = run.path / "probe" / "probe.json"
        if not path.is_file():
            continue
        try:
            about = read_json(path)
            entries = about["figures"]
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError("figures")
        except (UserError, OSError, KeyError, ValueError):
            notes.append(f"The probe of {run.name} can't be read: probe/probe.json is damaged; it is left out.")
            continue
        figures = [figure for entry in entries if (figure := _figure(run, entry, notes))]
        if figures:
            found.append(Probe(run.name, _about(about), figures))
    return found


def _figure(run: RunLog, entry: dict[str, object], notes: list[str]) -> ProbeFigure | None:
    try:
        picture = narrowed(open_picture(run.path / "probe", str(entry["file"])), WIDTH)
    except (UserError, OSError, KeyError, ValueError, SyntaxError, Image.DecompressionBombError):
        notes.append(f"A figure of the probe of {run.name} is missing or not a picture; it is left out.")
        return None
    title, caption = str(entry.get("title", "")), str(entry.get("caption", ""))
    return ProbeFigure(title, caption, data_uri(picture), picture.width, picture.height)


def _about(about: dict[str, object]) -> str:
    """What the probe looked at, in a sentence."""
    held_out = "that no training saw" if about.get("held_out_unseen") is True else "that the probe alone never saw"
    return (
        f"On {about.get('held_out_images', '?')} images {held_out}; linear classifiers learnt from "
        f"{about.get('train_images', '?')} others. Weights: {about.get('weights', '?')}."
    )
