"""Shards out of other projects' latents, whatever their layout: `--from-latents`, `--from-repa` and `--from-coco`."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from st_fast.core.errors import UserError, counted
from st_fast.core.latents import Normalisation
from st_fast.core.machine import rank_count
from st_fast.core.progress import bar
from st_fast.data.layouts import READABLE, recognise
from st_fast.data.layouts.coco import CocoSet, is_coco
from st_fast.data.layouts.npy import NpyRecords
from st_fast.data.layouts.records import ForeignRecords
from st_fast.data.layouts.repa import RepaSet
from st_fast.data.layouts.webdataset import WebdatasetSet
from st_fast.data.manifest import FILE_NAME, VaeInfo, read_manifest
from st_fast.data.text import CocoText
from st_fast.model.autoencoders import VAE, Autoencoder, autoencoder
from st_fast.model.vae import NO_NORMALISATION, PIXELS, PRESETS
from st_fast.prepare.job import Produced, Progress, check_finished, own_share, run_job
from st_fast.prepare.normalising import read_stats
from st_fast.prepare.ready import check_free, tell_ready, text_command
from st_fast.prepare.text import write_captions, write_states
from st_fast.prepare.vaes import copy_vae, given_vae, keep_vae


class LatentsProducer:
    """Shards with the records of another project's set (see `job.Producer`)."""

    def __init__(self, records: ForeignRecords, digest: str, dtype: str, shard_size: int, vae_hash: str) -> None:
        """digest: of the set as it lies, before options changed its manifest. vae_hash: of another VAE than its own."""
        self.records, self.shard_size, self.shards = records, shard_size, -(-len(records) // shard_size)
        self.template = replace(records.manifest, count=0, dtype=dtype)
        self.left_out: Mapping[str, str] = {}
        self.fingerprint: dict[str, Any] = {
            "records": digest, "dtype": dtype, "shard_size": shard_size, "vae": vae_hash,
            "normalisation": str(self.template.normalisation),
        }  # fmt: skip

    def produce(self, number: int, progress: Progress) -> Produced:
        """The records of shard `number`."""
        first = number * self.shard_size
        indices = np.arange(first, min(first + self.shard_size, len(self.records)))
        moments, labels = self.records.gather(indices)
        progress(len(indices))
        with np.errstate(over="ignore"):  # what does not fit is refused before it is written
            return moments.numpy().astype(self.template.dtype), labels.numpy(), {}


def from_latents(args: argparse.Namespace) -> None:
    """Whatever another project's latents lie there → shards."""
    path = args.paths[0]
    layout = recognise(path)
    if layout is None:
        found = "no such file or folder" if not path.exists() else f"no latents that can be read: {READABLE}"
        raise UserError(f"{path}: {'a set of ours already' if (path / FILE_NAME).is_file() else found}")
    convert(args, layout.open(path))


def from_repa(args: argparse.Namespace) -> None:
    """REPA's layout → shards."""
    convert(args, RepaSet(args.paths[0]))


def from_coco(args: argparse.Namespace) -> None:
    """U-ViT's layout of COCO → shards of latents, captions.jsonl, and shards of the captions' states."""
    if not is_coco(args.paths[0]):
        raise UserError(
            f"{args.paths[0]}: not U-ViT's layout: 0.npy and 0_0.npy are needed, as in coco256_features/train"
        )
    convert(args, CocoSet(args.paths[0]))


def convert(args: argparse.Namespace, records: ForeignRecords) -> None:
    """Records → shards, with captions and their states where there are such."""
    if not isinstance(records, CocoSet):
        copy_latents(args, records)
        records.close()
        return
    if args.recipe:
        raise UserError(f"--recipe {args.recipe}: is made for classes; {records.folder} has captions")
    if rank_count() > 1:
        raise UserError(f"{records.folder}: files are copied, by one process: run this without torchrun")
    out, captions, stored = args.paths[1], records.captions(), CocoText(records)
    print(
        f"{records.folder}: {len(records):,} images, (mean, {records.kind}); states of {stored.manifest.count - 1:,} "
        f"captions, {'with' if any(map(any, captions)) else 'without'} their words"
    )
    copy_latents(args, records)
    if not args.dry_run:
        write_captions(out, captions)
        planned = replace(stored.manifest, latents=read_manifest(out).digest, dtype="float16")
        with bar(None, "converting", planned.count, "caption") as shown:
            write_states(out, planned, stored.states, progress=shown.update)
        print(f"train: {text_command(records.manifest, planned, out)}")
    stored.close()
    records.close()


def copy_latents(args: argparse.Namespace, records: ForeignRecords) -> None:
    """Records → shards; the VAE that `--vae` names, or that lies in the set's folder, is kept beside them."""
    check_free(args.recipe, args.paths[1])
    out, digest, loaded = args.paths[1], records.digest, asked_vae(args, records)
    info = records.manifest.vae if loaded is None else loaded[1]
    other = loaded is not None
    how = asked_normalisation(args, records, autoencoder(loaded[0]) if loaded else None)
    records.manifest = replace(records.manifest, vae=info, **asdict(how))
    producer = LatentsProducer(records, digest, args.dtype, args.shard_size, info.hash if other else "")
    template = producer.template
    if (out / FILE_NAME).is_file():
        check_finished(out, producer.fingerprint)
        print(f"{out}: complete already; --verify re-reads it")
        if not args.dry_run and own_share().start == 0:
            tell_ready(out, args.recipe, print)
        return
    if args.dry_run:
        print(
            f"{out}: {len(records):,} records of {args.dtype} {'×'.join(map(str, template.shape))} in "
            f"{counted(producer.shards, 'shard')}, VAE {info.name}, {how}"
        )
        return
    if other:
        keep_vae(args.vae, info, out, args.vae_variant)
    else:
        copy_vae(info, records.folder, out)
    with bar(None, "converting", len(records), "record", hidden=own_share().start != 0) as shown:
        complete = run_job(out, producer, 0, shown.update)
    if complete:
        tell_ready(out, args.recipe, tqdm.write)


def asked_vae(args: argparse.Namespace, records: ForeignRecords) -> tuple[VAE, VaeInfo] | None:
    """The VAE that `--vae` names, where it is not the set's own; UserError unless it can have made the latents."""
    told = records.manifest.vae
    if args.vae is None and args.vae_variant is not None:
        raise UserError(f"--vae-variant {args.vae_variant}: is of the VAE that --vae names; name it, too")
    same = args.vae_variant is None and told.name in (args.vae, PRESETS.get(args.vae))
    if args.vae is None or same:
        records.refuse_unknown()
        return None
    if args.vae in ("small", *PIXELS):
        raise UserError(f"--vae {args.vae}: latents in {records.folder} were made by an AutoencoderKL; name it")
    vae, info = given_vae(args)
    if records.origin is not None and told.hash not in ("", info.hash):
        raise UserError(f"--vae {args.vae}: other weights than those of {told.name}, which {records.folder} names")
    kind = autoencoder(vae)
    if isinstance(records, WebdatasetSet):
        records.take_channels(kind.channels)
    if kind.channels != records.manifest.channels:
        raise UserError(f"--vae {args.vae}: {kind.channels} channels, the latents have {records.manifest.channels}")
    if told.factor not in (0, kind.factor):
        raise UserError(
            f"--vae {args.vae}: reduces an image by {kind.factor}, the latents' VAE by {told.factor} ({told.name})"
        )
    return vae, replace(info, black=told.black)


def asked_normalisation(args: argparse.Namespace, records: ForeignRecords, kind: Autoencoder | None) -> Normalisation:
    """`--scale` and `--latents-stats`, else what the set or its project's code says, or the VAE where that knows best.

    UserError where no other is right than that of the files, and where nothing says any.
    """
    how = records.manifest.normalisation
    if records.scale_of == "vae" and kind is not None:
        how = kind.normalisation
        if isinstance(records, NpyRecords) and replace(how, scale=1.0) != NO_NORMALISATION:
            # their means are as the VAE gives them, and are copied as they are
            raise UserError(f"--vae {args.vae}: has {how}; {records.folder} has a place for the scale alone")
        if how == NO_NORMALISATION and args.scale is None and args.latents_stats is None and not kind.normalises:
            raise UserError(
                f"--vae {args.vae}: nothing says how its latents are normalised: --latents-stats FILE with their mean "
                "and std, or --scale (1 for none)"
            )
    if args.latents_stats:
        if records.scale_of == "files" or how.latents_std or isinstance(records, NpyRecords):
            raise UserError(f"--latents-stats {args.latents_stats}: the latents in {records.folder} have {how} already")
        if args.latents_stats == "auto":
            raise UserError("--latents-stats auto: measures images, of which there are none; name a file")
        how = read_stats(Path(args.latents_stats), records.manifest.channels)
    if args.scale is not None and args.scale != how.scale:
        if records.scale_of == "files":
            raise UserError(f"--scale {args.scale:g}: the latents in {records.folder} have {how.scale:g}; leave it out")
        how = replace(how, scale=args.scale)
    if isinstance(records, NpyRecords):
        how = replace(how, shift=records.manifest.shift)  # as older versions converted them
    return how
