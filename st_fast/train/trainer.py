"""A stage's model, method, optimiser and step: how they are built, saved and restored."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast import __version__, kernels
from st_fast.core import checkpoint
from st_fast.core.checkpoint.meta import GraphChoice, Guard, Init, Meta, Teacher
from st_fast.core.errors import RunFailed
from st_fast.core.ranks import Rendezvous
from st_fast.core.writing import RETRY
from st_fast.data.manifest import check_same_data
from st_fast.data.statistics import mean_latents
from st_fast.model import DiffusionTransformer, build, stored, unfilled
from st_fast.model.attention import Attend
from st_fast.model.compiling import checkpoint_activations
from st_fast.model.fp8 import use_fp8
from st_fast.model.side_stream import apart, batched, side_stream
from st_fast.model.smoke_test import validated_kernels
from st_fast.recipe import to_toml
from st_fast.recipe.methods import Given
from st_fast.recipe.schema import Recipe, Stage
from st_fast.sample.contrast import Correction, correction
from st_fast.train import adamw, continuity, start, supervision
from st_fast.train.batches import open_image_features
from st_fast.train.conditions import check_same_conditions, open_conditions
from st_fast.train.context import RunContext, attention, average_model, compile_blocks
from st_fast.train.early_stop import Ending
from st_fast.train.examiner import due
from st_fast.train.log import Clock, Skips, SpikeDetector
from st_fast.train.optim import Optimizer
from st_fast.train.parallel import REDUCTION, Shards, gathered, hand_out, take_parts
from st_fast.train.step import Step
from st_fast.train.validation import Validation


class StageTrainer:
    """A stage's model, method, optimiser and step, and how they are saved and restored."""

    def __init__(self, context: RunContext, stage: Stage) -> None:
        self.context, self.stage = context, stage
        recipe, device = context.recipe.for_stage(stage), context.ranks.device
        chosen = {**vars(recipe.kernels), **context.timed}
        table = validated_kernels(chosen, recipe.model, context.ranks, context.dtype, context.log.say)
        self.noisy_latents = table.noisy_latents
        update, norm = adamw.validated(recipe, context.ranks, context.dtype, context.log.say)
        attend = attention(context, recipe)
        self.conditions = open_conditions(recipe, context.shards)
        self.model = build(recipe.model, table, recipe.run.seed, attend).to(device)
        self.model.use_null(self.conditions.null)
        if recipe.run.fp8 != "off":
            use_fp8(self.model)
        self.shards: Shards | None = None
        if recipe.run.sharding != "none" and context.ranks.count > 1:
            size = recipe.run.shards(context.ranks.count)
            self.shards = Shards(context.ranks, REDUCTION[recipe.optim.reduction], size)
            self.shards.model(self.model)
        compile_blocks(context, self.model)
        self.teacher: Teacher | None = None
        """What tells the teacher from others; only the first rank, which reads it, knows."""
        frozen = self._read_teacher(table, attend)
        checkpoint_activations(self.model, recipe.run.checkpointing)
        if frozen is not None:
            if self.shards is not None and recipe.run.shard_teacher:
                self.shards.model(frozen, stage.method.frozen_depth)
            compile_blocks(context, frozen, dynamic=not recipe.run.padded)
        self._frozen = frozen
        self.graphs: GraphChoice | None = None
        """The result of `run.cuda_graphs = "auto"`; None before it is there, and without it."""
        average = average_model(context, stage, table, attend, self.shards)
        self.features = open_image_features(stage, recipe, context.shards, device, context.dtype)
        compile_blocks(context, self.features)
        streams = side_stream(recipe.run, device, recipe.run.teacher_branches == "streams")
        branches = batched if recipe.run.teacher_branches == "batched" else partial(apart, streams)
        parts = supervision.Parts(
            recipe.model, table, frozen, average, self.features.widths, recipe.flow.path, recipe.run.seed, branches,
            self.features.encoders, context.ranks,
        )  # fmt: skip
        self.method = supervision.create(stage, parts, recipe.run.seed + 1)
        self.method.heads.to(device)
        if self.shards is not None:
            self.shards.heads(self.method.heads)
        optim, ranks = recipe.optim, context.ranks
        self.optimizer = Optimizer(
            self.model, self.method.heads, optim, context.dtype, update, norm, stage.steps, ranks
        )  # fmt: skip
        if self.optimizer.muon is not None:
            context.log.say(f"{stage.name}: {self.optimizer.muon}")
        if average is not None:
            average.follow(self.optimizer.state()["ema"])
        self.ending = Ending(stage.name, self.method, recipe.flow.path, context.ranks, context.log)
        say, direction = context.log.say, stage.contrastive.direction
        self.step = Step(self.model, self.method, self.optimizer, recipe, context.ranks, say, direction)
        # Only the first rank uses it: with everything else in shards, the others save its memory.
        place = device if self.shards is None or context.ranks.first else torch.device("meta")
        self.averaged = unfilled(recipe.model, table, place, torch.float32).eval().requires_grad_(False)
        self.validation = Validation(context.recipe, stage, context.validated_on, ranks, context.log, context.stop)
        self.rollbacks, self.rolled_back_at, self.trained_before = 0, 0, 0.0
        self.skips = Skips(stage.name, recipe.run.max_bad_steps)
        self.spikes = SpikeDetector(recipe.run.spike_ratio)
        self.origin: Init | None = None
        """The record of the model that the weights started from, if any."""
        self.mean_latents: Mapping[str, Tensor] = {}
        """With a contrast: E[x] (C, H, W) by shape, which drawing needs where the data is not; kept in checkpoints."""
        # The first rank's, or every rank's where each writes its own part.
        ranks, run, team = context.ranks, recipe.run, None
        if self.shards is not None and ranks.rank < self.shards.size:  # the first group has all there is
            assert ranks.attempt is not None
            rendezvous, over = Rendezvous(ranks.attempt, "save"), lambda: ranks.heartbeat.over
            team = checkpoint.Team(ranks.rank, self.shards.size, rendezvous, stage.name, over)
        self.saver: checkpoint.Saver | None = None
        if ranks.first or team is not None:
            root, say = self.folder / "checkpoints", context.log.say
            self.saver = checkpoint.Saver(
                root, say, keep=run.keep, keep_every=run.keep_every, also=self._to_go_back_to, team=team
            )

    def _read_teacher(self, table: kernels.KernelTable, attend: Attend) -> DiffusionTransformer | None:
        context, name = self.context, self.stage.method.teacher_name
        if name is None:
            return None
        recipe, ranks, loaded = context.recipe, context.ranks, list[DiffusionTransformer]()
        config = recipe.teacher_model(name)

        def load() -> None:
            root, group = stored.checkpoint_root(recipe, name), self.stage.method.teacher_group
            place = ranks.device

            def record(said: dict[str, Any]) -> None:
                self.teacher = Teacher(**said)

            null = self.conditions.null
            model = stored.load_frozen(
                root, config, group, table, place, context.dtype, attend, record=record, null=null,
                latents=context.shards.manifest.space,
            )  # fmt: skip
            loaded.append(model)

        ranks.broadcast_from_rank0(load)
        model = loaded[0] if loaded else unfilled(config, table, ranks.device, context.dtype, attend)
        model.eval().requires_grad_(False)
        ranks.broadcast(model.state_dict().values())
        return model

    @property
    def folder(self) -> Path:
        """The stage's folder in the run folder."""
        return Path(self.context.recipe.run.out) / self.stage.name

    @property
    def stage_so_far(self) -> Stage:
        """The stage with the settings that its method has by now: supervision may have ended."""
        return replace(self.stage, method=self.method.settings)

    def use_graphs(self, recipe: Recipe) -> None:
        """Replays passes as CUDA graphs, or does not, as this recipe says; the teacher then sees other rows."""
        self.step.use_graphs(recipe.run.graphs)
        if self._frozen is not None:
            compile_blocks(self.context, self._frozen, dynamic=not recipe.run.padded)

    def seed(self, step: int) -> None:
        """Seeds PyTorch's own generator for a step, where code of somebody else's may draw from it, as dropout does."""
        context = self.context
        if context.recipe.model.network == "own" or isinstance(self.stage.method, Given):
            ranks = context.ranks
            torch.manual_seed((context.recipe.run.seed + step * 1_000_003) * ranks.count + ranks.rank)

    def resume(self, clock: Clock) -> int:
        """Loads the newest intact checkpoint, if there is one; returns the number of completed steps."""
        step, found = self._restore(before=None)
        self.skips.restore(found.guard.skips)
        self.spikes.restore(found.guard.spikes)
        self.rolled_back_at = found.guard.rolled_back_at
        self.trained_before = clock.seconds = found.seconds
        self.rollbacks, self.origin = found.rollbacks, found.init
        self.optimizer.begin(self.origin.updates if self.origin else 0)
        self.ending.restore(found.stopped_at)
        self.validation.restore(found.validated)
        if self.stage.contrastive.contrast:
            self.mean_latents = self.context.ranks.broadcast_from_rank0(self._mean_latents)
        return step

    def _mean_latents(self) -> Mapping[str, Tensor]:
        """Those of the checkpoint that was loaded, or new ones; on the first rank, so that all have the same bits."""
        heartbeat = self.context.ranks.heartbeat
        return self.mean_latents or mean_latents(self.context.shards, lambda count: heartbeat.beat("read"))

    def correction(self) -> Correction | None:
        """What takes the contrast's bias out of what is drawn while training."""
        recipe, means = self.context.recipe, self.mean_latents
        shape, where = recipe.model.latent_shape, f"stage.{self.stage.name}"
        return correction(self.stage.contrastive, recipe.sample, recipe.flow.path, means, shape, where)

    def roll_back(self, spike: int, done: int) -> None:
        """Loads the newest intact checkpoint from before step `spike`, at which the loss began to spike.

        The stream of samples does not go back, so the samples from that checkpoint to step `done` are skipped.
        """
        stage, run, log = self.stage.name, self.context.recipe.run, self.context.log
        if self.rollbacks >= run.spike_retries:
            raise RunFailed(
                f"{stage}: the loss spiked again at step {spike}, after {self.rollbacks} rollbacks "
                f"(run.spike_ratio = {run.spike_ratio:g}, run.spike_retries = {run.spike_retries})"
            )
        if self.saver is not None:
            self.saver.wait()
        step, _ = self._restore(before=spike)
        self.rollbacks, self.rolled_back_at = self.rollbacks + 1, done
        log.write("rollback", stage, done, spike=spike, to=step, rollbacks=self.rollbacks)
        log.say(
            f"{stage}: the loss spiked at step {spike}: back to the weights of step {step}, on with step {done + 1}"
        )

    def _to_go_back_to(self, step: int) -> bool:
        """Whether a spike may lead back to the checkpoint of this step, and not to one that an interruption made.

        Not to one that was saved between the last spike and its end, either.
        """
        after = step > self.rolled_back_at and due(step, self.context.recipe.run.save_every)
        return self.spikes.ratio > 0 and (after or step == self.rolled_back_at)

    def _restore(self, before: int | None) -> tuple[int, Meta]:
        """The first rank's newest intact checkpoint (of fewer than `before` steps) on every rank, or the start."""
        whole: dict[str, Mapping[str, Tensor]] = {}
        # Only the first rank looks for it: on a network file system others might find an older one.
        ranks, load = self.context.ranks, partial(self._load, before, whole)
        found: tuple[int, Meta, Path | None] = ranks.broadcast_from_rank0(load)
        step, said, path = found
        if self.shards is not None and path is not None:
            digest = ranks.broadcast_from_rank0(lambda: checkpoint.read_manifest(path).digest)
            take_parts(self.optimizer.state(), path, digest, ranks)
        else:
            hand_out(self.optimizer.state(), whole, ranks)
        self.optimizer.follow()
        return step, said

    def _load(self, before: int | None, into: dict[str, Mapping[str, Tensor]]) -> tuple[int, Meta, Path | None]:
        """The checkpoint's step, metadata and folder, and its tensors `into` a table; these not of a sharded run, where
        every byte is checked and each rank then reads its part.
        """
        root, say = self.folder / "checkpoints", self.context.log.say
        found = checkpoint.latest(
            root, say, before=before, first=lambda step: before is not None and self._to_go_back_to(step),
            hollow=self.shards is not None,
        )  # fmt: skip
        if found is None:
            if before is not None:
                raise RunFailed(f"{self.stage.name}: the loss spiked at step {before}, before any checkpoint")
            record = None
            if self.stage.start.init:
                groups, record = start.taken_over(self.context.recipe, self.stage, self.optimizer.state(), say)
                into.update(groups)
                say(f"{self.stage.name}: starts from {record.path} ({record.weights}, its step {record.step})")
            return 0, Meta(init=record), None
        said, manifest, folder = found.said, self.context.shards.manifest, Path(self.context.recipe.data.path)
        check_same_data(said.dataset, str(found.path), manifest, folder)
        self.features.check_same(said.features, str(found.path))
        check_same_conditions(said.conditions, str(found.path), self.conditions)
        if before is None and self.context.changes is not None and found.step < self.stage.steps:
            differences = continuity.file_differences(said.files, self.context.shards)
            differences += continuity.teacher_differences(self.stage, said.teacher, self.teacher)
            self.context.changes.check(differences, self.stage.name, found.step)
        for group, tensors in self.optimizer.state().items():
            checkpoint.match_strictly(tensors, found.groups.get(group, {}), f"{found.path} {group}")
        if self.shards is None:
            into.update(found.groups)
        if stored.MEAN_LATENTS in found.groups:
            self.mean_latents = checkpoint.load(found.path, (stored.MEAN_LATENTS,)).groups[stored.MEAN_LATENTS]
        return found.step, said, found.path

    def save(self, step: int, clock: Clock) -> None:
        """Writes a checkpoint of `step` completed steps in the background, and deletes older ones."""
        recipe = self.context.recipe
        self.context.ranks.heartbeat.beat("save")
        if self.saver is None:
            return
        self.context.log.files.guard()
        meta = Meta(
            stage=self.stage.name,
            recipe=to_toml(recipe),
            architecture=self.model.config.architecture(),
            dataset=self.context.shards.manifest.digest,
            files=self.context.shards.files,
            features=tuple(self.features.digests),
            conditions=self.conditions.digest,
            latents=self.context.shards.manifest.space,
            teacher=self.teacher,
            seconds=clock.read(),
            rollbacks=self.rollbacks,
            guard=Guard(self.skips.state(), self.spikes.state(), self.rolled_back_at),
            stopped_at=self.ending.stopped_at,
            validated=self.validation.found,
            init=self.origin,
            micro_batch=self.context.choice,
            kernels=dict(self.context.timed),
            cuda_graphs=self.graphs,
            versions={"st_fast": __version__, "torch": torch.__version__},
        )
        constants = {stored.MEAN_LATENTS: self.mean_latents} if self.mean_latents else {}
        stall = self.saver.save(step, {**self.optimizer.state(), **constants}, asdict(meta))
        self.context.log.write("save", self.stage.name, step, seconds=clock.read(), stall=round(stall, 6))

    def finish(self) -> None:
        """Waits until the last checkpoint is on the disk, for all ranks; while it can't be written, tries it again.

        RunFailed if a signal ends that, after one last try.
        """
        context, name = self.context, self.stage.name
        patience = context.recipe.run.hang_timeout
        pause = min(RETRY, patience / 4) if patience else RETRY
        waiting = stopping = False
        while True:
            context.ranks.heartbeat.beat("save")
            failed = self.saver is not None and self.saver.wait() is None
            if not context.ranks.any([failed])[0]:
                break
            if stopping:
                raise RunFailed(
                    f"{context.stop.signal}: the last checkpoint of {name} could not be written, those before it stay; "
                    "the same command continues from there"
                )
            stopping = context.stop.now()
            if not (waiting or stopping):
                context.log.say(
                    f"{name}: waits until its last checkpoint can be written, and tries it every {pause:g} s; "
                    "a signal ends the waiting"
                )
                waiting = True
            context.stop.wait(pause)
            if self.saver is not None:
                context.log.files.guard()
                self.saver.again()
        if waiting:
            context.log.say(f"{name}: its last checkpoint is written")

    def close(self) -> None:
        """Closes what is read beside the latents."""
        self.features.close()
        self.conditions.close()

    def stalls(self, clock: Clock) -> dict[str, float]:
        """Seconds that saves delayed training on the first rank since the start, and their share of its time."""
        if self.saver is None:
            return {}
        stalled, trained = self.saver.stalled, clock.read() - self.trained_before
        return {"save_stall": round(stalled, 6), "save_stall_share": round(stalled / max(trained, 1e-9), 6)}

    def float32_model(self, group: str) -> DiffusionTransformer:
        """The weights of a group of checkpoints, "ema" or "model", as a float32 model in eval mode.

        All ranks call it, for one group at a time; if sharded, the first uses it.
        """
        for name, weight in self.optimizer.state()[group].items():
            whole = gathered(weight)
            if self.averaged.device.type != "meta":
                self.averaged.get_parameter(name).copy_(whole)
        return self.averaged
