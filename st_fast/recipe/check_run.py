"""What [run]'s ways of doing the work exclude of one another, of a method or of a device. Imports no torch."""

from collections.abc import Mapping

from st_fast.recipe.batch import images_a_pass
from st_fast.recipe.error import RecipeError, show, wrong_value
from st_fast.recipe.methods import supervision_name
from st_fast.recipe.schema import Recipe, Run
from st_fast.recipe.token_cost import plan_of

FP8_MULTIPLE = 16
"""What the sides of an fp8 matrix product must be multiples of."""


def check_fp8(recipe: Recipe, ranks: int) -> None:
    """fp8 replaces bf16 products on a GPU, of sizes that its kernels take; also the tokens are one, in the backward."""
    run, model = recipe.run, recipe.model
    if run.fp8 == "off":
        return
    if run.device == "cpu" or not run.bf16(run.device):
        why = f"run.precision = {show(run.precision)}, run.device = {show(run.device)}"
        raise wrong_value("run.fp8", run.fp8, '"off", or run.precision = "bf16" on a GPU', why)
    images = images_a_pass(recipe.optim, ranks)
    plans = [plan_of(model, stage) for stage in recipe.stages]
    kept = (sum(plan.kept) for plan in plans if plan is not None and plan.route is not None)
    tokens = {each + model.registers for each in (model.tokens, *kept)}
    sizes = [(f"model.width {model.width}", model.width), (f"the MLP's {model.hidden} channels", model.hidden)]
    sizes += [(f"a micro-batch of {images * each} tokens", images * each) for each in sorted(tokens, reverse=True)]
    for name, size in sizes:
        if size % FP8_MULTIPLE:
            raise wrong_value("run.fp8", run.fp8, f'"off", or a multiple of {FP8_MULTIPLE}', f"{name} is none")


def check_sharding(recipe: Recipe, ranks: int) -> None:
    """What reads weights outside of the blocks, or works on another stream or without hooks, needs whole weights."""
    groups, size = recipe.run.sharding == "hsdp", recipe.run.shard_ranks
    if not groups and size:
        raise wrong_value("run.shard_ranks", size, '0, or run.sharding = "hsdp"')
    if groups and (size < 2 or (ranks > 1 and ranks % size)):
        sizes = [str(part) for part in range(2, ranks + 1) if ranks % part == 0]
        allowed = f"a divisor of the {ranks} ranks: {', '.join(sizes)}" if ranks > 1 else "at least 2"
        raise wrong_value("run.shard_ranks", size, allowed, 'run.sharding = "hsdp" splits weights within such groups')
    if recipe.run.sharding != "none":
        needs = {"model.modulation": ("per_block",), "run.cuda_graphs": (False, "auto"), "run.fp8": ("off",)}
        _require(recipe, needs, "the run is sharded")
    if recipe.run.shard_teacher:
        whole: dict[str, tuple[object, ...]] = {"run.sharding": ("fsdp2", "hsdp")}
        whole |= {"run.teacher_branches": ("batched",), "run.teacher_placement": ("before",)}
        _require(recipe, whole, "run.shard_teacher = true needs it")


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
    if run.graphs and (problem := graphs_problem(recipe, ranks)) is not None:
        raise problem
    if run.device == "cpu":
        check_device(run, "cpu")


def graphs_problem(recipe: Recipe, ranks: int) -> RecipeError | None:
    """What excludes CUDA graphs: one replays one micro-batch of fixed shapes on one stream, and its gradients start
    from nothing."""
    run, optim, share = recipe.run, recipe.optim, recipe.optim.batch_size // ranks
    needs: dict[str, tuple[object, ...]] = {
        "run.sharding": ("none",),
        "run.supervised_rows": ("auto", "padded"),
        "run.teacher_placement": ("before",),
        "run.teacher_branches": ("batched", "sequential"),
        "optim.accumulation": (1,),
        "optim.micro_batch": (optim.micro_batch,) if images_a_pass(optim, ranks) == share else (share, 0),
    }
    for stage in recipe.stages:
        if stage.method.compares_samples and ranks > 1:
            key, name = f"stage.{stage.name}.supervision", supervision_name(stage.method)
            why = "run.cuda_graphs = true needs passes without collectives, this one compares samples of all ranks"
            return wrong_value(key, name, "another one, a single rank, or run.cuda_graphs = false", why)
    if run.checkpointing == "attention" and run.compile != "off":
        # PyTorch's compiler takes attention for an op that draws, and asks the generator's state to compute it again.
        why = "run.cuda_graphs = true needs it: what is computed again inside a compiled block reads a random state"
        attention = wrong_value("run.checkpointing", "attention", 'none or block, or run.compile = "off"', why)
    else:
        attention = None
    return _missing(recipe, needs, "run.cuda_graphs = true needs it") or attention


def _require(recipe: Recipe, needs: Mapping[str, tuple[object, ...]], why: str) -> None:
    """RecipeError for the first key whose value is not among those that are needed."""
    if (problem := _missing(recipe, needs, why)) is not None:
        raise problem


def _missing(recipe: Recipe, needs: Mapping[str, tuple[object, ...]], why: str) -> RecipeError | None:
    """What `_require` raises."""
    for key, values in needs.items():
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        if value not in values:
            return wrong_value(key, value, " or ".join(map(show, values)), why)
    return None


def check_device(run: Run, device: str) -> None:
    """RecipeError, saying what is available, if a schedule needs CUDA and the device ("cpu", "cuda") is another."""
    if device == "cuda":
        return
    if run.graphs:
        why = f"the run is on {device}, CUDA graphs need a CUDA device"
        raise wrong_value("run.cuda_graphs", True, '"auto" or false', why)
    inline = {"teacher_branches": ("batched", "sequential"), "teacher_placement": ("before",), "prefetch": (False,)}
    for key, values in inline.items() if run.streams == "required" else ():
        if (value := getattr(run, key)) not in values:
            why = f"the run is on {device}, CUDA streams need a CUDA device"
            others = f'{" or ".join(map(show, values))}, or run.streams = "auto" to have the same order without them'
            raise wrong_value(f"run.{key}", value, others, why)
