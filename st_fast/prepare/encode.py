"""Images → moments, a shard at a time: threads decode one batch of files while the VAE encodes the batch before."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from st_fast.core.errors import UserError
from st_fast.core.latents import Normalisation
from st_fast.core.machine import usable_cpus
from st_fast.data.images import Size, load_image, named_size, sides
from st_fast.data.manifest import FILE_NAME, UPRIGHT, Manifest, ShardEntry, VaeInfo, check_readable
from st_fast.data.source import Source
from st_fast.model.autoencoders import VAE, Posterior, autoencoder
from st_fast.model.vae import encode_moments, latent_shape, vae_hash
from st_fast.prepare.job import Produced, Progress
from st_fast.prepare.writing import shard_name


def plan(source: Source, size: Size, flip: bool, dtype: str, shard_size: int) -> dict[str, Any]:
    """What a set is made from and how, but for the VAE. As JSON has it: height and width are a list."""
    return {
        "source": source.description, "images": source.digest(), "count": len(source.names),
        "content": source.content(), "probe": source.probe(),
        "num_classes": source.num_classes, "class_names": list(source.class_names),
        "size": list(size) if isinstance(size, tuple) else size,
        "flip": flip, "dtype": dtype, "shard_size": shard_size,
    } | dict(source.columns)  # fmt: skip


@dataclass(frozen=True)
class Latents:
    """What records are made of a VAE's latents."""

    normalisation: Normalisation
    posterior: Posterior = "sample"


VAE_OWN = "vae_own"
"""In job.json: what the VAE says of its latents itself, which is what a command asks for by leaving options out."""


def own_latents(vae: VAE) -> Latents:
    """What records are made of a VAE's latents where no option says otherwise."""
    return Latents(autoencoder(vae).normalisation, autoencoder(vae).posteriors[0])


def plan_latents(vae: VAE, how: Latents) -> dict[str, Any]:
    """What a set's latents follow from beside its images, as JSON has it."""
    return {
        "channels": autoencoder(vae).channels,  # pixels and pixels-gray have one hash, of no weights
        "vae": vae_hash(vae), "precision": str(vae.dtype).removeprefix("torch."),
        "normalisation": str(how.normalisation), "posterior": how.posterior, VAE_OWN: asdict(own_latents(vae)),
    }  # fmt: skip


class Encoder:
    """The producer of shards from a source of images (see `job.Producer`).

    dtype: of the stored moments. shard_size: records a shard; with `flip` half as many images. upright: images are
    turned as their EXIF says, which work begun by an older version does not. UserError before any work where the
    manifest would be too large to be read.
    """

    def __init__(
        self, source: Source, vae: VAE, info: VaeInfo, how: Latents, size: Size, flip: bool, dtype: str,
        batch_size: int, shard_size: int, upright: bool = True,
    ) -> None:  # fmt: skip
        self.source, self.vae, self.size, self.batch_size, self.upright = source, vae, size, batch_size, upright
        self.left_out = source.left_out
        self.views = 2 if flip else 1
        self.images_a_shard = max(1, shard_size // self.views)
        self.shards = -(-len(source.names) // self.images_a_shard)
        (channels, height, _), (*_, width) = (latent_shape(vae, side) for side in sides(size))
        self.template = Manifest(
            count=0,
            shape=(channels if how.posterior == "mean" else 2 * channels, height, width),
            dtype=dtype,
            scale=how.normalisation.scale,
            shift=how.normalisation.shift,
            latents_mean=how.normalisation.latents_mean,
            latents_std=how.normalisation.latents_std,
            posterior=how.posterior,
            vae=info,
            source=f"{source.description}, {UPRIGHT * upright}centre crop {named_size(size)}",
            num_classes=source.num_classes,
            flip=flip,
            class_names=source.class_names,
        )
        entries = (ShardEntry(shard_name(number), 0, 2**40, "0" * 64) for number in range(self.shards))
        check_readable(replace(self.template, shards=tuple(entries)), Path(FILE_NAME))
        self.fingerprint = plan(source, size, flip, dtype, shard_size) | plan_latents(vae, how) | {"upright": upright}

    def images_of(self, number: int) -> range:
        """The numbers of the images that shard `number` is made of."""
        first = number * self.images_a_shard
        return range(first, min(first + self.images_a_shard, len(self.source.names)))

    def produce(self, number: int, progress: Progress) -> Produced:
        """Encodes the images of shard `number`: a batch is decoded while the VAE encodes the one before.

        With flips, image i of those that can be used gives records 2i and 2i + 1.
        """
        numbers, size, names, made = self.images_of(number), self.batch_size, self.source.names, self.template
        moments, labels = [np.empty((0, *self.template.shape), self.template.dtype)], [np.empty(0, np.int64)]
        skipped: dict[str, str] = {}
        with ThreadPoolExecutor(max(2, usable_cpus()), "st_fast images") as pool:
            ahead = pool.map(self._load, numbers[:size])
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                loaded, ahead = ahead, pool.map(self._load, numbers[start + size : start + 2 * size])
                images, kept = [], []
                for image, pixels in zip(part, loaded, strict=True):
                    if isinstance(pixels, str):
                        skipped[names[image]] = pixels
                        tqdm.write(f"skipped: {names[image]!a}: {pixels}")
                    else:
                        images.append(torch.from_numpy(pixels))
                        kept.append(image)
                if images:
                    batch = torch.stack(images)  # (n, C, H, W), or 2n with flips
                    if self.views == 2:
                        batch = torch.stack((batch, batch.flip(-1)), dim=1).flatten(0, 1)
                    found = encode_moments(self.vae, batch, made.posterior, made.normalisation).cpu()
                    moments.append(found.to(getattr(torch, self.template.dtype)).numpy())
                    labels.append(np.repeat(self.source.labels[kept], self.views))
                progress(len(part))
        return np.concatenate(moments), np.concatenate(labels), skipped

    def _load(self, number: int) -> np.ndarray | str:
        """Image `number` as uint8 (C, H, W), or why it can't be used."""
        try:
            return load_image(self.source.read(number), self.size, autoencoder(self.vae).in_channels, self.upright)
        except UserError as error:  # BadImage, or a damaged member of an archive
            return str(error)
        except OSError as error:
            return error.strerror or str(error)
