"""The denoising loss on held-out records while a stage trains, by time, and whether it ends the stage.

Times lie evenly in (0, 1), each bin has as many, and with the noise they follow from `validate.split_seed`: every
validation, of every run on the same records, asks the same. Conditions are the records' own, the network runs all
tokens in float32, and the loss is that of the path's velocity, whatever supervises training. It never ends a run: one
that fails is a line. A signal ends it at once, and the resume makes it.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from st_fast.core import random
from st_fast.core.checkpoint.meta import Validated
from st_fast.core.errors import Stopped, UserError, first_line
from st_fast.core.machine import lacks_memory, out_of_memory
from st_fast.core.random import Purpose
from st_fast.core.ranks import Ranks
from st_fast.core.signals import StopConsensus
from st_fast.data.ahead import ReadAhead, RecordSet, mean_and_std
from st_fast.data.buckets import BucketSet
from st_fast.data.held_out import sizes_of, split
from st_fast.data.manifest import Manifest
from st_fast.model import flow
from st_fast.recipe.schema import Recipe, Stage
from st_fast.train.conditions import open_conditions
from st_fast.train.log import Log

HELD_OUT, TRAINED = "", "train_"
"""How the log's names begin for losses on held-out records, and on records that are trained on."""
GROUPS = {"ema": {"": "ema"}, "raw": {"": "model"}, "both": {"": "ema", "raw_": "model"}}
"""By `validate.weights`: how the log's names begin, and a checkpoint's group of weights."""


@dataclass(frozen=True)
class Part:
    """Records that a loss is taken of, and the recipe that says how their conditions are read."""

    records: RecordSet
    chosen: np.ndarray
    """(n,) int64: the i-th one is seen in the i-th of n equal stretches of time."""
    recipe: Recipe


def open_parts(recipe: Recipe, trained: RecordSet, opened: Callable[[Recipe], RecordSet]) -> dict[str, Part]:
    """What is validated on, by HELD_OUT and TRAINED; nothing where `validate.every` is 0.

    `trained` are training's records; `opened` gives those of a recipe's `data.path`, once they fit its network.
    UserError for too few records, or held-out ones that are not of the training's kind.
    """
    wanted = recipe.validate
    kept, held = np.arange(len(trained)), np.empty(0, np.int64)
    if wanted.share:
        kept, held = split(trained, wanted.share, wanted.split_seed)
        _check_batches(recipe, trained, kept)
    if not wanted.every:
        return {}
    found = {HELD_OUT: (trained, held, recipe.data.path), TRAINED: (trained, kept, recipe.data.path)}
    if wanted.path:
        data, alone = replace(recipe.data, path=wanted.path, source="shards"), replace(recipe.optim, batch_size=1)
        apart = opened(replace(recipe, data=data, optim=alone, stages=()))
        _check_kind(wanted.path, apart.manifest, trained.manifest)
        found[HELD_OUT] = apart, np.arange(len(apart)), wanted.path
    names = [HELD_OUT, TRAINED] if wanted.train else [HELD_OUT]
    return {name: _part(recipe, number, *found[name]) for number, name in enumerate(names)}


def _part(recipe: Recipe, number: int, records: RecordSet, indices: np.ndarray, path: str) -> Part:
    """At most `validate.num` of these records, drawn, as many for each bin; number 0 are those held out."""
    wanted = recipe.validate
    count = min(wanted.num, len(indices)) // wanted.bins * wanted.bins
    if not count:
        what = f"{len(indices)} {'training' if number else 'held-out'} records"
        raise UserError(f"validate.bins = {wanted.bins}: each needs a record, and there are {what} in {path}")
    drawn = random.permutation(wanted.split_seed, Purpose.VALIDATION, number, len(indices))[:count]
    run, data = replace(recipe.run, seed=wanted.split_seed), replace(recipe.data, path=path, loader="torch")
    found = Part(records, indices[drawn], replace(recipe, run=run, data=data))
    open_conditions(found.recipe, records).close()
    return found


def _check_batches(recipe: Recipe, records: RecordSet, kept: np.ndarray) -> None:
    """UserError where latents of a shape leave no batch to train on."""
    if isinstance(records, BucketSet) and (least := min(sizes_of(records, kept))) < recipe.optim.batch_size:
        raise UserError(
            f"validate.share = {recipe.validate.share:g}: it leaves {least} records of a shape in {records.folder}, "
            f"fewer than optim.batch_size = {recipe.optim.batch_size}"
        )


def _check_kind(path: str, held_out: Manifest, trained: Manifest) -> None:
    """UserError for records that are the training's own, or of other latents or classes."""
    where = f"validate.path = {path!r}"
    if held_out.digest == trained.digest:
        raise UserError(f"{where}: these are the training data; validate.share = 0.01 holds a part of them out")
    if differences := held_out.space.differences(trained.space):
        raise UserError(f"{where}: its latents are not of the training data's kind: {', '.join(differences)}")
    names, theirs = held_out.class_names, trained.class_names
    if names and theirs and names != theirs[: len(names)]:
        first = next(i for i, name in enumerate(names) if name != dict(enumerate(theirs)).get(i))
        raise UserError(f"{where}: its class {first} is {names[first]!r}, the training data's is another")


def digest(recipe: Recipe, parts: Mapping[str, Part]) -> str:
    """Changes with all that a held-out loss depends on beside the model; "" without validations."""
    if HELD_OUT not in parts:
        return ""
    part, wanted = parts[HELD_OUT], recipe.validate
    said = part.records.digest, part.chosen.tolist(), wanted.split_seed, GROUPS[wanted.weights][""], recipe.flow.path
    return hashlib.sha256(repr(said).encode()).hexdigest()


def times(seed: int, places: Tensor, count: int) -> Tensor:
    """(B,) float32: t of the records at these places of `count`, one in each of as many equal stretches of (0, 1)."""
    u = random.uniform(seed, Purpose.VALIDATION_TIME, places)[:, 0]
    return ((places.double() + u.double()) / count).float().clamp(2.0**-25, 1 - 2.0**-24)


def losses(model: nn.Module, moments: Tensor, condition: Tensor, places: Tensor, count: int, part: Part) -> Tensor:
    """(B,) float32: mean over C, H, W of (v̂ − v)², of records (B, 2C, H, W) at these places (B,) of `count`."""
    seed, manifest = part.recipe.run.seed, part.records.manifest
    mean, std = mean_and_std(moments, manifest)
    normals = random.normal(seed, Purpose.VALIDATION, places, (2, *mean.shape[1:]))
    x, noise, t = manifest.scale * (mean + std * normals[:, 0]), normals[:, 1], times(seed, places, count)
    x_t, velocity = flow.interpolate(x, noise, t, part.recipe.flow.path)
    return flow.denoising_loss(model(x_t, t, condition)[0], velocity)


def still_to_run(recipe: Recipe, stage: Stage, step: int, validated: Validated) -> bool:
    """Whether a stage that has made `step` steps, with what its validations found by then, is to make more."""
    patience = recipe.validate.patience
    return step < stage.steps and not (patience and validated.since >= patience)


class Validation:
    """A stage's validations: when they are due, what they found, and whether they have ended the stage."""

    def __init__(
        self, recipe: Recipe, stage: Stage, parts: Mapping[str, Part], ranks: Ranks, log: Log, stop: StopConsensus
    ) -> None:
        self._recipe, self._stage, self._parts = recipe, stage, parts
        self._ranks, self._log, self._stop = ranks, log, stop
        self.found = Validated()
        """Kept in checkpoints."""

    @cached_property
    def _protocol(self) -> str:
        return digest(self._recipe, self._parts)

    def restore(self, found: Validated) -> None:
        """Goes on from a checkpoint; from nothing where losses were taken of something else."""
        self.found = found if found.protocol == self._protocol else Validated()

    def due(self, step: int) -> bool:
        """Whether the loss after this many steps is to be taken, and has not been."""
        every = self._recipe.validate.every
        return bool(self._parts) and (step % every == 0 or step == self._stage.steps) and self.found.step < step

    def missing(self, step: int) -> bool:
        """Whether it is to be taken by a resume at this step; not where the stage has ended so. All ranks call it."""
        name = self._stage.name
        return self.due(step) and self._ranks.broadcast_from_rank0(lambda: not self._log.has("end", name, step))

    def stage_after(self, step: int) -> Stage:
        """The stage with the steps that it has, as far as is known after this many."""
        goes_on = still_to_run(self._recipe, self._stage, step, self.found)
        return self._stage if goes_on else replace(self._stage, steps=step)

    def how_it_ended(self, step: int) -> dict[str, Any]:
        """For the log of a stage's end: nothing where it made all its steps."""
        if step >= self._stage.steps:
            return {}
        return {"ended_by": "validation", "lowest": self.found.lowest, "lowest_at": self.found.lowest_at}

    def __call__(self, step: int, weights: Callable[[str], nn.Module], spent: Mapping[str, float]) -> None:
        """Takes the losses after `step` steps; all ranks call it alike.

        `weights` gives a group's as a float32 model in eval mode, whole on the first rank alone where the run is
        sharded; the first then works alone. What fails is one line.
        """
        record: dict[str, Any] = {}
        for prefix, group in GROUPS[self._recipe.validate.weights].items():
            self._ranks.heartbeat.beat("validate")
            model = weights(group)
            for name, part in self._parts.items():
                found = self._agreed(model, part, step)
                if found is None:
                    return
                by_bin = found.view(self._recipe.validate.bins, -1).mean(1)
                record |= {f"{prefix}{name}loss": float(found.mean()), f"{prefix}{name}by_time": by_bin.tolist()}
        self._take(step, record["loss"])
        record |= {"records": len(self._parts[HELD_OUT].chosen), "protocol": self._protocol}
        self._log.write("validate", self._stage.name, step, **record, **spent)
        self._tell(step, record)

    def _agreed(self, model: nn.Module, part: Part, step: int) -> Tensor | None:
        """The loss of each record (n,) float64, the same bits on every rank; None where any was stopped or failed."""
        mine, stopped, failed = torch.zeros(len(part.chosen), dtype=torch.float64), False, False
        try:
            with self._stop.interruptible():
                self._measure(model, part, mine)
        except Stopped:
            stopped = True
        except Exception as error:  # whatever it is, training need not end for it
            failed = True
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
            if lacks_memory(error):
                reason = f"{out_of_memory(error, 'validating')}; --validate.batch_size takes less"
            print(f"{self._stage.name} {step}: no validation: {reason}; training goes on", flush=True)
        if any(self._ranks.any([stopped, failed])):
            return None
        return self._ranks.sum(mine)

    @torch.no_grad()
    def _measure(self, model: nn.Module, part: Part, into: Tensor) -> None:
        """Fills in the losses of this rank's share, pass by pass; passes are the same for any number of ranks."""
        ranks, size, count = self._ranks, self._recipe.validate.batch_size, len(part.chosen)
        workers = 1 if self._recipe.run.sharding != "none" else ranks.count
        passes = [
            np.arange(start, min(start + size, count))[np.isin(part.chosen[start : start + size], alike)]
            for start in range(0, count, size)
            for alike in part.records.by_shape(part.chosen[start : start + size])
        ]
        mine = passes[ranks.rank :: workers] if ranks.rank < workers else []
        if not mine:
            return
        conditions = open_conditions(part.recipe, part.records)
        conditions.open(ranks.device, self._log.say)
        ahead = ReadAhead(part.records, pinned=ranks.device.type == "cuda")
        try:
            states = conditions.stream((places, part.chosen[places]) for places in mine)
            answers = ahead.stream(part.chosen[places] for places in mine)
            for places, (moments, labels) in zip(mine, answers, strict=True):
                ranks.heartbeat.beat("validate")
                condition = labels if states is None else next(states)
                numbers = torch.from_numpy(places)
                x, y, at = (one.to(ranks.device) for one in (moments, condition, numbers))
                into[numbers] = losses(model, x, y, at, count, part).double().cpu()
        finally:
            ahead.close()
            conditions.close()

    def _take(self, step: int, loss: float) -> None:
        """Counts the loss of a validation; one at a stage's end alone not, as a longer stage would not have had it."""
        before = replace(self.found, protocol=self._protocol)
        if step % self._recipe.validate.every:
            self.found = replace(before, step=step)
        elif isfinite(loss) and (before.lowest is None or loss < before.lowest - self._recipe.validate.min_delta):
            self.found = replace(before, step=step, lowest=loss, lowest_at=step, since=0)
        else:
            self.found = replace(before, step=step, since=before.since + 1)

    def _tell(self, step: int, record: Mapping[str, Any]) -> None:
        """The progress line of a validation, and the one of a stage that ends by it."""
        stage, found = self._stage, self.found
        line = f"{stage.name} {step:>{len(str(stage.steps))}}/{stage.steps} | validation {record['loss']:.4f}"
        names = {"train_loss": "training records", "raw_loss": "raw weights"}
        line += "".join(f" | {words} {record[name]:.4f}" for name, words in names.items() if name in record)
        lowest = f"{found.lowest:.4f} at step {found.lowest_at}" if found.lowest is not None else "none"
        self._log.say(f"{line} | lowest {lowest}")
        if step < stage.steps and self.stage_after(step).steps == step:
            self._log.say(
                f"{stage.name}: ends after {step} steps, as no validation since was lower than {lowest} "
                f"(validate.patience = {self._recipe.validate.patience})"
            )
