"""A trained model ready to sample, with its decoder."""

import functools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.machine import naming_lack_of_memory
from st_fast.core.ranks import Ranks, process_group
from st_fast.core.signals import stop_on_signals
from st_fast.data.manifest import Manifest
from st_fast.data.shards import open_data
from st_fast.data.text import open_text, read_text_manifest
from st_fast.kernels.heap import keep_freed_memory
from st_fast.model import DiffusionTransformer, stored
from st_fast.model.attention import choose
from st_fast.model.autoencoders import autoencoder
from st_fast.model.compiling import CompiledBlocks, keep_compiled
from st_fast.model.formats.loaded_state import NULL_CONTEXT
from st_fast.model.load import UNKNOWN_TEXT, TextStates
from st_fast.model.smoke_test import validated_kernels
from st_fast.model.vae import NO_NORMALISATION, decode, has_hash, load_vae, vae_hash
from st_fast.recipe.schema import Recipe
from st_fast.sample.contrast import Correction, correction
from st_fast.sample.draw import Draw, draw_of
from st_fast.sample.guided import Watch, sample, sample_from, unwatched
from st_fast.sample.internal import EarlyHead, early_head
from st_fast.sample.prompts import (
    Prompts,
    check_same_encoder,
    encoded_prompts,
    states_manifest,
    stored_prompts,
)
from st_fast.sample.request import DTYPES, SampleRequest, TextRequest
from st_fast.sample.sizes import asked_shape

PATIENCE_S = 7 * 24 * 3_600.0
"""How long a rank waits for the others, whose batches may take longer (dopri5)."""

Decode = Callable[[Tensor], Tensor]
"""Scaled latents (B, C, S, S) → uint8 images (B, 1 or 3, H, W) on the CPU."""


@dataclass(frozen=True)
class Sampler:
    """A frozen model with its decoder and the settings of its samples."""

    request: SampleRequest
    model: DiffusionTransformer
    step: int
    decode: Decode
    vae: str
    compiled: bool
    class_names: tuple[str, ...] = ()
    """As the data's manifest has them, or the prompts; empty where there are none."""
    prompts: Prompts | None = None
    """What labels number, of a network that draws from text."""
    shape: tuple[int, int, int] | None = None
    """(C, H, W) of a latent where it is not the model's own."""
    correction: Correction | None = None
    head: EarlyHead | None = None
    """What Internal Guidance leads away from, where that is not the model's own internal head."""

    def draw_of(self, first: int, count: int) -> Draw:
        """Samples number first … first + count − 1."""
        device = self.model.device
        draw = draw_of(self.request.labels, self.request.seed, first, count, device, self.prompts)
        return replace(draw, shape=self.shape)

    def latents(self, noise: Tensor, draw: Draw, watch: Watch = unwatched) -> Tensor:
        """(B, C, S, S) float32 scaled latents for noise (B, C, S, S)."""
        settings, path = self.request.settings, self.request.recipe.flow.path
        return sample_from(self.model, noise, draw, settings, path, watch, self.correction, self.head)

    def images(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples number first … first + count − 1 as uint8 images (count, 1 or 3, H, W), and labels, on the CPU."""
        with naming_lack_of_memory(f"drawing {count} samples at once (--batch-size takes fewer)"):
            draw = self.draw_of(first, count)
            settings, path = self.request.settings, self.request.recipe.flow.path
            latents = sample(self.model, draw, settings, path, self.correction, self.head)
            return self.decode(latents).cpu(), draw.labels.cpu()


def decoder(
    folder: Path, manifest: Manifest, device: torch.device, vae: str = "", say: Callable[[str], None] = print
) -> Decode:
    """The decoder of a data folder: `vae`, a folder or name, else its own VAE, else the one its manifest names.

    UserError where it can't be the decoder of these latents: its own with other weights than the manifest names, or
    `vae` with other channels, another factor or another normalisation. `say` is told of other weights of `vae`.
    """
    name = vae or manifest.vae.source(folder)
    loaded = load_vae(name, device)
    kind, made = autoencoder(loaded), manifest.vae
    where = f"sample.vae = {vae!r}" if vae else f"{folder}: its VAE {name!r}"
    differing = [] if manifest.channels == kind.channels else [f"channels {kind.channels} ({manifest.channels})"]
    differing += [] if made.factor in (0, kind.factor) else [f"factor {kind.factor} ({made.factor})"]
    if vae and not has_hash(loaded, made.hash) and kind.normalisation != NO_NORMALISATION:
        differing += kind.normalisation.differences(manifest.normalisation)
    if differing:
        raise UserError(f"{where}: no decoder of the latents in {folder} (in brackets): {', '.join(differing)}")
    if made.hash and not has_hash(loaded, made.hash):
        if not vae:
            found = vae_hash(loaded)
            raise UserError(f"{where}: its weights are {found[:12]}…, the latents were made with {made.hash[:12]}…")
        say(f"{where}: other weights than those of {made.name}, which encoded {folder}")
    return lambda latents: decode(loaded, latents, manifest.normalisation, made.black)


def load_sampler(request: SampleRequest, ranks: Ranks, say: Callable[[str], None]) -> Sampler:
    """The weights asked for on every rank, with kernels and attention that work here; UserError without any."""
    source, recipe, device, dtype = request.source, request.recipe, ranks.device, DTYPES[request.precision]
    for remark in source.remarks:
        say(f"{source.path}: {remark}")
    table = validated_kernels(vars(recipe.kernels), recipe.model, ranks, dtype, say)
    attend = choose(recipe.model.attention, device, dtype, recipe.model.width // recipe.model.heads, say)
    found = source.weights()
    own = request.settings.vae
    manifest = source.manifest(own)
    prompts = None if recipe.model.network == "sit" else load_prompts(request.text, recipe, device, say, source.text)
    null = prompts.null().cpu() if prompts and NULL_CONTEXT not in found.tensors else None
    model = stored.frozen(found, recipe.model, table, device, dtype, attend, null=null, latents=manifest.space)
    compiled = request.compile == "on" or (request.compile == "auto" and device.type == "cuda")
    if compiled:
        model.run_block = CompiledBlocks(say, dynamic=False)
    vae = own or f"{manifest.vae.name} {manifest.vae.hash[:16]}".strip()
    decode = decoder(source.data or source.path, manifest, device, own, say)
    if prompts and not stored.alike(prompts.null().cpu(), model.null_condition(1)[0].cpu()):
        raise UserError(
            f"{request.text.folder or source.data or request.text.encoder}: its states of the empty caption are not "
            f"those that {source.path} was trained on: they are another encoder's, or padding was masked otherwise"
        )
    names = manifest.class_names if prompts is None else prompts.texts
    shape = asked_shape(request.size, recipe.model, manifest, decode, device) if request.size else None
    corrected = correction(
        source.trained.contrastive, request.settings, recipe.flow.path, found.mean_latents,
        shape or recipe.model.latent_shape, str(found.path),
    )  # fmt: skip
    internal = request.settings.internal_guidance != 1.0
    head = early_head(source, found, table, device, dtype) if internal else None
    return Sampler(request, model, found.step, decode, vae, compiled, names, prompts, shape, corrected, head)


def load_prompts(
    text: TextRequest, recipe: Recipe, device: torch.device, say: Callable[[str], None],
    known: TextStates = UNKNOWN_TEXT,
) -> Prompts:  # fmt: skip
    """The prompts asked for, or captions; UserError where the encoder, or the captions' states, are missing.

    `known`: whose states a model without data was trained on.
    """
    encoder = text.encoder or recipe.sample.text_encoder
    if not recipe.data.path:
        return encoded_prompts(
            text.prompts, states_manifest(known, recipe.model, encoder), device, say, text.negative, encoder
        )
    data, other = Path(recipe.data.path), text.folder or Path(recipe.data.path)
    if not other.is_dir():
        raise UserError(f"{other}: no such folder, whose captions are to be drawn (--captions, evaluate.captions)")
    manifest = read_text_manifest(data, recipe.data.text)
    if text.prompts:
        return encoded_prompts(text.prompts, manifest, device, say, text.negative, encoder)
    with closing(open_data(other, verify=False)) as records:
        stored, negative = open_text(other, recipe.data.text, records), None
    check_same_encoder(stored, manifest, data)
    if text.negative is not None:
        alone = encoded_prompts((), manifest, device, say, text.negative, encoder)
        negative = alone.negative(1)
    return stored_prompts(other, stored, text.captions, device, negative)


@contextmanager
def sampling(request: SampleRequest) -> Iterator[tuple[Ranks, Sampler, Callable[[str], None]]]:
    """This process among its ranks, with the model loaded; the last of the three prints on the first rank only."""
    keep_compiled(request.source.compiled)
    keep_freed_memory()
    with stop_on_signals(), process_group("auto", PATIENCE_S) as ranks:
        say: Callable[[str], None] = functools.partial(print, flush=True) if ranks.first else (lambda text: None)
        yield ranks, load_sampler(request, ranks, say), say
