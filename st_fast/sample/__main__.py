"""Draws samples of a run or another model: a picture of a few, or a set of many on any number of ranks.

    python -m st_fast.sample runs/digits
    python -m st_fast.sample runs/digits --stage transcend --num 100 --sampler heun --steps 50 --cfg-scale 2
    torchrun --nproc-per-node 8 -m st_fast.sample runs/sit_xl -n 50000 --preset self-transcendence
    python -m st_fast.sample runs/digits --interpolate 3 8
    python -m st_fast.sample runs/photos --size 224x288
    python -m st_fast.sample runs/digits --num 20 --gif
    python -m st_fast.sample runs/emoji --prompt "red apple" --prompt rocket --negative "a face"
    python -m st_fast.sample SiT-XL-2-256x256.pt --preset unguided --vae sd-vae-ft-mse

A picture holds its settings and is named after the main ones; of others it gets another name. A set (--num above
1000, --npz or --png) is a folder with samples.npz as ADM's evaluator reads it, sample.json with every setting, and
grid.png. The same command again continues where it stopped; after more training, or with other settings, it draws
another set beside the first. Every sample's noise and label follow from (seed, sample number), and every batch from its
number, so the number of ranks changes no image. Of a network that draws from text, prompts stand for labels: --prompt,
--prompts, those of the recipe (sample.prompts), or else captions of the data, in turn.

MODEL is a run, stage or checkpoint folder, a file that st_fast.convert reads, or a Hugging Face or diffusers folder or
hub name. What is drawn from one without a run goes to samples/ in this folder, is decoded by --vae, the model's own VAE
or SD's, and has the defaults of docs/recipe.md as settings.
"""

from st_fast.core.command import need_model_first
from st_fast.core.signals import catch_signals

if __name__ == "__main__":
    catch_signals()
    need_model_first()  # the imports below take seconds, or a minute where csrc is compiled

import argparse
from collections.abc import Sequence
from dataclasses import replace

from st_fast.core.command import run_command
from st_fast.core.errors import UserError
from st_fast.core.options import SEED_MOST, integer, path, pixels
from st_fast.sample.draw import names_in_turn
from st_fast.sample.model import Sampler, sampling
from st_fast.sample.previews import check_replaced, draw_grid, draw_interpolation, draw_trajectory, free_name
from st_fast.sample.request import sample_request, sampling_parser
from st_fast.sample.set import draw_set, settings_of

PICTURE_MOST = 1_000
"""More samples than that are drawn as a set."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = sampling_parser("sample", __doc__)
    parser.add_argument(
        "--out",
        type=path,
        help="the picture, or the set's folder (default: in RUN/STAGE/samples, or samples/MODEL-SETTINGS)",
    )
    parser.add_argument(
        "--size",
        type=pixels,
        metavar="SIZE|HEIGHTxWIDTH",
        help="of the images in pixels, also where the model was trained on others (default: the recipe's own)",
    )
    parser.add_argument("--npz", action="store_true", help="a set, whatever its size")
    parser.add_argument("--png", action="store_true", help="a set with a folder of single images")
    previews = parser.add_mutually_exclusive_group()
    previews.add_argument(
        "--interpolate",
        type=integer(0, SEED_MOST // 2),
        nargs=2,
        metavar=("A", "B"),
        help="from sample A's noise to B's",
    )
    previews.add_argument("--gif", action="store_true", help="from noise to image, step by step")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags; and `samples`, a `SampleRequest`, whether it `is_set`, a folder, and the `target` to write.

    A set's target is None where its place follows from what is in its stage's `samples`.

    UserError for a folder without a run, SystemExit(2) for bad flags.
    """
    given = parser().parse_args(arguments)
    one, ending = given.gif or given.interpolate, ".gif" if given.gif else ".png"
    if one and (given.npz or given.png):
        raise UserError("--gif and --interpolate make one picture: without --npz and --png")
    given.samples = replace(sample_request(given, "sample"), size=given.size)
    given.is_set = given.npz or given.png or (given.samples.settings.num > PICTURE_MOST and not one)
    if not given.is_set and given.out is not None and given.out.suffix != ending:
        raise UserError(f"--out {given.out}: a picture's name ends in {ending}; a folder is for --npz and --png")
    picture = given.samples.source.place(f"{picture_name(given)}{ending}")
    given.target = given.out or (None if given.is_set else picture)
    return given


def picture_name(given: argparse.Namespace) -> str:
    """A picture's name, without its ending: that of a set with the same settings, but for what it shows."""
    if given.interpolate:
        return f"interpolate-{given.interpolate[0]}-{given.interpolate[1]}-{given.samples.drawn}"
    drawn = f"{given.samples.settings.num}-{given.samples.drawn}"
    return f"trajectory-{drawn}" if given.gif else drawn


def main(arguments: Sequence[str]) -> None:
    """Writes a grid of samples of a run, or what else was asked for."""
    request = parse(arguments)
    with sampling(request.samples) as (ranks, sampler, say):
        if request.is_set:
            request.target = draw_set(sampler, request.target, request.png, ranks, say).parent
        elif ranks.first:
            draw_picture(sampler, request)
        if text := named_classes(sampler, request):
            say(text)
        say(str(request.target))


def named_classes(sampler: Sampler, request: argparse.Namespace) -> str:
    """A line on the classes that a picture shows, or a set's grid; empty without names, or with random labels."""
    if request.interpolate:
        ends = [int(sampler.draw_of(number, 1).labels) for number in request.interpolate]
        rows = names_in_turn(ends, sampler.class_names)
        return f"classes of the rows: {', '.join(rows)}" if rows else ""
    cycle = request.samples.labels.cycle[: request.samples.settings.num]
    names, what = names_in_turn(cycle, sampler.class_names), "classes" if sampler.prompts is None else "prompts"
    return f"{what} in turn, row by row: {', '.join(names)}" if names else ""


def draw_picture(sampler: Sampler, request: argparse.Namespace) -> None:
    """Writes the picture, never in place of one of other settings: those of a name given are a UserError."""
    record = settings_of(sampler) | {"gif": request.gif, "interpolate": request.interpolate}
    if request.out is None:
        request.target = free_name(request.target, record)
    check_replaced(request.target, record)
    if request.interpolate:
        draw_interpolation(sampler, request.interpolate, request.target, record)
    else:
        (draw_trajectory if request.gif else draw_grid)(sampler, request.target, record)


if __name__ == "__main__":
    run_command(main)
