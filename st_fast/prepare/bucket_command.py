"""`st_fast.prepare IMAGES OUT --buckets …`: the buckets of a folder, one after another."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from st_fast.core.errors import UserError, counted
from st_fast.core.files import make_folder, read_json
from st_fast.data.buckets import has_buckets, read_buckets, write_index
from st_fast.data.images import Size
from st_fast.data.manifest import FILE_NAME
from st_fast.data.source import Source
from st_fast.model.autoencoders import autoencoder
from st_fast.prepare.buckets import PATCH, all_sides, assigned, part_of, read_assigned, read_ratios
from st_fast.prepare.commands import finished_plan, open_images, progress, say_once
from st_fast.prepare.encode import Encoder, plan, plan_latents
from st_fast.prepare.job import JOB_FILE, check_finished, check_unfinished, own_share, run_job, skipped_in
from st_fast.prepare.normalising import latents_of
from st_fast.prepare.ready import tell_ready
from st_fast.prepare.text import keep_captions
from st_fast.prepare.vaes import VAE_FOLDER, factor_of, keep_vae, plan_variant, the_vae


def encode(args: argparse.Namespace) -> None:
    """Images → a folder of shards for each aspect ratio, and their captions if these are asked for."""
    ratios = read_ratios(args.buckets)
    if args.vae == "small":  # whose factor is known
        all_sides(ratios, args.size, PATCH * factor_of(args))  # before a VAE is trained
    (source, captions), out = open_images(args), args.paths[1]
    if (out / FILE_NAME).is_file():
        raise UserError(f"{out}: holds latents of one shape, without --buckets; name another folder to write")
    asked = plan(source, args.size, args.flip, args.dtype, args.shard_size) | {"buckets": list(ratios)}
    if has_buckets(out):
        check_finished(out, finished_plan(args, source, out) | asked)
        print(f"{out}: complete already; --verify re-reads it")
    else:
        if (out / JOB_FILE).is_file():
            check_unfinished(out, asked)  # before a VAE is trained
            if read_json(out / JOB_FILE).get("buckets") is None:
                raise UserError(f"{out}: begun without --buckets; use none, or name another folder to write")
        if args.dry_run and args.vae == "small" and not (out / VAE_FOLDER).is_dir():
            print(f"{out}: a small VAE would be trained on them first, {args.vae_steps:,} steps")
            return
        _encode(args, source, ratios, asked)
    if not has_buckets(out) or args.dry_run:
        return
    if captions:
        order = np.argsort(read_assigned(out, len(captions), len(ratios)), kind="stable")  # that of the records
        names, texts = [source.names[number] for number in order], [captions[number] for number in order]
        keep_captions(out, names, texts, list(read_buckets(out)))
    tell_ready(out, args.recipe, say_once())


def _encode(args: argparse.Namespace, source: Source, ratios: tuple[str, ...], asked: dict[str, Any]) -> None:
    """Makes this process's share of what is missing of every bucket, and the index once all are there."""
    out, say = args.paths[1], say_once()
    vae, info = the_vae(args, source, out)
    how = latents_of(args, vae, source, out)
    sides = all_sides(ratios, args.size, PATCH * autoencoder(vae).factor)
    if args.dry_run:
        say(f"{out}: buckets of {', '.join(folder_of(pair) for pair in sides)}, as images are nearest in aspect ratio")
        return
    make_folder(out)
    keep_vae(args.vae, info, out, args.vae_variant)
    asked = asked | {"sides": [list(pair) for pair in sides]} | plan_latents(vae, how) | plan_variant(args)
    check_unfinished(out, asked)
    buckets = assigned(out, source, sides)
    numbers = {pair: np.flatnonzero(buckets == place) for place, pair in enumerate(sides)}
    used = {folder_of(pair): (pair, found) for pair, found in numbers.items() if len(found)}
    told = ", ".join(f"{name} {counted(len(found), 'image')}" for name, (_, found) in used.items())
    unused = [folder_of(pair) for pair, found in numbers.items() if not len(found)]
    say(f"{out}: {told}" + (f"; none in {', '.join(unused)}" if unused else ""))
    encoders = {}
    for place, (name, (pair, found)) in enumerate(used.items()):
        size: Size = pair[0] if pair[0] == pair[1] else pair
        part = part_of(source, found, first=not place)
        encoders[name] = Encoder(part, vae, info, how, size, args.flip, args.dtype, args.batch_size, args.shard_size)
    for name, encoder in encoders.items():
        images = sum(len(encoder.images_of(number)) for number in range(encoder.shards)[own_share()])
        with progress(f"encoding {name}", images, "image") as shown:
            run_job(out / name, encoder, args.max_bad, shown.update)
    if all((out / name / FILE_NAME).is_file() for name in used):
        skipped = sum(skipped_in(out / name, encoder) for name, encoder in encoders.items())
        if skipped > args.max_bad:  # each alone has no more
            raise UserError(f"{out}: {counted(skipped, 'image')} can't be used, --max-bad allows {args.max_bad}")
        write_index(out, list(used))


def folder_of(pair: tuple[int, int]) -> str:
    """A bucket's folder: height and width in pixels."""
    return f"{pair[0]}x{pair[1]}"
