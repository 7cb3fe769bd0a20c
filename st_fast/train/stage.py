"""One stage from top to bottom: build, resume, loop, log, sample, save."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import count

import torch

from st_fast import __version__
from st_fast.core.checkpoint.meta import GraphChoice
from st_fast.core.errors import RunFailed, Say, UserError
from st_fast.core.machine import PassTooLarge, freeze_heap, thaw_heap
from st_fast.data.buckets import parts_of
from st_fast.data.loader import Loader, make_loader
from st_fast.kernels.heap import GrowthLimit
from st_fast.recipe import Recipe, cost
from st_fast.recipe.batch import images_a_pass
from st_fast.recipe.muon_cost import muon_flops
from st_fast.recipe.schema import Stage
from st_fast.train import graphs, memory
from st_fast.train.batches import BatchIterator, Lookahead
from st_fast.train.callbacks import Event
from st_fast.train.context import RunContext
from st_fast.train.examiner import Kind, due
from st_fast.train.log import JUDGED_EVERY, Clock, Meter, Readings, joined, progress_line
from st_fast.train.profiling import StageProfile
from st_fast.train.shapes import mean_cost
from st_fast.train.supervision import NoisyBatch
from st_fast.train.trainer import StageTrainer


def run_stage(context: RunContext, stage: Stage) -> None:
    """Trains a stage to its last step, from where it stands; Interrupted if a signal asked to stop."""
    ranks, log = context.ranks, context.log
    ranks.heartbeat.stage, ranks.heartbeat.step = stage.name, 0
    ranks.heartbeat.beat("build")
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    shapes, clock = len(parts_of(context.shards)), Clock()
    choice = graphs.settled(context.recipe, stage, ranks, log.say, shapes)
    # A trial takes the way of graphs, which are taken more often than not where there is one.
    recipe = graphs.with_graphs(context.recipe, choice is None or choice.used)
    trainer = StageTrainer(replace(context, recipe=recipe), stage)
    trainer.context = context  # what is decided for a stage is no part of the run's recipe
    first = trainer.resume(clock)
    examined, validation = partial(examine, trainer), trainer.validation
    if first:  # losses, pictures and scores of the step, if the run was interrupted before they were made
        spent = cost_so_far(trainer, clock, first)
        if validation.missing(first):
            validation(first, trainer.float32_model, spent)
        made = validation.stage_after(first)
        wanted = ranks.broadcast_from_rank0(lambda: context.examiner.missing(made, first))
        examined(wanted, first, spent)
        context.stop.check()
    if first >= validation.stage_after(first).steps:
        log.say(f"{stage.name}: complete at step {first}")
        if not log.has("end", stage.name):  # killed between its last checkpoint and this line
            log.write("end", stage.name, first, **spent, **validation.how_it_ended(first))
        trainer.close()
        return
    loader = make_loader(recipe.data.loader, context.shards, ranks.device, log.say)
    readers = (loader, *trainer.features.loaders(ranks.device))
    trainer.conditions.open(ranks.device, log.say)
    if choice is None:
        recipe, choice = try_graphs(trainer, recipe, readers, first, log.say)
    trainer.graphs = choice if context.recipe.run.cuda_graphs == "auto" else None
    iterator = _batches(trainer, recipe, readers)
    meter = Meter(ranks.device)
    profile = StageProfile(recipe.profile, ranks, log, stage, trainer.folder / "profile", clock)
    _log_start(trainer, first)
    report = Reporter(trainer, iterator, meter, clock, first)

    freeze_heap()
    context.stop.begin()
    clock.start()
    steps = Lookahead(saved_where_data_fail(iterator.steps(first, stage.steps), report, first))
    trainer.step.following = steps.peek
    for done, batches in enumerate(profile.watch(steps, first), start=first + 1):
        trainer.seed(done - 1)
        with retreat_if_too_large(trainer, report, readers, first, done - 1):
            trainer.ending.compare(trainer.step, done - 1, batches)
            losses, norm = trainer.step(done - 1, batches)
        meter.add(losses.denoise, losses.aux, norm, trainer.optimizer.updates, losses.direction)
        profile.stepped(done)
        context.callbacks(Event("step", stage.name, done, model=trainer.model))
        stopping = validate(trainer, report, done, context.stop())
        made = validation.stage_after(done)
        last = done == made.steps
        spike = report(done, last)
        if spike is not None:
            with clock.paused():
                trainer.roll_back(spike, done)
        wanted = () if stopping else context.examiner.due(made, done)
        if due(done, recipe.run.save_every) or last or stopping or spike is not None or wanted:
            report.read(done)  # not in the pause: on a GPU it waits for the steps that were launched
            with clock.paused():
                trainer.save(done, clock)
        if wanted or last:
            with clock.paused():
                examined(wanted, done, report.cost(done))
                stopping = context.stop.now() or stopping
        if stopping or made.steps < stage.steps:
            break
    clock.stop()
    for reader in readers:
        reader.close()
    trainer.finish()
    stalls = trainer.stalls(clock)
    trainer.close()
    thaw_heap()
    context.callbacks.check(f"{stage.name} is saved at step {done}")
    if stopping:
        raise context.stop.interrupted(f"saved {stage.name} at step {done}")
    log.write("end", stage.name, done, **report.cost(done), **stalls, **validation.how_it_ended(done))
    context.stop.end()
    context.callbacks.check(f"{stage.name} is complete")


def validate(trainer: StageTrainer, report: "Reporter", step: int, stopping: bool) -> bool:
    """Takes the held-out loss where that is due after a step; returns whether the ranks are `stopping` by then."""
    if stopping or not trainer.validation.due(step):
        return stopping
    report.read(step)
    with report.clock.paused():
        trainer.validation(step, trainer.float32_model, report.cost(step))
        return trainer.context.stop.now()


def examine(trainer: StageTrainer, wanted: Sequence[Kind], step: int, spent: dict[str, float]) -> None:
    """Pictures and scores of the average after `step` steps, on the first rank. All ranks call it alike."""
    if wanted:
        context = trainer.context
        context.ranks.heartbeat.beat("sample")
        context.examiner.examine(wanted, trainer.float32_model("ema"), trainer.stage, step, spent, trainer.correction)


def _batches(trainer: StageTrainer, recipe: Recipe, readers: Sequence[Loader]) -> BatchIterator:
    context, (loader, *others) = trainer.context, readers
    stage, draw, shards = trainer.stage_so_far, trainer.noisy_latents, context.shards
    batches = BatchIterator(recipe, stage, loader, shards, context.ranks, others, draw, trainer.conditions)
    batches.supervises = trainer.ending.supervises
    return batches


def try_graphs(
    trainer: StageTrainer, recipe: Recipe, readers: Sequence[Loader], first: int, say: Say
) -> tuple[Recipe, GraphChoice]:
    """Whether the stage's steps become graphs, by a trial on the batch of its first step, which is made for it alone.

    `recipe` is the trainer's, with graphs. `say` is told what was decided.
    """
    context, stage, parameters = trainer.context, trainer.stage, trainer.optimizer.parameters()
    ((batch,),) = _batches(trainer, recipe, readers).steps(first, first + 1)
    trial = graphs.try_out(partial(trainer.step.forward, first, batch), parameters, context.ranks)
    choice = graphs.decide(trial, stage, context.ranks, say)
    recipe = graphs.with_graphs(recipe, choice.used)
    if not choice.used:
        trainer.use_graphs(recipe)
    return recipe, choice


def saved_where_data_fail(
    steps: Iterator[list[NoisyBatch]], report: "Reporter", first: int
) -> Iterator[list[NoisyBatch]]:
    """The batches of steps `first` …; where one can't be had, a rank that is alone saves what is trained first."""
    trainer = report.trainer
    for done in count(first):
        try:
            batches = next(steps, None)
        except UserError as error:
            if trainer.context.ranks.count > 1 or done == first:
                raise
            report.clock.stop()
            report.read(done)
            trainer.save(done, report.clock)
            trainer.finish()
            kind = RunFailed if isinstance(error, RunFailed) else UserError
            raise kind(f"{error}; {trainer.stage.name} is saved at step {done}") from error
        if batches is None:
            return
        yield batches


@contextmanager
def retreat_if_too_large(
    trainer: StageTrainer, report: "Reporter", readers: Sequence[Loader], first: int, done: int
) -> Iterator[None]:
    """Around a step: if memory lacks for its passes, saves the `done` steps before it and closes the stage.

    Only where `memory.halved` allows smaller passes, with which the stage can be started again.
    """
    try:
        yield
    except PassTooLarge:
        smaller = memory.halved(trainer.context.recipe, trainer.context.choice)
        if smaller is None:
            raise
        report.clock.stop()
        for parameter in trainer.optimizer.parameters():
            parameter.grad = None
        if done > first:
            trainer.context = replace(trainer.context, recipe=smaller[0], choice=smaller[1])
            report.read(done)
            trainer.save(done, report.clock)
            trainer.finish()
        for reader in readers:
            reader.close()
        trainer.close()
        thaw_heap()
        trainer.context.stop.end()
        raise


def cost_of_an_image(trainer: StageTrainer) -> cost.StageCost:
    """The stage's FLOPs per image."""
    return mean_cost(trainer.context.recipe, trainer.stage, trainer.context.shards, trainer.features.flops_an_image)


def cost_so_far(trainer: StageTrainer, clock: Clock, step: int) -> dict[str, float]:
    """A stage's cost: training seconds, and FLOPs including the forwards of teachers and encoders."""
    recipe, stage, features = trainer.context.recipe, trainer.stage_so_far, trainer.features
    flops = features.flops_beforehand + cost.stage_flops(recipe, stage, 0, step, cost_of_an_image(trainer))
    if compared := trainer.ending.comparisons(step):
        dense = stage.routing.dense_after
        routed = trainer.ending.comparisons(min(step, dense or step))
        for count, at in ((routed, 0), (compared - routed, dense)):
            flops += count * cost.comparison_flops(recipe, stage, features.flops_an_image, at)
    return {"seconds": round(clock.read(), 3), "flops": flops}


class Reporter:
    """Logs the meter's readings, prints the progress line, and checks for skipped steps and spikes."""

    def __init__(self, trainer: StageTrainer, batches: BatchIterator, meter: Meter, clock: Clock, first: int) -> None:
        self.context, self.stage, self.batches, self.clock = trainer.context, trainer.stage, batches, clock
        self.trainer, self._meter = trainer, meter
        self._flops = self.cost(first)["flops"]
        self._step, self._seconds, self._waited = first, clock.read(), batches.waited
        self._read: list[Readings] = []
        self._limit_growth = GrowthLimit()

    def cost(self, step: int) -> dict[str, float]:
        """The stage's cost up to a step."""
        return cost_so_far(self.trainer, self.clock, step)

    def __call__(self, step: int, last: bool) -> int | None:
        """Logs where that is due after a step; returns the step that a spike began with, where one is to be mended.

        last: the stage ends with it.

        RunFailed after too many steps in a row whose gradients were not finite.
        """
        spikes = self.trainer.spikes
        logged = last or due(step, self.context.recipe.run.log_every)
        judged = spikes.ratio > 0 and (last or due(step, JUDGED_EVERY))
        if logged or judged or self._meter.full:
            self.read(step)
        if logged:
            self._log(step)
            self._limit_growth()
        self.trainer.skips.check(step)
        return spikes.take() if judged else None

    def read(self, step: int) -> None:
        """Brings the scalars of the steps up to this one to the host; all ranks call it alike."""
        if not self._meter.steps:
            return
        self.context.ranks.heartbeat.beat("log")
        readings = self._meter.read(self.context.ranks, step)
        self._log_skipped(readings)
        self.trainer.spikes.add(readings)
        self._read.append(readings)

    def _log(self, step: int) -> None:
        context, stage = self.context, self.stage
        readings, self._read = joined(self._read), []
        values = readings.means()
        seconds, waited = self.clock.read(), self.batches.waited
        elapsed = max(seconds - self._seconds, 1e-9)
        spent = self.cost(step)
        values["lr"] = float(self.trainer.optimizer.rate(torch.tensor(readings.updates)))
        values["images_per_s"] = (step - self._step) * context.recipe.optim.batch_size / elapsed
        of_updates = (step - self._step) * muon_flops(self.trainer.model.config, context.recipe.optim)
        of_model = spent["flops"] - self._flops - of_updates
        values["mfu"] = of_model / elapsed / (context.rate * context.ranks.count)
        values["data_wait"] = (waited - self._waited) / elapsed
        values["peak_gib"] = round(memory.peak_bytes(context.ranks.device) / 2**30, 3)
        eta = (stage.steps - step) * elapsed / max(step - self._step, 1)
        self._step, self._flops, self._seconds, self._waited = step, spent["flops"], seconds, waited
        skipped = self.trainer.skips.total
        context.log.write("train", stage.name, step, **values, skipped=skipped, **spent)
        context.log.say(progress_line(stage.name, step, stage.steps, values, eta))

    def _log_skipped(self, readings: Readings) -> None:
        """Names each skipped step's samples: those of the ranks whose loss was not finite, or all if none was."""
        self.trainer.skips.add(readings)
        for offset in readings.bad:
            step, ranks = readings.first + offset, readings.bad_ranks[offset]
            ordinals, records = self.batches.samples(step - 1, ranks)
            self.context.log.write("skip", self.stage.name, step, ranks=ranks, ordinals=ordinals, records=records)
            self.context.log.say(
                f"{self.stage.name}: step {step} skipped, not finite on ranks {ranks or 'unknown'}: {len(records)} "
                f"samples are named in {self.context.log.path.name}"
            )


def _log_start(trainer: StageTrainer, first: int) -> None:
    context, stage, recipe = trainer.context, trainer.stage, trainer.context.recipe
    each, threads = cost_of_an_image(trainer), torch.get_num_threads()
    cuda, name = context.ranks.device.type == "cuda", f"cpu, {threads} thread{'s' * (threads != 1)}"
    context.log.write(
        "start", stage.name, first, trunk_params=trainer.model.config.parameters, resumed_from=first,
        flops_per_image=each.total, teacher_flops_per_image=each.teacher, steps=stage.steps,
        batch_size=recipe.optim.batch_size, micro_batch=images_a_pass(recipe.optim, context.ranks.count),
        ranks=context.ranks.count, device=torch.cuda.get_device_name(context.ranks.device) if cuda else name,
        matmul_flops_per_s=context.rate, dataset=context.shards.manifest.digest,
        versions={"st_fast": __version__, "torch": torch.__version__},
        **({"init": asdict(trainer.origin)} if trainer.origin else {}),
        **({"teacher": asdict(trainer.teacher)} if trainer.teacher else {}),
    )  # fmt: skip
