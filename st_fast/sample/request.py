"""Which model samples, and how: the flags of every command that samples, over the recipe that the model comes with."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from st_fast.core.command import command_parser
from st_fast.core.errors import UserError
from st_fast.core.options import BATCH_MOST, COUNT_MOST, SEED_MOST, add_file_options, given, integer, number, path
from st_fast.data.images import Size, named_size, sides
from st_fast.data.shards import read_any_manifest
from st_fast.data.text import read_captions
from st_fast.recipe.keys import CFG_MOST, SHIFT_LEAST, SHIFT_MOST
from st_fast.recipe.schema import STEPS_MOST, Recipe, Sample
from st_fast.sample.draw import NUMBER, Labels, read_labels
from st_fast.sample.internal import fitted
from st_fast.sample.presets import PRESETS
from st_fast.sample.prompts import (
    checked_prompts,
    read_prompts,
)
from st_fast.sample.source import USUAL_CHANNELS, USUAL_VAE, Source, find_source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PICTURES = 10
"""Samples of a few prompts where their number is not given: about as many, the same of each."""


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
    weights: str
    """"raw", "ema", or one of the run's further averages by its group."""
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
        shift = "" if self.settings.shift == 1.0 or not steps else f"-shift{self.settings.shift}"
        return f"{self.settings.sampler}{steps}{shift}-{guidance}{size}"

    @property
    def set_folder(self) -> Path:
        """Where the first set that is sampled so is written by default."""
        return self.source.place(f"{self.settings.num}-{self.drawn}")


def _check_path_drop(settings: Sample, source: Source) -> None:
    """UserError where there are no blocks that guidance could skip, or another guidance that they take part in."""
    if settings.guidance == "path_drop" and not source.recipe.model.fusion_last:
        hint = source.others_with(lambda stage: stage.routing.route == "sprint")
        raise UserError(f'--guidance path_drop: {source.named} has no fusion; route = "sprint" trains one{hint}')
    if settings.guidance == "path_drop" and settings.internal_guidance != 1.0:
        asked = f"--guidance path_drop with --internal-guidance {settings.internal_guidance:g}"
        raise UserError(f"{asked}: only cfg is possible, both of whose branches the latter guides")


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
    parser.add_argument(
        "--weights", default="ema", help="ema (default), raw, or one of a run's optim.ema_decays, such as ema-0.999"
    )
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
    parser.add_argument("--shift", type=_shift, help="of the solver's times towards noise; 1 is none, auto by the size")
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


def _shift(text: str) -> float | str:
    return text if text == "auto" else number(SHIFT_LEAST, SHIFT_MOST)(text)


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
    named = "num", "batch_size", "sampler", "steps", "shift", "cfg_scale", "guidance", "internal_guidance", "contrast"
    for key in (*named, "vae"):
        if (value := getattr(given, key)) is not None:
            chosen[key] = value
    for key in ("cfg_range", "internal_range"):
        if (ends := getattr(given, key)) is not None:
            chosen[key] = low, high = tuple(ends)
            if low >= high:
                raise UserError(f"--{key.replace('_', '-')} {low} {high}: 0 ≤ LOW < HIGH ≤ 1")
    settings, source = fitted(replace(recipe.sample, **chosen), source)
    _check_path_drop(settings, source)
    if settings.cfg_scale != 1.0 and recipe.model.class_dropout == 0:
        raise UserError(
            f"--cfg-scale {settings.cfg_scale}: the model has no null class (model.class_dropout = 0), which guidance "
            "reads; give --cfg-scale 1"
        )
    if given.contrast not in (None, "none") and source.trained.contrastive.contrast == 0:
        hint = source.others_with(lambda stage: stage.contrastive.contrast > 0)
        raise UserError(
            f"--contrast {given.contrast}: {source.named} was trained without contrast, there is no bias{hint}"
        )
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
