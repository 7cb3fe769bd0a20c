"""How the latents of a set are normalised: by the VAE's configuration, or by what the command says instead."""

import argparse
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import is_pickle, make_folder, read_header, read_json, shown, write_json_atomic
from st_fast.core.latents import Normalisation
from st_fast.core.machine import rank_count
from st_fast.core.progress import bar
from st_fast.core.records import record_from
from st_fast.core.torch_files import read_pickled
from st_fast.data.images import load_image
from st_fast.data.manifest import Manifest
from st_fast.data.source import Source
from st_fast.model.autoencoders import VAE, Posterior, autoencoder
from st_fast.model.vae import NO_NORMALISATION, encode_moments
from st_fast.prepare.encode import VAE_OWN, Latents
from st_fast.prepare.job import JOB_FILE

MEASURED_FILE = "latents_stats.json"
"""Where `--latents-stats auto` keeps what it measured, so that work goes on with the same numbers."""
MEASURED = 2_048
"""Images at most, evenly spaced, that it measures."""
BATCH = 32
NAMES = {"mean": ("latents_mean", "mean"), "std": ("latents_std", "std"), "var": ("latents_var", "var")}
"""What statistics are called in files: diffusers', LightningDiT's and RAE's names."""


def latents_of(args: argparse.Namespace, vae: VAE, source: Source, out: Path) -> Latents:
    """What records are made of the VAE's latents, by the options; UserError for what the VAE can't be asked for."""
    kind = autoencoder(vae)
    posterior = kind.posteriors[0] if args.posterior == "auto" else args.posterior
    if posterior not in kind.posteriors:
        raise UserError(f"--posterior {posterior}: {args.vae} has none to draw from; allowed: mean")
    how = kind.normalisation
    if args.latents_stats == "auto":
        how = measured(args, vae, source, out, posterior)
    elif args.latents_stats:
        how = read_stats(Path(args.latents_stats), kind.channels)
    if how == NO_NORMALISATION and args.scale is None and not kind.normalises:
        raise UserError(
            f"--vae {args.vae}: nothing says how its latents are normalised, and training on them as they are fails "
            "silently: --latents-stats FILE with their mean and std, --latents-stats auto, or --scale (1 for none)"
        )
    return Latents(how if args.scale is None else replace(how, scale=args.scale), posterior)


def kept_own_latents(out: Path) -> Latents | None:
    """What the VAE of a set says of its latents itself, as its job.json has it; None for one of an older version."""
    path = out / JOB_FILE
    told = read_json(path).get(VAE_OWN) if path.is_file() else None
    return None if told is None else record_from(Latents, told, f"{path}: {VAE_OWN}")


def check_same_latents(args: argparse.Namespace, made: Manifest, out: Path, own: Latents | None = None) -> None:
    """UserError where the options ask for other latents than a finished set has.

    own: what the VAE that they name says itself, where that is known: it is asked for by leaving an option out.
    """
    wanted, posterior = made.normalisation, args.posterior
    if args.latents_stats and (args.latents_stats != "auto" or (out / MEASURED_FILE).is_file()):
        path = out / MEASURED_FILE if args.latents_stats == "auto" else Path(args.latents_stats)
        wanted = read_stats(path, made.channels)
    elif own is not None:
        wanted = own.normalisation
    wanted = wanted if args.scale is None else replace(wanted, scale=args.scale)
    if posterior == "auto":
        posterior = made.posterior if own is None else own.posterior
    differing = made.normalisation.differences(wanted)
    if posterior != made.posterior:
        differing.append(f"posterior {made.posterior} ({posterior})")
    if args.latents_stats == "auto" and not (out / MEASURED_FILE).is_file():
        differing.append("statistics that were given (measured ones)")
    if differing:
        raise UserError(f"{out}: complete, but made with {', '.join(differing)}; name another folder to write")


def read_stats(path: Path, channels: int) -> Normalisation:
    """The mean and std, or variance, of each channel out of a .pt, .safetensors or .json file.

    UserError for a file that has none, for other numbers of channels, and for a std that isn't above 0.
    """
    where = f"--latents-stats {path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    if path.suffix == ".json":
        content: Any = read_json(path)
    elif is_pickle(path):
        content = read_pickled(path)
    else:
        read_header(path)
        content = load_file(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: holds {type(content).__name__}; mean and std, or var, of each channel are needed")
    if twice := [names for names in NAMES.values() if all(name in content for name in names)]:
        raise UserError(f"{where}: has both {twice[0][0]} and {twice[0][1]}; which is meant can't be known")
    found = {kind: next((content[name] for name in names if name in content), None) for kind, names in NAMES.items()}
    if found["mean"] is None or (found["std"] is None) == (found["var"] is None):
        raise UserError(f"{where}: has {shown(list(content))}; mean, and std or var, of each channel are needed")
    mean, std, var = (_flat(value, where) for value in found.values())
    if wrong := [value for value in var if not value > 0]:
        raise UserError(f"{where}: var = {shown(wrong[0])}: a positive number is needed")
    how = Normalisation(1.0, 0.0, mean, std or tuple(float(np.sqrt(value)) for value in var))
    missing = "" if mean and how.latents_std else f"no numbers; the latents have {channels} channels"
    if problem := how.problem(channels) or missing:
        raise UserError(f"{where}: {problem}")
    return how


def _flat(value: Any, where: str) -> tuple[float, ...]:
    """A tensor or list of one number a channel, whatever its shape, as plain numbers."""
    if value is None:
        return ()
    try:
        array = value.double().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    if array.size != max(array.shape, default=0):
        raise UserError(f"{where}: statistics of shape {shown(array.shape)}; one number a channel is needed")
    return tuple(array.reshape(-1).tolist())


def measured(args: argparse.Namespace, vae: VAE, source: Source, out: Path, posterior: Posterior) -> Normalisation:
    """Mean and std of each channel over evenly spaced images of the source, kept in OUT.

    Of what a step sees: drawn latents, whose spread is also the posteriors' own, or the means alone.
    """
    kept = out / MEASURED_FILE
    if kept.is_file():
        return read_stats(kept, autoencoder(vae).channels)
    if rank_count() > 1:
        raise UserError("--latents-stats auto: they are measured first, by one process: run this without torchrun once")
    total, count = np.zeros((2, autoencoder(vae).channels)), 0
    for moments in _spaced(args, vae, source):
        mean, std = moments.double().cpu().chunk(2, dim=1)
        square = mean.square() + (std.square() if posterior == "sample" else 0)
        total += np.stack([part.sum((0, 2, 3)).numpy() for part in (mean, square)])
        count += mean.numel() // mean.shape[1]
    if not count:
        raise UserError(f"{source.description}: not one usable image")
    average, squares = total / count
    deviation = np.sqrt(np.maximum(squares - average**2, 0))
    how = Normalisation(1.0, 0.0, tuple(average.tolist()), tuple(deviation.tolist()))
    if problem := how.problem(len(average)):
        raise UserError(f"--latents-stats auto: {problem}")
    make_folder(out)
    write_json_atomic(kept, {"latents_mean": list(how.latents_mean), "latents_std": list(how.latents_std)})
    return how


def _spaced(args: argparse.Namespace, vae: VAE, source: Source) -> Iterator[Tensor]:
    """Moments of evenly spaced images, not normalised, a batch at a time; those that can't be used are left out."""
    count = min(MEASURED, len(source.names))
    chosen, channels = np.linspace(0, len(source.names) - 1, count).astype(int).tolist(), autoencoder(vae).in_channels

    def usable() -> Iterator[Tensor]:
        for number in bar(chosen, "measuring", count, "image"):
            try:
                yield torch.from_numpy(load_image(source.read(number), args.size, channels))
            except (UserError, OSError):
                continue  # encoding names and counts it

    images = usable()
    while batch := list(itertools.islice(images, BATCH)):
        yield encode_moments(vae, torch.stack(batch), "sample", NO_NORMALISATION)
