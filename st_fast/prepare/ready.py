"""What comes after preparing: the classes that a set has, the command that trains on it, and a recipe made for it."""

import math
import shlex
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from st_fast.core.errors import Say, UserError, counted, printable
from st_fast.core.files import make_folder, write_atomic
from st_fast.core.writing import cannot_write
from st_fast.data.ahead import RecordSet
from st_fast.data.buckets import has_buckets, parts_of
from st_fast.data.labels import UNLABELLED_HINT, counts_line
from st_fast.data.manifest import FILE_NAME, Manifest
from st_fast.data.shards import open_data
from st_fast.data.source import Source
from st_fast.data.text import CAPTIONS, TextManifest
from st_fast.data.text import FOLDER as TEXT
from st_fast.prepare.job import SKIPPED_FILE
from st_fast.recipe.check import check
from st_fast.recipe.load import from_text, to_literal
from st_fast.recipe.sizes import PATCHES, SIZES

TOKENS = (64, 256)
"""Tokens of a latent: as many as the second number at most, as SiT's on ImageNet, and not fewer than the first."""
BATCH = 256
LISTED, NAME_MOST = 10, 40
"""Classes whose names a recipe tells, and characters of each."""


@dataclass(frozen=True)
class Plan:
    """What is trained on a set of so many records: SiT's size, steps of stage 1, of which stage 2 takes twice."""

    size: str
    steps: int
    recipe: str
    """The one in recipes/ that it follows."""
    lr: str
    ema_decay: float
    feature_guidance: float
    sampling: str


SMALL = 'sampler = "heun"\nsteps = 50\ncfg_scale = {cfg_scale}\ncfg_range = [0.0, 1.0]'
PUBLISHED = 'sampler = "sde"\nsteps = 250\ncfg_scale = {cfg_scale}\ncfg_range = [0.0, 0.65]'
PLANS = (
    (20_000, Plan("S", 10_000, "recipes/sit_s.toml", "3e-4", 0.999, 3.0, SMALL)),
    (100_000, Plan("S", 20_000, "recipes/sit_s.toml", "3e-4", 0.999, 3.0, SMALL)),
    (500_000, Plan("B", 50_000, "recipes/sit_b.toml", "1e-4", 0.9999, 30.0, PUBLISHED)),
    (math.inf, Plan("B", 200_000, "recipes/sit_b.toml", "1e-4", 0.9999, 30.0, PUBLISHED)),
)
"""Below so many records → the plan."""
THERE: dict[str, Any] = {
    "model.channels": 4, "model.latent_size": 32, "model.num_classes": 1000, "model.class_dropout": 0.1,
    "optim.batch_size": BATCH, "sample.cfg_scale": 1.9, "stage.transcend.cfg_scale": 30.0,
}  # fmt: skip
"""Values of both recipes that plans follow."""
TEXT_RECIPE = "recipes/mmdit_coco.toml"
TEXT_THERE: dict[str, Any] = {
    "model.name": "MMDiT-24/2", "model.channels": 4, "model.latent_size": 32, "model.text_width": 768,
    "model.text_length": 77, "optim.batch_size": BATCH,
}  # fmt: skip
"""Its values."""


def plan_for(manifest: Manifest) -> Plan:
    """The plan for a set, by the number of its records."""
    return next(plan for below, plan in PLANS if manifest.count < below)


@dataclass(frozen=True)
class Bounds:
    """What all shapes of a set allow: the largest number that divides each side, and the records of the rarest one."""

    shared: int
    records: int


def bounds_of(records: RecordSet) -> Bounds:
    """Over every shape of a set."""
    parts = parts_of(records).values()
    shared = math.gcd(*(side for part in parts for side in part.manifest.shape[1:]))
    return Bounds(shared, min(len(part) for part in parts))


def own_bounds(manifest: Manifest) -> Bounds:
    """Of a set of one shape."""
    return Bounds(math.gcd(*manifest.shape[1:]), manifest.count)


def typical(records: RecordSet) -> Manifest:
    """The manifest of a set; of several shapes with the one of most tokens, a square if there is one of these.

    Its source then says how many records there are of each.
    """
    parts = parts_of(records)
    shapes = [part.manifest.shape for part in parts.values()]
    shape = max(shapes, key=lambda shape: (shape[1] * shape[2], shape[1] == shape[2]))
    if len(parts) == 1:
        return replace(records.manifest, shape=shape)
    told = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
    return replace(records.manifest, shape=shape, source=f"the largest of {len(parts)} shapes: {told}")


def patch_for(height: int, width: int, shared: int = 0) -> int:
    """The smallest patch above 1 that divides latents into TOKENS; where none does, the largest that gives enough, or
    1. `shared`: what it must divide, where that is not both sides alone.
    """
    fewest, most = TOKENS
    shared = shared or math.gcd(height, width)
    tokens = {p: height * width // p**2 for p in range(2, shared + 1) if shared % p == 0}
    patches = [p for p, count in tokens.items() if count >= fewest]
    return next((p for p in patches if tokens[p] <= most), patches[-1] if patches else 1)


def train_command(manifest: Manifest, folder: Path, bounds: Bounds | None = None) -> str:
    """The command that trains on the set in `folder`: a recipe of this project's, and what differs from it.

    `bounds`: of a set of several shapes.
    """
    bounds = bounds or own_bounds(manifest)
    plan, wanted = plan_for(manifest), THERE | values(manifest, bounds)
    patch = patch_for(*manifest.shape[1:], bounds.shared)
    model = {}
    if patch not in PATCHES:
        depth, width, heads = SIZES[plan.size]
        model = {"name": "custom", "depth": depth, "width": width, "heads": heads, "patch": patch}
    elif patch != 2:  # which the recipes have
        model = {"name": f"SiT-{plan.size}/{patch}"}
    changes = {"data.path": str(folder)} | {f"model.{key}": value for key, value in model.items()}
    changes |= {key: value for key, value in wanted.items() if value != THERE[key]}
    return _command(plan.recipe, changes, wanted["optim.batch_size"])


def text_command(manifest: Manifest, text: TextManifest, folder: Path, bounds: Bounds | None = None) -> str:
    """The command that trains MMDiT on the captions' states beside the latents in `folder`."""
    bounds = bounds or own_bounds(manifest)
    wanted = {key: value for key, value in values(manifest, bounds).items() if key in TEXT_THERE}
    wanted |= {"model.text_width": text.width, "model.text_length": text.length}
    wanted["model.name"] = f"MMDiT-24/{patch_for(*manifest.shape[1:], bounds.shared)}"
    changes: dict[str, Any] = {"data.path": str(folder)}
    if len(list((folder / TEXT).glob("*/"))) > 1:
        changes["data.text"] = text.encoder
    changes |= {key: value for key, value in wanted.items() if value != TEXT_THERE[key]}
    return _command(TEXT_RECIPE, changes, wanted["optim.batch_size"])


def _command(recipe: str, changes: Mapping[str, Any], batch_size: int) -> str:
    gpus = torch.cuda.device_count()
    shared = gpus > 1 and batch_size % gpus == 0
    start = f"torchrun --nproc-per-node {gpus} -m" if shared else "python -m"
    words = [f"--{key}={value if isinstance(value, str) else to_literal(value)}" for key, value in changes.items()]
    return " ".join([start, "st_fast.train", recipe, *map(shlex.quote, words)])


def values(manifest: Manifest, bounds: Bounds) -> dict[str, Any]:
    """Keys of a recipe that follow from a set. One class has no null class, which would be the same, nor guidance."""
    height, width = manifest.shape[1:]
    found: dict[str, Any] = {
        "model.channels": manifest.channels, "model.latent_size": height if height == width else (height, width),
        "model.num_classes": manifest.num_classes,
        "optim.batch_size": min(BATCH, 2 ** int(math.log2(max(1, bounds.records)))),
    }  # fmt: skip
    if manifest.num_classes == 1:
        found |= {"model.class_dropout": 0.0, "sample.cfg_scale": 1.0, "stage.transcend.cfg_scale": 1.0}
    return found


def ready_recipe(manifest: Manifest, path: str, bounds: Bounds | None = None) -> str:
    """A recipe in TOML for the set at `path`: both stages of Self-Transcendence, or stage 1 alone for a single class.

    `bounds`: of a set of several shapes. RecipeError should it not be one that trains.
    """
    bounds = bounds or own_bounds(manifest)
    plan, classes, (rows, columns) = plan_for(manifest), manifest.num_classes, manifest.shape[1:]
    patch, chosen, single = patch_for(rows, columns, bounds.shared), values(manifest, bounds), classes == 1
    depth, width, heads = SIZES[plan.size]
    some = [printable(name)[:NAME_MOST] for name in manifest.class_names[:LISTED]]
    names = f": {', '.join(some)}{', …' * (len(manifest.class_names) > LISTED)}" if some else ""
    cfg_scale = 1.0 if single else 1.9 if plan.sampling == PUBLISHED else 2.0
    text = HEAD.format(
        records=f"{manifest.count:,}", channels=manifest.channels, rows=rows, columns=columns, names=names,
        what=f"{classes} class{'es' * (classes != 1)}", source=printable(manifest.source)[:160], recipe=plan.recipe,
        size=plan.size, depth=depth, width=width, heads=heads, patch=patch, tokens=rows * columns // patch**2,
        latent_size=to_literal(chosen["model.latent_size"]), classes=classes,
        path=to_literal(path), vae=to_literal(manifest.vae.name),
        dropout="0.0  # one class: the null class would be the same, and guidance means nothing" if single else 0.1,
        batch=chosen["optim.batch_size"], lr=plan.lr, ema=plan.ema_decay, save=min(5_000, plan.steps // 5),
        every=plan.steps // 5, num=8 * classes if 1 < classes <= 10 else 40 if single else 80,
        sampling=plan.sampling.format(cfg_scale=cfg_scale), align=plan.steps * (2 if single else 1),
    )  # fmt: skip
    if not single:
        text += TRANSCEND.format(
            guidance=plan.feature_guidance,
            stop=plan.steps,
            steps=2 * plan.steps,
            tap=depth // 2,
            teacher=2 * depth // 3,
        )
    check(from_text(text, "the recipe made for this set"))
    return text


HEAD = """# {records} latents of {channels} × {rows} × {columns} in {what}{names}
# ({source}).
# Nothing is published for this set: all choices are ours, and a start. Sizes and steps go by the number of images, the
# rest follows {recipe}. What it costs, and then the training:
#   python -m st_fast.train THIS.toml --dry-run
#   python -m st_fast.train THIS.toml

[model]  # SiT-{size}: S below 100,000 images, B from there on
depth = {depth}
width = {width}
heads = {heads}
patch = {patch}  # {tokens} tokens; the step's time grows with them
channels = {channels}
latent_size = {latent_size}
num_classes = {classes}
class_dropout = {dropout}

[data]
path = {path}
vae = {vae}  # latents of another one are refused

[flow]
time = "logit_normal"  # not the published choice: it paid in short runs, see docs/speedrun.md

[optim]
batch_size = {batch}
micro_batch = "auto"
lr = {lr}
warmup_steps = 500
ema_decay = {ema}
ema_warmup = true  # not the published choice either: it paid in short runs, see docs/models.md

[run]
save_every = {save:_}

[sample]
every = {every:_}
num = {num}
{sampling}

# Stage 1: a shallow block learns to predict the velocity through a head of its own.
[[stage]]
name = "align"
supervision = "velocity_head"
depth = 2
steps = {align:_}
"""
TRANSCEND = """
# Stage 2: a new student, supervised by the guided features of stage 1.
[[stage]]
name = "transcend"
supervision = "self_transcendence"
teacher = "align"
student_depth = {tap}
teacher_depth = {teacher}
cfg_scale = {guidance}
stop_step = {stop:_}
steps = {steps:_}
"""


def say_classes(source: Source, max_bad: int, say: Say) -> None:
    """Says what a source has, class by class, and what is left out. UserError for too many images without a label."""
    say(source.summary())
    if source.num_classes > 1:
        say(counts_line(source.labels, source.num_classes, source.class_names))
    if source.left_out:
        say(f"{source.left_out_summary()}; {SKIPPED_FILE} lists them")
    nulls = np.flatnonzero(source.labels < 0)
    if len(nulls):
        told = f"{source.description}: {counted(len(nulls), 'image')} without a label, {source.names[nulls[0]]} first"
        if len(nulls) > max_bad:
            raise UserError(f"{told}; --max-bad allows {max_bad}, {UNLABELLED_HINT}")
        say(f"{told}: skipped")


def check_free(path: Path | None, out: Path) -> None:
    """UserError where a recipe would be written over a file, before any work; a finished set's may be the same."""
    if path is not None and path.exists() and not ((out / FILE_NAME).is_file() or has_buckets(out)):
        raise UserError(f"--recipe {path}: it is there already; name another file")


def write_recipe(path: Path, text: str) -> None:
    """Writes a recipe to a new file. UserError where another one is there, or it can't be written."""
    if path.exists():
        if path.is_file() and path.read_bytes() == text.encode():
            return
        raise UserError(f"--recipe {path}: it is there already, with other content; name another file")
    try:
        make_folder(path.parent)
        write_atomic(path, text.encode())
    except OSError as error:
        raise cannot_write(path, error) from None


def tell_ready(out: Path, recipe: Path | None, say: Say) -> None:
    """Says what classes a finished set has and how to train on it; writes the recipe if one is wanted."""
    with closing(open_data(out, verify=False)) as records:
        manifest, bounds = typical(records), bounds_of(records)
        say(f"{out}: {counts_line(records.labels, manifest.num_classes, manifest.class_names)}")
    if (out / CAPTIONS).is_file():
        say(f"encode the captions: python -m st_fast.prepare --text ENCODER {shlex.quote(str(out))} (docs/text.md)")
        return
    if recipe is not None:
        write_recipe(recipe, ready_recipe(manifest, str(out), bounds))
        say(f"train: python -m st_fast.train {shlex.quote(str(recipe))}")
    else:
        say(f"train: {train_command(manifest, out, bounds)}")
