"""The modes of `st_fast.prepare`, one function each."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from st_fast.core.command import is_hub_name
from st_fast.core.errors import Say, UserError, counted
from st_fast.core.files import printable, read_json
from st_fast.core.progress import bar
from st_fast.data.ahead import RecordSet, mean_and_std
from st_fast.data.buckets import has_buckets, one_shape, parts_of
from st_fast.data.captions import coco_captions, read_source_captions
from st_fast.data.features import FOLDER, SMALL, SMALL_ENCODER, features_folder, open_features
from st_fast.data.labels import counts_line
from st_fast.data.layouts.coco import is_coco
from st_fast.data.manifest import FILE_NAME, VaeInfo
from st_fast.data.shards import open_data, read_any_manifest
from st_fast.data.source import Source
from st_fast.data.sources import open_source
from st_fast.data.statistics import latent_statistics
from st_fast.data.text import FOLDER as TEXT
from st_fast.data.text import open_text, read_captions, text_folder
from st_fast.model.encoders import load_encoder
from st_fast.model.text_encoders import load_text_encoder
from st_fast.model.vae import PIXELS, PRESETS, load_vae, vae_hash
from st_fast.prepare.buckets import ASSIGNED_FILE
from st_fast.prepare.encode import Encoder, own_latents, plan
from st_fast.prepare.features import open_record_images, template, write_features
from st_fast.prepare.job import (
    JOB_FILE,
    check_finished,
    check_unfinished,
    is_done,
    own_share,
    run_job,
)
from st_fast.prepare.latents import from_coco as from_coco
from st_fast.prepare.latents import from_latents as from_latents
from st_fast.prepare.latents import from_repa as from_repa
from st_fast.prepare.normalising import check_same_latents, kept_own_latents, latents_of
from st_fast.prepare.ready import (
    bounds_of,
    check_free,
    ready_recipe,
    say_classes,
    tell_ready,
    text_command,
    train_command,
    typical,
    write_recipe,
)
from st_fast.prepare.repa import check_moments, check_target, write_repa
from st_fast.prepare.small_encoder import the_small_encoder
from st_fast.prepare.text import check_words, keep_captions, write_text
from st_fast.prepare.text import template as text_template
from st_fast.prepare.vaes import (
    VAE_FOLDER,
    check_small,
    compute,
    copy_vae,
    is_local,
    keep_vae,
    plan_variant,
    the_vae,
)
from st_fast.sample.model import decoder
from st_fast.sample.previews import grid, save_png


def verify(args: argparse.Namespace) -> None:
    """Re-reads everything."""
    records = open_data(args.paths[0], verify=True, say=print)
    for folder in sorted((args.paths[0] / FOLDER).glob("*/")):
        features = open_features(args.paths[0], folder.name, records)
        features.verify()
        print(f"features: {printable(features.manifest.encoder)} of {features.manifest.count:,} records verified")
        features.close()
    encoders = [folder.name for folder in sorted((args.paths[0] / TEXT).glob("*/"))] + [""] * is_coco(args.paths[0])
    for encoder in encoders:
        text = open_text(args.paths[0], encoder, records)
        text.verify()
        print(f"text: {printable(text.manifest.encoder)} of {text.manifest.count - 1:,} captions verified")
        text.close()
    records.close()


def stats(args: argparse.Namespace) -> None:
    """Prints statistics and writes a picture of 64 random records, decoded; of each bucket its own.

    What needs no VAE comes first, so that only the pictures are missing where it can't be loaded, which is a UserError.
    """
    folder = args.paths[0]
    records = open_data(folder, verify=False)
    for name, part in parts_of(records).items():
        print(f"{name}: {describe(part)}" if name else describe(part))
    if args.recipe:
        write_recipe(args.recipe, ready_recipe(typical(records), str(folder), bounds_of(records)))
        print(f"train: python -m st_fast.train {shlex.quote(str(args.recipe))}")
    try:
        decode = decoder(folder, records.manifest, compute(args)[0], args.vae or "")
    except UserError as error:
        raise UserError(f"no picture: {error}; --stats {folder} --vae VAE names one that is here") from None
    for name, part in parts_of(records).items():
        manifest = part.manifest
        chosen = np.random.default_rng(0).choice(manifest.count, min(64, manifest.count), replace=False)
        mean, std = mean_and_std(part.gather(np.sort(chosen))[0], manifest)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        place = folder / name / "stats.png" if folder.is_dir() else folder.with_name(f"{folder.name}.stats.png")
        save_png(grid(decode((mean + std * noise) * manifest.scale), 8), place)
        print(f"picture: {place}")


def describe(records: RecordSet) -> str:
    """Per-channel statistics of the latents as a network sees them, normalised, and the number of records a class.

    Reads every record once. "std" is the total, the spread of the means plus the posterior's own; "of which posterior"
    the root mean square of the posterior's std.
    """
    made, count = records.manifest, len(records)
    with bar(None, "reading", count, "record") as progress:
        found = latent_statistics(records, np.arange(count), progress.update)
    present = len(np.unique(records.labels))
    lines = [f"{count:,} records, {present} of {made.num_classes} classes present"]
    lines += [f"latents of {made.vae.name}, normalised by {made.normalisation}:"]
    lines += ["channel      mean       std  of which posterior"]
    for number, row in enumerate(zip(found.mean, found.std, found.posterior, strict=True)):
        lines.append(f"{number:7d}  {row[0]:8.4f}  {row[1]:8.4f}  {row[2]:8.4f}")
    mean, std = found.whole
    unit = f"  with scale {made.scale / std:.5f} the std would be 1" if std else ""
    lines.append(f"    all  {mean:8.4f}  {std:8.4f}{unit}")
    told = found.warning(made)
    lines.append(
        f"warning: {told}" if told else f"about mean 0 and std 1 ({mean:.2f} and {std:.2f}), as training expects"
    )
    return "\n".join([*lines, counts_line(records.labels, made.num_classes, made.class_names)])


def features(args: argparse.Namespace) -> None:
    """Features of the images beside their latents."""
    source_path, out = args.paths
    records = open_data(out, verify=False)
    found = None if args.features == SMALL else load_encoder(args.features, *compute(args))
    images = open_record_images(out, records, str(source_path), args.subset, args.size)
    if found is None and args.dry_run and not (out / SMALL_ENCODER).is_dir():
        print(f"{out}: a small encoder would be trained on the images first")
        return
    encoder = found or load_encoder(str(the_small_encoder(args, out, records, images)), *compute(args))
    size = images.manifest.shape[-1]
    planned = template(encoder, records, size)
    print(
        f"{features_folder(out, encoder.name)}: {planned.count:,} records of {planned.dtype} {planned.shape}, "
        f"{planned.count * planned.record_bytes / 1e9:.2f} GB"
    )
    if not args.dry_run:
        with progress("encoding", len(records), "record") as shown:
            write_features(out, records, encoder, images, args.batch_size, own_share(), shown.update)


def text(args: argparse.Namespace) -> None:
    """States of the captions beside the latents."""
    out = args.paths[0]
    records = open_data(out, verify=False)
    masks = {"auto": None, "yes": True, "no": False}
    encoder = load_text_encoder(args.text, *compute(args), args.text_length, masks[args.text_mask])
    captions, digest = read_captions(out)
    check_words(out, captions)
    planned = text_template(encoder, records, digest, 1 + sum(map(len, captions)))
    say = say_once()
    say(
        f"{text_folder(out, encoder.name)}: {planned.count - 1:,} captions of {planned.length} tokens × "
        f"{planned.width} in {planned.dtype}, {'with' if planned.mask else 'without'} attention mask, "
        f"{planned.count * planned.record_bytes / 1e9:.2f} GB"
    )
    if not args.dry_run:
        with progress("encoding", planned.count, "caption") as shown:
            write_text(out, records, encoder, tqdm.write, args.batch_size, own_share(), shown.update)
        say(f"train: {text_command(typical(records), planned, out, bounds_of(records))}")


def to_repa(args: argparse.Namespace) -> None:
    """Shards → REPA's layout."""
    source, out = args.paths
    records = one_shape(open_data(source, verify=False), "REPA's layout")
    check_target(source, out)
    check_moments(records.manifest, source)
    if args.dry_run:
        print(f"{out}: {len(records):,} files in vae-sd/")
        return
    copy_vae(records.manifest.vae, source, out)
    with progress("converting", len(records), "record") as shown:
        write_repa(records, out, shown.update)
    print(f"{out}: {len(records):,} files; REPA's own trainer also wants the images, as many in images/")


def open_images(args: argparse.Namespace) -> tuple[Source, list[Sequence[str]]]:
    """The images to encode, and the captions of each if these are asked for."""
    if args.vae_variant is not None and args.vae in ("small", *PIXELS):
        raise UserError(f"--vae-variant {args.vae_variant}: --vae {args.vae} has no variants of weights; leave it out")
    columns, say = (args.image_column or "", args.label_column or ""), say_once()
    source = open_source(args.paths[0], args.subset, bool(args.captions), args.unlabelled, *columns)
    say_classes(source, args.max_bad, say)
    check_free(args.recipe, args.paths[1])
    if not args.captions:
        return source, []
    found = source.captions if args.captions == "auto" else coco_captions(Path(args.captions), source.names)
    return source, read_source_captions(source.names, found, args.max_bad, source.description, say)


def encode(args: argparse.Namespace) -> None:
    """Images → shards, and their captions if these are asked for."""
    (source, captions), out, say = open_images(args), args.paths[1], say_once()
    begun = read_json(out / JOB_FILE) if (out / JOB_FILE).is_file() else {"upright": True}
    if has_buckets(out) or (out / ASSIGNED_FILE).is_file() or "buckets" in begun:
        raise UserError(f"{out}: begun with --buckets; use those, or name another folder to write")
    if (out / FILE_NAME).is_file():
        check_finished(out, finished_plan(args, source, out))
        if args.captions and not args.dry_run:
            keep_captions(out, source.names, captions)
        print(f"{out}: complete already; --verify re-reads it")
        if not args.dry_run:
            tell_ready(out, args.recipe, say)
        return
    asked = plan(source, args.size, args.flip, args.dtype, args.shard_size)
    if (out / JOB_FILE).is_file():
        check_unfinished(out, asked)  # before a VAE is trained
    if (out / JOB_FILE).is_file() and args.vae == "small" and not (out / VAE_FOLDER).is_dir():
        raise UserError(f"{out}: begun with another VAE (now small); use that, or name another folder to write")
    if args.dry_run and args.vae == "small" and not (out / VAE_FOLDER).is_dir():
        print(f"{out}: a small VAE would be trained on them first, {args.vae_steps:,} steps")
        return
    vae, info = the_vae(args, source, out)
    upright = bool(begun.get("upright", False))
    how = latents_of(args, vae, source, out)
    encoder = Encoder(
        source, vae, info, how, args.size, args.flip, args.dtype, args.batch_size, args.shard_size, upright
    )
    encoder.fingerprint |= plan_variant(args)
    _, height, width = encoder.template.shape
    if (odd := [side for side in (height, width) if side % 2]) and own_share().start == 0:
        print(f"latents of {height}×{width}: a model's patch must divide {odd[0]}, so patch 2 can't be used")
    if (out / JOB_FILE).is_file():
        check_unfinished(out, encoder.fingerprint)
    done = [is_done(out, number) for number in range(encoder.shards)]
    if args.dry_run:
        template, records = encoder.template, len(source.names) * encoder.views
        print(
            f"{out}: {records:,} records of {template.dtype} {'×'.join(map(str, template.shape))}, "
            f"{records * template.record_bytes / 1e9:.2f} GB in {counted(encoder.shards, 'shard')}, "
            f"{sum(done)} of them done\n"
            f"VAE {info.name} ({info.kind}), {template.normalisation}, SHA-256 {info.hash[:12]}…"
        )
        say(f"train: {train_command(replace(template, count=records), out)}")
        return
    keep_vae(args.vae, info, out, args.vae_variant)
    images = np.array([len(encoder.images_of(number)) for number in range(encoder.shards)])[own_share()]
    with progress("encoding", int(images.sum()), "image", int(images[done[own_share()]].sum())) as shown:
        complete = run_job(out, encoder, args.max_bad, shown.update)
    if args.captions and (out / FILE_NAME).is_file():
        keep_captions(out, source.names, captions)
    if complete:
        tell_ready(out, args.recipe, tqdm.write)


def finished_plan(args: argparse.Namespace, source: Source, out: Path) -> dict[str, Any]:
    """What is asked of a finished set, without loading a VAE from elsewhere than this disk."""
    made, asked = read_any_manifest(out), plan(source, args.size, args.flip, args.dtype, args.shard_size)
    asked |= plan_variant(args)
    found, wanted = same_names(args.vae, made.vae, out)
    if found != wanted:
        raise UserError(
            f"{out}: complete, but made with VAE {found} (now {wanted}); use that, or name another folder to write"
        )
    if args.vae == "small":
        check_small(args, out)
    local = is_local(args.vae)
    vae = load_vae(args.vae, variant=args.vae_variant) if local or args.vae in PIXELS else None
    if vae is not None and local:
        asked["vae"] = vae_hash(vae)
        if made.vae.hash not in ("", asked["vae"]):
            raise UserError(f"{out}: complete, but made with another VAE than {args.vae}: its weights changed")
    check_same_latents(args, made, out, kept_own_latents(out) if vae is None else own_latents(vae))
    if args.precision != "auto":
        asked["precision"] = str(compute(args)[1]).removeprefix("torch.")
    return asked


def same_names(asked: str, made: VaeInfo, out: Path) -> tuple[str, str]:
    """The set's VAE and the wanted one, under one name where they are the same VAE."""
    if not made.name or Path(asked).resolve() == (out / VAE_FOLDER).resolve():
        return asked, asked
    on_hub = is_hub_name(Path(asked))
    if made.path == VAE_FOLDER and asked != made.name and not on_hub:  # came from the disk, may be elsewhere by now
        return made.name, Path(asked).resolve().name
    return PRESETS.get(made.name, made.name), PRESETS.get(asked, asked)


def say_once() -> Say:
    """Prints, in the first of several processes."""
    return print if own_share().start == 0 else lambda line: None


def progress(what: str, total: int, unit: str, done: int = 0) -> tqdm[Any]:
    """A progress bar with an ETA; other processes than the first show none."""
    return bar(None, what, total, unit, done, hidden=own_share().start != 0)
