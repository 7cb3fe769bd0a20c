"""The modes of `st_fast.prepare`, one function each."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from st_fast.core.comparison import check_same
from st_fast.core.errors import UserError, counted
from st_fast.core.files import printable, read_json, write_folder, write_json_atomic
from st_fast.core.machine import local_rank, rank_count
from st_fast.core.progress import bar
from st_fast.core.writing import save_pretrained
from st_fast.data.ahead import RecordSet
from st_fast.data.features import FOLDER, features_folder, open_features
from st_fast.data.images import load_image
from st_fast.data.manifest import FILE_NAME, VaeInfo, read_manifest
from st_fast.data.repa import ASSUMED, RepaSet, refuse_unknown_vae
from st_fast.data.shards import open_data
from st_fast.data.sources import Source, open_source
from st_fast.model.encoders import load_encoder
from st_fast.model.vae import (
    PIXELS,
    PRESETS,
    VAE,
    encode_moments,
    load_vae,
    refuse_normalised,
    vae_hash,
    vae_scale,
    vae_shift,
)
from st_fast.prepare.encode import Encoder, plan
from st_fast.prepare.features import open_record_images, template, write_features
from st_fast.prepare.job import (
    JOB_FILE,
    SKIPPED_FILE,
    check_finished,
    check_unfinished,
    is_done,
    own_share,
    run_job,
)
from st_fast.prepare.repa import RepaProducer, check_target, write_repa
from st_fast.prepare.small_vae import SmallVae, latent_scale, train_vae
from st_fast.sample.model import decoder
from st_fast.sample.previews import grid, save_png

VAE_FOLDER = "vae"
SMALL_FILE = "trained_with.json"
"""In a small VAE's folder: the options that it was trained with."""
WIDTHS = {2: (32, 32), 4: (16, 32, 64), 8: (16, 32, 64, 64)}
"""Channels of a small VAE's levels, by how much smaller its latents are."""
TRAINING_BYTES = 2**30
"""Pixels at most that a small VAE is trained on."""


def verify(args: argparse.Namespace) -> None:
    """Re-reads everything."""
    records = open_data(args.paths[0], verify=True, say=print)
    for folder in sorted((args.paths[0] / FOLDER).glob("*/")):
        features = open_features(args.paths[0], folder.name, records)
        features.verify()
        print(f"features: {printable(features.manifest.encoder)} of {features.manifest.count:,} records verified")
        features.close()
    records.close()


def stats(args: argparse.Namespace) -> None:
    """Prints statistics and writes a picture of 64 random records, decoded."""
    folder = args.paths[0]
    records = open_data(folder, verify=False)
    manifest = records.manifest
    print(describe(records))
    chosen = np.random.default_rng(0).choice(manifest.count, min(64, manifest.count), replace=False)
    mean, std = records.gather(np.sort(chosen))[0].float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    decode = decoder(folder, manifest, compute(args)[0])
    save_png(grid(decode((mean + std * noise) * manifest.scale), 8), folder / "stats.png")
    print(f"picture: {folder / 'stats.png'}")


def describe(records: RecordSet) -> str:
    """Per-channel statistics of the sampled latents mean + std · ξ, unscaled, and the number of records a class.

    Reads every record once; sums in float64. "std" is the total, the spread of the means plus the posterior's own; "of
    which posterior" the root mean square of the posterior's std.
    """
    manifest, count = records.manifest, len(records)
    total, square, own = np.zeros((3, manifest.channels))
    with bar(None, "reading", count, "record") as progress:
        for start in range(0, count, 1024):
            moments = records.gather(np.arange(start, min(start + 1024, count)))[0].numpy().astype(np.float64)
            mean, std = np.split(moments, 2, axis=1)
            total += mean.mean((2, 3)).sum(0)
            square += (mean**2).mean((2, 3)).sum(0)
            own += (std**2).mean((2, 3)).sum(0)
            progress.update(len(moments))
    average = total / count
    deviation = np.sqrt(square / count - average**2 + own / count)
    overall = np.sqrt((deviation**2 + average**2).mean() - average.mean() ** 2)  # over all channels together
    classes = np.bincount(records.labels, minlength=manifest.num_classes)
    lines = [f"{count:,} records, {int((classes > 0).sum())} of {len(classes)} classes present"]
    lines += ["channel      mean       std  of which posterior"]
    for number, row in enumerate(zip(average, deviation, np.sqrt(own / count), strict=True)):
        lines.append(f"{number:7d}  {row[0]:8.4f}  {row[1]:8.4f}  {row[2]:8.4f}")
    lines.append(f"    all  std {overall:.4f}; 1/std = {1 / overall:.5f} would give unit variance")
    if len(classes) <= 20:
        labels = tuple(map(printable, manifest.class_names)) or tuple(map(str, range(len(classes))))
        lines.append("classes: " + ", ".join(f"{n} {c}" for n, c in zip(labels, classes.tolist(), strict=True)))
    else:
        low, middle, high = np.percentile(classes, (0, 50, 100))
        lines.append(f"records a class: {low:.0f} at least, {middle:.0f} in the middle, {high:.0f} at most")
    return "\n".join(lines)


def features(args: argparse.Namespace) -> None:
    """Features of the images beside their latents."""
    source_path, out = args.paths
    records = open_data(out, verify=False)
    encoder = load_encoder(args.features, *compute(args))
    images = open_record_images(out, records, str(source_path), args.subset, args.size)
    size = images.manifest.shape[-1]
    planned = template(encoder, records, size)
    print(
        f"{features_folder(out, encoder.name)}: {planned.count:,} records of {planned.dtype} {planned.shape}, "
        f"{planned.count * planned.record_bytes / 1e9:.2f} GB"
    )
    if not args.dry_run:
        with progress("encoding", len(records), "record") as shown:
            write_features(out, records, encoder, images, args.batch_size, own_share(), shown.update)


def from_repa(args: argparse.Namespace) -> None:
    """REPA's layout → shards. Another VAE than the published latents' is asked for its scale, and kept beside them.

    Where the folder says what made its latents, that is kept, and `--vae` may only name the same.
    """
    records, out = RepaSet(args.paths[0]), args.paths[1]
    if args.vae == ASSUMED:
        refuse_unknown_vae(records)
    vae, scale, info = None, records.manifest.scale, records.manifest.vae
    if args.vae not in (ASSUMED, info.name):
        if args.vae in ("small", *PIXELS):
            raise UserError(f"--vae {args.vae}: latents in REPA's layout were made by an AutoencoderKL; name it")
        told, (vae, info) = info, given_vae(args)
        if records.origin is not None and told.hash not in ("", info.hash):
            raise UserError(f"--vae {args.vae}: other weights than those of {told.name}, which {records.folder} names")
        if vae.config.latent_channels != records.manifest.channels:
            found = f"{vae.config.latent_channels} channels, the latents have {records.manifest.channels}"
            raise UserError(f"--vae {args.vae}: {found}")
        if vae_shift(vae) and records.origin is None:  # REPA's means are as the VAE gives them, ours without the shift
            raise UserError(f"--vae {args.vae}: has a shift_factor, which REPA's layout has no place for")
        scale = vae_scale(vae)
    producer = RepaProducer(records, args.dtype, args.shard_size, info, scale)
    if (out / FILE_NAME).is_file():
        check_finished(out, producer.fingerprint)
        print(f"{out}: complete already; --verify re-reads it")
        return
    if args.dry_run:
        print(f"{out}: {len(records):,} records of {args.dtype} in {counted(producer.shards, 'shard')}")
        return
    if vae is not None:
        keep_vae(vae, info, out)
    else:
        copy_vae(info, records.folder, out)
    with progress("converting", len(records), "record") as shown:
        run_job(out, producer, 0, shown.update)


def to_repa(args: argparse.Namespace) -> None:
    """Shards → REPA's layout."""
    source, out = args.paths
    records = open_data(source, verify=False)
    check_target(source, out)
    if args.dry_run:
        print(f"{out}: {len(records):,} files in vae-sd/")
        return
    copy_vae(records.manifest.vae, source, out)
    with progress("converting", len(records), "record") as shown:
        write_repa(records, out, shown.update)
    print(f"{out}: {len(records):,} files; REPA's own trainer also wants the images, as many in images/")


def encode(args: argparse.Namespace) -> None:
    """Images → shards."""
    source, out = open_source(args.paths[0], args.subset), args.paths[1]
    if own_share().start == 0:
        print(source.summary())
        if source.left_out:
            print(f"{source.left_out_summary()}; {SKIPPED_FILE} lists them")
    if (out / FILE_NAME).is_file():
        check_finished(out, finished_plan(args, source, out))
        print(f"{out}: complete already; --verify re-reads it")
        return
    begun = read_json(out / JOB_FILE) if (out / JOB_FILE).is_file() else {"upright": True}
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
    encoder = Encoder(source, vae, info, args.size, args.flip, args.dtype, args.batch_size, args.shard_size, upright)
    side = encoder.template.shape[-1]
    if side % 2 and own_share().start == 0:
        print(f"latents of {side}×{side}: a model's patch must divide {side}, so patch 2 can't be used")
    if (out / JOB_FILE).is_file():
        check_unfinished(out, encoder.fingerprint)
    done = [is_done(out, number) for number in range(encoder.shards)]
    if args.dry_run:
        template, records = encoder.template, len(source.names) * encoder.views
        print(
            f"{out}: {records:,} records of {template.dtype} {'×'.join(map(str, template.shape))}, "
            f"{records * template.record_bytes / 1e9:.2f} GB in {counted(encoder.shards, 'shard')}, "
            f"{sum(done)} of them done\n"
            f"VAE {info.name}, scale {template.scale:.5f}, SHA-256 {info.hash[:12]}…"
        )
        return
    keep_vae(vae, info, out)
    images = np.array([len(encoder.images_of(number)) for number in range(encoder.shards)])[own_share()]
    with progress("encoding", int(images.sum()), "image", int(images[done[own_share()]].sum())) as shown:
        run_job(out, encoder, args.max_bad, shown.update)


def finished_plan(args: argparse.Namespace, source: Source, out: Path) -> dict[str, Any]:
    """What is asked of a finished set, without loading a VAE from elsewhere than a local folder."""
    made, asked = read_manifest(out), plan(source, args.size, args.flip, args.dtype, args.shard_size)
    found, wanted = same_names(args.vae, made.vae, out)
    if found != wanted:
        raise UserError(
            f"{out}: complete, but made with VAE {found} (now {wanted}); use that, or name another folder to write"
        )
    if args.vae == "small":
        check_small(args, out)
    elif Path(args.vae).is_dir() and args.vae not in PIXELS:
        asked["vae"] = vae_hash(load_vae(args.vae, *compute(args)))
        if made.vae.hash not in ("", asked["vae"]):
            raise UserError(f"{out}: complete, but made with another VAE than {args.vae}: its weights changed")
    if args.precision != "auto":
        asked["precision"] = str(compute(args)[1]).removeprefix("torch.")
    return asked


def same_names(asked: str, made: VaeInfo, out: Path) -> tuple[str, str]:
    """The set's VAE and the wanted one, under one name where they are the same VAE."""
    if not made.name or Path(asked).resolve() == (out / VAE_FOLDER).resolve():
        return asked, asked
    if made.path == VAE_FOLDER:  # came from a local folder, which may be elsewhere by now
        return made.name, Path(asked).resolve().name
    return PRESETS.get(made.name, made.name), PRESETS.get(asked, asked)


def progress(what: str, total: int, unit: str, done: int = 0) -> tqdm[Any]:
    """A progress bar with an ETA; other processes than the first show none."""
    return bar(None, what, total, unit, done, hidden=own_share().start != 0)


def compute(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the precision of the VAE."""
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device that PyTorch can use; allowed: auto, cpu")
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    bf16 = args.precision == "bf16" or (args.precision == "auto" and cuda)
    return device, torch.bfloat16 if bf16 else torch.float32


def the_vae(args: argparse.Namespace, source: Source, out: Path) -> tuple[VAE, VaeInfo]:
    """The wanted VAE and its entry in the manifest.

    One that is not on the hub, trained here or from a local folder, is kept in OUT/vae, so that the set is complete.
    """
    if args.vae != "small":
        return given_vae(args)
    device, dtype = compute(args)
    if not (out / VAE_FOLDER).is_dir():
        if rank_count() > 1:
            raise UserError("--vae small: it has to be trained first, by one process: run this without torchrun once")
        if args.size // factor_of(args) % 2:
            raise UserError(
                f"--size {args.size}: latents of a small VAE would have an odd side, {args.size // factor_of(args)}, "
                f"which patch 2 can't divide; give a multiple of {2 * factor_of(args)}"
            )
        with write_folder(out / VAE_FOLDER) as writing:
            save_pretrained(small_vae(args, source, device), writing)
            write_json_atomic(writing / SMALL_FILE, small_settings(args))
    check_small(args, out)
    vae = load_vae(out / VAE_FOLDER, device, dtype)
    return vae, VaeInfo("small", vae_hash(vae), VAE_FOLDER)


def given_vae(args: argparse.Namespace) -> tuple[VAE, VaeInfo]:
    """The VAE that `--vae` names and its entry in the manifest; UserError for one that normalises its latents."""
    vae = load_vae(args.vae, *compute(args))
    refuse_normalised(vae, f"--vae {args.vae}")
    local = Path(args.vae).is_dir() and args.vae not in PIXELS
    return vae, VaeInfo(Path(args.vae).resolve().name if local else args.vae, vae_hash(vae), local * VAE_FOLDER)


def factor_of(args: argparse.Namespace) -> int:
    """How much smaller a small VAE's latents are: given, or by the images' size."""
    return int(args.vae_factor or (2 if args.size <= 32 else 4 if args.size <= 64 else 8))


def small_settings(args: argparse.Namespace) -> dict[str, int]:
    """What a small VAE follows from, but for its images, by option."""
    return {"--size": args.size, "--vae-factor": factor_of(args), "--vae-steps": args.vae_steps}


def check_small(args: argparse.Namespace, out: Path) -> None:
    """UserError where OUT's small VAE was trained with other options; folders of older versions do not tell."""
    folder = out / VAE_FOLDER
    if (folder / SMALL_FILE).is_file():
        there, remedy = read_json(folder / SMALL_FILE), "use those, or name another folder to write"
        check_same(there, small_settings(args), f"{folder}: a small VAE trained with", remedy)


def small_vae(args: argparse.Namespace, source: Source, device: torch.device) -> VAE:
    """Trains a small VAE on evenly spaced images of the source."""
    factor = factor_of(args)
    images = training_images(source, args.size).to(device)
    vae = train_vae(images, SmallVae(WIDTHS[factor], args.vae_steps))
    vae.register_to_config(scaling_factor=latent_scale(encode_moments(vae, images[:512]).cpu()))
    return vae


def training_images(source: Source, size: int) -> Tensor:
    """uint8 (n, 3, size, size): evenly spaced images, TRAINING_BYTES at most; those that can't be used are left out."""
    step = -(-len(source.names) * 3 * size * size // TRAINING_BYTES)
    images = []
    numbers = range(0, len(source.names), step)
    for number in bar(numbers, "reading images", len(numbers), "image"):
        try:
            images.append(torch.from_numpy(load_image(source.read(number), size, 3)))
        except (UserError, OSError):
            continue  # encoding names and counts it
    if not images:
        raise UserError(f"{source.description}: not one usable image")
    return torch.stack(images)


def copy_vae(info: VaeInfo, folder: Path, out: Path) -> None:
    """Puts a copy of the VAE that lies in a set's folder, if one does, into OUT, once."""
    if not info.path or own_share().start != 0 or not (source := Path(info.source(folder))).is_dir():
        return
    if not (out / info.path).is_dir():
        with write_folder(out / info.path) as writing:
            shutil.copytree(source, writing, dirs_exist_ok=True)


def keep_vae(vae: VAE, info: VaeInfo, out: Path) -> None:
    """Puts a copy of a VAE from a local folder into OUT, once; UserError where OUT has another."""
    folder = out / VAE_FOLDER
    if not info.path or own_share().start != 0:
        return
    if not folder.is_dir():
        with write_folder(folder) as writing:
            save_pretrained(vae, writing)
    elif vae_hash(load_vae(folder, vae.device, vae.dtype)) != info.hash:
        raise UserError(f"{folder}: it holds another VAE than {info.name}; name another folder to write")
