"""Whether runs may be compared: which settings differ, and which of these make a comparison unfair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from st_fast.report.arms import Arm
from st_fast.report.collect import Record, RunLog

IGNORED = ("run.out", "run.log_every", "run.save_every", "run.keep", "run.keep_every", "data.loader", "data.verify")
"""Settings that change neither what is learnt nor what is measured."""

UNFAIR = ("model.", "data.", "flow.", "optim.", "sample.", "evaluate.", "run.seed", "run.precision")
"""Settings whose difference has to be known before two curves are compared."""


def differences(runs: Sequence[RunLog]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) for every setting outside the stages that isn't the same in all runs."""
    flat = [dict(_flat({k: v for k, v in run.recipe.items() if k != "stage"})) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: [settings.get(key, "–") for settings in flat] for key in keys if key not in IGNORED}
    return [(key, row) for key, row in values.items() if len(set(row)) > 1]


def warnings(runs: Sequence[RunLog], arms: Sequence[Arm], unfair: Sequence[str] = ()) -> list[str]:
    """Sentences on what makes comparing these runs doubtful, or (`unfair`) forbids it; empty where nothing does."""
    found = [f"Not a fair comparison, so no verdict is drawn: {'; '.join(unfair)}."] if unfair else []
    unfair = [key for key, _ in differences(runs) if key.startswith(UNFAIR)]
    if unfair:
        found.append(f"These runs differ in more than their stages: {', '.join(unfair)}. Compare with care.")
    evals = [record["metrics"] for arm in arms for record in arm.stage.evals if "metrics" in record]
    if len({str(metrics["classifier_digest"]) for metrics in evals if "classifier_digest" in metrics}) > 1:
        found.append("Different judges scored these samples, so their scores can't be compared.")
    if len({metrics["num"] for metrics in evals if "num" in metrics}) > 1:
        found.append("Scores come from different numbers of samples; fewer samples raise the Fréchet distance.")
    if len({str(metrics["cfg_scale"]) for metrics in evals if "cfg_scale" in metrics}) > 1:
        found.append("Samples were drawn with different guidance scales (cfg_scale).")
    devices = {str(stage.start["device"]) for run in runs for stage in run.stages if "device" in stage.start}
    if len(devices) > 1:
        found.append(f"Times come from different devices ({', '.join(sorted(devices))}); compare FLOPs instead.")
    return found


def _flat(settings: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
