"""What a run decides once, at its start, and keeps in its checkpoints, so that a resumed run computes the same bits."""

from collections.abc import Callable

import torch

from st_fast.core.checkpoint.meta import Meta
from st_fast.core.ranks import Ranks
from st_fast.kernels.common.trial import Size
from st_fast.model.timed import timed_choices
from st_fast.recipe import Recipe
from st_fast.recipe.batch import images_a_pass
from st_fast.train.continuity import newest


def newest_meta(recipe: Recipe) -> Meta | None:
    """What the newest readable checkpoint of the run says of it; None where there is none yet."""
    found = next(filter(None, (newest(recipe, stage) for stage in reversed(recipe.stages))), None)
    return found[1].said if found else None


def choose_kernels(recipe: Recipe, ranks: Ranks, dtype: torch.dtype, say: Callable[[str], None]) -> dict[str, str]:
    """What `kernels` says "auto" of and a trial decides: by op, "fused" or "reference", the same on all ranks."""

    def recorded() -> dict[str, str] | None:
        meta = newest_meta(recipe)
        return None if meta is None else dict(meta.kernels or {})

    if recipe.run.fp8 != "off" and recipe.kernels.gelu_mlp == "auto":
        say(f"kernels: gelu_mlp reference, run.fp8 = {recipe.run.fp8!r} has products of its own")
        return {}
    if recipe.model.mlp != "gelu":  # there is no such MLP to try
        return {}
    model = recipe.model
    size = Size(images_a_pass(recipe.optim, ranks.count), model.tokens, model.width, model.heads, model.hidden)
    before = ranks.broadcast_from_rank0(recorded)
    compiled = recipe.run.compiled(ranks.device.type)
    return timed_choices(vars(recipe.kernels), size, ranks, dtype, compiled, before, say)
