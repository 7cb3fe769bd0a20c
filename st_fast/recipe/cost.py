"""Arithmetic of a recipe, counted by formula: parameters, FLOPs (1 multiply-add = 2 FLOPs), memory. Imports no torch.

What a stage costs is the method as defined: only supervised rows through the teacher where the mask allows it. A
counter that watches a step (torch.utils.flop_counter) sees the same but for three things, below 0.2 % at the published
sizes: latents and times need no gradient, both branches of the teacher share a patch embedding, and it projects one
modulation too many. A flash backward computes the scores once more, which counters charge and this does not.
"""

import math
from dataclasses import dataclass, replace

from st_fast.recipe.batch import images_a_pass, possible_passes, with_passes_of
from st_fast.recipe.methods import Method, dinov2_size
from st_fast.recipe.muon_cost import muon_flops, muon_parameters
from st_fast.recipe.schema import Model, Recipe, Run, Sample, Stage
from st_fast.recipe.times import shifted, time_cdf, with_shift
from st_fast.recipe.token_cost import (
    grouped_bytes,
    grouped_macs,
    heads_macs,
    left_out_macs,
    plan_of,
    skipped_macs,
    tapped_tokens,
)
from st_fast.recipe.tokens import TokenPlan


def block_macs(model: Model, ends: bool = False) -> int:
    """Multiply-adds of one block's forward for one image: linear layers, attention, its adaLN projection.

    `ends`: of the last block that runs.
    """
    return sum(layer.macs for layer in model.block_layers(ends)) + model.attention_macs


def trunk_macs(model: Model, depth: int | None = None) -> int:
    """Multiply-adds of one image's forward up to block `depth`; without it, all of it with the final layers."""
    if model.network == "own":
        return (0, *model.own_macs)[-1 if depth is None else depth]
    embedding = sum(layer.macs for layer in model.embedders)
    final = sum(layer.macs for layer in (*model.final_layers, *model.internal_layers)) if depth is None else 0
    if depth is None or depth >= model.fusion_last:
        final += sum(layer.macs for layer in model.fusion_layers)
    count = model.depth if depth is None else depth
    blocks = (count - 1) * block_macs(model) + block_macs(model, ends=True) if count else 0
    return embedding + blocks + final


def recomputed_macs(model: Model, checkpointing: str) -> int:
    """Multiply-adds that the backward pass does again for one image under `run.checkpointing`.

    Of a block all but its adaLN projection, which lies outside; of an attention all but its last projection, whose
    result nothing needs. They are work of the implementation, not of the method, so neither `stage_cost` nor MFU
    counts them.
    """
    return (model.depth - 1) * _again(model, checkpointing, False) + _again(model, checkpointing, True)


def _again(model: Model, checkpointing: str, ends: bool) -> int:
    layers = model.block_layers(ends)
    if checkpointing == "attention":
        return sum(layer.macs for layer in layers if layer.name.endswith("attn.qkv")) + model.attention_macs
    outside = sum(layer.macs for layer in layers if "adaLN" in layer.name)
    return block_macs(model, ends) - outside if checkpointing == "block" else 0


@dataclass(frozen=True)
class StageCost:
    """FLOPs an image of the global batch, while supervision is active and, where there is a route, tokens left out."""

    student: float
    heads: float
    teacher: float
    dense_student: float = 0.0
    """What the student takes beside that at a step on all tokens, after `dense_after`."""
    dense_heads: float = 0.0
    """The same of the heads."""

    @property
    def total(self) -> float:
        return self.student + self.heads + self.teacher


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
    depth, width = dinov2_size(name)
    patches = math.prod(side // 2 for side in model.latent_sides)
    return vision_flops(width, depth, 4 * width, 14, patches, 5 if "registers" in name else 1)


def supervised_share(recipe: Recipe, method: Method) -> float:
    """The expected share of samples that a method supervises; exact for uniform and stratified t."""
    selection = method.selection
    if selection is None:
        return 0.0
    released = selection.mask == "released"
    if released:
        return 1.0
    flow = with_shift(recipe.flow, recipe.model.latent_shape)
    low, high = (time_cdf(flow, t) for t in selection.t_range)
    return high - low


def stage_cost(recipe: Recipe, stage: Stage, encoders: float | None = None) -> StageCost:
    """The method's training FLOPs per image: three times the student's and heads' forward, once the teacher's.

    REPA's encoders may run once over the data set, before training: what that took, the features' manifest says, and
    the trainer adds it to the stage's total. Where they run live they are the teacher, at `encoders` FLOPs an image, or
    at what their names tell. LayerSync costs nothing beside the student. What activation checkpointing computes again
    is not counted: see `recomputed_macs`. Under a route the student's blocks, and heads on one of them, run on the
    tokens that it keeps.
    """
    model, method = recipe.for_stage(stage).model, stage.method
    share = supervised_share(recipe, method)
    heads, whole_heads = (
        6.0 * heads_macs(model, stage, tokens) * share for tokens in (tapped_tokens(model, stage), model.tokens)
    )
    if method.encodes_images:
        live = sum(live_encoder_flops(name, model) for name in method.encoder_names)
        teacher = live if encoders is None else encoders
    else:
        depth = method.frozen_depth
        taught_by = model if method.teacher_name is None else recipe.teacher_model(method.teacher_name)
        macs = trunk_macs(taught_by, depth) + grouped_macs(taught_by, method.teacher_groups, depth)
        teacher = 2.0 * method.teacher_passes * macs * share
    whole, left_out = trunk_macs(model) + grouped_macs(model, method.token_groups), 6.0 * left_out_macs(model, stage)
    return StageCost(6.0 * whole - left_out, heads, teacher, left_out, whole_heads - heads)


def stage_flops(recipe: Recipe, stage: Stage, first: int, last: int, cost: StageCost | None = None) -> float:
    """FLOPs of the steps first … last − 1 of a stage, over the global batch; supervision or a route may end midway.

    Muon's products are among them, other updates are not. cost: of an image, where it is not `stage_cost`'s of the
    recipe.
    """
    cost = cost or stage_cost(recipe, stage)
    stop = min(last, stage.method.stop_step or last)
    dense = max(first, stage.routing.dense_after or last)  # the first step on all tokens
    steps, supervised = last - first, max(0, stop - first)
    student = cost.student * steps + cost.dense_student * max(0, last - dense)
    heads = cost.heads * supervised + cost.dense_heads * max(0, stop - dense)
    updates = steps * muon_flops(recipe.for_stage(stage).model, recipe.optim)
    return recipe.optim.batch_size * (student + heads + cost.teacher * supervised) + updates


def comparison_flops(recipe: Recipe, stage: Stage, encoders: float | None = None, step: int = 0) -> float:
    """FLOPs of one comparison of gradients (`stop_below`) before a step, over the whole global batch.

    At each of its times a forward of student and heads, and a backward from both losses to the tapped stream, without
    weights' gradients, on the tokens that a route keeps at that step; a teacher that reads noisy latents runs at each
    time, live encoders once.
    """
    model, method = recipe.for_stage(stage).model, stage.method
    assert isinstance(method.tap, int)
    student = 2 * trunk_macs(model) - trunk_macs(model, method.tap)
    student -= sum(left_out_macs(model, stage, after, step) for after in (0, method.tap))
    heads = 2 * heads_macs(model, stage, tapped_tokens(model, stage, step))
    taught_by = model if method.teacher_name is None else recipe.teacher_model(method.teacher_name)
    teacher = method.teacher_passes * trunk_macs(taught_by, method.frozen_depth)
    once = stage_cost(recipe, stage, encoders).teacher if method.encodes_images else 0.0
    return recipe.optim.batch_size * (2.0 * len(method.stop_times) * (student + heads + teacher) + once)


STATE_BYTES = 20
"""Bytes a trained parameter: float32 master, exp_avg, exp_avg_sq and EMA; gradient and copy of 2 (or gradient of 4)."""
HEAD_BYTES = 16
"""The same of a head, which has no EMA."""
SAVED_BYTES, SAVED_HEAD_BYTES = 16, 12
"""Bytes a parameter, and one of a head, in a checkpoint: master, exp_avg and exp_avg_sq in float32, and the EMA."""
AVERAGE_BYTES = 4
"""Bytes a parameter of a further average (`optim.ema_decays`), on the device and in a checkpoint."""
MUON_SAVES = 4
"""Bytes less for a parameter that Muon updates: it has one running mean in place of two."""
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
    shards = run.shards(ranks)
    teacher_shards = shards if run.shard_teacher else 1
    stages = []
    for stage in recipe.stages:
        model = recipe.for_stage(stage).model
        plan = plan_of(model, stage, step=stage.steps - 1)  # of the steps that run most tokens
        activations = activation_bytes(model, bf16, run.checkpointing, plan)
        pass_bytes = images * (activations + backward_bytes(model, bf16))
        rows = supervised_rows(recipe, stage.method, images)
        supervision = rows * supervision_bytes(model, stage, bf16, run)
        supervision += images * grouped_bytes(model, stage.method.token_groups, bf16, run.checkpointing)
        averages = len(recipe.optim.ema_decays)
        weights = weight_bytes(model, stage, bf16, shards, teacher_shards, averages)
        weights -= MUON_SAVES * muon_parameters(model, recipe.optim) // shards
        stages.append((weights, pass_bytes + supervision))
    return max(stages, key=sum)


def weight_bytes(
    model: Model, stage: Stage, bf16: bool, shards: int = 1, teacher_shards: int = 1, averages: int = 0
) -> int:
    """Bytes of a stage's weights and their state on one rank, gradients included; over how many ranks each is split.

    averages: how many there are beside the first.
    """
    method, each = stage.method, 2 if bf16 else 4
    average = each if method.learns_from_average and (bf16 or shards > 1) else 0  # else it is the EMA itself
    trunk = (
        SAMPLED_BYTES
        + (STATE_BYTES + averages * AVERAGE_BYTES + average) / shards
        + (each / teacher_shards if method.teacher_name else 0)
    )
    live = sum(12 * depth * width**2 for depth, width in map(dinov2_size, method.encoder_names)) * method.encodes_images
    heads = head_parameters(model, method) * HEAD_BYTES / shards
    return round(model.parameters * trunk + heads + live * each)


def saved_bytes(recipe: Recipe, ranks: int) -> int:
    """Bytes of the copy on the host that one rank's part of a checkpoint is written from, in the largest stage."""
    shards, averages = recipe.run.shards(ranks), AVERAGE_BYTES * len(recipe.optim.ema_decays)
    stages = [(recipe.for_stage(stage).model, stage.method) for stage in recipe.stages]
    return max(
        (
            model.parameters * (SAVED_BYTES + averages) + head_parameters(model, method) * SAVED_HEAD_BYTES
            - muon_parameters(model, recipe.optim) * MUON_SAVES
        ) // shards
        for model, method in stages
    )  # fmt: skip


def head_parameters(model: Model, method: Method) -> int:
    """Parameters of a method's heads, which are dropped after training."""
    return sum(layer.parameters for layer in method.head_layers(model))


def drawing_rows(settings: Sample) -> float:
    """Rows that the model is given for one sample, two where there is guidance; NaN for dopri5, which decides itself.

    The SDE's times are taken to be equally spaced to the end, which near the edges of `cfg_range` miscounts a row.
    """
    if settings.sampler == "dopri5":
        return math.nan
    ends = [shifted(i / settings.steps, settings.shift) for i in range(settings.steps + 1)]
    times = ends[1:] + (ends[:-1] if settings.sampler == "heun" else [])
    low, high = settings.cfg_range
    guided = sum(low <= t <= high for t in times) if settings.cfg_scale != 1.0 else 0
    return float(len(times) + guided)


def looking_flops(recipe: Recipe, stage: Stage) -> float:
    """What drawing costs while a stage trains, for pictures and for scores; scoring itself is not counted."""
    scored = recipe.evaluate.num if recipe.evaluate.classifier or recipe.evaluate.inception else 0
    drawn = sum(
        count * (-(-stage.steps // every) if every else 1)
        for count, every in ((recipe.sample.num, recipe.sample.every), (scored, recipe.evaluate.every))
    )
    return drawn * 2.0 * drawing_macs(recipe.for_stage(stage).model, recipe.sample)


def drawing_macs(model: Model, settings: Sample) -> float:
    """Multiply-adds of drawing one sample: of guidance by path drop half of the rows skip blocks."""
    settings = with_shift(settings, model.latent_shape)
    rows = drawing_rows(settings)
    if settings.guidance != "path_drop":
        return rows * trunk_macs(model)
    guided = rows - drawing_rows(replace(settings, cfg_scale=1.0))
    return rows * trunk_macs(model) - guided * skipped_macs(model)


def activation_bytes(model: Model, bf16: bool, checkpointing: str = "none", plan: TokenPlan | None = None) -> int:
    """What the trunk keeps for the backward per image, compiled for CUDA with cuDNN's attention (test_memory.py).

    With checkpointing, in every block what `st_fast.model.compiling` says is kept, and in one block what its
    backward pass has just computed again. plan: which tokens which blocks run, where not all of them run all.
    """
    if model.network == "own":  # under autocast about half as much
        return model.own_bytes // (2 if bf16 else 1)
    n, d, each = model.length, model.width, 2 if bf16 else 4
    routed, left_out = (plan.route.blocks, model.tokens - sum(plan.kept)) if plan and plan.route else ((), 0)
    joint = len(model.streams) > 1
    qkv, attended = 3 * d, d * (1 + joint)  # what a joint attention gave is cut into streams
    normed = (2 + joint) * d if model.qk_norm or model.rope else 0  # q and k once more, joined also v
    normed += d if model.value_residual else 0  # v, mixed
    # Of q and k mean and 1/σ, or 1/σ alone; of the softmax its log-sum.
    statistics = 4 * model.heads * (1 + {False: 0, True: 4, "rms": 2}[model.qk_norm])
    inside_attention = each * (qkv + attended + normed) + statistics
    adaln = 2 * (each * 3 * d + 4 * (2 if model.norm == "layer" else 1))  # at two sites: x', a and y; mean and 1/σ
    block = inside_attention + adaln + each * _mlp_channels(model)
    again = {"none": 0, "attention": inside_attention, "block": block - each * 2 * d}[checkpointing]
    ends = each * 2 * d  # the embedded tokens and the first y; the last block's are its own
    modulations = each * 6 * d * model.depth * len(model.streams)
    ends += each * d if model.internal_head else 0  # the head's y
    # Of a route: the tokens with which it begins, x and y of the kept ones, and those with which it ends, all of them.
    route = each * d * (2 * (n - left_out) + 2 * n) if routed else 0
    if model.fusion_last:  # both streams side by side, of all tokens or the kept ones, and what they are fused to
        route += each * d * (2 * (n - left_out) + n)
    blocks = (n * model.depth - left_out * len(routed)) * (block - again)
    return blocks + n * (again + ends) + modulations + route


def backward_bytes(model: Model, bf16: bool) -> int:
    """Gradients of one block's activations per image, which are there while all else is kept: x', y, MLP's hidden."""
    return model.length * (2 * model.width + _mlp_channels(model)) * (2 if bf16 else 4)


def _mlp_channels(model: Model) -> int:
    """Hidden channels of an MLP before and after its activation; of SwiGLU gate, value and what they make."""
    return (3 if model.mlp == "swiglu" else 2) * model.hidden


def supervised_rows(recipe: Recipe, method: Method, images: int) -> int:
    """The most rows of a pass that are supervised: five deviations above the mean, which one step in a million tops."""
    if method.selection is None:
        return 0
    share = supervised_share(recipe, method)
    return min(images, math.ceil(images * share + 5 * math.sqrt(images * share * (1 - share))))


def supervision_bytes(model: Model, stage: Stage, bf16: bool, run: Run) -> int:
    """What a method holds per supervised row: its heads' hidden layers, before and after SiLU, and its rows and target.

    A teacher that runs before the student's pass adds nothing, as no activations are there yet. Beside it, or ahead,
    it adds the block that it is in, of both branches where it is guided.
    """
    method = stage.method
    channels = method.kept_channels(model)
    if method.frozen_depth and run.teacher_placement != "before":
        channels += method.teacher_passes * (2 * model.width + _mlp_channels(model)) * model.length // model.tokens
    return tapped_tokens(model, stage, step=stage.steps - 1) * channels * (2 if bf16 else 4)


def unfinished_warmups(recipe: Recipe) -> list[str]:
    """A line for each stage that ends before its learning rate is up; a start with AdamW's state may be up already."""
    warmup = recipe.optim.warmup_steps
    return [
        f"{stage.name}: the stage's {stage.steps} steps end within the warm-up of {warmup} steps (optim.warmup_steps)"
        for stage in recipe.stages
        if stage.steps < warmup and not (stage.start.init and stage.start.init_weights == "state")
    ]


def untrained_averages(recipe: Recipe) -> list[str]:
    """A line for each stage at whose end more than half of the weight average is still what it began with.

    After n steps a share of decay^n is; samples of such an average are noise however well the weights are trained. A
    stage that starts from a model begins with trained weights.
    """
    if recipe.optim.ema_warmup:  # the first update alone takes nine tenths of them away
        return []
    lines, decay = [], recipe.optim.ema_decay
    for stage in recipe.stages:
        share = decay**stage.steps
        if share > 0.5 and not stage.start.init:
            lines.append(
                f"{stage.name}: after {stage.steps} steps the average of optim.ema_decay = {decay:g} is still "
                f"{100 * share:.0f} % of its first weights, and samples of it are poor; "
                f"{0.01 ** (1 / stage.steps):.4g} would leave 1 %, optim.ema_warmup = true nothing"
            )
    return lines
