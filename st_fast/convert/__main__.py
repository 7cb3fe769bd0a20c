"""Models between projects: official SiT, REPA, Self-Transcendence, SRA, our own, Hugging Face and diffusers folders.

    python -m st_fast.convert last.pt                                  what is in it
    python -m st_fast.convert last.pt models/repa                      a stage folder: a teacher, or a start (init)
    python -m st_fast.convert runs/sit_xl sit.pt --to sit              for the official code
    python -m st_fast.convert models/repa repa.safetensors --to repa --weights raw
    python -m st_fast.convert runs/digits published/digits --to huggingface
    python -m st_fast.convert runs/digits published/pipeline --to diffusers
    python -m st_fast.convert runs/digits published/digits --to huggingface --push OWNER/NAME

SOURCE is a .pt or .safetensors file in any of these layouts (`module.` prefixes and bare state dicts too), or a run,
stage, checkpoint, Hugging Face or diffusers folder of ours. Pickles are read by a restricted unpickler that executes
nothing. Every key, shape and dtype is checked; what does not fit is listed. Nothing that exists is overwritten.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from st_fast.convert import hub
from st_fast.convert.card import card
from st_fast.convert.exporting import export_file
from st_fast.convert.folders import latents_of, write_diffusers, write_huggingface, write_stage
from st_fast.core.command import command_parser, run_command
from st_fast.core.errors import RunFailed, UserError
from st_fast.model.formats.layouts import LAYOUTS
from st_fast.model.formats.loaded_state import LoadedState, heads
from st_fast.model.formats.model_source import ModelSource, read_model
from st_fast.model.load import CONFIG, read_config
from st_fast.recipe.schema import Model

FOLDERS = ("stage", "huggingface", "diffusers")
FILES = (".pt", ".safetensors")


@dataclass(frozen=True)
class Request:
    """What `python -m st_fast.convert` was asked for."""

    source: Path
    target: Path | None
    form: str
    """One of FOLDERS or LAYOUTS; "" for the file's own layout."""
    weights: Literal["ema", "raw"]
    layout: str | None
    number_of_heads: int | None
    stage: str | None
    vae: str | None
    push: str | None
    private: bool
    dry_run: bool


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("convert", __doc__)
    parser.add_argument("source", type=Path, help="a file or folder with a model")
    parser.add_argument("target", type=Path, nargs="?", help="what to write; without it, SOURCE is only described")
    parser.add_argument(
        "--to", choices=(*FOLDERS, *LAYOUTS), help="default: a stage folder, or for a file the layout SOURCE came in"
    )
    parser.add_argument("--from", dest="layout", choices=LAYOUTS, help="SOURCE's layout, where its keys don't tell")
    parser.add_argument("--heads", type=int, help="attention heads of SOURCE, where no published size tells")
    parser.add_argument("--stage", help="of a run (default: the last one that was trained)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="for forms that hold one set")
    parser.add_argument("--vae", help="a folder or hub name, put into a diffusers folder (default: the data's own)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make the hub's repository private")
    parser.add_argument("--dry-run", action="store_true", help="read and check, say what would be written, and stop")
    return parser


def parse(arguments: Sequence[str]) -> Request:
    """The command line; UserError for what does not go together, SystemExit(2) for bad flags."""
    given = parser().parse_args(arguments)
    request = Request(
        given.source, given.target, given.to or "", given.weights, given.layout, given.heads, given.stage, given.vae,
        given.push and hub.check_name(given.push), given.private, given.dry_run,
    )  # fmt: skip
    return _checked(request)


def _checked(request: Request) -> Request:
    if request.number_of_heads is not None and request.number_of_heads < 1:
        raise UserError(f"--heads {request.number_of_heads}: at least 1")
    if request.target is not None:
        is_file = request.target.suffix in FILES
        form = request.form or ("" if is_file else "stage")
        if is_file != (form not in FOLDERS):
            raise UserError(f"{request.target}: --to {form} writes a {'folder' if is_file else '.pt or .safetensors'}")
        request = replace(request, form=form)
    if request.vae and request.form != "diffusers":
        raise UserError("--vae: only --to diffusers takes one")
    if request.push and request.form not in ("huggingface", "diffusers"):
        raise UserError("--push: only --to huggingface and --to diffusers can be uploaded")
    return request


def main(arguments: Sequence[str]) -> None:
    """The command; see the module's text."""
    request = parse(arguments)
    origin = read_model(request.source, print, request.stage, request.layout, request.number_of_heads)
    print(described(origin))
    if request.target is None:
        return
    form = request.form or origin.loaded.layout
    uploads = os.path.lexists(request.target)
    if uploads and not _written_before(request.target, form, request.push):
        raise UserError(f"{request.target}: exists; name another")
    if request.dry_run:
        print(f"{request.target}: would be written as {form}" + (f" and pushed to {request.push}" * bool(request.push)))
        return
    if not uploads:
        try:
            write(request, form, origin, request.target)
        except OSError as error:  # nothing is left of what was begun
            raise RunFailed(f"{request.target}: can't be written ({error})") from None
        print(f"{request.target}: written as {form}")
    if form == "stage":
        print(f"for a recipe: {' '.join(options(origin.loaded.config))}")
    if request.push:
        print(hub.push(request.target, request.push, request.private, hub.hub()))


def _written_before(target: Path, form: str, push: str | None) -> bool:
    """Whether the folder is there for a second try to upload it; UserError where it has a config that isn't ours."""
    place = target / "transformer" if form == "diffusers" else target
    if not push or not (place / CONFIG).is_file():
        return False
    read_config(place)
    return True


def write(request: Request, form: str, origin: ModelSource, target: Path) -> None:
    """Writes `origin` as `form`."""
    latents, name = latents_of(origin), request.push or target.name
    if form == "stage":
        write_stage(origin, target)
    elif form == "huggingface":
        text = card(origin, request.weights, form, name, latents.vae.name)
        write_huggingface(origin, request.weights, latents, text, target)
    elif form == "diffusers":
        vae = Path(request.vae).name if request.vae and Path(request.vae).is_dir() else request.vae
        text = card(origin, request.weights, form, name, vae or latents.vae.name)
        write_diffusers(origin, request.weights, latents, text, request.vae, target)
    else:
        export_file(origin.loaded, form, target, "model" if request.weights == "raw" else "ema")


def described(origin: ModelSource) -> str:
    """What was read, in a few lines."""
    bundle, config = origin.loaded, origin.loaded.config
    extra = heads(bundle.model)
    kinds = sorted({key.split(".")[0] for key in extra})
    optimiser = f"AdamW's state after {bundle.updates:,} updates" if bundle.exp_avg else "no optimiser state"
    layout = "st_fast" if origin.path.is_dir() else bundle.layout
    return (
        f"{origin.path}: {layout} layout, {config.name}, {config.parameters / 1e6:.1f} M "
        f"parameters, step {bundle.step:,}, {bundle.path} path\n"
        f"  depth {config.depth}, width {config.width}, heads {config.heads}, patch {config.patch}, latents "
        f"{config.channels} × {config.latent_size} × {config.latent_size}, {config.num_classes} classes "
        f"{_null(bundle)}, qk-norm {'on' if config.qk_norm else 'off'}\n"
        f"  training heads: {', '.join(kinds) or 'none'}; {_average(bundle)}; {optimiser}"
    )


def _null(bundle: LoadedState) -> str:
    return "and a null class" if bundle.config.class_dropout > 0 else "without a null class"


def _average(bundle: LoadedState) -> str:
    return "one set of weights" if bundle.ema is bundle.model else "raw weights and their average"


def options(config: Model) -> list[str]:
    """The options that make a recipe's model this one."""
    sizes = {"name": config.name, "depth": config.depth, "width": config.width, "heads": config.heads}
    sizes |= {"patch": config.patch, "channels": config.channels, "latent_size": config.latent_size}
    sizes |= {"num_classes": config.num_classes, "class_dropout": config.class_dropout, "mlp_ratio": config.mlp_ratio}
    sizes |= {"qk_norm": str(config.qk_norm).lower()}
    return [f"--model.{key}={value}" for key, value in sizes.items()]


if __name__ == "__main__":
    run_command(main)
