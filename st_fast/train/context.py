"""What all stages of a run share, and how the networks of one are made: attention, average, compiled blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from st_fast import kernels
from st_fast.core.checkpoint.meta import MicroBatch
from st_fast.core.ranks import Ranks
from st_fast.core.signals import StopConsensus
from st_fast.data.ahead import RecordSet
from st_fast.model import DiffusionTransformer, unfilled
from st_fast.model.attention import BACKENDS, Attend, choose
from st_fast.model.compiling import CompiledBlocks
from st_fast.recipe.schema import Recipe, Stage
from st_fast.train import continuity
from st_fast.train.batches import ImageFeatures, compile_encoders
from st_fast.train.callbacks import Callbacks
from st_fast.train.examiner import Examiner
from st_fast.train.log import Log
from st_fast.train.optim import EmaModel
from st_fast.train.parallel import Shards, is_sharded
from st_fast.train.validation import Part


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
    choice: MicroBatch | None = None
    """The result of `optim.micro_batch = "auto"`, which is in `recipe` as accumulation; None without it."""
    timed: Mapping[str, str] = field(default_factory=dict)
    """The kernels that a trial has chosen, by op: "fused" or "reference"."""
    changes: continuity.Changes | None = None
    """What is refused or accepted where the run continues; None: not compared."""
    validated_on: Mapping[str, Part] = field(default_factory=dict)
    """By `validation.HELD_OUT` and `TRAINED`; nothing where nothing is validated."""
    callbacks: Callbacks = field(default_factory=Callbacks)


def attention(context: RunContext, recipe: Recipe) -> Attend:
    """The backend of the network's attention; a module of one's own has its own."""
    model = recipe.model
    if model.network == "own":
        return BACKENDS["sdpa"].attend
    place, head_dim = context.ranks.device, model.width // model.heads
    return choose(model.attention, place, context.dtype, head_dim, context.log.say, model.length)


def average_model(
    context: RunContext, stage: Stage, table: kernels.KernelTable, attend: Attend, shards: Shards | None
) -> EmaModel | None:
    if not stage.method.learns_from_average:
        return None
    model = unfilled(context.recipe.for_stage(stage).model, table, context.ranks.device, context.dtype, attend)
    if shards is not None:
        shards.model(model.requires_grad_(False), stage.method.frozen_depth)
    compile_blocks(context, model)
    return EmaModel(model)


def compile_blocks(context: RunContext, model: DiffusionTransformer | ImageFeatures, dynamic: bool = False) -> None:
    """Runs the blocks of the model, or of live encoders, compiled from now on, if `run.compile` says so."""
    if not context.recipe.run.compiled(context.ranks.device.type):
        return
    if isinstance(model, ImageFeatures):
        compile_encoders(model, context.log.say)
    elif is_sharded(model):
        CompiledBlocks(context.log.say, dynamic).inside(model.blocks)
    else:
        model.run_block = CompiledBlocks(context.log.say, dynamic)
