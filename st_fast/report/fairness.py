"""Whether runs may be compared at all: the same data and the same stream of samples and noise. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from st_fast.core.files import shown
from st_fast.report.collect import RunLog

STREAM = (
    ("optim", "batch_size"), ("flow", "path"), ("flow", "time"), ("run", "seed"),
    ("sample", "sampler"), ("sample", "steps"), ("sample", "cfg_scale"), ("sample", "cfg_range"), ("evaluate", "num"),
)  # fmt: skip
"""What decides which samples, times and noise a run sees, and how its scores are taken."""
YARDSTICKS = {
    "classifier_digest": "their judges are not the same classifier",
    "inception_sha256": "their Inception weights differ",
    "reference_sha256": "their FID references differ",
}
"""What scores are measured with, as each evaluation records it."""


def unfair(runs: Sequence[RunLog], seeds_declared: bool = False) -> list[str]:
    """Why these runs' scores can't be ranked, a sentence each; empty where they can.

    With `seeds_declared` runs of other seeds are repetitions, and are compared with those of their own seed.
    """
    reasons = []
    digests = _values(runs, data_digest)
    if len(digests) > 1:
        reasons.append(f"they were trained on different data ({_told(digests)})")
    for section, key in STREAM:
        if (section, key) == ("run", "seed") and seeds_declared:
            continue
        values = _values(runs, partial(_setting, section=section, key=key))
        if len(values) > 1:
            reasons.append(f"their {section}.{key} differ ({_told(values)})")
    for key, words in YARDSTICKS.items():
        values = _values(runs, partial(_yardstick, key=key))
        if len(values) > 1:
            reasons.append(f"{words} ({_told(values)})")
    return reasons


def data_digest(run: RunLog) -> str | None:
    """The digest of what the run's stages were trained on; None where its log is older than that record."""
    found = [stage.start.get("dataset") for stage in run.stages]
    known = [digest for digest in found if isinstance(digest, str)]
    return known[-1] if known else None


def _yardstick(run: RunLog, key: str) -> object:
    """From the run's last evaluation that says it."""
    metrics = [record.get("metrics", {}) for stage in run.stages for record in stage.evals]
    return next((found[key] for found in reversed(metrics) if isinstance(found.get(key), str)), None)


def seed_of(run: RunLog) -> int:
    """The run's seed; 0, as in any recipe, where it says nothing."""
    value = _setting(run, "run", "seed")
    return value if isinstance(value, int) else 0


def _setting(run: RunLog, section: str, key: str) -> object:
    table = run.recipe.get(section, {})
    value = table.get(key) if isinstance(table, dict) else None
    return tuple(value) if isinstance(value, list) else value


def _values(runs: Sequence[RunLog], read: Callable[[RunLog], object]) -> dict[object, str]:
    """Each value that is known, and the first run that has it."""
    values: dict[object, str] = {}
    for run in runs:
        value = read(run)
        if value is not None:
            values.setdefault(value if isinstance(value, (str, int, float, tuple)) else str(value), run.name)
    return values


def _told(values: dict[object, str]) -> str:
    return ", ".join(f"{run}: {shown(value, 14)}" for value, run in list(values.items())[:3])
