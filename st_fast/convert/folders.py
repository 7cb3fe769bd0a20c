"""A model written as a stage of ours, as a Hugging Face folder, or as a diffusers pipeline."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from st_fast import __version__
from st_fast.convert.card import card
from st_fast.convert.text import text_of
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.core.files import read_json, write_folder, write_json_atomic
from st_fast.core.writing import save_pretrained
from st_fast.data.repa import SD_SCALE
from st_fast.data.shards import read_any_manifest
from st_fast.model.formats.loaded_state import heads, trunk
from st_fast.model.load import DIFFUSERS_WEIGHTS, WEIGHTS, Published, write_pretrained
from st_fast.model.stored import ModelSource
from st_fast.model.vae import load_vae, refuse_normalised, tensors_hash, vae_scale
from st_fast.recipe import load_run
from st_fast.recipe.schema import Sample

DIFFUSERS_AT_LEAST = "0.35.0"
STANDALONE = {
    "pipeline.py": "convert/pipeline.py",
    "sit_streams.py": "core/random.py",
    "sit_draws.py": "kernels/noise/definition.py",
    "transformer/sit_transformer.py": "convert/sit_transformer.py",
}
"""The pipeline's files: sources of st_fast that import nothing of it but one another. diffusers fetches those beside
pipeline.py that this one imports itself."""


def latents_of(origin: ModelSource) -> tuple[float | None, str, str | None]:
    """How a model's latents are decoded: their scale, the VAE's name and where it lies, each where it is known.

    From the data that a run was trained on, if it is still there; else what is usual for the channels.
    """
    if origin.run is not None:
        data = Path(load_run(origin.run).data.path)
        try:
            manifest = read_any_manifest(data)
        except UserError:
            return None, "", None
        return manifest.scale, manifest.vae.name, manifest.vae.source(data) if manifest.vae.path else None
    usual = origin.loaded.config.channels == 4  # of SD's VAE, in other projects' checkpoints
    return (SD_SCALE, "sd-vae-ft-mse", None) if usual else (None, "", None)


def write_stage(origin: ModelSource, folder: Path) -> None:
    """A stage folder, for a teacher or a start: weights, heads and optimiser state; UserError if it is there."""
    loaded = origin.loaded
    groups: dict[str, dict[str, Tensor]] = {"model": trunk(loaded.model), "ema": trunk(loaded.ema)}
    if found := heads(loaded.model):
        groups["heads"] = found
    if loaded.exp_avg:
        optim = groups["optim"] = {}
        for part, of, updates in (("model", trunk, loaded.updates), ("heads", heads, loaded.head_updates)):
            for kind, table in (("exp_avg", loaded.exp_avg), ("exp_avg_sq", loaded.exp_avg_sq)):
                optim |= {f"{part}.{kind}.{key}": tensor for key, tensor in of(table).items()}
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
    folder: Path, origin: ModelSource, weights: str, scale: float | None, name: str = WEIGHTS, **also: Any
) -> None:
    """config.json and the trunk's averaged or raw weights."""
    loaded = origin.loaded
    tensors = trunk(loaded.ema if weights == "ema" else loaded.model)
    published = Published(loaded.config, cast(Any, loaded.path), scale, loaded.step, text_of(origin))
    write_pretrained(folder, tensors, published, name, also)


def write_huggingface(origin: ModelSource, weights: str, name: str, folder: Path) -> None:
    """config.json, model.safetensors and README.md; UserError if the folder is there."""
    scale, vae, _ = latents_of(origin)
    with write_folder(folder) as writing:
        _write_model(writing, origin, weights, scale)
        text = card(origin, weights, "huggingface", name, vae, text_of(origin))
        (writing / "README.md").write_text(text, encoding="utf-8")


def standalone() -> dict[str, str]:
    """The texts of `STANDALONE`, which find one another beside them and not in st_fast."""
    package = Path(__file__).parent.parent
    texts = {place: (package / source).read_text(encoding="utf-8") for place, source in STANDALONE.items()}
    for place, source in STANDALONE.items():
        module = f"st_fast.{source.removesuffix('.py').replace('/', '.')}"
        texts = {name: text.replace(f"from {module} ", f"from .{Path(place).stem} ") for name, text in texts.items()}
    return texts


def write_diffusers(origin: ModelSource, weights: str, name: str, vae: str | None, folder: Path) -> None:
    """A pipeline that runs without st_fast: model_index.json, pipeline.py, the transformer and, if given, the VAE.

    UserError if the folder is there, or the VAE can't be had or has other channels.
    """
    scale, vae_name, vae_folder = latents_of(origin)
    if vae:
        vae_name = Path(vae).name if Path(vae).is_dir() else vae
    source, channels = vae or vae_folder, origin.loaded.config.channels
    decoder = load_vae(source) if source else None
    if decoder is not None:
        if decoder.config.latent_channels != channels:
            raise UserError(f"--vae {source}: {decoder.config.latent_channels} channels, the model has {channels}")
        refuse_normalised(decoder, f"VAE {vae_name}")
        scale = scale or vae_scale(decoder)
    decodes = decoder is not None or channels in (1, 3)
    with write_folder(folder) as writing:
        write_json_atomic(writing / "model_index.json", index(origin, decoder is not None))
        (writing / "transformer").mkdir()
        for place, text in {
            "README.md": card(origin, weights, "diffusers", name, vae_name, text_of(origin), decodes, scale),
            **standalone(),
        }.items():
            (writing / place).write_text(text, encoding="utf-8")
        _write_model(
            writing / "transformer", origin, weights, scale, DIFFUSERS_WEIGHTS,
            _class_name="SiTTransformer", _diffusers_version=DIFFUSERS_AT_LEAST,
        )  # fmt: skip
        if decoder is not None:
            save_pretrained(decoder, writing / "vae")
            config = read_json(writing / "vae" / "config.json")
            config.pop("_name_or_path", None)  # where on this machine the VAE was read from
            write_json_atomic(writing / "vae" / "config.json", config)


def index(origin: ModelSource, with_vae: bool) -> dict[str, Any]:
    """model_index.json: the components, and how the run's recipe samples where the pipeline can."""
    guided = origin.loaded.config.class_dropout > 0
    sampling = load_run(origin.run).sample if origin.run else Sample(cfg_scale=1.8 if guided else 1.0)
    return {
        "_class_name": ["pipeline", "SiTPipeline"],
        "_diffusers_version": DIFFUSERS_AT_LEAST,
        "transformer": ["sit_transformer", "SiTTransformer"],
        "vae": ["diffusers", "AutoencoderKL"] if with_vae else [None, None],
        "sampler": sampling.sampler if sampling.sampler != "dopri5" else "heun",
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.cfg_scale,
        "guidance_low": sampling.cfg_range[0],
        "guidance_high": sampling.cfg_range[1],
    }
