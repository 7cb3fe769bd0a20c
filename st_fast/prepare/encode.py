"""Images → moments, a shard at a time: threads decode one batch of files while the VAE encodes the batch before."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from st_fast.core.machine import usable_cpus
from st_fast.data.images import BadImage, load_image
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.sources import Source
from st_fast.model.vae import VAE, encode_moments, latent_shape, vae_hash, vae_scale
from st_fast.prepare.job import Produced


@dataclass(frozen=True)
class Encoding:
    """How images become moments."""

    size: int
    flip: bool
    dtype: str
    batch_size: int
    shard_size: int
    """Records a shard; with `flip` half as many images."""


class Encoder:
    """The producer of shards from a source of images (see `job.Producer`)."""

    def __init__(self, source: Source, vae: VAE, info: VaeInfo, encoding: Encoding) -> None:
        self.source, self.vae, self.info, self.encoding = source, vae, info, encoding
        self.channels = int(vae.config.in_channels)
        self.progress: Callable[[int], object] = lambda images: None
        """Called with the number of images done since the last call."""
        self.images_a_shard = max(1, encoding.shard_size // (2 if encoding.flip else 1))
        self.shards = -(-len(source.names) // self.images_a_shard)
        channels, height, width = latent_shape(vae, encoding.size)
        self.template = Manifest(
            count=0,
            shape=(2 * channels, height, width),
            dtype=encoding.dtype,
            scale=vae_scale(vae),
            vae=info,
            source=f"{source.description}, centre crop {encoding.size}",
            num_classes=source.num_classes,
            flip=encoding.flip,
            class_names=source.class_names,
        )
        settings = {key: value for key, value in asdict(encoding).items() if key != "batch_size"}
        images = {"images": source.digest(), "count": len(source.names)}
        precision = str(vae.dtype).removeprefix("torch.")
        self.fingerprint = {**images, **settings, "vae": vae_hash(vae), "precision": precision}

    def images_of(self, number: int) -> range:
        """The numbers of the images that shard `number` is made of."""
        first = number * self.images_a_shard
        return range(first, min(first + self.images_a_shard, len(self.source.names)))

    def produce(self, number: int) -> Produced:
        """Encodes the images of shard `number`; those that can't be used are named in `skipped`."""
        skipped: dict[str, str] = {}
        moments, labels = [], []
        for images, kept in self._batches(self.images_of(number), skipped):
            moments.append(self._encode(images))
            labels.append(np.repeat(self.source.labels[kept], 2 if self.encoding.flip else 1))
        if not moments:
            return Produced(np.empty((0, *self.template.shape), self.encoding.dtype), np.empty(0, np.int64), skipped)
        return Produced(np.concatenate(moments), np.concatenate(labels), skipped)

    def _encode(self, images: Tensor) -> np.ndarray:
        """uint8 (n, C, S, S) → moments (n or 2n, 2C, h, w); with flips, image i gives records 2i and 2i + 1."""
        if self.encoding.flip:
            images = torch.stack((images, images.flip(-1)), dim=1).flatten(0, 1)
        moments = encode_moments(self.vae, images).cpu()
        return moments.to(getattr(torch, self.encoding.dtype)).numpy()

    def _batches(self, numbers: range, skipped: dict[str, str]) -> Iterator[tuple[Tensor, list[int]]]:
        """Decoded images with their numbers, one batch ahead of the VAE."""
        size = self.encoding.batch_size
        parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        with ThreadPoolExecutor(max(2, usable_cpus()), "st_fast images") as pool:
            ahead = [pool.submit(self._load, number) for number in parts[0]] if parts else []
            for part, following in zip(parts, [*parts[1:], range(0)], strict=True):
                now, ahead = ahead, [pool.submit(self._load, number) for number in following]
                images, kept = [], []
                for number, future in zip(part, now, strict=True):
                    pixels = future.result()
                    if isinstance(pixels, str):
                        skipped[self.source.names[number]] = pixels
                        tqdm.write(f"skipped: {self.source.names[number]!a}: {pixels}")
                    else:
                        images.append(torch.from_numpy(pixels))
                        kept.append(number)
                if images:
                    yield torch.stack(images), kept
                self.progress(len(part))

    def _load(self, number: int) -> np.ndarray | str:
        """Image `number` as uint8 (C, S, S), or why it can't be used."""
        try:
            return load_image(self.source.read(number), self.encoding.size, self.channels)
        except BadImage as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)
