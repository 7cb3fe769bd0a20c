"""What must hold between a recipe's values, and what a resumed run may not change. Imports no torch."""

from dataclasses import replace
from typing import Any, get_args

from st_fast.core.options import did_you_mean
from st_fast.recipe.architecture import check_shapes
from st_fast.recipe.batch import images_a_pass
from st_fast.recipe.check_run import check_fp8, check_schedule, check_sharding
from st_fast.recipe.error import RecipeError, show, wrong_value
from st_fast.recipe.keys import UpTo, keys
from st_fast.recipe.methods import supervision_name
from st_fast.recipe.own import check_own
from st_fast.recipe.schema import SECTIONS, Model, Optim, Recipe, Stage, Start
from st_fast.recipe.tokens import divided


def check(recipe: Recipe, ranks: int = 1) -> None:
    """Raises RecipeError for the first thing that doesn't fit; `ranks` is how many processes share a batch."""
    check_own(recipe)
    check_shapes(recipe.model)
    check_batch(recipe.optim, ranks)
    check_names(recipe.stages)
    for position, stage in enumerate(recipe.stages):
        recipe.optim.check(stage)
        check_numbers(stage, recipe.model.depth)
        stage.method.check(stage.name)
        check_models(stage, recipe.stages, position)
        check_contrast(stage, recipe.optim)
        check_groups(stage, recipe.model)
        check_pairs(stage, recipe.optim, ranks)
        stage.routing.check(stage.name, stage.method.network(recipe.model), stage.method)
        check_shapes(recipe.for_stage(stage).model)
    check_guidance(recipe)
    check_internal_head(recipe)
    check_path_drop(recipe)
    check_single_values(recipe)
    recipe.evaluate.check()
    recipe.validate.check()
    check_text(recipe)
    check_fp8(recipe, ranks)
    check_sharding(recipe, ranks)
    check_schedule(recipe, ranks)


def check_batch(optim: Optim, ranks: int) -> None:
    """The global batch must split evenly over ranks and accumulation steps, or passes of the micro-batch's size."""
    parts, share, images = ranks * optim.accumulation, optim.batch_size // ranks, optim.micro_batch
    if optim.batch_size % parts:
        sizes, splits = splits_near(optim.batch_size, parts)
        why = f"not divisible by ranks x accumulation = {ranks} x {optim.accumulation} = {parts}"
        allowed = f"a batch size of {_either(sizes)}, or ranks x accumulation of {_either(splits)}"
        raise wrong_value("optim.batch_size", optim.batch_size, allowed, why)
    if isinstance(images, int) and images and share % images:
        why = f"does not divide a rank's share of the batch, {optim.batch_size} / {ranks} = {share}"
        raise wrong_value("optim.micro_batch", images, f'{_either(splits_near(share, images)[1])}, or "auto"', why)


def splits_near(batch_size: int, parts: int) -> tuple[list[int], list[int]]:
    """Up to four batch sizes near `batch_size` that `parts` divides, and up to six numbers near `parts` that divide it.

    Divisors are looked for up to 65536, more than ranks × accumulation ever is, so that a huge batch costs no time.
    """
    multiple = batch_size // parts
    sizes = [parts * m for m in range(max(1, multiple - 1), multiple + 3)]
    divisors = (d for d in range(1, min(batch_size, 65_536) + 1) if batch_size % d == 0)
    return sizes, sorted(sorted(divisors, key=lambda d: abs(d - parts))[:6])


def check_names(stages: tuple[Stage, ...]) -> None:
    """At least one stage, and no two whose folders would be one on a file system that ignores case."""
    if not stages:
        raise RecipeError("the recipe has no stage", "one [[stage]] or more, with name, supervision and steps", "stage")
    seen: dict[str, str] = {}
    for stage in stages:
        other = seen.setdefault(stage.name.casefold(), stage.name)
        if other is not stage.name:
            raise wrong_value(f"stage.{stage.name}.name", stage.name, "a different name for each stage", "taken")


def check_numbers(stage: Stage, depth: int) -> None:
    """Settings that are block numbers lie in 1..depth, those that are steps of the stage in 0..steps.

    depth 0: of a module of one's own whose blocks are not known yet.
    """
    most = {"the model's depth": (depth, "the model's blocks"), "the stage's steps": (stage.steps, "the stage's steps")}
    for settings in (stage.method, stage.routing):
        for name, key in keys(type(settings)).items():
            value = getattr(settings, name)
            for limit in get_args(key.kind)[1:]:
                if isinstance(limit, UpTo) and most[limit.of][0] and not limit.low <= value <= most[limit.of][0]:
                    allowed = f"{limit.low} to {most[limit.of][0]}, {most[limit.of][1]}"
                    raise wrong_value(f"stage.{stage.name}.{name}", value, allowed)


def check_models(stage: Stage, stages: tuple[Stage, ...], position: int) -> None:
    """A teacher, or what a stage starts from, is an earlier stage by name, or a path: anything with a slash.

    A path is looked for only when it is needed. The other keys of the start belong to `init`.
    """
    start, earlier = stage.start, [s.name for s in stages[:position]]
    for key, value, itself, example in (
        ("teacher", stage.method.teacher_name, "a stage can't teach itself", "./teacher"),
        ("init", start.init or None, "a stage can't start from itself", "./model.pt"),
    ):
        if value is None or value in earlier or "/" in value:
            continue
        if value == "":
            why = f"supervision = {show(supervision_name(stage.method))} learns from a teacher"
        elif value == stage.name:
            why = itself
        elif value in [s.name for s in stages]:
            why = "that stage comes later"
        else:
            why = "no stage of that name" + did_you_mean(value, earlier)
        names = ", ".join(earlier) or "there is none"
        allowed = f"an earlier stage ({names}) or a path with a slash, such as {example}"
        raise wrong_value(f"stage.{stage.name}.{key}", value, allowed, why)
    if not start.init and start != Start():
        key = next(name for name in keys(Start) if getattr(start, name) != getattr(Start(), name))
        why, allowed = "without init nothing is read", "left out, or with init = a stage or a path"
        raise wrong_value(f"stage.{stage.name}.{key}", getattr(start, key), allowed, why)


def check_contrast(stage: Stage, optim: Optim) -> None:
    """A contrast takes another sample of the batch, and its other key means something only with it."""
    contrast, name = stage.contrastive, f"stage.{stage.name}.contrast"
    if contrast.contrast and optim.batch_size == 1:
        raise wrong_value(name, contrast.contrast, "0", "optim.batch_size = 1 has no other sample to push away from")
    if not contrast.contrast and not contrast.contrast_null:
        why = "without contrast nothing is read"
        raise wrong_value(f"{name}_null", False, "left out, or with contrast above 0", why)


def check_groups(stage: Stage, model: Model) -> None:
    """Groups of tokens with times of their own have a token each, in a network whose tokens are an image's alone."""
    groups, method = stage.method.token_groups, stage.method
    if groups is None:
        return
    if model.network != "sit":
        why = f'model.network = "{model.network}": the tokens of a text have no time'
        raise wrong_value(f"stage.{stage.name}.supervision", supervision_name(method), "a method with one time", why)
    if model.registers:
        why = f"stage.{stage.name} ({supervision_name(method)}) has groups of tokens, of which a register has none"
        raise wrong_value("model.registers", model.registers, "0", why)
    lengths = divided(model.tokens, groups.shares)
    if min(lengths) < 1:
        key = "mask_ratio" if hasattr(method, "mask_ratio") else "groups"
        value = getattr(method, key)
        why = f"of {model.tokens} tokens they would be {' and '.join(map(str, lengths))}"
        raise wrong_value(f"stage.{stage.name}.{key}", value, "shares that give each group a token", why)


def check_pairs(stage: Stage, optim: Optim, ranks: int) -> None:
    """A loss of all pairs of samples sees the whole batch at once: each rank's share is one pass."""
    if not stage.method.compares_samples:
        return
    who = f"stage.{stage.name} ({supervision_name(stage.method)}) compares all samples of a batch"
    if optim.batch_size == 1:
        raise wrong_value("optim.batch_size", 1, "2 or more", who)
    share = optim.batch_size // ranks
    if optim.accumulation > 1:
        raise wrong_value("optim.accumulation", optim.accumulation, "1: more ranks, or a smaller batch", who)
    if images_a_pass(optim, ranks) != share:
        raise wrong_value("optim.micro_batch", optim.micro_batch, f"0 or a rank's whole share, {share}", who)


def check_guidance(recipe: Recipe) -> None:
    """Guidance reads the null class, which only class dropout trains."""
    if recipe.model.class_dropout > 0:
        return
    wanted = [f"stage.{s.name} ({supervision_name(s.method)})" for s in recipe.stages if s.method.needs_null_class]
    if recipe.sample.cfg_scale != 1.0:
        wanted.append(f"sample.cfg_scale = {show(recipe.sample.cfg_scale)}")
    if wanted:
        why = f"no null class is trained, but guidance is wanted by {' and '.join(wanted)}"
        allowed = "class_dropout above 0 and below 1 (0.1 is usual), or cfg_scale = 1 there"
        raise wrong_value("model.class_dropout", recipe.model.class_dropout, allowed, why)


def check_path_drop(recipe: Recipe) -> None:
    """Guidance by path drop skips the blocks within a fusion, which every stage's network must have."""
    sample = recipe.sample
    if sample.guidance != "path_drop":
        return
    for stage in recipe.stages:
        if not recipe.for_stage(stage).model.fusion_last:
            why = f"stage.{stage.name} has no fusion around blocks that could be skipped"
            raise wrong_value("sample.guidance", sample.guidance, '"cfg", or route = "sprint" in every stage', why)
    if sample.internal_guidance != 1.0:
        why = f"sample.internal_guidance = {show(sample.internal_guidance)} guides both of cfg's branches"
        raise wrong_value("sample.guidance", sample.guidance, '"cfg"', why)


def check_internal_head(recipe: Recipe) -> None:
    """An internal head is a method's, which trains it, and is guided by only where every stage's network has it."""
    given = recipe.model.internal_head
    for stage in recipe.stages:
        trained = stage.method.network(replace(recipe.model, internal_head=0)).internal_head
        if given not in (0, trained):
            why = f"stage.{stage.name} ({supervision_name(stage.method)}) trains {trained or 'none'}"
            raise wrong_value("model.internal_head", given, '0: supervision = "internal_guidance" adds it', why)
        if recipe.sample.internal_guidance != 1.0 and not trained:
            why = f"stage.{stage.name} ({supervision_name(stage.method)}) has no internal head"
            allowed = '1, or supervision = "internal_guidance" in every stage'
            raise wrong_value("sample.internal_guidance", recipe.sample.internal_guidance, allowed, why)


def check_single_values(recipe: Recipe) -> None:
    """Shards lie in a folder, a loss at or below its usual value is no spike, and some stage has the profiled step.

    A prediction of x is known on the linear path.
    """
    if recipe.model.prediction == "x" and recipe.flow.path != "linear":
        why = f"flow.path = {show(recipe.flow.path)}; x gives the velocity on the linear path alone"
        raise wrong_value("model.prediction", "x", "velocity", why)
    recipe.flow.check()
    if recipe.data.source == "shards" and not recipe.data.path:
        raise wrong_value("data.path", "", "the folder of shards that `python -m st_fast.prepare` wrote")
    if 0 < recipe.run.spike_ratio <= 1:
        raise wrong_value("run.spike_ratio", recipe.run.spike_ratio, "0 (off) or a number above 1; 2 or 3 are usual")
    longest = max(stage.steps for stage in recipe.stages)
    if recipe.profile.start > longest:
        allowed = f"0 (none) or 1 to {longest}, the longest stage's steps"
        raise wrong_value("profile.start", recipe.profile.start, allowed)


def check_text(recipe: Recipe) -> None:
    """Texts are named only for a network that reads them, and captions to score only where these are what is scored."""
    evaluate = recipe.evaluate
    named = {
        "data.text": recipe.data.text, "sample.prompts": recipe.sample.prompts, "evaluate.captions": evaluate.captions
    }  # fmt: skip
    if recipe.model.by_class:
        for key, value in named.items():
            if value:
                why = f"model.network = {show(recipe.model.network)} reads classes"
                raise wrong_value(key, value, "left out", why)
    if evaluate.captions and evaluate.classifier:
        why = "evaluate.classifier scores captions of the data itself, and of its held_out"
        raise wrong_value("evaluate.captions", evaluate.captions, "left out", why)
    if evaluate.captions and not evaluate.inception:
        allowed = "left out, or evaluate.inception = the FID network's weights beside it"
        raise wrong_value("evaluate.captions", evaluate.captions, allowed, "nothing is scored")


def _either(numbers: list[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))


def changed_maths(old: Recipe, new: Recipe) -> list[str]:
    """One line for each difference that changes the mathematics or the stream of samples; empty: safe to resume.

    A stage may change its length, unless a schedule of learning rates spans it, and stages may be added at the end; no
    stage may be removed, renamed or moved.
    """
    lines = [line for name in SECTIONS for line in _differences(name, getattr(old, name), getattr(new, name))]
    for position, stage in enumerate(old.stages):
        lines += _stage_differences(stage, new.stages[position] if position < len(new.stages) else None, new.optim)
    return lines


def _stage_differences(old: Stage, new: Stage | None, optim: Optim) -> list[str]:
    if new is None:
        return [f"stage.{old.name}: removed"]
    if old.name != new.name:
        return [f"stage.{old.name}: its place is taken by stage.{new.name}"]
    if type(old.method) is not type(new.method):
        before, after = supervision_name(old.method), supervision_name(new.method)
        return [f"stage.{old.name}.supervision: {show(before)} → {show(after)}"]
    label = f"stage.{old.name}"
    lines = (
        []
        if optim.schedule == "constant" or old.steps == new.steps
        else [f"{label}.steps: {old.steps} → {new.steps}, which optim.schedule = {show(optim.schedule)} spans"]
    )
    parts = [(old.method, new.method), (old.start, new.start)]
    parts += [(old.contrastive, new.contrastive), (old.routing, new.routing)]
    return lines + [line for before, after in parts for line in _differences(label, before, after)]


def _differences(prefix: str, old: Any, new: Any) -> list[str]:
    fixed = [name for name, key in keys(type(old)).items() if not key.free]
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in fixed]
    return [f"{prefix}.{name}: {show(before)} → {show(after)}" for name, before, after in pairs if before != after]
