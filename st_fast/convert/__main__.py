"""Models between projects: official SiT, REPA, LightningDiT and others, our own, Hugging Face and diffusers folders.

    python -m st_fast.convert last.pt                                  what is in it
    python -m st_fast.convert last.pt models/repa                      a stage folder: a teacher, or a start (init)
    python -m st_fast.convert runs/sit_xl sit.pt --to sit              for the official code
    python -m st_fast.convert models/repa repa.safetensors --to repa --weights raw
    python -m st_fast.convert runs/digits published/digits --to huggingface
    python -m st_fast.convert runs/digits published/pipeline --to diffusers
    python -m st_fast.convert runs/digits published/digits --to huggingface --push OWNER/NAME
    torchrun --nproc-per-node 8 -m st_fast.convert runs/sit_xl dcp/sit_xl --to dcp      and back: dcp/sit_xl TARGET

SOURCE is a .pt or .safetensors file in any of these layouts (`module.` prefixes and bare state dicts too), or a run,
stage, checkpoint, Hugging Face, diffusers or DCP folder of ours. Pickles are read by a restricted unpickler that
executes nothing. Every key, shape and dtype is checked; what does not fit is listed. Nothing that exists is
overwritten.
"""

from st_fast.core.command import command_parser, compile_nothing_for_help, run_command

if __name__ == "__main__":
    compile_nothing_for_help()

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from st_fast.convert import distributed, hub
from st_fast.convert.exporting import export_file
from st_fast.convert.folders import assumed, decodes, write_diffusers, write_huggingface, write_stage
from st_fast.convert.text import check_empty_context, with_empty_context
from st_fast.core.checkpoint.dcp import is_dcp
from st_fast.core.errors import RunFailed, UserError
from st_fast.core.files import shown
from st_fast.core.options import LAYOUTS, add_file_options, given, path
from st_fast.model.formats.loaded_state import NULL_CONTEXT, LoadedState, heads
from st_fast.model.load import CONFIG, read_config
from st_fast.model.stored import ModelSource, read_model
from st_fast.recipe.architecture import LATER, Model
from st_fast.recipe.keys import keys
from st_fast.recipe.load import to_literal

FOLDERS = ("stage", "huggingface", "diffusers", "dcp")
FILES = (".pt", ".safetensors")
FUSED = ("stage", "huggingface", "speedrundit")
"""Forms that a network with a fusion can be written in."""
TARGETS = ("to", "empty_context", "weights", "vae", "text_encoder", "push", "private", "dry_run")
"""Options that say how TARGET is written."""
NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("convert", __doc__)
    parser.add_argument("source", type=path, help="a file or folder with a model")
    parser.add_argument("target", type=path, nargs="?", help="what to write; without it, SOURCE is only described")
    parser.add_argument(
        "--to", choices=(*FOLDERS, *LAYOUTS), help="default: a stage folder, or for a file the layout SOURCE came in"
    )
    add_file_options(parser)
    parser.add_argument(
        "--empty-context", type=path, metavar="FILE",
        help="a .npy (L, W) with the states of the empty caption, which published models of text lack",
    )  # fmt: skip
    parser.add_argument("--stage", help="of a run (default: the last one that was trained)")
    parser.add_argument("--weights", choices=("ema", "raw"), help="for forms that hold one set (default: ema)")
    parser.add_argument(
        "--vae", type=given, help="whose the latents are (default: the data's own); put into a diffusers folder"
    )
    parser.add_argument(
        "--text-encoder", type=given, help="a folder or hub name, put into a diffusers folder of a model of text"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make the hub's repository private")
    parser.add_argument("--dry-run", action="store_true", help="read and check, say what would be written, and stop")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; UserError for what does not go together, SystemExit(2) for bad flags."""
    given = parser().parse_intermixed_args(arguments)
    if given.target is None and (unused := [name for name in TARGETS if getattr(given, name)]):
        raise UserError(f"--{unused[0].replace('_', '-')}: without a target nothing is written")
    if given.private and not given.push:
        raise UserError("--private: only --push makes a repository")
    if given.target is not None:
        is_file = given.target.suffix in FILES
        given.to = given.to or (None if is_file else "stage")
        if is_file != (given.to not in FOLDERS):
            raise UserError(
                f"{given.target}: --to {given.to} writes a {'folder' if is_file else '.pt or .safetensors'}"
            )
    if given.weights and (given.to == "stage" or given.target.suffix == ".pt"):
        raise UserError(f"--weights {given.weights}: {given.target} will hold both, the raw weights and their average")
    given.weights = given.weights or "ema"
    if given.vae and given.to not in ("huggingface", "diffusers"):
        raise UserError("--vae: only --to huggingface and --to diffusers take one")
    if given.text_encoder and given.to != "diffusers":
        raise UserError("--text-encoder: only --to diffusers takes one")
    if given.push and given.to not in ("huggingface", "diffusers"):
        raise UserError("--push: only --to huggingface and --to diffusers can be uploaded")
    if given.push and (not NAME.fullmatch(given.push) or ".." in given.push):
        raise UserError(f"--push {given.push}: OWNER/NAME is needed, of letters, digits, -, _ and .")
    return given


def _check_used(given: argparse.Namespace, origin: ModelSource) -> None:
    """UserError for an option that SOURCE leaves without meaning."""
    if given.stage and not (given.source / "recipe.toml").is_file():
        raise UserError(f"--stage {given.stage}: {given.source} is no run")
    options = ("layout", "from"), ("heads", "heads"), ("num_classes", "num-classes"), ("internal_head", "internal-head")
    for name, option in options:
        if origin.path.is_dir() and getattr(given, name) is not None:
            raise UserError(f"--{option} {getattr(given, name)}: {given.source} tells it itself; this is for files")
    if given.num_classes and origin.loaded.config.network == "mmdit":
        raise UserError(f"--num-classes {given.num_classes}: {given.source} draws from text, not classes")


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's text."""
    given = parse(arguments)
    if given.to == "dcp" or is_dcp(given.source):
        distributed.convert(given)
        return
    origin = read_model(given.source, print, given.stage, given.layout, given.heads, given.num_classes,
                        internal_head=given.internal_head)  # fmt: skip
    _check_used(given, origin)
    if given.text_encoder and origin.loaded.config.network == "sit":
        raise UserError(f"--text-encoder: {given.source} draws classes, not text")
    if given.empty_context:
        origin = with_empty_context(origin, given.empty_context)
    if given.to in ("huggingface", "diffusers"):
        check_empty_context(origin, given.to)
    print(described(origin))
    if given.target is None:
        return
    form = given.to or origin.loaded.layout
    if origin.loaded.config.fusion_last and form not in FUSED:
        raise UserError(f"--to {form}: {given.source} has a fusion (SPRINT), for which only {', '.join(FUSED)} do")
    uploads = os.path.lexists(given.target)
    if uploads and not _written_before(given.target, form, given.push):
        raise UserError(f"{given.target}: exists; name another")
    if given.dry_run:
        print(f"{given.target}: would be written as {form}" + (f" and pushed to {given.push}" if given.push else ""))
        return
    if not uploads:
        try:
            write(given, form, origin)
        except OSError as error:  # nothing is left of what was begun
            raise RunFailed(f"{given.target}: can't be written ({error})") from None
        print(f"{given.target}: written as {form}")
        if origin.loaded.mean_latents:
            print(
                "warning: trained with a contrast, whose bias drawing takes out with the data's mean latent; what was "
                "written has no place for that, so that what draws from it draws with the bias"
            )
        if form in ("huggingface", "diffusers") and (usual := assumed(origin, given.vae)):
            print(f"note: the latents are taken for those of {usual}; --vae names another VAE")
        if form == "diffusers" and not decodes(given.target, origin):
            print("warning: without a VAE the pipeline gives latents, no images; --vae FOLDER puts one in")
        if form == "diffusers" and origin.loaded.config.network == "mmdit" and not given.text_encoder:
            print("warning: without a text encoder the pipeline reads no prompts; --text-encoder FOLDER puts one in")
    if form == "stage":
        sizes = replace(origin.loaded.config, internal_head=0).described().items()  # a method adds the head
        words = (f"--model.{key}={value if isinstance(value, str) else to_literal(value)}" for key, value in sizes)
        print("for a recipe:", *map(shlex.quote, words))
    if given.push:
        print(hub.push(given.target, given.push, given.private, hub.hub()))


def _written_before(target: Path, form: str, push: str | None) -> bool:
    """Whether the folder is there for a second try to upload it; UserError where it has a config that isn't ours."""
    place = target / "transformer" if form == "diffusers" else target
    if not push or not (place / CONFIG).is_file():
        return False
    read_config(place)
    return True


def write(given: argparse.Namespace, form: str, origin: ModelSource) -> None:
    """Writes `origin` as `form` to the target."""
    target, name = given.target, given.push or given.target.name
    if form == "stage":
        write_stage(origin, target)
    elif form == "huggingface":
        write_huggingface(origin, given.weights, name, given.vae, target)
    elif form == "diffusers":
        write_diffusers(origin, given.weights, name, given.vae, given.text_encoder, target)
    else:
        export_file(origin.loaded, form, target, "model" if given.weights == "raw" else "ema")


def _unprefixed(loaded: LoadedState) -> list[str]:
    """A line where prefixes of keys are not written back."""
    names = [shown(name) if name else "the state dict" for name in loaded.facts.get("unprefixed", ())]
    return [f"keys of {', '.join(names)} have prefixes that are not written back"] if names else []


def described(origin: ModelSource) -> str:
    """What was read, in a few lines."""
    loaded, config = origin.loaded, origin.loaded.config
    kinds = sorted({key.split(".")[0] for key in heads(loaded.model)})
    layout = "st_fast" if origin.path.is_dir() else loaded.layout
    condition = f"{config.num_classes} classes {'and a' if config.class_dropout > 0 else 'without a'} null class"
    if config.network == "mmdit":
        null = "with" if NULL_CONTEXT in loaded.model else "without"
        condition = f"captions of {config.text_length} × {config.text_width}, {null} the empty caption's states"
    parts = f", internal head after block {config.internal_head}" if config.internal_head else ""
    told = {key: getattr(config, key) for key in LATER if not key.startswith(("internal", "fusion"))}
    parts += "".join(f", {key} {value}" for key, value in told.items() if value != keys(Model)[key].default)
    qk_norm = config.qk_norm if isinstance(config.qk_norm, str) else "on" if config.qk_norm else "off"
    if config.fusion_last:
        parts += f", fusion around blocks {config.fusion_first + 1} to {config.fusion_last}"
    average = "raw weights and their average" if loaded.averaged else "one set of weights"
    whose = "Muon's and AdamW's state, for st_fast only," if loaded.momentum_buffer else "AdamW's state"
    optimiser = f"{whose} after {loaded.updates:,} updates" if loaded.exp_avg else "no optimiser state"
    if loaded.left_out:
        optimiser += f", its own is left out ({loaded.left_out})"
    return (
        f"{origin.path}: {layout} layout, {config.name}, {config.parameters / 1e6:.1f} M parameters, step "
        f"{loaded.step:,}, {loaded.path} path\n"
        f"  depth {config.depth}, width {config.width}, heads {config.heads}, patch {config.patch}, latents "
        f"{' × '.join(map(str, config.latent_shape))}, {condition}, "
        f"qk-norm {qk_norm}{parts}\n"
        f"  training heads: {', '.join(kinds) or 'none'}; {average}; {optimiser}"
        + "".join(f"\n  {remark}" for remark in (*loaded.remarks, *_unprefixed(loaded)))
    )


if __name__ == "__main__":
    run_command(main)
