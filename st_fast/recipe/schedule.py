"""Which schedules of the same work a recipe and a device allow. Imports no torch."""

from __future__ import annotations

from st_fast.recipe.batch import images_a_pass
from st_fast.recipe.error import wrong_value
from st_fast.recipe.methods import supervision_name
from st_fast.recipe.schema import Recipe, Run


def check_schedule(recipe: Recipe, ranks: int) -> None:
    """RecipeError for schedules that exclude one another, that a method excludes, or that `run.device` lacks."""
    run = recipe.run
    for stage in recipe.stages:
        if run.teacher_placement == "ahead" and stage.method.learns_from_average:
            why = f"stage.{stage.name} ({supervision_name(stage.method)}) learns from what every update changes"
            raise wrong_value("run.teacher_placement", "ahead", "before or beside", why)
        if run.teacher_placement == "beside" and stage.method.learns_from_average and run.sharding != "none":
            why = f"stage.{stage.name} ({supervision_name(stage.method)}) learns from weights that lie in shards"
            raise wrong_value("run.teacher_placement", "beside", "before in a sharded run", why)
    if run.cuda_graphs:
        _check_graphs(recipe, ranks)
    if run.device == "cpu":
        check_device(run, "cpu")


def _check_graphs(recipe: Recipe, ranks: int) -> None:
    """A graph replays one micro-batch of fixed shapes on one stream, and its gradients start from nothing."""
    run, optim, share = recipe.run, recipe.optim, recipe.optim.batch_size // ranks
    whole = images_a_pass(optim, ranks) == share
    needs = {
        "run.supervised_rows": (run.supervised_rows, ("padded",)),
        "run.teacher_placement": (run.teacher_placement, ("before",)),
        "run.teacher_branches": (run.teacher_branches, ("batched", "sequential")),
        "optim.accumulation": (optim.accumulation, (1,)),
        "optim.micro_batch": (optim.micro_batch, (optim.micro_batch,) if whole else (share, 0)),
    }
    for key, (value, allowed) in needs.items():
        if value not in allowed:
            raise wrong_value(key, value, " or ".join(map(str, allowed)), "run.cuda_graphs = true needs it")
    if run.checkpointing == "attention" and run.compile != "off":
        # PyTorch's compiler takes attention for an op that draws, and asks the generator's state to compute it again.
        why = "run.cuda_graphs = true needs it: what is computed again inside a compiled block reads a random state"
        raise wrong_value("run.checkpointing", "attention", 'none or block, or run.compile = "off"', why)


def check_device(run: Run, device: str) -> None:
    """RecipeError, saying what is available, if a schedule needs CUDA and the device ("cpu", "cuda") is another."""
    if device == "cuda":
        return
    if run.cuda_graphs:
        raise wrong_value("run.cuda_graphs", True, "false", f"the run is on {device}, CUDA graphs need a CUDA device")
    if run.streams != "required":
        return
    wanted: dict[str, tuple[object, bool, str]] = {
        "run.teacher_branches": (run.teacher_branches, run.teacher_branches == "streams", "batched or sequential"),
        "run.teacher_placement": (run.teacher_placement, run.teacher_placement != "before", "before"),
        "run.prefetch": (run.prefetch, run.prefetch, "false"),
    }
    for key, (value, asked, available) in wanted.items():
        if asked:
            why = f"the run is on {device}, CUDA streams need a CUDA device"
            inline = 'run.streams = "auto" to have the same order without them'
            raise wrong_value(key, value, f"{available}, or {inline}", why)
