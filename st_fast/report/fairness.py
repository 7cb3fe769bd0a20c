"""Whether runs may be compared: which settings differ, which of these make it doubtful, and which forbid a verdict."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from st_fast.core.files import shown
from st_fast.report.arms import Arm
from st_fast.report.collect import Record, RunLog, number
from st_fast.report.metrics import METRICS

STREAM = (
    ("optim", "batch_size"), ("flow", "path"), ("flow", "time"), ("flow", "time_mean"),
    ("flow", "time_std"), ("flow", "shift"), ("run", "seed"), ("sample", "shift"),
    ("sample", "sampler"), ("sample", "steps"), ("sample", "cfg_scale"), ("sample", "cfg_range"),
    ("sample", "guidance"), ("sample", "internal_guidance"), ("sample", "internal_range"), ("sample", "contrast"),
    ("evaluate", "num"),
)  # fmt: skip
"""Settings that decide which samples, times and noise a run sees, and how its scores are taken."""
LATER: dict[tuple[str, str], object] = {
    ("sample", "guidance"): "cfg", ("sample", "internal_guidance"): 1.0, ("sample", "internal_range"): (0.0, 1.0),
    ("sample", "contrast"): "unbiased", ("sample", "shift"): 1.0, ("flow", "shift"): 1.0, ("flow", "time_mean"): 0.0,
    ("flow", "time_std"): 1.0,
}  # fmt: skip
"""What runs had before there was such a setting."""
YARDSTICKS = {
    "classifier_digest": "their classifiers differ",
    "inception_sha256": "their Inception weights differ",
    "reference_sha256": "their FID references differ",
}
"""The networks and references of scores, as each evaluation records them."""
FLOOR = METRICS["frechet"].floor

DOUBTFUL = (
    "model.", "data.", "flow.", "optim.", "sample.", "evaluate.", "run.seed", "run.precision", "run.fp8",
    "validate.share", "validate.split_seed",
)  # fmt: skip
"""Settings outside the stages whose difference has to be known before two curves are compared."""
FREE = (
    "model.name", "model.attention", "model.modulation", "model.own_macs", "model.own_bytes", "data.path",
    "data.images", "data.images_subset", "data.vae", "data.loader", "data.verify", "optim.accumulation",
    "optim.micro_batch", "optim.implementation",
)  # fmt: skip
"""But not these, which do the same work in another way. The recipe's schema says so; a test compares them with it."""
IGNORED = ("run.out", "run.log_every", "run.save_every", "run.keep", "run.keep_every", "data.loader", "data.verify")
"""Settings that change neither what is learnt nor what is measured."""
PROTOCOL = {
    "num": "Scores come from different numbers of samples; fewer samples raise Fréchet distances.",
    "cfg_scale": "Samples were drawn with different guidance scales (cfg_scale).",
    "internal_guidance": "Samples were drawn with different Internal Guidance (internal_guidance).",
    "shift": "Samples were drawn with different shifts of time (shift).",
}
"""What evaluations record of how samples were drawn, and what to say where they disagree."""


def unfair(runs: Sequence[RunLog], seeds_declared: bool = False) -> list[str]:
    """Why these runs' scores can't be ranked, a sentence each; empty where they can.

    With `seeds_declared` runs of other seeds are repetitions, and are compared with those of their own seed.
    """
    checks: list[tuple[Callable[[RunLog], object], str]] = [(data_digest, "they were trained on different data")]
    checks += [
        (partial(_setting, section=section, key=key), f"their {section}.{key} differ")
        for section, key in STREAM
        if (section, key) != ("run", "seed") or not seeds_declared
    ]
    checks += [(partial(_yardstick, key=key), words) for key, words in YARDSTICKS.items()]
    checks.append((_floor, "their test images differ, as what real ones score tells"))
    values = [(_values(runs, read), words) for read, words in checks]
    return [f"{words} ({_told(found)})" for found, words in values if len(found) > 1]


def data_digest(run: RunLog) -> str | None:
    """The digest of the data that the run's stages were trained on; None where an older log lacks it."""
    found = [stage.start.get("dataset") for stage in run.stages]
    return next((digest for digest in reversed(found) if isinstance(digest, str)), None)


def _yardstick(run: RunLog, key: str) -> object:
    """What the run's last evaluation with that key says."""
    metrics = [record["metrics"] for stage in run.stages for record in stage.evals]
    return next((found[key] for found in reversed(metrics) if isinstance(found.get(key), str)), None)


def _floor(run: RunLog) -> str | None:
    """What held-out real images score in the classifier's features, as far as two machines agree on it."""
    found = [number(record["metrics"], FLOOR) for stage in run.stages for record in stage.evals]
    return next((f"{floor:.3g}" for floor in reversed(found) if math.isfinite(floor)), None)


def seed_of(run: RunLog) -> int:
    """The run's seed; 0, as in any recipe, where it says nothing."""
    value = _setting(run, "run", "seed")
    return value if isinstance(value, int) else 0


def _setting(run: RunLog, section: str, key: str) -> object:
    table = run.recipe.get(section, {})
    value = table.get(key, LATER.get((section, key))) if isinstance(table, dict) else None
    return tuple(value) if isinstance(value, list) else value


def _values(runs: Sequence[RunLog], read: Callable[[RunLog], object]) -> dict[object, str]:
    """Each value that is known, and the first run that has it."""
    values: dict[object, str] = {}
    for run in runs:
        value = read(run)
        if value is not None:
            values.setdefault(_comparable(value), run.name)
    return values


def _comparable(value: object) -> object:
    """A value that can be a key: what neither a setting nor a score should be is so as text."""
    parts = value if isinstance(value, tuple) else (value,)
    return value if all(isinstance(part, (str, int, float)) for part in parts) else str(value)


def _told(values: dict[object, str]) -> str:
    return ", ".join(f"{run}: {shown(value, 14)}" for value, run in list(values.items())[:3])


def differences(runs: Sequence[RunLog]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) for every setting outside the stages that isn't the same in all runs."""
    flat = [dict(_flat({k: v for k, v in run.recipe.items() if k != "stage"})) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in IGNORED)
    values = {key: [settings.get(key, "–") for settings in flat] for key in keys}
    return [(key, row) for key, row in values.items() if len(set(row)) > 1]


def doubtful(key: str) -> bool:
    """Whether runs with another value of this key, such as "optim.lr", learn or are measured differently."""
    return key.startswith(DOUBTFUL) and key not in FREE


def _flat(settings: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def warnings(runs: Sequence[RunLog], arms: Sequence[Arm], reasons: Sequence[str]) -> list[str]:
    """Sentences on what makes comparing these runs doubtful, or (`reasons`) forbids it; empty where nothing does."""
    found = [f"Not a fair comparison, so no verdict is drawn: {'; '.join(reasons)}."] if reasons else []
    if keys := [key for key, _ in differences(runs) if doubtful(key)]:
        found.append(f"These runs differ in more than their stages: {', '.join(keys)}. Compare with care.")
    evals = [record["metrics"] for arm in arms for record in arm.stage.evals]
    for key, sentence in PROTOCOL.items():
        # Evaluations tell of these only where there are any.
        usual = {key: 1.0} if key in ("internal_guidance", "shift") else {}
        if len({_comparable((usual | metrics)[key]) for metrics in evals if key in usual | metrics}) > 1:
            found.append(sentence)
    devices = {str(stage.start["device"]) for run in runs for stage in run.stages if "device" in stage.start}
    if len(devices) > 1:
        found.append(f"Times come from different devices ({', '.join(sorted(devices))}); compare FLOPs instead.")
    return found
