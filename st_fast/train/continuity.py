"""What a resumed run must have in common with what it continues: recipe, data, teacher and other files it reads.

Each checkpoint says with what it was made, so that nothing depends on the copy of the recipe in the run folder. What
has changed is refused in one line; `--accept-changes` goes on all the same, and the log and the report say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from st_fast.core.checkpoint.meta import FilesIdentity, Meta, Teacher
from st_fast.core.checkpoint.store import Manifest, candidates, patiently, read_manifest
from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, Unreadable, shown
from st_fast.core.records import log_records
from st_fast.data.ahead import RecordSet
from st_fast.recipe import Recipe, RecipeError, Stage, changed_maths, from_text, load_run
from st_fast.train.log import Log
from st_fast.train.validation import still_to_run

KIND = "accepted"
"""Of the log's records of accepted changes."""


@dataclass
class Changes:
    """Refuses changes, or accepts them for good: what was accepted once is not asked again."""

    accept: bool
    log: Log
    accepted: set[str] = field(default_factory=set)
    scored: dict[str, Any] = field(default_factory=dict)
    """The metrics of the log's last evaluation."""

    def __post_init__(self) -> None:
        """Reads what was accepted and scored before; only the first rank, which alone compares."""
        if self.log.active and self.log.path.exists():
            for record in log_records(self.log.path):
                if record["kind"] == KIND and isinstance(changes := record.get("changes"), list):
                    self.accepted |= set(map(str, changes))
                if record["kind"] == "eval" and isinstance(metrics := record.get("metrics"), dict):
                    self.scored = metrics or self.scored

    def check(self, differences: Sequence[str], stage: str, step: int) -> None:
        """UserError with all differences that are neither accepted now nor before; `stage` and `step` are continued."""
        fresh = [line for line in dict.fromkeys(differences) if line not in self.accepted]
        if not fresh:
            return
        text = "; ".join(fresh)
        if not self.accept:
            raise UserError(
                f"{self.log.path.parent} holds a run with other mathematics: {text}. "
                "Restore that, choose another --run.out, or --accept-changes to resume all the same"
            )
        self.accepted |= set(fresh)
        self.log.write(KIND, stage, step, changes=fresh)
        self.log.say(f"accepted: {text}")


def score_differences(before: Mapping[str, Any], protocol: Mapping[str, str]) -> list[str]:
    """Whether the log has scores by another network or against another reference than those to come."""
    return [
        f"evaluate: {key.removesuffix('_sha256')} was {str(before[key])[:12]} (now {now[:12]})"
        for key, now in protocol.items()
        if key in before and before[key] != now
    ]


def newest(recipe: Recipe, stage: Stage) -> tuple[Path, Manifest] | None:
    """The newest checkpoint of a stage whose manifest is sound, and where it lies; `Unreadable` if storage fails."""
    for candidate in candidates(Path(recipe.run.out) / stage.name / "checkpoints"):
        try:
            return candidate.path, patiently(partial(read_manifest, candidate.path))
        except Unreadable:
            raise
        except BadFile:  # loading it reports it
            continue
    return None


def check_recipe(recipe: Recipe, changes: Changes) -> None:
    """Compares the recipe with the run folder's and with that of the newest checkpoint.

    Stages before that one are done; where one of them teaches, the teacher itself is compared.
    """
    out, differences, at = Path(recipe.run.out), list[str](), (recipe.stages[0].name, 0)
    if (out / "recipe.toml").exists():
        differences += changed_maths(load_run(out), recipe)
    begun = [(stage, *found) for stage in recipe.stages if (found := newest(recipe, stage)) is not None]
    for stage, path, manifest in begun:
        if manifest.step > stage.steps:
            differences.append(f"stage.{stage.name}.steps: {stage.steps}, and {manifest.step} are done")
        if (name := manifest.said.stage or stage.name) != stage.name:
            differences.append(f"{path} is a checkpoint of stage {shown(name)}")
    for stage, path, manifest in begun[-1:]:
        at = stage.name, manifest.step
        try:
            differences += changed_maths(from_text(manifest.said.recipe, f"{path}: its recipe"), recipe)
        except RecipeError as error:  # none, or of a version with other keys
            if not (out / "recipe.toml").exists():
                differences.append(f"{path} can't be compared, and there is no {out / 'recipe.toml'} ({error})")
        if manifest.step < stage.steps:
            differences += _longer_teacher(recipe, stage, manifest.said) + _longer_start(recipe, stage, manifest.said)
    changes.check(differences, *at)


def _longer_teacher(recipe: Recipe, stage: Stage, meta: Meta) -> list[str]:
    """A stage of this run that teaches one which has begun, but is to be trained on before that goes on."""
    name, before = stage.method.teacher_name, meta.teacher
    if name is None or before is None or all(other.name != name for other in recipe.stages):
        return []
    return teacher_differences(stage, before, replace(before, step=_last_step(recipe, name)))


def _longer_start(recipe: Recipe, stage: Stage, meta: Meta) -> list[str]:
    """The same of a stage of this run whose weights it began with."""
    name, before = stage.start.init, meta.init
    if before is None or name != before.path or all(other.name != name for other in recipe.stages):
        return []
    now = _last_step(recipe, name)
    return [f"stage.{stage.name}: it began from {name} at step {before.step} (now {now})"] * (before.step != now)


def _last_step(recipe: Recipe, name: str) -> int:
    """The step that a stage of this run ends with: an earlier one where its validations have ended it."""
    stage = recipe.stage(name)
    found = newest(recipe, stage)
    if found is None or still_to_run(recipe, stage, found[1].step, found[1].said.validated):
        return stage.steps
    return found[1].step


def teacher_differences(stage: Stage, before: Teacher | None, now: Teacher | None) -> list[str]:
    """How the teacher that a stage has differs from the one it had; nothing is known of it in older checkpoints."""
    if before is None or now is None:
        return []
    label = f"stage.{stage.name}: its teacher {stage.method.teacher_name} was"
    if before.step != now.step:
        return [f"{label} at step {before.step} (now {now.step})"]
    if before.sha256 != now.sha256:
        return [f"{label} {shown(before.sha256)[1:13]} (now {now.sha256[:12]}), at step {now.step}"]
    return []


def file_differences(before: FilesIdentity | None, records: RecordSet) -> list[str]:
    """Whether files without hashes of their own were changed; a copy, which has other times, is read to find out."""
    if before is None or records.files is None:
        return []
    if before.stat == records.files.stat:
        return []
    if before.content and not records.files.content:
        records.verify()
    now = records.files
    if before.content and before.content == now.content:
        return []
    known = "" if before.content else ", and data.verify was false, so that their content is not known"
    ours, theirs = (before.content, now.content) if before.content else (before.stat, now.stat)
    return [f"data.path: its files were {shown(ours)[1:13]} (now {theirs[:12]}){known}"]
