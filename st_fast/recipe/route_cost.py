"""What a stage's route leaves out of a step's cost. Imports no torch."""

from dataclasses import replace

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.schema import Stage
from st_fast.recipe.tokens import TokenPlan


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
    tokens = sum(lengths)
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
