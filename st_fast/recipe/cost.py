"""Arithmetic of a recipe, counted by formula: parameters, FLOPs (1 multiply-add = 2 FLOPs), memory. Imports no torch.

What a stage costs is the method as defined: only supervised rows through the teacher where the mask allows it. A
counter that watches a step (torch.utils.flop_counter) sees the same but for three things, below 0.2 % at the published
sizes: latents and times need no gradient, both branches of the teacher share a patch embedding, and it projects one
modulation too many. A flash backward computes the scores once more, which counters charge and this does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from st_fast.recipe.batch import images_a_pass, possible_passes, with_passes_of
from st_fast.recipe.methods import LayerSync, Method, Repa, SelfRepresentation, SelfTranscendence, VelocityHead
from st_fast.recipe.schema import Model, Recipe, Run, Sample, Stage

TIME_FREQUENCIES = 256


def tokens(model: Model) -> int:
    """N, tokens of a latent."""
    return (model.latent_size // model.patch) ** 2


def trunk_parameters(model: Model) -> int:
    """Parameters of SiT, fixed positions included, as the published counts have them."""
    d, hidden, patch = model.width, int(model.width * model.mlp_ratio), model.patch**2 * model.channels
    block = (4 * d * d + 4 * d) + (2 * d * hidden + hidden + d) + (6 * d * d + 6 * d)
    if model.qk_norm:
        block += 4 * (d // model.heads)
    embedders = (patch * d + d) + (TIME_FREQUENCIES * d + d + d * d + d)
    embedders += (model.num_classes + (model.class_dropout > 0)) * d + tokens(model) * d
    final = (d * patch + patch) + (2 * d * d + 2 * d)
    return model.depth * block + embedders + final


def block_macs(model: Model) -> int:
    """Multiply-adds of one block's forward for one image: linear layers, attention, its adaLN projection."""
    n, d, hidden = tokens(model), model.width, int(model.width * model.mlp_ratio)
    return n * (4 * d * d + 2 * d * hidden) + 2 * n * n * d + 6 * d * d


def trunk_macs(model: Model, depth: int | None = None) -> int:
    """Multiply-adds of one image's forward up to block `depth`; without it, all of it with the final layer."""
    n, d, patch = tokens(model), model.width, model.patch**2 * model.channels
    embed = n * patch * d + TIME_FREQUENCIES * d + d * d
    if depth is not None:
        return embed + depth * block_macs(model)
    return embed + model.depth * block_macs(model) + n * d * patch + 2 * d * d


def recomputed_macs(model: Model, checkpointing: str) -> int:
    """Multiply-adds that the backward pass does again for one image under `run.checkpointing`.

    Of a block all but its adaLN projection, which lies outside; of an attention all but its last projection, whose
    result nothing needs. They are work of the implementation, not of the method, so neither `stage_cost` nor MFU
    counts them.
    """
    if checkpointing == "none":
        return 0
    n, d = tokens(model), model.width
    attention = 3 * n * d * d + 2 * n * n * d
    return model.depth * (attention if checkpointing == "attention" else block_macs(model) - 6 * d * d)


def _projector_macs(model: Model, hidden: int, out: int) -> int:
    return tokens(model) * (model.width * hidden + hidden * hidden + hidden * out)


@dataclass(frozen=True)
class StageCost:
    """FLOPs an image of the global batch, while supervision is active."""

    student: float
    heads: float
    teacher: float

    @property
    def total(self) -> float:
        return self.student + self.heads + self.teacher


DINOV2 = {"small": (12, 384), "base": (12, 768), "large": (24, 1024), "giant": (40, 1536)}
"""(depth, width) of the published sizes."""


def encoder_width(name: str, model: Model) -> int:
    """Channels of an image encoder's features, where its name tells; else the model's width stands for it."""
    return next((width for size, (_, width) in DINOV2.items() if size in name), model.width)


def vision_flops(width: int, depth: int, hidden: int, patch: int, patches: int, prefix: int) -> float:
    """FLOPs of one image's forward through a vision transformer: linear layers, attention, patch embedding.

    `prefix` tokens (class token, registers) come before the patches'. SwiGLU has three matrices of two thirds of the
    hidden width: about what two of all of it cost.
    """
    n = patches + prefix
    block = n * (4 * width**2 + 2 * width * hidden) + 2 * n * n * width
    return 2.0 * (depth * block + patches * width * 3 * patch**2)


def live_encoder_flops(name: str, model: Model) -> float:
    """FLOPs of one image through a DINOv2, where the name tells which; 0 where it tells nothing.

    Images are taken to be 8 times as large as the latents, and so to give as many patches as a patch of 2 gives tokens.
    """
    depth, width = _dinov2(name)
    patches = (model.latent_size // 2) ** 2
    return vision_flops(width, depth, 4 * width, 14, patches, 5 if "registers" in name else 1)


def _dinov2(name: str) -> tuple[int, int]:
    """(depth, width) of a DINOv2 by its name, such as facebook/dinov2-base; zeros where that tells nothing."""
    return next((sizes for size, sizes in DINOV2.items() if "dinov2" in name and size in name), (0, 0))


def _in_range_share(recipe: Recipe, t_range: tuple[float, float], mask: str) -> float:
    """The expected share of samples that are supervised; exact for uniform and stratified t."""
    return 1.0 if mask == "released" else time_share(recipe.flow.time, recipe.flow.path, t_range)


def time_share(time: str, path: str, t_range: tuple[float, float]) -> float:
    """P(low ≤ t ≤ high) under a time sampling."""
    if time != "lognormal":
        return t_range[1] - t_range[0]

    def below(t: float) -> float:
        if t <= 0 or t >= 1:
            return float(t >= 1)
        sigma = t / (1 - t) if path == "linear" else math.tan(t * math.pi / 2)
        return 0.5 * (1 + math.erf(math.log(sigma) / math.sqrt(2)))

    return below(t_range[1]) - below(t_range[0])


def stage_cost(recipe: Recipe, stage: Stage, encoders: float | None = None) -> StageCost:
    """The method's training FLOPs per image: three times the student's and heads' forward, once the teacher's.

    REPA's encoders may run once over the data set, before training: what that took, the features' manifest says, and
    the trainer adds it to the stage's total. Where they run live they are the teacher, at `encoders` FLOPs an image, or
    at what their names tell. LayerSync costs nothing beside the student. What activation checkpointing computes again
    is not counted: see `recomputed_macs`.
    """
    model, method = recipe.model, stage.method
    student = 6.0 * trunk_macs(model)
    if isinstance(method, VelocityHead):
        share = _in_range_share(recipe, method.t_range, method.mask)
        out = model.patch**2 * model.channels
        macs = _projector_macs(model, method.hidden, model.width) + tokens(model) * model.width * out
        return StageCost(student, 6.0 * macs * share, 0.0)
    if isinstance(method, SelfTranscendence):
        share = _in_range_share(recipe, method.t_range, method.mask)
        heads = 6.0 * _projector_macs(model, method.hidden, model.width) * share
        return StageCost(student, heads, 2 * 2.0 * trunk_macs(model, method.teacher_depth) * share)
    if isinstance(method, SelfRepresentation):
        heads = 6.0 * tokens(model) * 4 * model.width**2
        return StageCost(student, heads, 2.0 * trunk_macs(model, method.teacher_depth))
    if isinstance(method, Repa):
        widths = [encoder_width(name, model) for name in method.encoders]
        heads = 6.0 * sum(_projector_macs(model, method.hidden, width) for width in widths)
        live = sum(live_encoder_flops(name, model) for name in method.encoders) if encoders is None else encoders
        return StageCost(student, heads, live if method.encodes_images else 0.0)
    return StageCost(student, 0.0, 0.0)


def stage_flops(recipe: Recipe, stage: Stage, first: int, last: int, encoders: float | None = None) -> float:
    """FLOPs of the steps first … last − 1 of a stage, over the whole global batch; supervision may end midway.

    encoders: see `stage_cost`.
    """
    cost = stage_cost(recipe, stage, encoders)
    stop = stage.method.stop_step
    supervised = max(0, min(last, stop or last) - first)
    return recipe.optim.batch_size * (cost.student * (last - first) + (cost.heads + cost.teacher) * supervised)


STATE_BYTES = 20
"""Bytes a trained parameter: float32 master, two moments and EMA, and a gradient and copy of 2 (or gradient of 4)."""


HEAD_BYTES = 16
"""The same of a head, which has no EMA."""
SAMPLED_BYTES = 4
"""Bytes a parameter of the float32 model that samples are drawn from."""


MEMORY_SHARE = 0.9
"""The share of the memory that an estimate may fill: fragments and libraries take the rest."""


def largest_micro_batch(recipe: Recipe, ranks: int, bf16: bool, room: int) -> int:
    """The most images a pass, of those that divide a rank's share of the batch, whose estimate fits `room` bytes.

    0 where not even one image does.
    """
    for images in possible_passes(recipe.optim, ranks):
        if sum(memory_bytes(with_passes_of(images, recipe, ranks), ranks, bf16)) <= MEMORY_SHARE * room:
            return images
    return 0


def memory_bytes(recipe: Recipe, ranks: int, bf16: bool) -> tuple[int, int]:
    """An estimate for one rank, of the stage that takes most: (weights with their state; a micro-batch's activations).

    Weights are those of the student, its heads, a teacher, live encoders and the model for sampling. Left out: of a
    sharded run the one block that is gathered. The rank is the first: of a sharded run only it samples.
    """
    images, run = images_a_pass(recipe.optim, ranks), recipe.run
    shards = ranks if run.sharding == "fsdp2" else 1
    teacher_shards = shards if run.shard_teacher else 1
    stages = [
        (
            weight_bytes(recipe.model, stage, bf16, shards, teacher_shards),
            images * activation_bytes(recipe.model, bf16, run.checkpointing)
            + images * backward_bytes(recipe.model, bf16)
            + supervised_rows(recipe, stage.method, images) * supervision_bytes(recipe.model, stage.method, bf16, run),
        )
        for stage in recipe.stages
    ]
    return max(stages, key=sum)


def weight_bytes(model: Model, stage: Stage, bf16: bool, shards: int = 1, teacher_shards: int = 1) -> int:
    """Bytes of a stage's weights and their state on one rank, gradients included; over how many ranks each is split."""
    method, each = stage.method, 2 if bf16 else 4
    average = 0
    if method.learns_from_average and (bf16 or shards > 1):
        average = each  # else it is the EMA itself
    trunk = SAMPLED_BYTES + (STATE_BYTES + average) / shards + (each / teacher_shards if method.teacher_name else 0)
    live = sum(12 * depth * width**2 for depth, width in map(_dinov2, method.encoder_names)) * method.encodes_images
    heads = head_parameters(model, method) * HEAD_BYTES / shards
    return round(trunk_parameters(model) * trunk + heads + live * each)


def head_parameters(model: Model, method: Method) -> int:
    """Parameters of a method's heads, which are dropped after training."""
    d, patch = model.width, model.patch**2 * model.channels

    def projector(hidden: int, out: int) -> int:
        return (d * hidden + hidden) + (hidden * hidden + hidden) + (hidden * out + out)

    if isinstance(method, VelocityHead):
        return projector(method.hidden, d) + d * patch + patch
    if isinstance(method, SelfTranscendence):
        return projector(method.hidden, d)
    if isinstance(method, SelfRepresentation):
        return (d * 2 * d + 2 * d) + (2 * d * d + d)
    if isinstance(method, Repa):
        return sum(projector(method.hidden, encoder_width(name, model)) for name in method.encoders)
    return 0


def drawing_rows(settings: Sample) -> float:
    """Rows that the model is given for one sample, two where there is guidance; NaN for dopri5, which decides itself.

    The SDE's times are taken to be equally spaced to the end, which near the edges of `cfg_range` miscounts a row.
    """
    if settings.sampler == "dopri5":
        return math.nan
    ends = [i / settings.steps for i in range(settings.steps + 1)]
    times = ends[1:] + (ends[:-1] if settings.sampler == "heun" else [])
    low, high = settings.cfg_range
    guided = sum(low <= t <= high for t in times) if settings.cfg_scale != 1.0 else 0
    return float(len(times) + guided)


def looking_flops(recipe: Recipe, stage: Stage) -> float:
    """What drawing costs while a stage trains, for pictures and for scores; scoring itself is not counted."""
    scored = recipe.evaluate.num if recipe.evaluate.judge != "none" or recipe.evaluate.inception else 0
    drawn = sum(
        count * (-(-stage.steps // every) if every else 1)
        for count, every in ((recipe.sample.num, recipe.sample.every), (scored, recipe.evaluate.every))
    )
    return drawn * drawing_rows(recipe.sample) * 2.0 * trunk_macs(recipe.model)


def activation_bytes(model: Model, bf16: bool, checkpointing: str = "none") -> int:
    """What the trunk keeps for the backward per image, compiled for CUDA with cuDNN's attention (test_memory.py).

    With checkpointing, in every block what `st_fast.model.checkpointing` says is kept, and in one block what its
    backward pass has just computed again. The CPU keeps attention's output once: there this is 4 to 5 % too much.
    """
    n, d, each = tokens(model), model.width, 2 if bf16 else 4
    qkv, attended = 3 * d, d
    normed = qkv + d if model.qk_norm else 0  # q, k, v once more, and the output also as its projection reads it
    statistics = 4 * model.heads * (5 if model.qk_norm else 1)  # of q and k: mean and 1/σ; of the softmax: its log-sum
    inside_attention = each * (qkv + attended + normed) + statistics
    adaln = 2 * (each * 3 * d + 4 * 2)  # at two sites: x', a and y; mean and 1/σ
    block = inside_attention + adaln + each * 2 * int(d * model.mlp_ratio)  # the MLP's hidden before and after GELU
    again = {"none": 0, "attention": inside_attention, "block": block - each * 2 * d}[checkpointing]
    ends = each * 2 * d  # the embedded tokens and the first y; the last block's are its own
    modulations = each * 6 * d * model.depth
    return n * (model.depth * (block - again) + again + ends) + modulations


def backward_bytes(model: Model, bf16: bool) -> int:
    """Gradients of one block's activations per image, which are there while all else is kept: x', y, MLP's hidden."""
    return tokens(model) * (2 * model.width + 2 * int(model.width * model.mlp_ratio)) * (2 if bf16 else 4)


def supervised_rows(recipe: Recipe, method: Method, images: int) -> int:
    """The most rows of a pass that are supervised: five deviations above the mean, which one step in a million tops."""
    if method.selection is None:
        return 0
    share = _in_range_share(recipe, method.selection.t_range, method.selection.mask)
    return min(images, math.ceil(images * share + 5 * math.sqrt(images * share * (1 - share))))


def supervision_bytes(model: Model, method: Method, bf16: bool, run: Run) -> int:
    """What a method holds per supervised row: its heads' hidden layers, before and after SiLU, and its rows and target.

    A teacher that runs before the student's pass adds nothing, as no activations are there yet. Beside it, or ahead,
    it adds the block that it is in, of both branches where it is guided.
    """
    d, channels = model.width, 0
    if isinstance(method, VelocityHead):
        channels = 4 * method.hidden + 3 * d  # rows, LayerNorm's input and output
    elif isinstance(method, SelfTranscendence):
        channels = 4 * method.hidden + 4 * d  # rows, both targets, the loss's gradient
    elif isinstance(method, SelfRepresentation):
        channels = 4 * d + 3 * d  # one hidden layer of 2 d; prediction, target, gradient
    elif isinstance(method, Repa):
        widths = [encoder_width(name, model) for name in method.encoders]
        channels = sum(4 * method.hidden + 3 * width for width in widths)
    elif isinstance(method, LayerSync):
        channels = 2 * d
    if method.frozen_depth and run.teacher_placement != "before":
        branches = 1 if method.learns_from_average else 2
        channels += branches * (2 * d + 2 * int(d * model.mlp_ratio))
    return tokens(model) * channels * (2 if bf16 else 4)
