"""What a recipe may say in a speedrun, and the recipe that is trained.

Everything counts that training took: so nothing comes from outside, neither weights nor images, and what could make two
runs differ is settled. The rules are told in docs/speedrun.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.kernels import TABLE, declared
from st_fast.recipe import Recipe, load
from st_fast.recipe.document import apply_override, read_document
from st_fast.recipe.error import show
from st_fast.recipe.schema import Evaluate, Sample
from st_fast.recipe.times import with_shift
from st_fast.sample.draw import Draw
from st_fast.sample.guided import euler, euler_maruyama
from st_fast.study.speedrun.task import Task

OWN_DATA = ("path", "images", "images_subset", "source", "vae", "text")
"""Keys of [data] that say what is read."""
SAMPLE_SEED = 1_000_000
"""Added to a run's seed for the noise of its samples, which no training sees."""


def read(path: Path, task: Task, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` with `--section.key=value` applied, for the task's data.

    UserError for what is wrong with it, or names the first key that the task's rules don't allow, its value, and why.
    """
    document = read_document(path)
    for override in overrides:
        apply_override(document, override)
    for key, value in document.sections.get("data", {}).items():
        if key in OWN_DATA:
            why = "the task brings its training images; others, and its test images, are not to be read"
            raise UserError(f"{path}: data.{key} = {show(value)}: {why}")
    recipe = load(path, [*overrides, f"--data.path={task.name}"])
    for name, value, why in _broken(recipe, task):
        raise UserError(f"{path}: {name} = {show(value)}: {why}")
    return recipe


def _broken(recipe: Recipe, task: Task) -> Iterator[tuple[str, object, str]]:
    """Each key that a rule forbids, its value, and the rule."""
    wanted = recipe.evaluate
    for name in ("classifier", "inception", "reference", "captions"):
        if (value := getattr(wanted, name)) != getattr(Evaluate(), name):
            yield f"evaluate.{name}", value, "scoring in training reads the test images; the task scores at the end"
    if recipe.model.network != "sit":
        yield "model.name", recipe.model.name, "the task has classes; a network that draws from text has no captions"
    own = [stage.name for stage in recipe.stages]
    for stage in recipe.stages:
        method, init = stage.method, stage.start.init
        if init and init not in own:
            yield f"stage.{stage.name}.init", init, "weights from outside, whose training is not counted"
        if method.teacher_name is not None and method.teacher_name not in own:
            yield f"stage.{stage.name}.teacher", method.teacher_name, "a teacher from outside; train it in a stage"
        if method.stop_below != "off":
            yield f"stage.{stage.name}.stop_below", method.stop_below, "what it will cost is not known before"
        if method.encoder_names:
            names = ", ".join(method.encoder_names)
            yield f"stage.{stage.name}.encoders", names, "an image encoder's training is not counted"
    if recipe.sample.vae:
        yield "sample.vae", recipe.sample.vae, "the task's own VAE draws"
    if recipe.sample.sampler == "dopri5":
        yield "sample.sampler", "dopri5", "the passes that it takes are not known before"
    elif (count := evaluations(recipe.sample, recipe.model.latent_shape)) > task.evaluations:
        yield "sample.steps", recipe.sample.steps, f"{count} passes of the network a sample; {task.evaluations} at most"
    if recipe.optim.micro_batch == "auto":
        yield "optim.micro_batch", "auto", "the free memory would decide on the bits; give a number"
    if recipe.run.device not in ("auto", task.device):
        yield "run.device", recipe.run.device, f"the task is one of {task.device}"


def evaluations(settings: Sample, shape: tuple[int, int, int]) -> int:
    """Passes of the network for one sample with latents (C, H, W), counted; a step with guidance has two."""
    (low, high), guided, count = settings.cfg_range, settings.cfg_scale != 1.0, 0

    def velocity(x: Tensor, t: float) -> Tensor:
        nonlocal count
        count += 1 + (guided and low <= t <= high)
        return x

    x, shift = torch.zeros(1, 1, 1, 1), with_shift(settings, shape).shift
    if settings.sampler == "sde":
        euler_maruyama(
            velocity, x, settings.steps, "linear", Draw(torch.zeros(1, dtype=torch.int64), x, 0), shift=shift
        )
    else:
        euler(velocity, x, settings.steps, heun=settings.sampler == "heun", shift=shift)
    return count


def settled(recipe: Recipe, task: Task, seed: int, data: Path, out: Path) -> Recipe:
    """The recipe as it is trained: the task's data and device, one seed, a folder, and nothing that times decide."""
    pinned = {op: "fused" for op in TABLE if declared(op).instead is not None and getattr(recipe.kernels, op) == "auto"}
    return replace(
        recipe,
        data=replace(recipe.data, path=str(data), source="shards"),
        run=replace(recipe.run, seed=seed, out=str(out), device=task.device, trackers=()),
        sample=replace(recipe.sample, num=0, every=0),
        kernels=replace(recipe.kernels, **pinned),  # type: ignore[type-var]
    )
