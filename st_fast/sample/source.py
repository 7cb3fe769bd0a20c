"""What samples are drawn from: a stage of a run, or a model by itself, in the same terms.

A model by itself is a file of another project, a Hugging Face or diffusers folder (or its name on the hub), or a stage
or checkpoint of ours whose run is gone. Its recipe is made of what its config or its checkpoint says and of defaults.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from st_fast.core.command import is_hub_name, need_model
from st_fast.core.errors import UserError
from st_fast.core.files import read_json, shown
from st_fast.core.latents import LatentSpace
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import read_any_manifest
from st_fast.data.text import read_text_manifest
from st_fast.model import stored
from st_fast.model.autoencoders import autoencoder
from st_fast.model.formats.loaded_state import NULL_CONTEXT
from st_fast.model.load import CONFIG, MODEL_OR_PIPELINE, UNKNOWN_TEXT, TextStates, fetch
from st_fast.model.own import not_here
from st_fast.model.stored import ModelSource, Weights, newest_stage
from st_fast.model.vae import PIXELS, load_vae, vae_hash
from st_fast.recipe import load_run
from st_fast.recipe.architecture import Model
from st_fast.recipe.keys import build
from st_fast.recipe.load import from_text
from st_fast.recipe.methods import METHODS
from st_fast.recipe.schema import Data, Flow, Recipe, Sample, Stage

SAMPLES = Path("samples")
"""Where samples of a model by itself go, in the folder that the command runs in."""
USUAL_CHANNELS, USUAL_VAE = 4, "sd-vae-ft-ema"
"""What decodes the latents of published models, which name no VAE: SD's, of so many channels."""
OF_FILES = {"layout": "--from", "heads": "--heads", "num_classes": "--num-classes",
            "internal_head": "--internal-head"}  # fmt: skip
"""Options about another project's file, by their names among the parsed ones."""
OF_MODELS = OF_FILES | {"data": "--data"}
"""The same about any model by itself."""
INDEX = "model_index.json"
INDEX_KEYS = {
    "sampler": "sampler", "num_inference_steps": "steps", "guidance_scale": "cfg_scale", "guidance_low": "cfg_range",
    "guidance_high": "cfg_range", "internal_guidance": "internal_guidance", "internal_low": "internal_range",
    "internal_high": "internal_range", "shift": "shift",
}  # fmt: skip
"""Keys of a pipeline's INDEX, and those of `Sample`."""


@dataclass(frozen=True)
class Source:
    """A model with its recipe, and where what is drawn from it goes."""

    path: Path
    """As it was named; of a run's stage or checkpoint the run."""
    recipe: Recipe
    stage: str
    """The stage's name; of a model by itself its file's or folder's."""
    weights: Callable[[], Weights]
    """Reads, or has read, the set of weights that was asked for."""
    folder: Path
    """Where pictures and sets go by default."""
    compiled: Path
    """Where compiled kernels are kept."""
    run: bool = True
    """Whether it belongs to a run."""
    prefix: str = ""
    """How the names of pictures and sets begin."""
    vae: str = ""
    """What decodes where neither data nor --vae says; "" where nothing is known."""
    latents: LatentSpace | None = None
    """What the latents of a model without data are of; None: of whatever decodes."""
    text: TextStates = UNKNOWN_TEXT
    """Whose states of captions a model by itself was trained on, where it is known."""
    remarks: tuple[str, ...] = ()
    """Lines to say before anything is drawn."""

    @property
    def data(self) -> Path | None:
        """The data folder; None for a model by itself without one."""
        return Path(self.recipe.data.path) if self.recipe.data.path else None

    @property
    def trained(self) -> Stage:
        """The stage that trained the weights; of a checkpoint that keeps no recipe the one that was made for it."""
        return next((one for one in self.recipe.stages if one.name == self.stage), self.recipe.stages[-1])

    @property
    def named(self) -> str:
        """In messages: the model, and of a run the folder of the stage."""
        return str(self.path / self.stage if self.run else self.path)

    def others_with(self, wanted: Callable[[Stage], bool]) -> str:
        """What a message ends with that this stage lacks something: the run's first stage that has it, if any."""
        found = [stage.name for stage in self.recipe.stages if wanted(stage)] if self.run else []
        return f"; try --stage {found[0]}" if found else ""

    def place(self, name: str) -> Path:
        """Where what has this name goes by default."""
        return self.folder / f"{self.prefix}{name}"

    def manifest(self, vae: str) -> Manifest:
        """What tells how latents are decoded: the data's manifest; without data one that says as much of `vae`."""
        if self.data is not None:
            return read_any_manifest(self.data)
        model, loaded = self.recipe.model, load_vae(vae)
        kind = autoencoder(loaded)
        if kind.channels != model.channels:
            raise UserError(f"--vae {vae}: {kind.channels} channels, {self.path} has {model.channels}")
        space = self.latents or LatentSpace(vae, vae_hash(loaded), kind.normalisation)
        how = space.normalisation
        return Manifest(
            0, model.latent_shape, "float16", how.scale, VaeInfo(space.vae, space.vae_hash), "none", model.num_classes,
            shift=how.shift, latents_mean=how.latents_mean, latents_std=how.latents_std, posterior="mean",
        )  # fmt: skip


def find_all(given: argparse.Namespace, named: Path) -> list[Source]:
    """Every trained stage of a run, as a source each; of what else there is the one."""
    inside = place_in_run(named)
    if inside is None:
        return [by_itself(named, given)]
    run, stage, checkpoint = inside
    if len(given.runs) == 1:
        refuse_told(given, run, OF_MODELS, "a model by itself")
    trained = [stage] if stage else stored.trained_stages(run, [one.name for one in load_run(run).stages])
    if not trained:
        raise UserError(f"{run}: no checkpoints of any stage yet")
    return [of_run(run, name, checkpoint, given.weights) for name in trained]


def find_source(given: argparse.Namespace, needs_model: bool = True) -> Source:
    """The source that the parsed options name: `run`, `stage`, `weights` and OF_MODELS.

    UserError where there is none, for options that it leaves without meaning, and, if `needs_model`, for a run without
    a trained stage.
    """
    need_model(given.run)
    if inside := place_in_run(given.run):
        run, stage, checkpoint = inside
        refuse_told(given, run, OF_MODELS, "a model by itself")
        if given.stage and stage and given.stage != stage:
            raise UserError(f"--stage {given.stage}: {given.run} is of {stage}")
        return of_run(run, stage or given.stage, checkpoint, given.weights, needs_model)
    if given.stage:
        raise UserError(f"--stage {given.stage}: {given.run} is no run")
    return by_itself(given.run, given)


def place_in_run(path: Path) -> tuple[Path, str | None, Path | None] | None:
    """Run, stage and checkpoint folder that a path stands for, as far as it says; None where it is none of a run's."""
    if path.is_file():
        return None
    path = path if path.name not in ("", "..") else path.absolute()
    for run in (path, *list(path.parents)[:3]):
        if (run / "recipe.toml").is_file():
            stage, *below = path.relative_to(run).parts or ("",)
            known = not stage or stage in [one.name for one in load_run(run).stages]
            if not known or len(below) > 2 or below[:1] not in ([], ["checkpoints"]):
                return None
            return run, stage or None, path if len(below) == 2 else None
    return None


def of_run(run: Path, stage: str | None, checkpoint: Path | None, weights: str, needs_model: bool = True) -> Source:
    """A stage of a run, the last one that was trained where none is named, and its newest checkpoint."""
    recipe = load_run(run)
    if recipe.model.network == "own":
        raise not_here(str(run))
    name = newest_stage(run, recipe, stage) if needs_model else stage or recipe.stages[-1].name
    groups = ["ema", "raw", *map(stored.average_group, recipe.optim.ema_decays)]
    if weights not in groups:
        raise UserError(f"--weights {weights}: {run} has {', '.join(groups)}")
    root, recipe = checkpoint or run / name / "checkpoints", recipe.for_stage(recipe.stage(name))
    read = functools.partial(stored.read_weights, root, recipe.model, weights)
    return Source(run, recipe, name, read, run / name / "samples", run / "compiled")


def refuse_told(given: argparse.Namespace, path: Path, options: Mapping[str, str], kind: str) -> None:
    """UserError for an option that `path`, which is none of that kind, leaves without meaning."""
    for name, option in options.items():
        if getattr(given, name) is not None:
            raise UserError(f"{option} {getattr(given, name)}: {path} tells it itself; this is for {kind}")


def by_itself(named: Path, given: argparse.Namespace) -> Source:
    """A model without a run; UserError where it can't be read, or the data are not of its kind."""
    if given.weights not in ("ema", "raw"):
        raise UserError(f"--weights {given.weights}: {named} has at most ema and raw")
    place = fetch(str(named), MODEL_OR_PIPELINE) if is_hub_name(named) else named
    origin = stored.read_model(
        place, print, None, given.layout, given.heads, given.num_classes, only=given.weights,
        internal_head=given.internal_head,
    )  # fmt: skip
    if origin.path.is_dir():
        refuse_told(given, named, OF_FILES, "files")
    if given.weights == "raw" and not origin.loaded.averaged:
        raise UserError(f"--weights raw: {named} holds one set of weights")
    name = named.stem if origin.path.is_file() else named.resolve().name
    recipe = _recipe(origin, name, given.data)
    if recipe.data.path:
        recipe = _fitted(recipe, origin)
    # All else of the file need not stay in memory. The recipe's architecture may have the data's captions' length.
    chosen = replace(stored.weights_of(origin, given.weights), architecture=recipe.model.architecture())
    return Source(
        named, recipe, str(origin.meta.get("stage") or name), lambda: chosen, SAMPLES, SAMPLES / "compiled", False,
        f"{name}-", _own_vae(place, recipe), origin.loaded.latents, stored.text_states(origin), origin.loaded.remarks,
    )  # fmt: skip


def _own_vae(place: Path, recipe: Recipe) -> str:
    """What decodes where neither data nor --vae says: the VAE in a pipeline's folder, pixels without one, or SD's."""
    channels = recipe.model.channels
    if recipe.data.path:
        return ""
    if (place / "vae" / CONFIG).is_file():
        return str(place / "vae")
    if (place / INDEX).is_file() and (pixels := [name for name, count in PIXELS.items() if count == channels]):
        return pixels[0]
    return USUAL_VAE if channels == USUAL_CHANNELS else ""


def _recipe(origin: ModelSource, name: str, data: Path | None) -> Recipe:
    """The recipe that a checkpoint of ours holds, or one of the model's config and the defaults."""
    config, said, where = origin.loaded.config, origin.meta.get("recipe"), f"{origin.path}: its recipe"
    if isinstance(said, str) and said:
        recipe = _of_stage(from_text(said, where), origin)
        if differing := recipe.model.differences(config.architecture()):
            raise UserError(f"{where} is of another model: {', '.join(differing)}")
        kept = str(data or "") or (recipe.data.path if _still_there(recipe, origin) else "")
        return replace(recipe, data=replace(recipe.data, path=kept))
    stage = Stage(name, METHODS["none"](), 1)
    flow = build(Flow, {"path": origin.loaded.path}, where)
    return Recipe(config, (stage,), flow, Data(path=str(data or "")), sample=_sample(origin, config))


def _of_stage(recipe: Recipe, origin: ModelSource) -> Recipe:
    """The recipe with the network of the stage that a checkpoint is of, where it names one of the recipe's."""
    named = [stage for stage in recipe.stages if stage.name == origin.meta.get("stage")]
    return recipe.for_stage(named[0]) if named else recipe


def _still_there(recipe: Recipe, origin: ModelSource) -> bool:
    """Whether the data that a checkpoint was trained on are where its recipe says."""
    try:
        manifest = read_any_manifest(Path(recipe.data.path)) if recipe.data.path else None
    except UserError:
        return False
    return manifest is not None and origin.meta.get("dataset", manifest.digest) == manifest.digest


def _sample(origin: ModelSource, config: Model) -> Sample:
    """How samples are drawn by default: as a pipeline says, else the schema's way, unguided where none is possible."""
    index, encoder = origin.path / INDEX, origin.path / "text_encoder"
    usual = Sample() if config.class_dropout > 0 else replace(Sample(), cfg_scale=1.0)
    if not index.is_file():
        return usual
    content, found = read_json(index), dict[str, Any]()
    for key, name in INDEX_KEYS.items():
        if key in content:
            found[name] = [*found.get(name, []), content[key]] if name.endswith("_range") else content[key]
    said = build(Sample, found, f"{index}: sample")
    return replace(usual, **{name: getattr(said, name) for name in found},
                   text_encoder=str(encoder) if (encoder / CONFIG).is_file() else "")  # fmt: skip


def _fitted(recipe: Recipe, origin: ModelSource) -> Recipe:
    """The recipe with the data's captions' length where the model does not tell it; UserError for other latents."""
    folder, model = Path(recipe.data.path), recipe.model
    manifest = read_any_manifest(folder)
    theirs = (manifest.channels, *manifest.shape[1:])
    if theirs != model.latent_shape:
        raise UserError(f"--data {folder}: latents of {theirs}, {origin.path} draws {model.latent_shape}")
    if model.network == "sit":
        if manifest.num_classes > model.num_classes:
            raise UserError(f"--data {folder}: {manifest.num_classes} classes, {origin.path} has {model.num_classes}")
        return recipe
    text = read_text_manifest(folder, recipe.data.text)
    if text.width != model.text_width:
        raise UserError(f"--data {folder}: states of {text.width} channels, {origin.path} has {model.text_width}")
    if NULL_CONTEXT not in origin.loaded.model:  # nothing in a published file tells how long its captions were
        return replace(recipe, model=replace(model, text_length=text.length))
    if text.length != model.text_length:
        raise UserError(
            f"--data {folder}: captions of {shown(text.length)} tokens, {origin.path} of {model.text_length}"
        )
    return recipe
