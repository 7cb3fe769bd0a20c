"""A whole run: data, every stage in order, the report."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from st_fast import kernels
from st_fast.core import lock
from st_fast.core.checkpoint.store import candidates
from st_fast.core.errors import Say, UserError
from st_fast.core.files import read_bytes
from st_fast.core.machine import PassTooLarge, local_rank, naming_lack_of_memory
from st_fast.core.ranks import JOINING, Ranks, process_group
from st_fast.core.signals import StopConsensus, stop_on_signals
from st_fast.data.ahead import RecordSet
from st_fast.data.buckets import BucketSet
from st_fast.data.manifest import Manifest, check_same_data
from st_fast.data.shards import open_data
from st_fast.data.statistics import sampled_warning
from st_fast.kernels.heap import keep_freed_memory
from st_fast.model import own, stored
from st_fast.model.compiling import keep_compiled, swept
from st_fast.model.fp8 import check_fp8
from st_fast.prepare import digits, emoji
from st_fast.recipe import Recipe, Stage, cost, to_toml
from st_fast.recipe.batch import images_a_pass
from st_fast.recipe.check_run import check_device
from st_fast.recipe.error import show
from st_fast.report import write_report
from st_fast.sample.model import Decode
from st_fast.train import memory, profiling, start, trackers
from st_fast.train.agreement import RECIPE, agree, of_data, of_recipe
from st_fast.train.batches import open_image_features
from st_fast.train.callbacks import Callbacks
from st_fast.train.choices import choose_kernels
from st_fast.train.conditions import check_same_conditions, kept_on_device, open_conditions
from st_fast.train.context import RunContext
from st_fast.train.continuity import Changes, check_recipe, newest, score_differences
from st_fast.train.examiner import Examiner
from st_fast.train.log import Log, matmul_rate
from st_fast.train.shapes import check_shapes, with_largest_shape
from st_fast.train.stage import run_stage
from st_fast.train.validation import open_parts
from st_fast.train.watchdog import watched

NO_TIMEOUT = 7 * 24 * 3_600.0
"""Seconds a rank waits for others where `run.hang_timeout` is 0."""
LEAST_JOINING = 60.0
"""Seconds by which one rank's imports may take longer than another's."""


@dataclass(frozen=True)
class Parts:
    """What a program gives a run beside its recipe."""

    records: RecordSet | None = None
    """Of `data.source = "given"`."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    decode: Decode | None = None
    """In place of the VAE."""


def run(recipe: Recipe, accept_changes: bool = False, given: Path | None = None, parts: Parts | None = None) -> None:
    """Trains every stage of the recipe, resuming where it stopped, and writes the report.

    accept_changes: also where what it continues was begun with other mathematics; given: the file it was read from;
    parts: what a recipe can't hold.

    Raises Interrupted after a signal (saved), RunFailed when training can't go on, UserError for bad input.
    """
    out, parts = Path(recipe.run.out), parts or Parts()
    if recipe.data.source == "given" and parts.records is None:
        raise UserError(
            'data.source = "given": the latents come from a program: st_fast.Trainer(recipe, data=...).fit()'
        )
    keep_compiled(out / "compiled")
    keep_freed_memory()
    patience = recipe.run.hang_timeout
    with (
        stop_on_signals() as stop,
        process_group(
            recipe.run.device,
            2.0 * patience or NO_TIMEOUT,
            joining_patience(patience),
            partial(met, recipe, patience),
        ) as ranks,
    ):
        check_device(recipe.run, ranks.device.type)
        ranks.broadcast_from_rank0(lambda: trackers.check_installed(recipe.run.trackers))
        profiling.choose_tool(recipe.profile, ranks.device)
        with (
            lock.run_lock(out, print) if ranks.first else nullcontext(lambda: None) as still_ours,
            swept(out / "compiled") if ranks.first else nullcontext(),
            trackers.tracking(recipe, out, print) if ranks.first else nullcontext() as track,
            Log(out / "log.jsonl", ranks, told_of_records(track, parts.callbacks)) as log,
        ):
            log.files.guard = still_ours
            changes = Changes(accept_changes, log)
            ranks.broadcast_from_rank0(lambda: check_recipe(recipe, changes))
            ranks.heartbeat.beat("prepare" if ranks.first else "agree")
            if ranks.first:
                make_on_first_use(recipe, log.say)
            ranks.barrier()
            shards = open_agreed_data(recipe, ranks, log.say, given=parts.records)
            open_held_out = partial(open_agreed_data, ranks=ranks, say=log.say, topic="validation data")
            validated_on = open_parts(recipe, shards, open_held_out)
            if told := ranks.broadcast_from_rank0(lambda: sampled_warning(shards)):
                log.say(f"warning: {told}")
            classes = shards.manifest.num_classes
            if recipe.model.by_class and classes < recipe.model.num_classes:
                log.say(
                    f"warning: the data has {classes} classes, the model {recipe.model.num_classes}; the others "
                    f"are never trained; --model.num_classes={classes} fits"
                )
            ranks.broadcast_from_rank0(lambda: check_stages(recipe, shards))
            for line in (*cost.untrained_averages(recipe), *cost.unfinished_warmups(recipe)):
                log.say(line)
            consensus = StopConsensus(stop, ranks, lambda: bool(parts.callbacks.failure))
            examiner = Examiner(recipe, shards.manifest, ranks, log, stop, parts.decode)
            check_fp8(recipe, ranks.device)
            ranks.broadcast_from_rank0(examiner.check)
            differences = score_differences(changes.scored, examiner.protocol)
            ranks.broadcast_from_rank0(lambda: changes.check(differences, recipe.stages[0].name, 0))
            dtype, kept = precision(recipe, ranks.device), kept_on_device(recipe, shards, ranks)
            of_most = with_largest_shape(recipe, shards)
            split, choice = memory.choose_micro_batch(of_most, ranks, dtype, kept, log.say)
            split = replace(split, model=recipe.model)
            if ranks.first:
                # Not earlier: a recipe that is refused has not begun, and may be corrected.
                keep_given(given, out / "recipe.toml", recipe, log)
                log.files.write(out / "recipe.toml", to_toml(recipe).encode())
                own.keep_start(recipe.model, out, log.files.write)
            with naming_lack_of_memory("measuring the device and trying kernels"):
                rate = matmul_rate(ranks.device, dtype)
                timed = choose_kernels(split, ranks, dtype, log.say)
            context = RunContext(
                split, ranks, shards, examiner, log, consensus, dtype, rate, choice, timed, changes, validated_on,
                parts.callbacks,
            )  # fmt: skip
            for stage in recipe.stages:
                context = train_stage(context, stage, recipe)
            consensus.close()
            if ranks.first:
                finish_writing(log, out, recipe, partial(ranks.heartbeat.beat, "report"))


def keep_given(given: Path | None, target: Path, recipe: Recipe, log: Log) -> None:
    """Where the recipe was read from the place of the run's own copy, keeps what its author wrote beside that."""
    kept = target.with_name("recipe.given.toml")
    if given is None or os.path.lexists(kept) or not os.path.lexists(target) or not given.samefile(target):
        return
    if (text := read_bytes(target)) != to_toml(recipe).encode():
        log.files.write(kept, text)
        log.say(f"{target} becomes the resolved recipe; as given it is kept in {kept.name}")


def finish_writing(log: Log, out: Path, recipe: Recipe, beat: Callable[[], None]) -> None:
    """Writes what is still missing, and the report: a disk that refuses costs a line, for the weights are saved.

    beat: called as the report makes progress.
    """
    if not os.path.lexists(out / "recipe.toml"):  # the folder was deleted, and made again; no command takes it without
        log.files.write(out / "recipe.toml", to_toml(recipe).encode())
    log.files.close()
    try:
        log.say(f"report: {write_report([out], out / 'report.html', beat=beat)}")
    except UserError as error:
        log.say(f"no report: {error}; python -m st_fast.report {out} makes it")


@contextmanager
def met(recipe: Recipe, hang_timeout: float, ranks: Ranks) -> Iterator[None]:
    """Inside, the ranks that have just met are watched, and start only if they were given the same."""
    with watched(ranks, hang_timeout):
        agree(ranks, RECIPE, lambda: of_recipe(recipe), JOINING)
        yield


def make_on_first_use(recipe: Recipe, say: Say) -> None:
    """Makes the data that `data.source` names, where it is not there yet."""
    if recipe.data.source == "digits":
        digits.prepare_digits(Path(recipe.data.path), say)
        digits.prepare_features(recipe, say)
    elif recipe.data.source == "emoji":
        emoji.prepare_emoji(Path(recipe.data.path), say, emoji.size_of(recipe.model))


def told_of_records(
    track: Callable[[Mapping[str, Any]], None] | None, callbacks: Callbacks
) -> Callable[[Mapping[str, Any]], None]:
    """What the log passes each record on to: the trackers, and then the callbacks."""

    def tell(record: Mapping[str, Any]) -> None:
        if track is not None:
            track(record)
        callbacks.record(record)

    return tell


def open_agreed_data(
    recipe: Recipe, ranks: Ranks, say: Say, topic: str = "data", given: RecordSet | None = None
) -> RecordSet:
    """The recipe's data, which fit it and are the same on all ranks; one rank a machine verifies them.

    topic: what ranks call them; given: in place of the folder's.
    """
    opened = list[RecordSet]()

    def look() -> Mapping[str, str]:
        verify, beat = recipe.data.verify and local_rank() == 0, partial(ranks.heartbeat.beat, "verify")
        beat()
        size = recipe.optim.batch_size
        if given is not None and len(given) < size:
            raise UserError(f"data: {len(given)} items, the global batch needs {size} (optim.batch_size)")
        opened.append(given or open_data(Path(recipe.data.path), verify, size, say, beat))
        fit_data(recipe, opened[0])
        return of_data(recipe, opened[0])

    agree(ranks, topic, look, NO_TIMEOUT)
    return opened[0]


def joining_patience(hang_timeout: float) -> float:
    """Seconds that a rank waits for the others: `run.hang_timeout`, but enough for imports and never for ever."""
    return min(max(hang_timeout, LEAST_JOINING), JOINING) if hang_timeout else JOINING


def train_stage(context: RunContext, stage: Stage, given: Recipe) -> RunContext:
    """Trains a stage; with micro_batch = "auto", if memory runs out, once again with smaller passes.

    Returns the context for the stages after it. `given` is the recipe before its passes were chosen. RunFailed, which
    says what would fit, where memory runs out all the same.
    """
    while True:
        with memory.explained(context.recipe, context.ranks, context.dtype, given):
            try:
                run_stage(context, stage)
                return context
            except PassTooLarge:
                smaller = memory.halved(context.recipe, context.choice)
                if smaller is None:
                    raise
        gc.collect()  # not earlier: until it is handled, the error refers to all of the stage
        if context.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        recipe, choice = smaller
        before, step = images_a_pass(context.recipe.optim, 1), context.ranks.heartbeat.step
        context.log.say(
            f"{stage.name}: out of memory at step {step} with {before} images a pass; going on after step {step - 1} "
            f"with {choice.images}, {recipe.optim.accumulation} passes a step"
        )
        context = replace(context, recipe=recipe, choice=choice)


def check_stages(recipe: Recipe, records: RecordSet) -> None:
    """UserError for a teacher, features or a model to start from that are missing or do not fit, before days are spent.

    So for data or captions other than those that a stage has begun with; the run's folder stays as it is. What comes
    from a stage of this run is not there yet. A stage that has begun never reads its start again.
    """
    cpu, own = torch.device("cpu"), [stage.name for stage in recipe.stages]
    conditions = open_conditions(recipe, records)
    conditions.close()
    for stage in recipe.stages:
        if found := newest(recipe, stage):
            where, said = str(found[0]), found[1].said
            check_same_data(said.dataset, where, records.manifest, Path(recipe.data.path))
            check_same_conditions(said.conditions, where, conditions)
        name, group, init = stage.method.teacher_name, stage.method.teacher_group, stage.start.init
        if name is not None and name not in own:
            root, table = stored.checkpoint_root(recipe, name), kernels.select({}, cpu)
            path, null = recipe.flow.path, conditions.null
            config, space = recipe.teacher_model(name), records.manifest.space
            stored.load_frozen(
                root, config, group, table, cpu, torch.float32, flow=path, null=null, latents=space,
            )  # fmt: skip
        features = open_image_features(stage, recipe, records, cpu, torch.float32)
        if init and init not in own and not candidates(Path(recipe.run.out) / stage.name / "checkpoints"):
            start.check(recipe, stage, features.widths, print)
        features.close()


def precision(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The dtype of the weights in use; a module of one's own has float32 ones, and runs under autocast."""
    if recipe.model.network == "own":
        return torch.float32
    return torch.bfloat16 if recipe.run.bf16(device.type) else torch.float32


def fit_data(recipe: Recipe, records: RecordSet) -> None:
    """UserError unless the recipe's model can be trained on these records, of one shape or of several."""
    if not isinstance(records, BucketSet):
        check_fits(recipe, records.manifest)
        return
    for part in records.parts:
        _, height, width = part.manifest.shape
        check_fits(replace(recipe, model=replace(recipe.model, latent_size=(height, width))), part.manifest)
    check_shapes(recipe, records)


LEAST_HASH = 8
"""Characters of a hash that name a VAE."""


def check_fits(recipe: Recipe, manifest: Manifest) -> None:
    """UserError if the data's channels, size, labels or VAE are not those of the recipe."""
    model, wanted, made = recipe.model, recipe.data.vae, manifest.vae
    if wanted not in ("", made.name) and not (len(wanted) >= LEAST_HASH and made.hash.startswith(wanted)):
        raise UserError(
            f"data.vae = {wanted!r}: the latents in {recipe.data.path} are of {made.name!r}"
            f"{f', SHA-256 {made.hash}' if made.hash else ''}"
        )
    if (manifest.channels, *manifest.shape[1:]) != model.latent_shape:
        height, width = manifest.shape[1:]
        fits = f"--model.channels={manifest.channels} --model.latent_size="
        fits += f"{height}" if height == width else f"[{height},{width}]"
        raise UserError(
            f"{recipe.data.path}: latents are {(manifest.channels, *manifest.shape[1:])}, model.channels = "
            f"{model.channels} and model.latent_size = {show(model.latent_size)} (patch {model.patch}) need "
            f"{model.latent_shape}; {fits} fit the data"
        )
    if model.by_class and manifest.num_classes > model.num_classes:
        raise UserError(
            f"{recipe.data.path}: labels of {manifest.num_classes} classes, model.num_classes = {model.num_classes}"
        )
