"""A model as a folder that other programs know: config.json and model.safetensors, read from a disk or from the hub."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from st_fast.core.checkpoint import match_strictly
from st_fast.core.checkpoint.groups import write_group
from st_fast.core.errors import UserError, how_to_install
from st_fast.core.files import read_header, read_json, shown, write_folder, write_json_atomic
from st_fast.core.latents import LatentSpace, Normalisation
from st_fast.core.records import record_from
from st_fast.kernels import select
from st_fast.model.vae import from_hub
from st_fast.recipe import RecipeError
from st_fast.recipe.architecture import LATER, check_shapes, resolve_model
from st_fast.recipe.keys import build
from st_fast.recipe.schema import Model

CONFIG, WEIGHTS, DIFFUSERS_WEIGHTS = "config.json", "model.safetensors", "diffusion_pytorch_model.safetensors"
MODEL_OR_PIPELINE = (
    CONFIG, WEIGHTS, "model_index.json", "text_encoder/*.json", f"text_encoder/{WEIGHTS}", "tokenizer/*.json",
    "tokenizer/*.txt", "tokenizer/*.model", *(f"{part}/{name}" for part in ("transformer", "vae")
                                           for name in (CONFIG, DIFFUSERS_WEIGHTS)),
)  # fmt: skip
"""The files that drawing needs of a Hugging Face model, or of a diffusers pipeline."""
FORMAT, VERSION = "st_fast.sit", 1
FLOWS = ("linear", "cosine")
EVERY_KEY = 10_000
"""How many keys of a kind a mismatch names."""


@dataclass(frozen=True)
class TextStates:
    """Whose states of captions a model was trained on, each where it is known."""

    encoder: str = ""
    hash: str = ""
    """SHA-256 of the encoder's weights."""
    mask: bool = False
    """Whether padding was masked, and its states are zeros."""

    def as_json(self) -> dict[str, Any]:
        """Keys of config.json."""
        return {"text_encoder": self.encoder, "text_encoder_sha256": self.hash, "text_mask": self.mask}


UNKNOWN_TEXT = TextStates()
"""Of a model that has no text, or whose encoder nothing names."""


@dataclass(frozen=True)
class Published:
    """What config.json says: the network, and what it takes to draw with it (t = 1 is noise, it gives the velocity)."""

    model: Model
    flow: Literal["linear", "cosine"] = "linear"
    latents: LatentSpace | None = None
    """What the model's latents are of; None where it is unknown."""
    step: int = 0
    """How many steps it was trained, where that is known."""
    text: TextStates = UNKNOWN_TEXT
    """Of a network that draws from text."""

    def as_json(self) -> dict[str, Any]:
        """The content of config.json; the network's keys are those of a recipe's [model]."""
        own = {"flow": self.flow} | latents_as_json(self.latents) | {"step": self.step}
        if self.model.network == "mmdit":
            own |= self.text.as_json()
        kind = {"model_type": self.model.network, "format": FORMAT, "version": VERSION}
        return kind | self.model.described() | own


def read_config(folder: Path) -> Published:
    """config.json of a folder, every key checked; UserError in one line."""
    path = Path(folder) / CONFIG
    content = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    if content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: no config of a model of ours: format = {FORMAT!r} is needed")
    if (version := content.pop("version", None)) != VERSION:
        raise UserError(f"{path}: version = {shown(version)}; {VERSION} is known here")
    kind, text = content.pop("model_type", None), _text_states(content, path)
    flow, latents, step = content.pop("flow", "linear"), _latents(content, path), content.pop("step", 0)
    if flow not in FLOWS:
        raise UserError(f"{path}: flow = {shown(flow)}: one of {', '.join(FLOWS)}")
    if type(step) is not int:
        raise UserError(f"{path}: step = {shown(step)}: a whole number is needed")
    known = {*Model().described(), *Model(network="mmdit").described(), *LATER}
    if strangers := sorted(set(content) - known):
        raise UserError(f"{path}: unknown {', '.join(map(shown, strangers))}")
    try:
        model = resolve_model(build(Model, content, CONFIG))
        check_shapes(model)
    except RecipeError as error:
        raise UserError(f"{path}: {error}") from None
    if kind not in (None, model.network):
        raise UserError(f"{path}: model_type = {shown(kind)}, but network = {model.network!r}")
    if latents and (problem := latents.normalisation.problem(model.channels)):
        raise UserError(f"{path}: {problem.replace('scale =', 'latent_scale =')}")
    return Published(model, cast(Any, flow), latents, step, text)


def latents_as_json(latents: LatentSpace | None) -> dict[str, Any]:
    """Keys of config.json; all but the first are there where they say anything."""
    if latents is None:
        return {"latent_scale": None}
    how = latents.normalisation
    more = {
        "latents_mean": list(how.latents_mean), "latents_std": list(how.latents_std),
        "vae": latents.vae, "vae_sha256": latents.vae_hash,
    }  # fmt: skip
    shift = {} if how.shift is None else {"latent_shift": how.shift}  # without it the VAE's own is meant
    return {"latent_scale": how.scale} | shift | {key: value for key, value in more.items() if value}


def _latents(content: dict[str, Any], path: Path) -> LatentSpace | None:
    """The keys about latents, taken from what config.json has."""
    names = ("latent_scale", "latent_shift", "latents_mean", "latents_std", "vae", "vae_sha256")
    scale, shift, mean, std, vae, digest = (content.pop(name, None) for name in names)
    if scale is None:
        return None
    told = {"scale": scale, "shift": shift, "latents_mean": mean or [], "latents_std": std or []}
    space = {"vae": vae or "", "vae_hash": digest or "", "normalisation": told}
    return record_from(LatentSpace, space, str(path))


def _text_states(content: dict[str, Any], path: Path) -> TextStates:
    """The keys about text, taken from what config.json has."""
    usual = UNKNOWN_TEXT.as_json()
    found = {key: content.pop(key, value) for key, value in usual.items()}
    if wrong := [key for key, value in found.items() if type(value) is not type(usual[key])]:
        raise UserError(f"{path}: {wrong[0]} = {shown(found[wrong[0]])}: {type(usual[wrong[0]]).__name__} is needed")
    return TextStates(*found.values())


def check_size(config: Model, file: Path) -> None:
    """UserError unless the weights in a file are about as many as a network has, before one of any size is built."""
    there = sum(math.prod(entry.shape) for entry in read_header(file).values())
    if config.parameters > 2 * there:
        raise UserError(f"{file}: holds {there} weights, {CONFIG} beside it describes {config.parameters}")


def write_pretrained(
    folder: Path, weights: Mapping[str, Tensor], config: Published, name: str = WEIGHTS,
    also: Mapping[str, Any] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Writes weights and config.json, with what others want to find there `also`, into a folder that is there."""
    write_group(folder / name, weights)
    write_json_atomic(folder / CONFIG, {**also, **config.as_json()})


def fetch(name: str, files: Sequence[str] = (CONFIG, WEIGHTS)) -> Path:
    """A local folder, or a hub model's files in the hub's cache; UserError where there is neither."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"model {name!r}: no folder, and huggingface_hub can't be imported ({error}): {how_to_install('hub')}"
        ) from None
    with from_hub(f"model {name!r}: neither a folder nor a name on the hub in reach", name):
        return Path(snapshot_download(name, allow_patterns=list(files)))


class Pretrained(nn.Module):
    """Reading and writing of such folders, for a network."""

    network: ClassVar[str]
    """Its name in a recipe and in config.json."""
    config: Model

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """The model of a local folder or hub name, in eval mode; never unpickles.

        UserError in one line where it can't be had, or any key is missing, unknown, or of another shape or dtype.
        """
        folder, place = fetch(str(name)), torch.device(device)
        config = read_config(folder).model
        if config.network != cls.network:
            raise UserError(f"{folder}: its network is {config.network!r}, {cls.__name__} reads {cls.network!r}")
        check_size(config, folder / WEIGHTS)  # and the header, before the library maps it
        model = cls(config, select({}, place))  # type: ignore[call-arg, arg-type]
        weights = load_file(folder / WEIGHTS)
        match_strictly(model.state_dict(), weights, str(folder / WEIGHTS), EVERY_KEY)
        model.load_state_dict(weights)
        return model.to(place, dtype).eval()

    def save_pretrained(
        self, folder: str | Path, flow: Literal["linear", "cosine"] = "linear", latent_scale: float | None = None
    ) -> None:
        """Writes the float32 weights and config.json to a new folder; UserError if it is there already."""
        weights = {key: tensor.detach().float() for key, tensor in self.state_dict().items()}
        with write_folder(Path(folder)) as writing:
            latents = None if latent_scale is None else LatentSpace("", "", Normalisation(latent_scale, 0.0))
            write_pretrained(writing, weights, Published(self.config, flow, latents))
