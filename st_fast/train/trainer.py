"""A stage's model, method, optimiser and step: how they are built, saved and found again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_fast import __version__, kernels
from st_fast.core import checkpoint
from st_fast.core.errors import RunFailed
from st_fast.core.ranks import Ranks, Rendezvous
from st_fast.core.signals import StopConsensus
from st_fast.data.manifest import check_same_data
from st_fast.data.shards import RecordSet
from st_fast.model import SiT, build, teacher, unfilled
from st_fast.model.attention import Attend, choose
from st_fast.model.compiling import CompiledBlocks, checkpoint_activations
from st_fast.model.fp8 import use_fp8
from st_fast.model.side_stream import Apart, Branches, batched, side_stream
from st_fast.model.smoke_test import validated_kernels
from st_fast.recipe import to_toml
from st_fast.recipe.schema import Recipe, Run, Stage
from st_fast.train import adamw, start, supervision
from st_fast.train.examiner import Examiner
from st_fast.train.image_features import compile_encoders, open_image_features
from st_fast.train.log import Clock, Log
from st_fast.train.memory import Choice
from st_fast.train.optim import EmaModel, Optimizer
from st_fast.train.sharding import Shards, gathered, hand_out, is_sharded, shards_of
from st_fast.train.step import Step
from st_fast.train.supervision.registry import Parts


@dataclass(frozen=True)
class RunContext:
    """What all stages of a run share."""

    recipe: Recipe
    ranks: Ranks
    shards: RecordSet
    examiner: Examiner
    log: Log
    stop: StopConsensus
    dtype: torch.dtype
    """Of the weights in use: what `run.precision` says, resolved for the device."""
    rate: float
    """Measured matmul FLOP/s of one device in that precision; MFU is a share of it."""
    choice: Choice | None = None
    """What `optim.micro_batch = "auto"` came to, and is in `recipe` as accumulation; None where it is not asked."""


class Trainer:
    """A stage's model, method, optimiser and step, and how they are saved and found again."""

    def __init__(self, context: RunContext, stage: Stage) -> None:
        self.context, self.stage = context, stage
        recipe, device = context.recipe, context.ranks.device
        table = validated_kernels(vars(recipe.kernels), recipe.model, context.ranks, context.dtype, context.log.say)
        update, norm = adamw.validated(recipe, context.ranks, context.dtype, context.log.say)
        head_dim = recipe.model.width // recipe.model.heads
        tokens = recipe.model.tokens
        attend = choose(recipe.model.attention, device, context.dtype, head_dim, context.log.say, tokens)
        self.model = build(recipe.model, table, recipe.run.seed, attend).to(device)
        if recipe.run.fp8 != "off":
            use_fp8(self.model)
        self.shards = shards_of(recipe, context.ranks)
        if self.shards is not None:
            self.shards.model(self.model)
        _compile(context, self.model, dynamic=False)
        frozen = _teacher(context, stage, table, attend)
        checkpoint_activations(self.model, recipe.run.checkpointing)
        if frozen is not None:
            if self.shards is not None and recipe.run.shard_teacher:
                self.shards.model(frozen, stage.method.frozen_depth)
            _compile(context, frozen, dynamic=recipe.run.supervised_rows == "exact")
        average = _average(context, stage, table, attend, self.shards)
        self.features = open_image_features(stage, recipe, context.shards, device, context.dtype)
        if _compiles(context):
            compile_encoders(self.features, context.log.say)
        branches, encoders = _branches(recipe.run, device), self.features.encoders
        parts = Parts(
            recipe.model, table, frozen, average, self.features.widths, recipe.flow.path, recipe.run.seed, branches,
            encoders,
        )  # fmt: skip
        self.method = supervision.create(stage, parts, recipe.run.seed + 1)
        self.method.heads.to(device)
        if self.shards is not None:
            self.shards.heads(self.method.heads)
        self.optimizer = Optimizer(self.model, self.method.heads, recipe.optim, context.dtype, update, norm)
        if average is not None:
            average.follow(self.optimizer.state()["ema"])
        self.step = Step(self.model, self.method, self.optimizer, recipe, context.ranks)
        # Only the first rank looks at it: with everything else in shards, the others do without its memory.
        place = device if self.shards is None or context.ranks.first else torch.device("meta")
        self.averaged = unfilled(recipe.model, table, place, torch.float32).eval().requires_grad_(False)
        self.rollbacks, self.trained_before = 0, 0.0
        self.origin: dict[str, Any] | None = None
        """What the weights started from, where that is a model."""
        self.saver = _saver(context, stage, self.folder / "checkpoints", self.shards is not None)

    @property
    def folder(self) -> Path:
        """The stage's folder in the run folder."""
        return Path(self.context.recipe.run.out) / self.stage.name

    def resume(self, clock: Clock) -> int:
        """Takes over the newest sound checkpoint, if there is one; returns the number of completed steps."""
        found = self._restore(before=None)
        self.trained_before = found["seconds"]
        clock.seconds, self.rollbacks, self.origin = found["seconds"], found["rollbacks"], found["init"]
        return found["step"]

    def roll_back(self, spike: int, done: int) -> None:
        """Takes over the newest sound checkpoint from before step `spike`, which is where the loss began to spike.

        The stream of samples does not go back, so what was seen from that checkpoint to step `done` is skipped.
        """
        stage, run, log = self.stage.name, self.context.recipe.run, self.context.log
        if self.rollbacks >= run.spike_retries:
            raise RunFailed(
                f"{stage}: the loss spiked again at step {spike}, after {self.rollbacks} rollbacks "
                f"(run.spike_ratio = {run.spike_ratio:g}, run.spike_retries = {run.spike_retries})"
            )
        if self.saver is not None:
            self.saver.wait()
        self.rollbacks += 1
        step = self._restore(before=spike)["step"]
        log.write("rollback", stage, done, spike=spike, to=step, rollbacks=self.rollbacks)
        log.say(
            f"{stage}: the loss spiked at step {spike}: back to the weights of step {step}, on with step {done + 1}"
        )

    def _restore(self, before: int | None) -> dict[str, Any]:
        """The first rank's newest sound checkpoint (of fewer than `before` steps) on every rank; else the start."""
        whole: dict[str, Mapping[str, Tensor]] = {}
        found = self.context.ranks.broadcast_from_rank0(lambda: self._load(before, whole))
        # Others never read it: on a network file system they might see an older one, and train on something else.
        hand_out(self.optimizer.state(), whole, self.context.ranks)
        self.optimizer.follow()
        return found

    def _load(self, before: int | None, into: dict[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        found = checkpoint.latest(self.folder / "checkpoints", self.context.log.say, before=before)
        if found is None:
            if before is not None:
                raise RunFailed(f"{self.stage.name}: the loss spiked at step {before}, before any checkpoint")
            return {"step": 0, "seconds": 0.0, "rollbacks": 0, "init": self._begin(into)}
        manifest, folder = self.context.shards.manifest, Path(self.context.recipe.data.path)
        check_same_data(str(found.meta.get("dataset")), str(found.path), manifest, folder)
        self.features.check_same(found.meta.get("features", []), str(found.path))
        for group, tensors in self.optimizer.state().items():
            checkpoint.match_strictly(tensors, found.groups.get(group, {}), f"{found.path} {group}")
        into.update(found.groups)
        kept = {"rollbacks": found.meta.get("rollbacks", 0), "init": found.meta.get("init")}
        return {"step": found.step, "seconds": found.meta["seconds"]} | kept

    def _begin(self, into: dict[str, Mapping[str, Tensor]]) -> dict[str, Any] | None:
        """Finds the model that the recipe starts from, if it names one; returns what to record of it."""
        if not self.stage.start.init:
            return None
        log = self.context.log
        groups, record = start.taken_over(self.context.recipe, self.stage, self.optimizer.state(), log.say)
        into.update(groups)
        log.say(f"{self.stage.name}: starts from {record['path']} ({record['weights']}, its step {record['step']})")
        return record

    def save(self, step: int, clock: Clock) -> None:
        """Writes a checkpoint of `step` completed steps in the background, and tidies up older ones."""
        recipe = self.context.recipe
        self.context.ranks.heartbeat.beat("save")
        if self.saver is None:
            return
        meta = {
            "stage": self.stage.name,
            "recipe": to_toml(recipe),
            "architecture": recipe.model.architecture(),
            "dataset": self.context.shards.manifest.digest,
            "features": self.features.digests,
            "seconds": clock.read(),
            "rollbacks": self.rollbacks,
            "init": self.origin,
            "micro_batch": asdict(self.context.choice) if self.context.choice else None,
            "versions": {"st_fast": __version__, "torch": torch.__version__},
        }
        stall = self.saver.save(step, self.optimizer.state(), meta)
        self.context.log.write("save", self.stage.name, step, seconds=clock.read(), stall=round(stall, 6))

    def finish(self) -> None:
        """Waits until the last checkpoint is on the disk, for all ranks."""
        self.context.ranks.heartbeat.beat("save")
        if self.saver is not None and self.saver.wait() is None:
            raise RunFailed(f"{self.folder}: the last checkpoint could not be written")
        self.context.ranks.barrier()

    def stalls(self, clock: Clock) -> dict[str, float]:
        """Seconds that saves held this start's training up on the first rank, and their share of its training time."""
        if self.saver is None:
            return {}
        stalled, trained = self.saver.stalled, clock.read() - self.trained_before
        return {"save_stall": round(stalled, 6), "save_stall_share": round(stalled / max(trained, 1e-9), 6)}

    def close(self) -> None:
        """Closes the features' files."""
        self.features.close()

    def ema_model(self) -> SiT:
        """The averaged weights as a float32 model in eval mode; all ranks ask, only the first may use it if sharded."""
        for name, ema in self.optimizer.state()["ema"].items():
            whole = gathered(ema)
            if not self.averaged.pos_embed.is_meta:
                self.averaged.get_parameter(name).copy_(whole)
        return self.averaged


def _teacher(context: RunContext, stage: Stage, table: kernels.KernelTable, attend: Attend) -> SiT | None:
    name = stage.method.teacher_name
    if name is None:
        return None
    recipe, ranks, loaded = context.recipe, context.ranks, list[SiT]()

    def load() -> None:
        root, group = teacher.checkpoint_root(recipe, name), stage.method.teacher_group
        loaded.append(teacher.load_frozen(root, recipe.model, group, table, ranks.device, context.dtype, attend))

    ranks.broadcast_from_rank0(load)
    model = loaded[0] if loaded else unfilled(recipe.model, table, ranks.device, context.dtype, attend)
    model.eval().requires_grad_(False)
    ranks.broadcast(model.state_dict().values())
    return model


def _average(
    context: RunContext, stage: Stage, table: kernels.KernelTable, attend: Attend, shards: Shards | None
) -> EmaModel | None:
    if not stage.method.learns_from_average:
        return None
    model = unfilled(context.recipe.model, table, context.ranks.device, context.dtype, attend)
    if shards is not None:
        shards.model(model.requires_grad_(False), stage.method.frozen_depth)
    _compile(context, model, dynamic=False)
    return EmaModel(model)


def _branches(run: Run, device: torch.device) -> Branches:
    """How a guided teacher runs with the labels and with the null label, by `run.teacher_branches`."""
    return (
        batched
        if run.teacher_branches == "batched"
        else Apart(side_stream(run, device, run.teacher_branches == "streams"))
    )


def _compiles(context: RunContext) -> bool:
    run, device = context.recipe.run, context.ranks.device
    return run.compile == "on" or (run.compile == "auto" and device.type == "cuda")


def _compile(context: RunContext, model: SiT, dynamic: bool) -> None:
    if not _compiles(context):
        return
    blocks = CompiledBlocks(context.log.say, dynamic)
    if is_sharded(model):
        blocks.inside(model.blocks)
    else:
        model.run_block = blocks


def _saver(context: RunContext, stage: Stage, root: Path, sharded: bool) -> checkpoint.Saver | None:
    """The first rank's, or every rank's where each writes its own part."""
    ranks, run, team = context.ranks, context.recipe.run, None
    if sharded:
        team = checkpoint.Team(ranks.rank, ranks.count, Rendezvous("save"), stage.name, lambda: ranks.heartbeat.over)
    if not ranks.first and team is None:
        return None
    return checkpoint.Saver(root, context.log.say, keep=run.keep, keep_every=run.keep_every, team=team)
