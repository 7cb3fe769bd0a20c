"""A trained model ready to sample: the flags that choose its weights and settings, and the model with its decoder."""

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from st_fast.core.command import command_parser
from st_fast.core.errors import UserError
from st_fast.core.machine import naming_lack_of_memory
from st_fast.core.options import BATCH_MOST, COUNT_MOST, SEED_MOST, add_file_options, given, integer, number, path
from st_fast.core.ranks import Ranks, process_group
from st_fast.core.signals import stop_on_signals
from st_fast.data.images import Size, named_size, sides
from st_fast.data.manifest import Manifest
from st_fast.data.shards import open_data, read_any_manifest
from st_fast.data.text import open_text, read_captions, read_text_manifest
from st_fast.kernels.heap import keep_freed_memory
from st_fast.model import DiffusionTransformer, stored
from st_fast.model.attention import choose
from st_fast.model.autoencoders import autoencoder
from st_fast.model.compiling import CompiledBlocks, keep_compiled
from st_fast.model.formats.loaded_state import NULL_CONTEXT
from st_fast.model.load import UNKNOWN_TEXT, TextStates
from st_fast.model.smoke_test import validated_kernels
from st_fast.model.vae import NO_NORMALISATION, decode, has_hash, load_vae, vae_hash
from st_fast.recipe.keys import CFG_MOST
from st_fast.recipe.schema import STEPS_MOST, Recipe, Sample
from st_fast.sample.contrast import Correction, correction
from st_fast.sample.draw import NUMBER, Draw, Labels, draw_of, read_labels
from st_fast.sample.guided import Watch, sample, sample_from, unwatched
from st_fast.sample.internal import EarlyHead, early_head, fitted
from st_fast.sample.presets import PRESETS
from st_fast.sample.prompts import (
    Prompts,
    check_same_encoder,
    checked_prompts,
    encoded_prompts,
    read_prompts,
    states_manifest,
    stored_prompts,
)
from st_fast.sample.sizes import asked_shape
from st_fast.sample.source import USUAL_CHANNELS, USUAL_VAE, Source, find_source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATIENCE_S = 7 * 24 * 3_600.0
"""How long a rank waits for the others, whose batches may take longer (dopri5)."""
PICTURES = 10
"""Samples of a few prompts where their number is not given: about as many, the same of each."""

Decode = Callable[[Tensor], Tensor]
"""Scaled latents (B, C, S, S) → uint8 images (B, 1 or 3, H, W) on the CPU."""


@dataclass(frozen=True)
class TextRequest:
    """What a network that draws from text is asked for; nothing where it draws classes."""

    prompts: tuple[str, ...] = ()
    """Empty: captions of the data."""
    captions: int = 0
    """How many of them."""
    folder: Path | None = None
    """The data folder that these captions are of; None: the run's."""
    negative: str | None = None
    encoder: str = ""
    """Where the text encoder lies, if not where the run's recipe or the data's manifest says."""


@dataclass(frozen=True)
class SampleRequest:
    """Which model samples, and how."""

    source: Source
    weights: Literal["raw", "ema"]
    settings: Sample
    labels: Labels
    seed: int
    precision: str = "fp32"
    compile: str = "auto"
    text: TextRequest = TextRequest()
    size: Size | None = None
    """Of an image, in pixels; None: the recipe's own."""

    @property
    def recipe(self) -> Recipe:
        """The run's; or one made for a model by itself."""
        return self.source.recipe

    @property
    def drawn(self) -> str:
        """The main settings, as they stand in names."""
        steps = "" if self.settings.sampler == "dopri5" else f"{self.settings.steps}"
        size = "" if self.size is None else f"-{named_size(sides(self.size))}"
        internal = self.settings.internal_guidance
        kind = "pdg" if self.settings.guidance == "path_drop" else "cfg"
        guidance = f"{kind}{self.settings.cfg_scale:g}" + (f"-ig{internal:g}" if internal != 1.0 else "")
        return f"{self.settings.sampler}{steps}-{guidance}{size}"

    @property
    def set_folder(self) -> Path:
        """Where the first set that is sampled so is written by default."""
        return self.source.place(f"{self.settings.num}-{self.drawn}")


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
        device = self.model.pos_embed.device
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


def _check_path_drop(settings: Sample, source: Source) -> None:
    """UserError where there are no blocks that guidance could skip, or another guidance that they take part in."""
    if settings.guidance == "path_drop" and not source.recipe.model.fusion_last:
        raise UserError(f'--guidance path_drop: {source.path} has no fusion; route = "sprint" trains one')
    if settings.guidance == "path_drop" and settings.internal_guidance != 1.0:
        asked = f"--guidance path_drop with --internal-guidance {settings.internal_guidance:g}"
        raise UserError(f"{asked}: only cfg is possible, both of whose branches the latter guides")


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


def sampling_parser(command: str, text: str | None) -> argparse.ArgumentParser:
    """The flags of every command that samples; the commands add their own."""
    parser = command_parser(command, text)
    parser.add_argument(
        "run", type=path, metavar="MODEL",
        help="a run, stage or checkpoint folder, another project's file, or a Hugging Face or diffusers folder or name",
    )  # fmt: skip
    add_file_options(parser)
    parser.add_argument("--data", type=path, metavar="FOLDER", help="a data folder for a model that comes without one")
    parser.add_argument("--stage", help="the stage whose model samples (default: the last one that was trained)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument(
        "-n", "--num", type=integer(1, COUNT_MOST), help="how many samples (torchrun takes --num for a flag of its own)"
    )
    parser.add_argument("--labels", default="balanced", help="balanced (i mod classes), random, or such as 0,3,cat")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw from text; may be repeated")
    parser.add_argument("--prompts", type=path, metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument("--captions", type=path, metavar="DATA", help="draw the captions of another data folder")
    parser.add_argument("--negative", metavar="TEXT", help="what guidance leads away from (default: no text)")
    parser.add_argument(
        "--text-encoder",
        type=given,
        metavar="FOLDER",
        help="where the data's text encoder lies (default: sample.text_encoder of the run, else its name)",
    )
    parser.add_argument(
        "--seed", type=integer(0, SEED_MOST), help="of the noise and of random labels (default: the run's)"
    )
    parser.add_argument(
        "--batch-size", type=integer(1, BATCH_MOST), help="of each rank; a dopri5 batch shares its steps"
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="published settings; other flags override them")
    parser.add_argument("--sampler", choices=("euler", "heun", "dopri5", "sde"))
    parser.add_argument(
        "--steps", type=integer(1, STEPS_MOST), help="of all samplers but dopri5, which chooses its own"
    )
    parser.add_argument("--cfg-scale", type=number(0, CFG_MOST), help="guidance ω; 1 is none")
    parser.add_argument(
        "--cfg-range", type=number(0, 1), nargs=2, metavar=("LOW", "HIGH"), help="times t with guidance"
    )
    parser.add_argument(
        "--guidance", choices=("cfg", "path_drop"),
        help="away from the null label, or with it from the network without its inner blocks (SPRINT's)",
    )  # fmt: skip
    parser.add_argument(
        "--internal-guidance", type=number(0, CFG_MOST), metavar="W", help="Internal Guidance w; 1 is none"
    )
    parser.add_argument(
        "--internal-range", type=number(0, 1), nargs=2, metavar=("LOW", "HIGH"), help="times t with Internal Guidance"
    )
    parser.add_argument(
        "--contrast",
        choices=("unbiased", "released", "none"),
        help="when the bias of a stage with contrast is taken out: at all times, in --cfg-range, never",
    )
    parser.add_argument("--vae", type=given, metavar="FOLDER", help="what decodes (default: what the data names)")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="auto: on CUDA")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help="of the model; solvers use fp32")
    return parser


def _class_names(recipe: Recipe, labels: str) -> tuple[str, ...]:
    """The data's names of classes, where labels are given that numbers alone don't tell."""
    if labels in ("random", "balanced") or all(NUMBER.fullmatch(part.strip()) for part in labels.split(",")):
        return ()
    return read_any_manifest(Path(recipe.data.path)).class_names if recipe.data.path else ()


def sample_request(given: argparse.Namespace, section: str, needs_model: bool = True) -> SampleRequest:
    """The flags over the model's own recipe, whose `section` says `num` by default.

    UserError without a model, for values out of range, and, if `needs_model`, without a trained stage or a VAE.
    """
    source = find_source(given, needs_model)
    recipe = source.recipe
    text = _text_request(given, source)
    usual = getattr(recipe, section).num
    if (asked := len(text.prompts)) and (given.prompt or given.prompts):
        usual = asked * max(1, PICTURES // asked)
    chosen = {"num": usual} | (PRESETS[given.preset] if given.preset else {})
    named = "num", "batch_size", "sampler", "steps", "cfg_scale", "guidance", "internal_guidance", "contrast", "vae"
    for key in named:
        if (value := getattr(given, key)) is not None:
            chosen[key] = value
    for key in ("cfg_range", "internal_range"):
        if (ends := getattr(given, key)) is not None:
            chosen[key] = low, high = tuple(ends)
            if low > high:
                raise UserError(f"--{key.replace('_', '-')} {low} {high}: 0 ≤ LOW ≤ HIGH ≤ 1")
    settings, source = fitted(replace(recipe.sample, **chosen), source)
    _check_path_drop(settings, source)
    if settings.cfg_scale != 1.0 and recipe.model.class_dropout == 0:
        raise UserError(
            f"--cfg-scale {settings.cfg_scale}: the model has no null class (model.class_dropout = 0), which guidance "
            "reads; give --cfg-scale 1"
        )
    if given.contrast not in (None, "none") and source.trained.contrastive.contrast == 0:
        raise UserError(f"--contrast {given.contrast}: {source.path} was trained without contrast, there is no bias")
    if needs_model and source.data is None and not settings.vae:
        source, settings = _with_vae(source, settings)
    if recipe.model.network == "sit":
        labels = read_labels(given.labels, recipe.model.num_classes, _class_names(recipe, given.labels))
    else:
        images = len(text.prompts) or min(settings.num, len(read_captions(text.folder or Path(recipe.data.path))[0]))
        text = replace(text, captions=0 if text.prompts else images)
        labels = read_labels(given.labels, images)
    seed = recipe.run.seed if given.seed is None else given.seed
    return SampleRequest(source, given.weights, settings, labels, seed, given.precision, given.compile, text)


def _with_vae(source: Source, settings: Sample) -> tuple[Source, Sample]:
    """The VAE of a model that comes without data, and a line where none is beside it but one is usual."""
    if not source.vae:
        channels = source.recipe.model.channels
        raise UserError(f"{source.path}: nothing says what decodes its {channels} channels; --vae or --data is needed")
    if source.vae == USUAL_VAE:
        line = f"decoded by {USUAL_VAE}, as is usual for {USUAL_CHANNELS} channels; --vae takes another"
        source = replace(source, remarks=(*source.remarks, line))
    return source, replace(settings, vae=source.vae)


def _text_request(given: argparse.Namespace, source: Source) -> TextRequest:
    """The flags about text; UserError where the network draws classes, a file has no prompt, or none is to be had."""
    recipe = source.recipe
    names = ("prompt", "prompts", "captions", "negative", "text_encoder")
    used = [f"--{name.replace('_', '-')}" for name in names if getattr(given, name) is not None]
    if recipe.model.network == "sit":
        if used:
            raise UserError(f"{used[0]}: {given.run} draws classes (--labels), not text")
        return TextRequest()
    if given.captions and (given.prompt or given.prompts):
        raise UserError(f"--captions {given.captions}: with {used[0]} these are not drawn; leave one of them out")
    prompts = [*(given.prompt or ()), *(read_prompts(given.prompts) if given.prompts else ())]
    if prompts or given.prompt:
        prompts = checked_prompts(prompts, "--prompt")
    elif recipe.sample.prompts and given.captions is None:
        prompts = checked_prompts(recipe.sample.prompts, "sample.prompts")
    if not prompts and source.data is None:
        raise UserError(f"{given.run}: no prompt; --prompt or --prompts, or a data folder with captions (--data)")
    if given.text_encoder and not prompts and given.negative is None:
        raise UserError(
            f"--text-encoder {given.text_encoder}: captions of the data are drawn, whose states are stored; it is for "
            "--prompt, --prompts and --negative"
        )
    negative = None if given.negative is None else checked_prompts([given.negative], "--negative")[0]
    return TextRequest(tuple(prompts), 0, given.captions, negative, given.text_encoder or "")
