"""What is not finished: which stage of which run, at which step of how many, and when its log last grew."""

import math
import time
from collections.abc import Sequence

from st_fast.report import words
from st_fast.report.collect import RunLog, StageLog


def unfinished(runs: Sequence[RunLog], now: float | None = None) -> list[str]:
    """A sentence for each run that has stages without an end; where there are several runs, one before them.

    `now`, in seconds since 1970, is when the page is written.
    """
    at = time.time() if now is None else now
    told = [(run, sentence) for run in runs if (sentence := _of_run(run, at))]
    if len(runs) == 1 or not told:
        return [f"This run is not finished: {sentence}" for _, sentence in told]
    which = "None of these runs is" if len(told) == len(runs) else f"{len(told)} of these {len(runs)} runs are not"
    which = "One of these runs is not" if len(told) == 1 < len(runs) else which
    first = f"{which} finished; everything below is what they had logged when this page was written."
    return [first, *(f"{run.name}: {sentence}" for run, sentence in told)]


def _of_run(run: RunLog, now: float) -> str:
    """“transcend” is at step 120 of 200. Last logged on …; "" for a run that has ended all its stages."""
    begun = {stage.name for stage in run.stages}
    states = [_of_stage(stage) for stage in run.stages if not stage.ended]
    states += [f"“{name}” has not begun" for name in run.planned if name not in begun]
    if not states:
        return ""
    last = max((stage.logged_at for stage in run.stages if math.isfinite(stage.logged_at)), default=math.nan)
    return f"{'; '.join(states)}.{_when(last, now)}"


def _of_stage(stage: StageLog) -> str:
    if not stage.step:
        return f"“{stage.name}” has begun, but logged none of its {words.count(stage.steps)} steps yet"
    if stage.step < stage.steps:
        return f"“{stage.name}” is at step {words.count(stage.step)} of {words.count(stage.steps)}"
    return (
        f"“{stage.name}” has made its {words.count(stage.steps)} steps, but has not ended: its last pictures and "
        "scores may be missing"
    )


def _when(last: float, now: float) -> str:
    """When the log last grew, in UTC and before `now`; "" where that isn't known."""
    try:
        text = time.strftime("%Y-%m-%d %H:%M", time.gmtime(last))
    except (ValueError, OverflowError, OSError):
        return ""
    ago = f", {words.duration(now - last)} before this page was written" if now > last else ""
    return f" Last logged on {text} UTC{ago}."
