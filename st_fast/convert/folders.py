"""A model written as a stage of ours, as a Hugging Face folder, or as a diffusers pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from st_fast import __version__
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.core.files import FolderWrite, durable_file, read_json, write_all, write_json_atomic
from st_fast.data.manifest import VaeInfo
from st_fast.data.shards import read_any_manifest
from st_fast.model.formats.loaded_state import LoadedState, heads, trunk
from st_fast.model.formats.model_source import ModelSource
from st_fast.model.load import DIFFUSERS_WEIGHTS, Published, write_pretrained
from st_fast.model.vae import load_vae, tensors_hash, vae_scale
from st_fast.recipe import load_run
from st_fast.recipe.schema import Sample

Weights = Literal["ema", "raw"]
SD_SCALE = 0.18215
"""Of the SD VAE's latents, which other projects' checkpoints of four channels were trained on."""
DIFFUSERS_AT_LEAST = "0.35.0"
OWN_STREAMS = "from st_fast.core.random import Purpose, normal"
"""The one line of the pipeline that names st_fast; the file goes along under another name."""


@dataclass(frozen=True)
class Latents:
    """What leads from a model's latents to images: the VAE, where there is one, and the scale between."""

    scale: float | None
    vae: VaeInfo
    folder: Path | None = None
    """Of the VAE's weights, where they lie on this disk."""


def weights_of(bundle: LoadedState, weights: Weights) -> dict[str, Tensor]:
    """The trunk's averaged or raw weights."""
    return trunk(bundle.ema if weights == "ema" else bundle.model)


def latents_of(origin: ModelSource) -> Latents:
    """From the data that a run was trained on, if it is still there; else what is usual for the channels."""
    if origin.run is not None:
        data = Path(load_run(origin.run).data.path)
        try:
            manifest = read_any_manifest(data)
        except UserError:
            return Latents(None, VaeInfo(""))
        local = data / manifest.vae.path if manifest.vae.path else None
        return Latents(manifest.scale, manifest.vae, local)
    usual = origin.loaded.config.channels == 4
    return Latents(SD_SCALE if usual else None, VaeInfo("sd-vae-ft-mse" if usual else ""))


def write_stage(origin: ModelSource, folder: Path) -> Path:
    """A stage folder that can be a teacher or a start: all weights, heads and optimiser state; returns the checkpoint.

    UserError if the folder is there.
    """
    bundle = origin.loaded
    groups: dict[str, dict[str, Tensor]] = {"model": trunk(bundle.model), "ema": trunk(bundle.ema)}
    if found := heads(bundle.model):
        groups["heads"] = found
    if bundle.exp_avg:
        groups["optim"] = _moments(bundle)
    meta = {
        "stage": folder.name,
        "architecture": bundle.config.architecture(),
        "flow": bundle.path,
        "dataset": "none",
        "source": {"file": origin.path.name, "layout": bundle.layout, "sha256": tensors_hash(bundle.model)},
        "versions": {"st_fast": __version__, "torch": torch.__version__},
    }
    with FolderWrite(folder) as writing:
        checkpoint.save(writing.path / "checkpoints", bundle.step, groups, meta)
    return folder / "checkpoints" / f"{bundle.step:08d}"


def _moments(bundle: LoadedState) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    parts = (("model", trunk, bundle.updates), ("heads", heads, bundle.head_updates))
    for part, of, updates in parts:
        for kind, table in (("exp_avg", bundle.exp_avg), ("exp_avg_sq", bundle.exp_avg_sq)):
            found |= {f"{part}.{kind}.{key}": tensor for key, tensor in of(table).items()}
        found[f"{part}.step"] = torch.tensor(float(updates))
    return found


def published(origin: ModelSource, latents: Latents) -> Published:
    """What config.json says."""
    bundle = origin.loaded
    return Published(bundle.config, cast(Any, bundle.path), latents.scale, bundle.step)


def write_huggingface(origin: ModelSource, weights: Weights, latents: Latents, card: str, folder: Path) -> None:
    """config.json, model.safetensors and README.md; UserError if the folder is there."""
    with FolderWrite(folder) as writing:
        write_pretrained(writing.path, weights_of(origin.loaded, weights), published(origin, latents))
        _write_text(writing.path / "README.md", card)


def write_diffusers(
    origin: ModelSource, weights: Weights, latents: Latents, card: str, vae: str | None, folder: Path
) -> None:  # fmt: skip
    """A pipeline that runs without st_fast: model_index.json, pipeline.py, the transformer and, if given, the VAE.

    UserError if the folder is there, or the VAE can't be had or has other channels.
    """
    source = vae or (str(latents.folder) if latents.folder else None)
    decoder = load_vae(source) if source else None
    scale = latents.scale
    if decoder is not None:
        if decoder.config.latent_channels != origin.loaded.config.channels:
            raise UserError(
                f"--vae {source}: {decoder.config.latent_channels} channels, the model has "
                f"{origin.loaded.config.channels}"
            )
        scale = scale or vae_scale(decoder)
    config = published(origin, replace(latents, scale=scale))
    with FolderWrite(folder) as writing:
        write_json_atomic(writing.path / "model_index.json", index(_sampling(origin), decoder is not None))
        for name, text in code().items():
            _write_text(writing.path / name, text)
        part = writing.path / "transformer"
        part.mkdir(exist_ok=True)
        write_pretrained(part, weights_of(origin.loaded, weights), config, DIFFUSERS_WEIGHTS, _CLASS)
        if decoder is not None:
            decoder.save_pretrained(writing.path / "vae", safe_serialization=True)
            _forget_place(writing.path / "vae" / "config.json")
        _write_text(writing.path / "README.md", card)


_CLASS = {"_class_name": "SiTTransformer", "_diffusers_version": DIFFUSERS_AT_LEAST}


def code() -> dict[str, str]:
    """The Python files of a diffusers folder, by their place in it."""
    here = Path(__file__).parent
    pipeline = (here / "pipeline.py").read_text(encoding="utf-8")
    if pipeline.count(OWN_STREAMS) != 1:
        raise ValueError(f"pipeline.py must have the line {OWN_STREAMS!r} once")
    return {
        "pipeline.py": pipeline.replace(OWN_STREAMS, OWN_STREAMS.replace("st_fast.core.random", ".sit_streams")),
        "sit_streams.py": (here.parent / "core" / "random.py").read_text(encoding="utf-8"),
        "transformer/sit_transformer.py": (here / "sit_transformer.py").read_text(encoding="utf-8"),
    }


def index(sampling: Sample, with_vae: bool) -> dict[str, Any]:
    """model_index.json: the components, and how the run's recipe samples where the pipeline can."""
    sampler = sampling.sampler if sampling.sampler != "dopri5" else "heun"
    return {
        "_class_name": ["pipeline", "SiTPipeline"],
        "_diffusers_version": DIFFUSERS_AT_LEAST,
        "transformer": ["sit_transformer", "SiTTransformer"],
        "vae": ["diffusers", "AutoencoderKL"] if with_vae else [None, None],
        "sampler": sampler,
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.cfg_scale,
        "guidance_low": sampling.cfg_range[0],
        "guidance_high": sampling.cfg_range[1],
    }


def _sampling(origin: ModelSource) -> Sample:
    null = origin.loaded.config.class_dropout > 0
    return load_run(origin.run).sample if origin.run else Sample(cfg_scale=1.8 if null else 1.0)


def _forget_place(config: Path) -> None:
    """diffusers writes down from where on this machine it read a model, which nobody else needs to know."""
    content = {key: value for key, value in read_json(config).items() if key != "_name_or_path"}
    write_json_atomic(config, content)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with durable_file(path) as file:
        write_all(file, text.encode())
