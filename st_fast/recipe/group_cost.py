"""What groups of an image's tokens change of a network's cost: a modulation for each, attention within each."""

from st_fast.recipe.architecture import Model
from st_fast.recipe.tokens import TokenGroups, divided


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
