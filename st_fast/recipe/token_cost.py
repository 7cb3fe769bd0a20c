"""What groups of an image's tokens, and a stage's route, change of a step's cost. Imports no torch.

A group has a modulation of its own, and may keep its attention to itself; a route leaves tokens out of blocks.
"""

from dataclasses import replace

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.schema import Stage
from st_fast.recipe.tokens import TokenGroups, TokenPlan, divided


def grouped_macs(model: Model, groups: TokenGroups | None, depth: int | None = None) -> int:
    """What groups add to the multiply-adds of one image's forward up to block `depth`, or all of it; negative: save.

    Each group has a time embedding and a modulation. Where attention is separated its cost is Σ n_g² instead of N²,
    but for the samples that are one group.
    """
    if groups is None:
        return 0
    blocks = model.depth if depth is None else depth
    vectors = sum(layer.macs for layer in model.embedders if layer.name.startswith("t_embedder."))
    vectors += blocks * sum(layer.macs for layer in model.block_layers() if "adaLN" in layer.name)
    vectors += sum(layer.macs for layer in model.final_layers if "adaLN" in layer.name) if depth is None else 0
    return (len(groups.shares) - 1) * vectors - blocks * saved_attention_macs(model, groups)


def saved_attention_macs(model: Model, groups: TokenGroups) -> int:
    """Multiply-adds that one block's attention of an image saves, on average over samples."""
    if not groups.separated:
        return 0
    apart = sum(length**2 for length in divided(model.tokens, groups.shares))
    return round((1 - groups.whole) * 2 * (model.tokens**2 - apart) * model.width)


def grouped_bytes(model: Model, groups: TokenGroups | None, bf16: bool, checkpointing: str = "none") -> int:
    """What groups add to what the trunk keeps for the backward per image (see `cost.activation_bytes`).

    Modulations; and the output of separated attention put together again, in blocks whose attention is kept.
    """
    if groups is None:
        return 0
    each, blocks = 2 if bf16 else 4, model.depth if checkpointing == "none" else 1
    modulations = (len(groups.shares) - 1) * each * 6 * model.width * model.depth
    return modulations + (blocks * each * model.tokens * model.width if groups.separated else 0)


def plan_of(model: Model, stage: Stage, step: int = 0) -> TokenPlan | None:
    """What becomes of an image's tokens at a step; None where all run alike."""
    return stage.routing.plan(model, stage.method.token_groups, model.grid, step)


def left_out_macs(model: Model, stage: Stage, after: int = 0, step: int = 0) -> int:
    """Multiply-adds of one image's forward behind block `after` that a stage's route leaves out; 0 without one."""
    plan = plan_of(model, stage, step)
    if plan is None or plan.route is None:
        return 0
    ends = [number == model.depth for number in plan.route.blocks if number > after]
    blocks = sum(_block_macs(model, plan, plan.lengths, end) - _block_macs(model, plan, plan.kept, end) for end in ends)
    # Of a fusion a token that was left out needs the half for its own state; the mask token's is one for all.
    fused = (sum(plan.lengths) - sum(plan.kept)) * model.width**2 if model.fusion_last > after else 0
    return blocks + fused


def skipped_macs(model: Model) -> int:
    """Multiply-adds of one image's forward that are not run where the blocks within a fusion are skipped."""
    blocks = sum(layer.macs for layer in model.block_layers() if "adaLN" not in layer.name) + model.attention_macs
    return (model.fusion_last - model.fusion_first) * blocks + sum(layer.macs for layer in model.fusion_layers) // 2


def _block_macs(model: Model, plan: TokenPlan, lengths: tuple[int, ...], ends: bool) -> int:
    """Multiply-adds of a block on groups of so many tokens, without what does not depend on their number."""
    tokens = sum(lengths) + model.registers
    attention = 2.0 * (tokens + model.text_length) ** 2 * model.width
    if plan.separated:
        apart = 2 * sum(length**2 for length in lengths) * model.width
        attention = plan.whole * attention + (1 - plan.whole) * apart
    return round(attention) + sum(layer.macs for layer in model.block_layers(ends, tokens))


def tapped_tokens(model: Model, stage: Stage, step: int = 0) -> int:
    """Tokens of an image that a stage's method compares: all, or those that a route around its block keeps."""
    plan = plan_of(model, stage, step)
    if plan is None or plan.route is None or not plan.route.around(stage.method.tap):
        return model.tokens
    return sum(plan.kept)


def heads_macs(model: Model, stage: Stage, tokens: int) -> int:
    """Multiply-adds of the forward of a method's heads on so many tokens of an image."""
    return sum(_on_tokens(layer, model, tokens).macs for layer in stage.method.head_layers(model))


def _on_tokens(layer: Layer, model: Model, tokens: int) -> Layer:
    """One that runs once for the image stays as it is."""
    return replace(layer, rows=tokens) if layer.rows == model.tokens else layer
