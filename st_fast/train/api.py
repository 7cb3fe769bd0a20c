"""st_fast from Python: train a recipe, one's own module or dataset among its parts, and use what was trained.

    run = Trainer(make_recipe(model={…}, stage=[{…}]), model=Mine, data=(latents, labels)).fit()
    latents, labels = run.sample(16)

`docs/python.md` explains it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from st_fast import kernels
from st_fast.core.errors import UserError
from st_fast.core.machine import rank_count
from st_fast.core.records import log_records
from st_fast.data.given import given_records
from st_fast.model import own, own_facts, stored
from st_fast.model.own import OwnNetwork
from st_fast.recipe import Recipe, load, load_run
from st_fast.recipe.check import check
from st_fast.recipe.document import as_document, section_with
from st_fast.recipe.error import show, wrong_value
from st_fast.recipe.keys import build, keys
from st_fast.recipe.load import check_keys, parse, resolve, to_literal
from st_fast.recipe.schema import SECTIONS, Sample, Stage
from st_fast.sample.contrast import correction
from st_fast.sample.draw import draw_of, read_labels
from st_fast.sample.guided import sample
from st_fast.train.callbacks import Callback, Callbacks
from st_fast.train.run import Parts, run
from st_fast.train.supervision import given

Factory = Callable[[], nn.Module]


def make_recipe(path: str | Path = "", /, **tables: Any) -> Recipe:
    """A recipe from a TOML file, from tables, or from a file with tables that override it.

    Tables are dicts by the names of docs/recipe.md, and `stage` a list of them:
    `make_recipe(model={"channels": 1}, run={"out": "runs/mine"}, stage=[{"name": "plain", …}])`. Over a file's stages
    `stage` is a dict of such dicts by the stages' names. RecipeError, in one line, for whatever does not fit.
    """
    if path:
        stages = tables.pop("stage", {})
        flags = [f"--{table}.{key}={_text(value)}" for table, given in tables.items() for key, value in given.items()]
        flags += [f"--stage.{name}.{key}={_text(v)}" for name, given in stages.items() for key, v in given.items()]
        return load(path, flags, rank_count())
    recipe = resolve(parse(as_document(_as_toml(tables))), Path("recipe.toml"))
    check(recipe if recipe.data.path else _given(recipe), rank_count())
    return recipe


def _as_toml(value: Any) -> Any:
    """The value as TOML has it: tuples are lists, and paths are text."""
    if isinstance(value, dict):
        return {key: _as_toml(inside) for key, inside in value.items()}
    if isinstance(value, tuple | list):
        return [_as_toml(inside) for inside in value]
    return str(value) if isinstance(value, Path) else value


def _text(value: Any) -> str:
    """The value of an override."""
    value = _as_toml(value)
    return value if isinstance(value, str) else to_literal(tuple(value) if isinstance(value, list) else value)


def _given(recipe: Recipe) -> Recipe:
    return replace(recipe, data=replace(recipe.data, source="given"))


class Trainer:
    """Trains every stage of a recipe: `Trainer(recipe, …).fit()`. Again, it continues where it stopped, bit for bit.

    recipe: a `Recipe`, or the path of one. Its `run.out` is the folder of the run.
    model: a class or function that makes a module, called under the run's seed, or a module; each stage starts from
        it. Without it, st_fast's own network by the recipe's [model]. It is called as `module(x, t, condition)` and
        returns the velocity ε − x: x (B, C, H, W) noisy latents, t (B,) in [0, 1] with 1 for noise, condition
        (B,) labels, `num_classes` for none. `tap(module, "blocks")` names its blocks for the methods that read them.
    data: (latents (N, C, H, W), labels (N,)), as the model sees them (about mean 0 and std 1), or a map-style Dataset
        of (latent, label), read by `workers` processes. Without it, the recipe's [data].
    supervision: a class or function that makes a module, or a module, for stages with `supervision = "given"`:
        called as `(hidden (B, N, D), x_t, t, y)`, it returns the mean of its loss. Its parameters are trained.
    callbacks: called with an `Event` after each step and for each record of the log, on the first rank.
    decode: latents (B, C, H, W) → uint8 images (B, 1 or 3, H, W), for pictures of given data, which have no VAE.

    Under torchrun each rank runs the same program. UserError, in one line, for whatever does not fit.
    """

    def __init__(
        self, recipe: Recipe | str | Path, model: nn.Module | Factory | None = None, data: Any = None,
        supervision: nn.Module | Factory | None = None, callbacks: Sequence[Callback] = (),
        decode: Callable[[Tensor], Tensor] | None = None, workers: int = 0,
    ) -> None:  # fmt: skip
        self.recipe = _checked(recipe)
        self._model, self._decode, self._callbacks = model, decode, callbacks
        if model is not None:
            self.recipe = replace(self.recipe, model=replace(self.recipe.model, network="own"))
        elif self.recipe.model.network == "own":
            raise UserError('model.network = "own": the module is given as Trainer(recipe, model=...)')
        self._records = None
        if data is not None:
            self._records = given_records(data, self.recipe.model.num_classes, workers)
            self.recipe = _with_given_data(self.recipe, decode is not None)
        self._supervision = None if supervision is None else _factory(supervision)

    def fit(self, accept_changes: bool = False) -> "TrainedRun":
        """Trains what is left of the recipe, and returns the run.

        accept_changes: also continues a run that was begun with other mathematics. Interrupted after a signal, when all
        is saved; RunFailed where training can't go on, or a callback has raised; UserError for bad input.
        """
        recipe, token = self.recipe, given.MODULE.set(self._supervision)
        try:
            with _standing(recipe, self._model):
                recipe = _described(recipe)
                if self._supervision is not None or recipe.model.network == "own":
                    recipe = _without_graphs(recipe)
                check(recipe, rank_count())
                parts = Parts(self._records, Callbacks(self._callbacks), self._decode)
                run(recipe, accept_changes, parts=parts)
        finally:
            given.MODULE.reset(token)
        return TrainedRun(Path(recipe.run.out), self._model, self._decode)


class TrainedRun:
    """A run's folder and what can be done with it: its models, samples, log and report."""

    def __init__(
        self, folder: str | Path, model: nn.Module | Factory | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """As `open_run`."""
        self.folder = Path(folder).absolute()
        if not (self.folder / "recipe.toml").is_file():
            raise UserError(f"{self.folder}: no run: there is no recipe.toml in it")
        self.recipe, self._model, self._decode = load_run(self.folder), model, decode

    @property
    def report(self) -> Path:
        """The HTML page about the run."""
        return self.folder / "report.html"

    def log(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The records of log.jsonl, all or those of a kind: train, save, sample, eval, end, …"""
        return [record for record in log_records(self.folder / "log.jsonl") if kind in (None, record["kind"])]

    def model(self, stage: str | None = None, weights: str = "ema", device: str | torch.device = "cpu") -> nn.Module:
        """The trained module, frozen and in eval mode: of the last stage that has begun, or of `stage`.

        weights: "ema", "raw", or "ema-DECAY" of a further average. One's own module is of the class that was given.
        """
        network = self._network(stage, weights, device)[0]
        return network.plain if isinstance(network, OwnNetwork) else network

    def sample(
        self, count: int, labels: str | Sequence[int] = "balanced", stage: str | None = None, weights: str = "ema",
        seed: int | None = None, device: str | torch.device = "cpu", **settings: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Latents (count, C, H, W) float32 and their labels (count,), the same for the same seed and weights.

        labels: "balanced", "random", or classes, taken in turn. settings: keys of [sample] for this time, such as
        `steps=50, cfg_scale=2.0`. UserError for a network that draws from text, which `st-fast sample` does.
        """
        network, chosen, found = self._network(stage, weights, device)
        recipe, model = self.recipe.for_stage(chosen), network.config
        if not model.by_class:
            raise UserError("sample: a network that draws from text; st-fast sample RUN --prompts ... draws from it")
        check_keys(settings, keys(Sample), "sample", section_with)
        checked = build(Sample, _as_toml(settings), "sample")
        wanted = replace(recipe.sample, **{key: getattr(checked, key) for key in settings})
        for key, usual, there in (
            ("internal_guidance", 1.0, model.internal_head > 0), ("guidance", "cfg", model.fusion_last > 0),
            ("cfg_scale", 1.0, model.class_dropout > 0),
        ):  # fmt: skip
            if (value := getattr(wanted, key)) != usual and not there:
                why = "the network has nothing that it could guide by"
                raise wrong_value(f"sample.{key}", value, show(usual), why)
        text = labels if isinstance(labels, str) else ",".join(map(str, labels))
        cycle = read_labels(text, model.num_classes)
        bias = correction(
            chosen.contrastive, wanted, recipe.flow.path, found.mean_latents, model.latent_shape, chosen.name
        )
        drawn = []
        for first in range(0, count, wanted.batch_size):
            size = min(wanted.batch_size, count - first)
            draw = draw_of(cycle, recipe.run.seed if seed is None else seed, first, size, network.device)
            drawn.append((sample(network, draw, wanted, recipe.flow.path, bias).cpu(), draw.labels.cpu()))
        if not drawn:
            raise UserError(f"sample: count = {count}: at least 1")
        latents, asked = zip(*drawn, strict=True)
        return torch.cat(latents), torch.cat(asked)

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images (B, 1 or 3, H, W) of latents, by the `decode` that was given, or the VAE of the data."""
        if self._decode is not None:
            return self._decode(latents)
        if self.recipe.data.source == "given":
            raise UserError(f"{self.folder}: its data were given; open_run(folder, decode=...) says what decodes them")
        from st_fast.data.manifest import read_manifest
        from st_fast.sample.model import decoder

        folder = Path(self.recipe.data.path)
        return decoder(folder, read_manifest(folder), latents.device, self.recipe.sample.vae)(latents)

    def _network(
        self, stage: str | None, weights: str, device: str | torch.device
    ) -> tuple[Any, Stage, stored.Weights]:
        name = stored.newest_stage(self.folder, self.recipe, stage)
        chosen, place = self.recipe.stage(name), torch.device(device)
        config, table = self.recipe.for_stage(chosen).model, kernels.select({}, place)
        found = stored.read_weights(self.folder / name / "checkpoints", config, weights)
        with _standing(self.recipe, self._model):
            own.keep_start(config, self.folder)
            network = stored.frozen(found, config, table, place, torch.float32)
        return network, chosen, found


def open_run(
    folder: str | Path, model: nn.Module | Factory | None = None, decode: Callable[[Tensor], Tensor] | None = None
) -> TrainedRun:
    """A run that was trained before, from its folder; `model` and `decode` as `Trainer` was given them."""
    return TrainedRun(folder, model, decode)


def _checked(recipe: Recipe | str | Path) -> Recipe:
    """A recipe of this version, whole: one that was kept by another version may lack keys, or have others."""
    if isinstance(recipe, str | Path):
        return make_recipe(recipe)
    if type(recipe) is not Recipe:
        raise UserError(
            f"recipe = {type(recipe).__name__}: a Recipe of this version of st_fast, or the path of one, is needed; "
            "make_recipe makes it of dicts"
        )
    for name, kind in SECTIONS.items():
        known, there = (
            set(keys(kind)),
            set(vars(getattr(recipe, name, None) or object)) if hasattr(recipe, name) else set(),
        )
        if differing := sorted(known ^ there):
            raise UserError(
                f"recipe: [{name}] differs in {', '.join(differing[:5])} from this version of st_fast: another version "
                "made it; make_recipe reads its file again"
            )
    return recipe


def _factory(made_of: nn.Module | Factory) -> Factory:
    """What makes a module each time: of a module, a copy."""
    return partial(copy.deepcopy, made_of) if isinstance(made_of, nn.Module) else made_of


@contextmanager
def _standing(recipe: Recipe, model: nn.Module | Factory | None) -> Iterator[None]:
    """For as long as the context lasts, the module stands for the recipe's `model.network = "own"`."""
    cuda = recipe.run.device == "cuda" or (recipe.run.device == "auto" and torch.cuda.is_available())
    bf16, drawn = recipe.run.bf16("cuda" if cuda else "cpu"), isinstance(model, nn.Module)
    given_module = None if model is None else own.Given(_factory(model), bf16, drawn, recipe.run.seed)
    token = own.GIVEN.set(given_module)
    try:
        yield
    finally:
        own.GIVEN.reset(token)


def _described(recipe: Recipe) -> Recipe:
    """The recipe with what its own module, if it has one, is found to be."""
    if recipe.model.network != "own":
        return recipe
    read = [stage.method.tap for stage in recipe.stages] + [stage.method.frozen_depth for stage in recipe.stages]
    blocks = {block for one in read for block in (one if isinstance(one, tuple) else (one,)) if block > 0}
    return replace(recipe, model=own_facts.described(recipe.model, sorted(blocks)))


def _without_graphs(recipe: Recipe) -> Recipe:
    """The recipe without a trial of CUDA graphs, which somebody's module may not be fit for."""
    graphs = False if recipe.run.cuda_graphs == "auto" else recipe.run.cuda_graphs
    return replace(recipe, run=replace(recipe.run, cuda_graphs=graphs))


def _with_given_data(recipe: Recipe, decodes: bool) -> Recipe:
    """The recipe for data that were given: pictures only where something decodes them."""
    if recipe.evaluate.classifier:
        raise UserError("evaluate.classifier: it is trained on a data folder's images, which given data do not have")
    drawn = recipe.sample if decodes or recipe.sample.vae else replace(recipe.sample, num=0)
    return replace(_given(recipe), sample=drawn)
