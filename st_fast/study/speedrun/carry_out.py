"""Makes a record: every seed of its task trained in turn, each in a process of its own, then the folder at once."""

from datetime import UTC, datetime
from pathlib import Path

from st_fast.core.errors import RunFailed, Say, UserError
from st_fast.core.files import make_folder, read_bytes, write_atomic, write_folder
from st_fast.core.lock import turn
from st_fast.core.signals import stop_on_signals
from st_fast.report import words
from st_fast.study.speedrun import rules
from st_fast.study.speedrun.attempt import picture, read_attempt
from st_fast.study.speedrun.origin import ROOT, check_line, check_scores, current_code, run_in, state, unread
from st_fast.study.speedrun.record import FORMAT, RECIPE, Record, check, identity, verdict, write_record
from st_fast.study.speedrun.task import Task


def make_record(
    task: Task, recipe_path: Path, out: Path, what: str, by: str, data: Path, images: Path | None, say: Say
) -> None:
    """Runs what isn't done yet under runs/speedrun, and writes the record to `out`, which must not be there.

    UserError, before anything is trained, for a recipe that the rules don't allow or code that git can't name;
    RunFailed where the seeds don't show that the target is reached, with their figures.
    """
    check_line("--what", what)
    check_line("--by", by)
    if out.exists():
        raise UserError(f"--out {out}: there already; a record is written once")
    rules.read(recipe_path, task)
    code = current_code()
    check_scores(ROOT, unread(code))
    runs = Path("runs") / "speedrun" / task.name / out.name
    with turn(out, say, "--out"), turn(runs, say, "--out"):
        make_folder(runs)
        copied = runs / RECIPE
        # Once, so that all seeds have one recipe whatever becomes of the file.
        write_atomic(copied, read_bytes(recipe_path))
        with stop_on_signals():
            for seed in task.seeds:
                place = runs / f"seed{seed}"
                flags = ["--seed", str(seed), "--data", str(data.resolve()), "--out", str(place)]
                flags += ["--images", str(images.resolve())] if images else []
                run_in(ROOT, ["speedrun", "try", task.folder, str(copied), *flags], task.threads)
        if state(current_code()) != state(code):
            raise UserError(f"{runs}: the code was changed while its seeds ran; remove it and run them again")
        attempts = {seed: read_attempt(runs / f"seed{seed}") for seed in task.seeds}
        if len({(one.machine, str(one.versions)) for one in attempts.values()}) > 1:
            raise UserError(f"{runs}: its seeds were run on several machines or versions; remove it and run them again")
        results, first = tuple(one.result for one in attempts.values()), attempts[task.seeds[0]]
        record = Record(
            FORMAT, task.name, task.digest, task.classifier_sha256, what, by, f"{datetime.now(UTC):%Y-%m-%d}",
            code.revision, first.machine, first.versions, results, **verdict(task, results),
        )  # fmt: skip
        logs = {seed: runs / f"seed{seed}" / "log.jsonl" for seed in task.seeds}
        with write_folder(out) as writing:
            write_record(writing, record, read_bytes(copied), logs, code, picture(runs / f"seed{task.seeds[0]}"))
            try:
                check(writing, record, task)
            except UserError as error:
                raise RunFailed(
                    f"no record: {str(error).replace(str(writing), str(out))}; its runs are in {runs}"
                ) from None
        say(f"{out}: {record.mean:.4g} on average, {record.verdict}; {words.flops(record.flops)} and "
            f"{record.seconds:.1f} s a seed; {identity(out)}")  # fmt: skip
