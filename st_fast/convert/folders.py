"""A model written as a stage of ours, as a Hugging Face folder, or as a diffusers pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from st_fast import __version__
from st_fast.convert.card import card
from st_fast.convert.text import load_encoder, text_of, write_text_encoder
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.core.files import read_json, write_folder, write_json_atomic
from st_fast.core.latents import LatentSpace, Normalisation
from st_fast.core.writing import save_pretrained
from st_fast.data.layouts.records import SD_SCALE
from st_fast.data.manifest import Manifest
from st_fast.data.shards import read_any_manifest
from st_fast.model.autoencoders import VAE, Pixels, autoencoder
from st_fast.model.formats.loaded_state import heads, trunk
from st_fast.model.load import DIFFUSERS_WEIGHTS, WEIGHTS, Published, TextStates, write_pretrained
from st_fast.model.stored import ModelSource
from st_fast.model.vae import NO_NORMALISATION, has_hash, load_vae, tensors_hash, vae_hash
from st_fast.recipe import load_run
from st_fast.recipe.schema import Sample
from st_fast.recipe.times import with_shift

DIFFUSERS_AT_LEAST = "0.35.0"
DECODED = ("AutoencoderKL", "AutoencoderDC")
"""Of the classes of autoencoders, those whose `decode` takes the model's latents as they are once not normalised."""
SHARED = {
    "sit_streams.py": "core/random.py",
    "sit_draws.py": "kernels/noise/definition.py",
    "sit_drawing.py": "convert/drawing.py",
    "transformer/sit_transformer.py": "convert/sit_transformer.py",
}
STANDALONE = {
    "sit": {"pipeline.py": "convert/pipeline.py", **SHARED},
    "mmdit": {
        "pipeline.py": "convert/text_pipeline.py",
        "transformer/mmdit_transformer.py": "convert/mmdit_transformer.py",
        **SHARED,
    },
}
"""A pipeline's files by its network: sources of st_fast that import nothing of it but one another. diffusers fetches
those beside pipeline.py that this one imports itself."""
PREFIX = {"sit": "SiT", "mmdit": "MMDiT"}
"""How the names of their classes begin."""


def data_of(origin: ModelSource) -> tuple[Path, Manifest] | None:
    """The folder and manifest of the data that a run was trained on, if they are still there."""
    if origin.run is None:
        return None
    data = Path(load_run(origin.run).data.path)
    try:
        return data, read_any_manifest(data)
    except UserError:
        return None


def latents_of(origin: ModelSource) -> LatentSpace | None:
    """What a model's latents are of, where it is known.

    From the data that a run was trained on, if it is still there; else what its own files say, or what is usual for
    the channels.
    """
    if told := told_latents(origin):
        return told
    usual = origin.run is None and origin.loaded.config.channels == 4  # of SD's VAE, in other projects' checkpoints
    return LatentSpace("sd-vae-ft-mse", "", Normalisation(SD_SCALE, 0.0)) if usual else None


def told_latents(origin: ModelSource) -> LatentSpace | None:
    """What the run's data or the model's own files say of its latents; None where only a guess is left."""
    found = data_of(origin)
    return found[1].space if found else origin.loaded.latents


def assumed(origin: ModelSource, vae: str | None) -> str:
    """Whose latents a model is taken to be trained on where nothing says so; "" where `vae` does, or it is known."""
    usual = None if vae or told_latents(origin) else latents_of(origin)
    return f"{usual.vae}, as is usual for {origin.loaded.config.channels} channels" if usual else ""


def own_vae(origin: ModelSource) -> str | None:
    """The folder of the VAE that lies in a run's data, if one does.

    UserError for images that were encoded from 0 to 1, as EDM2's: the pipeline's code decodes to -1 to 1.
    """
    if (found := data_of(origin)) is None:
        return None
    data, made = found[0], found[1].vae
    if made.black != -1:
        raise UserError(f"{data}: of images from {made.black:g} to 1; the pipeline's code decodes -1 to 1 alone")
    return made.source(data) if made.path else None


def write_stage(origin: ModelSource, folder: Path) -> None:
    """A stage folder, for a teacher or a start: weights, heads and optimiser state; UserError if it is there."""
    loaded = origin.loaded
    groups: dict[str, dict[str, Tensor]] = {"model": trunk(loaded.model), "ema": trunk(loaded.ema)}
    if found := heads(loaded.model):
        groups["heads"] = found
    if loaded.exp_avg:
        optim = groups["optim"] = {}
        for part, of, updates in (("model", trunk, loaded.updates), ("heads", heads, loaded.head_updates)):
            for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                optim |= {f"{part}.{kind}.{key}": tensor for key, tensor in of(getattr(loaded, kind)).items()}
            optim[f"{part}.step"] = torch.tensor(float(updates))
    meta = {
        "stage": folder.name,
        "architecture": loaded.config.architecture(),
        "flow": loaded.path,
        "dataset": "none",
        "source": {"file": origin.path.name, "layout": loaded.layout, "sha256": tensors_hash(loaded.model)},
        "versions": {"st_fast": __version__, "torch": torch.__version__},
    }
    with write_folder(folder) as writing:
        checkpoint.save(writing / "checkpoints", loaded.step, groups, meta)


def _write_model(
    folder: Path, origin: ModelSource, weights: str, latents: LatentSpace | None, text: TextStates, name: str = WEIGHTS,
    **also: Any,
) -> None:  # fmt: skip
    """config.json and the trunk's averaged or raw weights."""
    loaded = origin.loaded
    tensors = trunk(loaded.ema if weights == "ema" else loaded.model)
    published = Published(loaded.config, cast(Any, loaded.path), latents, loaded.step, text)
    write_pretrained(folder, tensors, published, name, also)


def write_huggingface(origin: ModelSource, weights: str, name: str, vae: str | None, folder: Path) -> None:
    """config.json, model.safetensors and README.md.

    `vae` says whose the latents are, where the model does not. UserError if the folder is there, or if the VAE can't be
    had or does not fit.
    """
    latents = latents_of(origin)
    if vae:
        latents = _decoded_by(_fitting(vae, origin), vae, _name_of(vae), told_latents(origin), latents)
    with write_folder(folder) as writing:
        _write_model(writing, origin, weights, latents, text_of(origin))
        named = assumed(origin, vae) or (latents.vae if latents else "")
        text = card(origin, weights, "huggingface", name, named, text_of(origin))
        (writing / "README.md").write_text(text, encoding="utf-8")


def standalone(network: str) -> dict[str, str]:
    """The texts of `STANDALONE`, which find one another beside them and not in st_fast."""
    package, files = Path(__file__).parent.parent, STANDALONE[network]
    texts = {place: (package / source).read_text(encoding="utf-8") for place, source in files.items()}
    for place, source in files.items():
        module = f"st_fast.{source.removesuffix('.py').replace('/', '.')}"
        texts = {name: text.replace(f"from {module} ", f"from .{Path(place).stem} ") for name, text in texts.items()}
    return texts


def write_diffusers(
    origin: ModelSource, weights: str, name: str, vae: str | None, encoder: str | None, folder: Path
) -> None:
    """A pipeline that runs without st_fast: model_index.json, pipeline.py, the transformer and, if given, the others.

    UserError for a network with a fusion, if the folder is there, if the VAE can't be had, has other channels or
    another normalisation than the model's latents, or was given other images, or if the text encoder can't be had or
    isn't the one that the model was trained with.
    """
    if last := origin.loaded.config.fusion_last:
        raise UserError(f"model.fusion_last = {last}: the pipeline's code has no fusion; --to huggingface keeps it")
    latents, vae_folder = latents_of(origin), own_vae(origin)
    vae_name = _name_of(vae) if vae else latents.vae if latents else ""
    source, channels = vae or vae_folder, origin.loaded.config.channels
    decoder = _fitting(source, origin) if source else None
    if decoder is not None:
        if type(decoder).__name__ not in (*DECODED, Pixels.__name__):
            raise UserError(f"VAE {vae_name}: the pipeline's code decodes {', '.join(DECODED)} alone")
        if vae:
            latents = _decoded_by(decoder, vae, vae_name, told_latents(origin), latents)
        if isinstance(decoder, Pixels):
            decoder = None  # the pipeline shows pixels by itself
    scale = latents.normalisation.scale if latents else None
    gives_images, network = decoder is not None or channels in (1, 3), origin.loaded.config.network
    reader, text = load_encoder(origin, encoder) if encoder else (None, text_of(origin))
    named = assumed(origin, source) or vae_name
    readme = card(origin, weights, "diffusers", name, named, text, gives_images, scale, reader is not None)
    with write_folder(folder) as writing:
        components: dict[str, list[str | None]] = {
            "vae": ["diffusers", type(decoder).__name__] if decoder is not None else [None, None]
        }
        if network == "mmdit":
            components |= write_text_encoder(reader, writing)
        write_json_atomic(writing / "model_index.json", index(origin, components))
        (writing / "transformer").mkdir()
        for place, content in {
            "README.md": readme,
            **standalone(network),
        }.items():
            (writing / place).write_text(content, encoding="utf-8")
        _write_model(
            writing / "transformer", origin, weights, latents, text, DIFFUSERS_WEIGHTS,
            _class_name=f"{PREFIX[network]}Transformer", _diffusers_version=DIFFUSERS_AT_LEAST,
        )  # fmt: skip
        if decoder is not None:
            save_pretrained(decoder, writing / "vae")
            config = read_json(writing / "vae" / "config.json")
            config.pop("_name_or_path", None)  # where on this machine the VAE was read from
            write_json_atomic(writing / "vae" / "config.json", config)


def _name_of(vae: str) -> str:
    return Path(vae).name if Path(vae).is_dir() else vae


def _fitting(vae: str, origin: ModelSource) -> VAE:
    """A VAE whose latents have as many channels as the model; UserError otherwise."""
    found, channels = load_vae(vae), origin.loaded.config.channels
    if (kind := autoencoder(found)).channels != channels:
        raise UserError(f"--vae {vae}: {kind.channels} channels, the model has {channels}")
    return found


def decodes(folder: Path, origin: ModelSource) -> bool:
    """Whether the pipeline of `write_diffusers` gives images: by its VAE, or because it draws pixels."""
    return (folder / "vae").is_dir() or origin.loaded.config.channels in (1, 3)


def _decoded_by(decoder: VAE, vae: str, name: str, told: LatentSpace | None, usual: LatentSpace | None) -> LatentSpace:
    """The latents of a model with the VAE `vae`: those that the model tells of, else the VAE's own.

    A VAE that says no normalisation has the usual one. UserError where the model's are normalised in another way than
    the VAE's, whose images would be wrong.
    """
    own = autoencoder(decoder).normalisation
    if told is None:
        how = usual.normalisation if usual and own == NO_NORMALISATION else own
        return LatentSpace(name, vae_hash(decoder), how)
    known = own != NO_NORMALISATION and not has_hash(decoder, told.vae_hash)
    if known and (differing := own.differences(told.normalisation)):
        raise UserError(f"--vae {vae}: no decoder of the model's latents (in brackets): {', '.join(differing)}")
    return told


def index(origin: ModelSource, components: Mapping[str, list[str | None]]) -> dict[str, Any]:
    """model_index.json: the components, and how the run's recipe samples where the pipeline can."""
    network = origin.loaded.config.network
    guided = origin.loaded.config.class_dropout > 0
    sampling = load_run(origin.run).sample if origin.run else Sample(cfg_scale=1.8 if guided else 1.0)
    return {
        "_class_name": ["pipeline", f"{PREFIX[network]}Pipeline"],
        "_diffusers_version": DIFFUSERS_AT_LEAST,
        "transformer": [f"{network}_transformer", f"{PREFIX[network]}Transformer"],
        **components,
        "sampler": sampling.sampler if sampling.sampler != "dopri5" else "heun",
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.cfg_scale,
        "guidance_low": sampling.cfg_range[0],
        "guidance_high": sampling.cfg_range[1],
        **({} if sampling.shift == 1.0 else {"shift": with_shift(sampling, origin.loaded.config.latent_shape).shift}),
        **(_internal(sampling) if origin.loaded.config.internal_head else {}),
    }


def _internal(sampling: Sample) -> dict[str, float]:
    """Keys of model_index.json of a model with an internal head."""
    low, high = sampling.internal_range
    return {"internal_guidance": sampling.internal_guidance, "internal_low": low, "internal_high": high}
